"""One night: screen what is new or changed, write the report, raise an alert where something is wrong, tidy up.

python jobs/nightly.py --archive URI --ledger URI --model REF [--alert-url-file FILE]
ray job submit --submission-id screen-20261123 --working-dir . -- python jobs/nightly.py ...

The night is today's date in --time-zone. A night that is done is marked by LEDGER/_nightly/DATE.json, and started again
does nothing. Exit codes are those of jobs/screen.py. An alert is a log line that begins with ALERT and, with
--alert-url-file, a POST of the same as JSON; it holds counts and dates, nothing of any study.

Research use only, not a medical device.
"""

import argparse
import json
import logging
import subprocess
import sys
import urllib.request
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import report
from cluster import parser, place, start_logging

from covtanet import storage
from covtanet.errors import ConfigError
from covtanet.report.worklist import summary
from covtanet.screening import ledger, view

logger = logging.getLogger("covtanet.nightly")

MARKS = "_nightly"
ALERT_TIMEOUT_S = 20
REFUSED_TO_START, COMMITTED, TOO_MANY = 3, 0, 4


def parse() -> argparse.Namespace:
    """Read the command line."""
    options = parser(__doc__)
    options.add_argument("--archive", required=True, help="folder or s3:// prefix with the CT")
    options.add_argument("--ledger", required=True, help="folder or s3:// prefix for the ledger")
    options.add_argument("--model", required=True, help="models:/NAME@ALIAS, models:/NAME/VERSION, path or URI")
    options.add_argument("--config", type=Path, help="TOML file with a [screening] table")
    options.add_argument("--night", type=date.fromisoformat, help="YYYY-MM-DD; default: today in --time-zone")
    options.add_argument("--time-zone", type=ZoneInfo, default=ZoneInfo("UTC"), help="default UTC")
    options.add_argument("--max-rejected", default="0.5", help="share of refused series from which to alert")
    options.add_argument("--max-failed", default="0.05", help="share of failed series from which to alert")
    options.add_argument("--alert-url-file", type=Path, help="file with the URL that alerts are sent to, a secret")
    options.add_argument("--keep-days", type=int, default=30, help="how long to keep work of runs that never ended")
    return options.parse_args()


def main() -> int:
    """Run the night."""
    arguments = parse()
    start_logging()
    night = arguments.night or datetime.now(arguments.time_zone).date()
    try:
        return run(arguments, night, place(arguments.ledger, "--ledger"))
    except ConfigError as error:
        logger.error("%s", error)
        return REFUSED_TO_START


def run(arguments: argparse.Namespace, night: date, ledger_uri: str) -> int:
    """Screen, report, alert, tidy up, and mark the night as done where it is."""
    mark = storage.join(ledger_uri, MARKS, f"{night.isoformat()}.json")
    if storage.exists(mark):
        logger.info("the night of %s is done; nothing to do", night)
        return 0
    missing = missing_before(ledger_uri, night)
    if missing is not None:
        alert(arguments.alert_url_file, {"alert": "missing_run", "night": missing.isoformat()})
    code = screen(arguments, night, ledger_uri)
    found: dict[str, Any] = {"night": night.isoformat(), "exit_code": code}
    if code in (COMMITTED, TOO_MANY):
        run_id = named_run(ledger_uri, night)
        found |= {"run_id": run_id, "report": report.write_report(ledger_uri, run_id, "")}
        counted = summary(view.read(view.file_of(ledger_uri, run_id)))
        found |= {name: counted[name] for name in ("series", "status", "reasons")}
    if code != COMMITTED:
        kind = "too_many_refused" if code == TOO_MANY else "screening_failed"
        shown = {name: value for name, value in found.items() if name != "report"}
        alert(arguments.alert_url_file, {"alert": kind, **shown})
    if code in (COMMITTED, TOO_MANY):
        prune(ledger_uri, night - timedelta(days=arguments.keep_days))
        storage.write_bytes(mark, json.dumps(found, indent=2).encode())
    logger.info("night of %s: exit code %d, %s", night, code, found.get("status", "no ledger"))
    return code


def screen(arguments: argparse.Namespace, night: date, ledger_uri: str) -> int:
    """The screening job, as a process of its own."""
    command = [
        sys.executable, str(Path(__file__).with_name("screen.py")), "--archive", arguments.archive,
        "--ledger", ledger_uri, "--model", arguments.model, "--results", storage.join(ledger_uri, "_results"),
        "--since", "last", "--run-date", night.isoformat(), "--batch", batch_of(night),
        "--max-rejected", arguments.max_rejected, "--max-failed", arguments.max_failed,
    ]  # fmt: skip
    if arguments.config:
        command += ["--config", str(arguments.config)]
    return subprocess.run(command, check=False).returncode


def batch_of(night: date) -> str:
    """The name by which the night's run is found again."""
    return f"nightly-{night.isoformat()}"


def named_run(ledger_uri: str, night: date) -> str:
    """The id of the night's run."""
    found = ledger.run_of_batch(ledger_uri, batch_of(night))
    if found is None:
        raise ConfigError("the night's run has left no name")
    return found.run_id


def missing_before(ledger_uri: str, night: date) -> date | None:
    """The day before, where nights were screened before it and it was not."""
    done = sorted(name.removesuffix(".json") for name in storage.list_names(storage.join(ledger_uri, MARKS)))
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
        if not url.startswith(("https://", "http://127.0.0.1:")):
            raise ConfigError("the alert URL is neither https:// nor on this machine")
        request = urllib.request.Request(url, text.encode(), {"Content-Type": "application/json"})
        urllib.request.urlopen(request, timeout=ALERT_TIMEOUT_S).close()
    except (OSError, ValueError) as error:
        logger.error("the alert could not be sent: %s", type(error).__name__)


def prune(ledger_uri: str, before: date) -> None:
    """Remove the work of runs that began before a day and were never committed; their rows can be made again."""
    root = storage.join(ledger_uri, ledger.WORK)
    for known in ledger.known_runs(ledger_uri, root):
        begun = datetime.fromisoformat(known.description["begun_at"]).astimezone(UTC).date()
        if not known.is_committed and begun < before:
            storage.delete_folder(storage.join(root, known.run_id))
            logger.info("removed the work of run %s, begun on %s and never committed", known.run_id, begun)


if __name__ == "__main__":
    sys.exit(main())
