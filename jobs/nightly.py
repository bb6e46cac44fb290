"""One night: screen what is new or changed, raise an alert if something is wrong, write the report, tidy up.

python jobs/nightly.py --archive URI --ledger URI --model REF [--alert-url-file FILE]
python jobs/nightly.py --ledger URI --night DATE --acknowledge "why"
ray job submit --submission-id screen-20261123 --working-dir . -- python jobs/nightly.py ...

The night is today's date in --time-zone. A night whose ledger is committed is marked by LEDGER/_nightly/DATE.json with
its exit code; started again it does nothing and ends with that code, until a person acknowledges it. Exit codes are
those of jobs/screen.py. Each start that ends otherwise than with 0 raises one alert: a log line that begins with ALERT
and, with --alert-url-file, a POST of the same as JSON; it holds counts and dates, nothing of any study.

Research use only, not a medical device.
"""

import argparse
import getpass
import json
import logging
import os
import subprocess
import sys
import urllib.request
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from http.client import HTTPException, HTTPMessage
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo

import report
from cluster import parser, place, start_logging

from covtanet import storage
from covtanet.errors import ConfigError, error_location
from covtanet.ledger.batch import run_of_batch
from covtanet.ledger.read import account_run, committed_files, find_run_file, read_run
from covtanet.ledger.run import WORK, KnownRun, known_runs
from covtanet.report.worklist import summary

logger = logging.getLogger("covtanet.nightly")

MARKS = "_nightly"
ALERT_TIMEOUT_S = 20
COMMITTED, FAILED, REFUSED_TO_START, TOO_MANY = 0, 1, 3, 4
SCREENING_CODES = (0, 1, 2, 3, 4, 5)
COUNTS = ("series", "status", "reasons")


def parse() -> argparse.Namespace:
    """Read the command line."""
    options = parser(__doc__)
    options.add_argument("--archive", help="folder or s3:// prefix with the CT")
    options.add_argument("--ledger", required=True, help="folder or s3:// prefix for the ledger")
    options.add_argument("--model", help="models:/NAME@ALIAS, models:/NAME/VERSION, path or URI")
    options.add_argument("--config", type=Path, help="TOML file with a [screening] table")
    options.add_argument(
        "--night", type=date.fromisoformat, help="YYYY-MM-DD; default: today in --time-zone"
    )
    options.add_argument("--time-zone", type=ZoneInfo, default=ZoneInfo("UTC"), help="default UTC")
    options.add_argument(
        "--max-rejected", default="0.5", help="share of refused series from which to alert"
    )
    options.add_argument(
        "--max-failed", default="0.05", help="share of failed series from which to alert"
    )
    options.add_argument(
        "--site-key", type=Path, help="file with the secret of the pseudonyms (deidentify = true)"
    )
    options.add_argument(
        "--linkage",
        default="",
        help="folder or s3:// prefix for what names a study (deidentify = true)",
    )
    options.add_argument(
        "--alert-url-file", type=Path, help="file with the URL that alerts are sent to, a secret"
    )
    options.add_argument(
        "--keep-days", type=int, default=30, help="how long to keep work of runs that never ended"
    )
    options.add_argument(
        "--keep-results-days",
        type=int,
        default=0,
        help="how long to keep masks and previews; default: for ever",
    )
    options.add_argument(
        "--acknowledge",
        metavar="WHY",
        default="",
        help="note that a person has seen the night's alert; then stop",
    )
    arguments = options.parse_args()
    if not arguments.acknowledge and not (arguments.archive and arguments.model):
        options.error("--archive and --model are needed, unless a night is acknowledged")
    if arguments.keep_days < 1:
        options.error("--keep-days must be at least 1: work of today's runs is under way")
    if arguments.keep_results_days < 0:
        options.error("--keep-results-days must be at least 0")
    return arguments


def main() -> int:
    """Run the night."""
    arguments = parse()
    start_logging()
    night = arguments.night or datetime.now(arguments.time_zone).date()
    return watched(arguments, night)


@dataclass
class Watch:
    """Content of one start's alert, and whether it was raised."""

    url_file: Path | None
    about: dict[str, Any] = field(default_factory=dict)
    has_alerted: bool = False

    def alert(self, kind: str) -> None:
        """Raise this start's alert, once."""
        if not self.has_alerted:
            self.has_alerted = True
            alert(self.url_file, {"alert": kind, **self.about})


def watched(arguments: argparse.Namespace, night: date) -> int:
    """Run the night, or acknowledge it; every way out other than 0 raises an alert."""
    watch = Watch(arguments.alert_url_file, {"night": night.isoformat()})
    code = FAILED
    try:
        ledger_uri = place(arguments.ledger, "--ledger")
        if arguments.acknowledge:
            code = acknowledge(ledger_uri, night, arguments.acknowledge)
        else:
            code = run(arguments, night, ledger_uri, watch)
    except ConfigError as error:
        logger.error("%s", error)
        code = REFUSED_TO_START
    except OSError as error:  # its text may name a place
        logger.error("storage: %s; the same command continues", type(error).__name__)
        watch.about["error"] = type(error).__name__
    except Exception as error:  # its text may quote a ledger
        logger.error("a fault of this software, %s", error_location(error))
        watch.about["error"] = type(error).__name__
    finally:
        if code != COMMITTED:
            watch.alert("night_failed")
    return code


