"""One night: screen new and changed series, alert if something is wrong, report, remove old files.

covtanet nightly --archive URI --ledger URI --model REF [--alert-url-file FILE] [--export-to SERVER]
covtanet nightly --ledger URI --night DATE --acknowledge "why"
ray job submit --submission-id screen-20261123 --working-dir . -- python jobs/nightly.py ...

The night is today's date in --time-zone. A night whose ledger is committed is marked by
LEDGER/_nightly/DATE.json with its exit code; started again it does nothing and ends with that
code, until a person acknowledges it. Exit codes are those of covtanet screen, but with a bound of
half the series for rejected ones (--max-rejected 0.5; screen alone has 1.0). Each start that ends
otherwise than with 0 raises one alert: a log line that begins with ALERT and, with
--alert-url-file, a POST of the same as JSON; it holds counts and dates, nothing of any study.

--export-to dicomweb+https://HOST/PATH sends the results of a committed night as covtanet export
does. An export that fails raises the alert export_failed, and every later start, of this night or
another, tries it again without screening again, until the night is acknowledged.

Research use only, not a medical device.
"""

import argparse
import getpass
import json
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

from covtanet import storage
from covtanet.alerts import send_alert
from covtanet.commands.night_exports import drop_export, export_nights, note_export
from covtanet.errors import ConfigError, Reason, error_location
from covtanet.ledger.batch import run_of_batch
from covtanet.ledger.read import account_run, find_run_file, read_run
from covtanet.ledger.retention import (
    RESULTS,
    remove_abandoned_work,
    remove_old_listings,
    remove_old_results,
)
from covtanet.ledger.run import WORK, known_runs
from covtanet.report.night_report import write_report
from covtanet.report.worklist import summary
from covtanet.runtime import ExitCode, location, parser, start_logging
from covtanet.storage import dicomweb

logger = logging.getLogger(__name__)