def run(arguments: argparse.Namespace, night: date, ledger_uri: str, watch: Watch) -> int:
    """Screen, alert, report, tidy up, and mark the night as done if its ledger is committed."""
    mark = mark_of(ledger_uri, night)
    if storage.exists(mark):
        return marked(json.loads(storage.read_bytes(mark)), night, watch)
    missing = missing_before(ledger_uri, night)
    if missing is not None:
        alert(arguments.alert_url_file, {"alert": "missing_run", "night": missing.isoformat()})
    code = screen(arguments, night, ledger_uri)
    found: dict[str, Any] = {"night": night.isoformat(), "exit_code": code}
    watch.about["exit_code"] = code
    run_id = judged_run(ledger_uri, night, code)
    if run_id:
        counted = summary(read_run(find_run_file(ledger_uri, run_id)))
        found |= {"run_id": run_id, **{name: counted[name] for name in COUNTS}}
        watch.about |= found
    if code != COMMITTED:  # before the report and tidying up, which may fail in turn
        watch.alert(kind_of(found))
    if run_id:
        try:
            found["report"] = report.write_report(ledger_uri, run_id, "")
            prune(arguments, night, ledger_uri)
            storage.write_bytes(mark, json.dumps(found, indent=2).encode())
        except (OSError, ConfigError) as error:
            logger.error(
                "report, tidying up or mark: %s; the same command continues", type(error).__name__
            )
            watch.about["error"] = type(error).__name__
            code = code or FAILED
    logger.info("night of %s: exit code %d, %s", night, code, found.get("status", "no ledger"))
    return code


def marked(found: dict[str, Any], night: date, watch: Watch) -> int:
    """The exit code of a night that is done: a committed ledger does not change, so only a person turns it to 0."""
    code = int(found.get("exit_code", FAILED))
    if code == COMMITTED or found.get("acknowledged"):
        logger.info("the night of %s is done; nothing to do", night)
        return COMMITTED
    logger.error(
        "the night of %s is done, but ended with %d; see docs/runbook.md, --acknowledge",
        night,
        code,
    )
    watch.about |= {name: found[name] for name in ("exit_code", "run_id", *COUNTS) if name in found}
    watch.alert(kind_of(found))
    return code


def acknowledge(ledger_uri: str, night: date, why: str) -> int:
    """Write into a night's mark the person who has seen its alert, and the reason why it counts as done.

    Raises:
        ConfigError: the night has no mark, so that there is nothing to acknowledge.
    """
    mark = mark_of(ledger_uri, night)
    if not storage.exists(mark):
        raise ConfigError(f"the night of {night} has no mark: it has not ended yet, start it again")
    noted = {"who": user(), "why": why, "at": datetime.now(UTC).isoformat()}
    found = {**json.loads(storage.read_bytes(mark)), "acknowledged": noted}
    storage.write_bytes(mark, json.dumps(found, indent=2).encode())
    logger.info("the night of %s is acknowledged by %s", night, noted["who"])
    return COMMITTED


def user() -> str:
    """Name of the user of this process, or its number if the machine knows no name."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def mark_of(ledger_uri: str, night: date) -> str:
    """The place of a night's mark."""
    return storage.join(ledger_uri, MARKS, f"{night.isoformat()}.json")


def kind_of(found: dict[str, Any]) -> str:
    """The kind of alert of an exit code."""
    if found["exit_code"] == TOO_MANY:
        return "too_many_refused"
    return "internal_errors" if found.get("run_id") else "screening_failed"


def judged_run(ledger_uri: str, night: date, code: int) -> str:
    """The id of the night's committed run if the exit code is a judgement of its ledger, else empty.

    1 is one if series met a fault of this software; else the job itself failed, and starting it again may mend it.
    """
    if code in (COMMITTED, TOO_MANY):
        return named_run(ledger_uri, night)
    found = run_of_batch(ledger_uri, batch_of(night)) if code == FAILED else None
    if found is None or not storage.exists(found.committed_uri(ledger_uri)):
        return ""
    counts = account_run(found.committed_uri(ledger_uri))
    return found.run_id if counts.failures["internal_error"] else ""


def screen(arguments: argparse.Namespace, night: date, ledger_uri: str) -> int:
    """The screening job, as a process of its own."""
    command = [
        sys.executable, str(Path(__file__).with_name("screen.py")), "--archive", arguments.archive,
        "--ledger", ledger_uri, "--model", arguments.model, "--results", storage.join(ledger_uri, "_results"),
        "--since", "last", "--run-date", night.isoformat(), "--batch", batch_of(night),
        "--max-rejected", arguments.max_rejected, "--max-failed", arguments.max_failed,
    ]  # fmt: skip
    for name in ("config", "site_key", "linkage"):
        if value := getattr(arguments, name):
            command += [f"--{name.replace('_', '-')}", str(value)]
    code = subprocess.run(command, check=False).returncode
    return code if code in SCREENING_CODES else FAILED  # one that was killed has a negative one


def batch_of(night: date) -> str:
    """The name by which the night's run is found again."""
    return f"nightly-{night.isoformat()}"


def named_run(ledger_uri: str, night: date) -> str:
    """The id of the night's run."""
    found = run_of_batch(ledger_uri, batch_of(night))
    if found is None:
        raise ConfigError("the night's run has left no name")
    return found.run_id


def missing_before(ledger_uri: str, night: date) -> date | None:
    """The day before, where nights were screened before it and it was not."""
    done = sorted(
        name.removesuffix(".json") for name in storage.list_names(storage.join(ledger_uri, MARKS))
    )
    before = night - timedelta(days=1)
    earlier = [name for name in done if name < night.isoformat()]
    return before if earlier and earlier[-1] != before.isoformat() else None


def alert(url_file: Path | None, what: dict[str, Any]) -> None:
    """Tell the log, and whoever listens at the URL; one that does not listen does not end the night."""
    text = json.dumps(what, sort_keys=True)
    logger.error("ALERT %s", text)
    if url_file is None:
        return
    try:
        url = url_file.read_text().strip()
        check_alert_url(url)
        request = urllib.request.Request(url, text.encode(), {"Content-Type": "application/json"})
        opener = urllib.request.build_opener(NoRedirect)
        opener.open(request, timeout=ALERT_TIMEOUT_S).close()
    except (OSError, ValueError, HTTPException, ConfigError) as error:
        logger.error("the alert could not be sent: %s", type(error).__name__)


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follow no redirect: only the configured URL gets the alert."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: HTTPMessage,
        newurl: str,
    ) -> None:
        """Make no other request, so that the redirect is the error that it is."""
        return


def check_alert_url(url: str) -> None:
    """Refuse a URL that would send alerts in clear text beyond this machine, or with a user in it.

    Raises:
        ConfigError: for either.
        ValueError: the text cannot be parsed as a URL.
    """
    parts = urlsplit(url)
    is_local = parts.scheme == "http" and parts.hostname in ("127.0.0.1", "localhost")
    if not (is_local or parts.scheme == "https") or "@" in parts.netloc or not parts.hostname:
        raise ConfigError("the alert URL is neither https:// nor on this machine, or names a user")


def prune(arguments: argparse.Namespace, night: date, ledger_uri: str) -> None:
    """Remove old files: work that was never committed, listings but the last, old results."""
    linkage = place(arguments.linkage, "--linkage") if arguments.linkage else ""
    roots = [storage.join(each, WORK) for each in (ledger_uri, linkage) if each]
    for root in roots:
        runs = known_runs(ledger_uri, root)
        prune_work(root, runs, night - timedelta(days=arguments.keep_days))
        prune_listings(root, runs)
    if arguments.keep_results_days:
        prune_results(ledger_uri, night - timedelta(days=arguments.keep_results_days))


def prune_work(root: str, runs: list[KnownRun], before: date) -> None:
    """Remove the work of runs that began before a day and were never committed; their rows can be made again."""
    for known in runs:
        if not known.is_committed and known.begun_on < before:
            storage.delete_folder(storage.join(root, known.run_id))
            logger.info(
                "removed the work of run %s, begun on %s and never committed",
                known.run_id,
                known.begun_on,
            )


def prune_listings(root: str, runs: list[KnownRun]) -> None:
    """Keep the listing of folders of the last run that listed all, for each archive and name of a model."""
    whole = [known for known in runs if known.is_committed and not known.description.get("limit")]
    last = {known.listing_of: known.run_id for known in whole if not known.is_ahead}
    for known in whole:
        if known.run_id not in last.values():
            storage.delete(storage.join(root, known.run_id, "folders.parquet"))


def prune_results(ledger_uri: str, before: date) -> None:
    """Remove masks and previews of committed runs of before a day."""
    kept = set(storage.list_names(storage.join(ledger_uri, "_results")))
    for uri in committed_files(ledger_uri):
        day, name = uri.rsplit("/", 2)[-2:]
        run_id = name.removesuffix(".parquet")
        if run_id in kept and day.removeprefix("date=") < before.isoformat():
            storage.delete_folder(storage.join(ledger_uri, "_results", run_id))
            logger.info(
                "removed masks and previews of run %s of %s", run_id, day.removeprefix("date=")
            )


if __name__ == "__main__":
    sys.exit(main())