MARKS = "_nightly"
COUNTS = ("series", "status", "reasons")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the night."""
    arguments = parse(argv)
    start_logging()
    night = arguments.night or datetime.now(arguments.time_zone).date()
    return run_watched(arguments, night)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    options = parser(__doc__, "nightly")
    add = options.add_argument
    add("--archive", help="folder or s3:// prefix with the CT")
    add("--ledger", required=True, help="folder or s3:// prefix for the ledger")
    add("--model", help="models:/NAME@ALIAS, models:/NAME/VERSION, path or URI")
    add("--config", type=Path, help="TOML file with a [screening] table")
    add("--night", type=date.fromisoformat, help="YYYY-MM-DD; default: today in --time-zone")
    add("--time-zone", type=ZoneInfo, default=ZoneInfo("UTC"), help="default UTC")
    add("--max-rejected", default="0.5", help="share of rejected series from which to alert")
    add("--max-failed", default="0.05", help="share of failed series from which to alert")
    add("--site-key", type=Path, help="file with the secret of the pseudonyms (deidentify = true)")
    add("--linkage", default="", help="folder or s3:// prefix for identities (deidentify = true)")
    add("--alert-url-file", type=Path, help="file with the URL that alerts are sent to, a secret")
    add("--export-to", default="", help="dicomweb+https://HOST/PATH that results are sent to")
    add(
        "--keep-days",
        type=int,
        default=30,
        help="days to keep the work of runs that never ended",
    )
    add(
        "--keep-results-days",
        type=int,
        default=0,
        help="days to keep masks and previews; default: for ever",
    )
    add(
        "--acknowledge",
        metavar="WHY",
        default="",
        help="note that a person has seen the night's alert; then stop",
    )
    arguments = options.parse_args(argv)
    if not arguments.acknowledge and not (arguments.archive and arguments.model):
        options.error("--archive and --model are needed, unless a night is acknowledged")
    if arguments.export_to and arguments.site_key:
        options.error("--export-to needs the locations of the series, which --site-key hides")
    if arguments.keep_days < 1:
        options.error("--keep-days must be at least 1: work of today's runs is under way")
    if arguments.keep_results_days < 0:
        options.error("--keep-results-days must be at least 0")
    return arguments


@dataclass
class Watch:
    """The alert of one start, and whether it was raised."""

    url_file: Path | None
    content: dict[str, Any] = field(default_factory=dict)
    has_alerted: bool = False

    def alert(self, kind: str) -> None:
        """Raise the alert, once."""
        if not self.has_alerted:
            self.has_alerted = True
            send_alert(self.url_file, {"alert": kind, **self.content})


def run_watched(arguments: argparse.Namespace, night: date) -> int:
    """Run the night, or acknowledge it; every end with another code than 0 raises an alert."""
    watch = Watch(arguments.alert_url_file, {"night": night.isoformat()})
    code: int = ExitCode.ERROR
    try:
        ledger = location(arguments.ledger, "--ledger")
        if arguments.acknowledge:
            code = acknowledge(ledger, night, arguments.acknowledge)
        else:
            code = run(arguments, night, ledger, watch)
    except ConfigError as error:
        logger.error("%s", error)
        code = ExitCode.REFUSED
    except OSError as error:  # its text may name a location
        logger.error("storage: %s; the same command continues", type(error).__name__)
        watch.content["error"] = type(error).__name__
    except Exception as error:  # its text may quote a ledger
        logger.error("internal error, %s", error_location(error))
        watch.content["error"] = type(error).__name__
    finally:
        if code != ExitCode.DONE:
            watch.alert("night_failed")
    return code


def run(arguments: argparse.Namespace, night: date, ledger: str, watch: Watch) -> int:
    """Screen the night unless it is marked, then export what is still to be exported."""
    server = dicomweb.server_root(arguments.export_to) if arguments.export_to else ""
    code = run_unless_marked(arguments, night, ledger, watch)
    if server and export_nights(ledger, server, run_process) != ExitCode.DONE:
        watch.alert("export_failed")
        return code or ExitCode.ERROR
    return code


def run_unless_marked(arguments: argparse.Namespace, night: date, ledger: str, watch: Watch) -> int:
    """Screen, alert, report, remove old files, and mark the night if its ledger is committed."""
    mark_uri = uri_of_mark(ledger, night)
    if storage.exists(mark_uri):
        return code_of_marked(json.loads(storage.read_bytes(mark_uri)), night, watch)
    missing = missing_night(ledger, night)
    if missing is not None:
        content = {"alert": "missing_run", "night": missing.isoformat()}
        send_alert(arguments.alert_url_file, content)
    code = screen(arguments, night, ledger)
    mark: dict[str, Any] = {"night": night.isoformat(), "exit_code": code}
    watch.content["exit_code"] = code
    run_id = judged_run(ledger, night, code)
    if run_id:
        counts = summary(read_run(find_run_file(ledger, run_id)))
        mark |= {"run_id": run_id, **{name: counts[name] for name in COUNTS}}
        watch.content |= mark
    if code != ExitCode.DONE:  # before the steps that may fail in turn
        watch.alert(kind_of_alert(mark))
    if run_id:
        code = finish(arguments, night, ledger, mark, watch)
    logger.info("night of %s: exit code %d, %s", night, code, mark.get("status", "no ledger"))
    return code


def finish(
    arguments: argparse.Namespace, night: date, ledger: str, mark: dict[str, Any], watch: Watch
) -> int:
    """Write the report, remove old files and mark the night; return the night's exit code.

    The mark comes last: a night without it is finished by the next start.
    """
    code = int(mark["exit_code"])
    try:
        mark["report"] = write_report(ledger, mark["run_id"], "")
        remove_old_files(arguments, night, ledger)
        if arguments.export_to:
            note_export(ledger, night, mark["run_id"])
        storage.write_bytes(uri_of_mark(ledger, night), json.dumps(mark, indent=2).encode())
    except (OSError, ConfigError) as error:
        kind = type(error).__name__
        logger.error("report, removal or mark: %s; the same command continues", kind)
        watch.content["error"] = kind
        return code or ExitCode.ERROR
    return code


def code_of_marked(mark: dict[str, Any], night: date, watch: Watch) -> int:
    """Return the exit code of a night that is done.

    A committed ledger does not change, so only a person turns its code to 0.
    """
    code = int(mark.get("exit_code", ExitCode.ERROR))
    if code == ExitCode.DONE or mark.get("acknowledged"):
        logger.info("the night of %s is done; nothing to do", night)
        return ExitCode.DONE
    logger.error(
        "the night of %s is done, but ended with %d; see docs/runbook.md, --acknowledge",
        night,
        code,
    )
    names = [name for name in ("exit_code", "run_id", *COUNTS) if name in mark]
    watch.content |= {name: mark[name] for name in names}
    watch.alert(kind_of_alert(mark))
    return code


def acknowledge(ledger: str, night: date, why: str) -> int:
    """Write into a night's mark the person who has seen its alert, and why it counts as done.

    Raises:
        ConfigError: the night has no mark, so that there is nothing to acknowledge.
    """
    mark_uri = uri_of_mark(ledger, night)
    if not storage.exists(mark_uri):
        raise ConfigError(f"the night of {night} has no mark: it has not ended yet, start it again")
    acknowledged = {"who": user(), "why": why, "at": datetime.now(UTC).isoformat()}
    mark = {**json.loads(storage.read_bytes(mark_uri)), "acknowledged": acknowledged}
    storage.write_bytes(mark_uri, json.dumps(mark, indent=2).encode())
    drop_export(ledger, night)
    logger.info("the night of %s is acknowledged by %s", night, acknowledged["who"])
    return ExitCode.DONE


def user() -> str:
    """Return the name of this process's user, or the number if the machine knows no name."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def uri_of_mark(ledger: str, night: date) -> str:
    """Return the URI of a night's mark."""
    return storage.join(ledger, MARKS, f"{night.isoformat()}.json")


def kind_of_alert(mark: dict[str, Any]) -> str:
    """Return the kind of alert that an exit code raises."""
    if mark["exit_code"] == ExitCode.BELOW_BOUND:
        return "too_many_refused"
    return "internal_errors" if mark.get("run_id") else "screening_failed"


def judged_run(ledger: str, night: date, code: int) -> str:
    """Return the id of the night's committed run if the exit code judges its ledger, else empty.

    1 does so if series met a fault of this software; else the job itself failed, and another start
    may finish it.
    """
    batch_run = run_of_batch(ledger, batch_of(night))
    if code in (ExitCode.DONE, ExitCode.BELOW_BOUND):
        if batch_run is None:
            raise ConfigError("the night's run has left no name")
        return batch_run.run_id
    if code != ExitCode.ERROR or batch_run is None:
        return ""
    if not storage.exists(batch_run.committed_uri(ledger)):
        return ""
    counts = account_run(batch_run.committed_uri(ledger))
    return batch_run.run_id if counts.failures[Reason.INTERNAL_ERROR] else ""


def screen(arguments: argparse.Namespace, night: date, ledger: str) -> int:
    """Run the screening as a process, whose end cannot take the alert with it."""
    command = [
        sys.executable, "-m", "covtanet", "screen", "--archive", arguments.archive,
        "--ledger", ledger, "--model", arguments.model, "--results", storage.join(ledger, RESULTS),
        "--since", "last", "--run-date", night.isoformat(), "--batch", batch_of(night),
        "--max-rejected", arguments.max_rejected, "--max-failed", arguments.max_failed,
    ]  # fmt: skip
    for name in ("config", "site_key", "linkage"):
        if value := getattr(arguments, name):
            command += [f"--{name.replace('_', '-')}", str(value)]
    return run_process(command)


def run_process(command: Sequence[str]) -> int:
    """Run a command of this package; return its exit code."""
    code = subprocess.run(command, check=False).returncode
    return code if code in tuple(ExitCode) else ExitCode.ERROR  # a killed process has another code


def batch_of(night: date) -> str:
    """Return the name by which the night's run is found again."""
    return f"nightly-{night.isoformat()}"


def missing_night(ledger: str, night: date) -> date | None:
    """Return the day before if nights were screened before it, but it was not."""
    names = storage.list_names(storage.join(ledger, MARKS))
    nights = sorted(name.removesuffix(".json") for name in names)
    earlier = [name for name in nights if name < night.isoformat()]
    day_before = night - timedelta(days=1)
    if earlier and earlier[-1] != day_before.isoformat():
        return day_before
    return None


def remove_old_files(arguments: argparse.Namespace, night: date, ledger: str) -> None:
    """Remove abandoned work, listings apart from the last, and old results."""
    linkage = location(arguments.linkage, "--linkage") if arguments.linkage else ""
    for root in filter(None, (ledger, linkage)):
        work_root = storage.join(root, WORK)
        runs = known_runs(ledger, work_root)
        remove_abandoned_work(work_root, runs, night - timedelta(days=arguments.keep_days))
        remove_old_listings(work_root, runs)
    if arguments.keep_results_days:
        remove_old_results(ledger, night - timedelta(days=arguments.keep_results_days))
