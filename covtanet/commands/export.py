"""Write a run's results as DICOM: segmentation, structured report and key images of every series.

covtanet export --ledger URI [--run RUN_ID] [--results URI] [--series SERIES_KEY ...] [--to SERVER]

The run must have kept results (covtanet screen --results), and its archive must not have changed or
moved: a series that differs from the screened one is refused, by the digest of its content. Written
beside the results: RESULTS/RUN_ID/SERIES_KEY/lesion.seg.dcm (segments lesion and lung),
measurements.sr.dcm (TID 1500) and key-01.sc.dcm to at most key-12.sc.dcm (Secondary Capture: the
slices with most lesion, or a few slices of a series without). Objects that are there are left
alone. Attributes that the source lacks, as after de-identification, are empty in them. NIfTI and
Enhanced multi-frame CT are not exported.

--to dicomweb+https://HOST/PATH sends them to that server by STOW-RS, one request for each series;
its credentials come from the environment (COVTANET_DICOMWEB_USER and others). Objects that the
server holds are not sent again.

Every series has an outcome, and the last line counts them: written, there already, with --to sent
or sent already, a reason of docs/input.md, or

enhanced_multi_frame  not exported, see above
no_masks              the run kept no masks of the series
vanished, changed     the series is gone, or another than was screened
hidden                the ledger hides the location of the series (deidentify = true)
refused               the server stored not all objects; the log names them and its reasons (PS3.18)
storage               an object could not be read, written or sent, after retries
worker_died           the series ended its worker, twice
internal_error        a fault of this software; type and location are in the log

Exit codes:

0  all written and sent, now or before
1  storage, the server, Ray or this software failed; the same command continues
2  wrong arguments
3  refused to start, or nothing to export
4  some could not be exported or sent, the others are

Research use only, not a medical device.
"""

import argparse
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import ray

from covtanet import storage
from covtanet.errors import ConfigError, Reason
from covtanet.ledger.read import committed_files, find_run_file, read_run
from covtanet.report.export import (
    THERE_ALREADY,
    WRITTEN,
    export_series,
)
from covtanet.report.exportable import exportable_rows
from covtanet.report.outcomes import outcome_of
from covtanet.report.sending import SENT, SENT_ALREADY
from covtanet.runtime import ExitCode, connect, location, parser, run_command
from covtanet.shared_folders import check_shared
from covtanet.storage import dicomweb

logger = logging.getLogger(__name__)

DONE = {WRITTEN, THERE_ALREADY, SENT, SENT_ALREADY}
# Two, so that a CPU has the next series when it has finished one.
SERIES_PER_CPU = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run_command(export, parse(argv))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    options = parser(__doc__, "export")
    add = options.add_argument
    add("--ledger", required=True, help="folder or s3:// prefix of the ledger")
    add("--run", default="", help="run id; default: the newest committed run")
    add("--results", default="", help="location of the run's results; default: LEDGER/_results")
    add("--to", default="", help="dicomweb+https://HOST/PATH that the objects are sent to")
    add("--series", action="append", default=[], help="series key; default: every DICOM series")
    return options.parse_args(argv)


def export(arguments: argparse.Namespace) -> int:
    """Export the series that were asked for."""
    ledger = location(arguments.ledger, "--ledger")
    results = storage.join(ledger, "_results")
    if arguments.results:
        results = location(arguments.results, "--results")
    server = dicomweb.server_root(arguments.to) if arguments.to else ""
    rows = chosen_rows(ledger, arguments.run, arguments.series)
    connect()
    check_shared(written={"--results": results}, read={})
    return report_outcomes(export_all(rows, results, server))


def chosen_rows(ledger: str, run_id: str, keys: list[str]) -> list[dict[str, Any]]:
    """Return the screened DICOM series of a run.

    Raises:
        ConfigError: there are none.
    """
    committed = committed_files(ledger)
    if not committed:
        raise ConfigError("no run is committed in this ledger")
    uri = find_run_file(ledger, run_id) if run_id else committed[-1]
    rows = exportable_rows(read_run(uri).to_pylist(), keys)
    if not rows:
        raise ConfigError("this run has no screened DICOM series of those asked for")
    return rows


def export_all(
    rows: Sequence[dict[str, Any]], results: str, server: str = ""
) -> Iterator[dict[str, Any]]:
    """Yield the outcome of every row as it ends.

    Tasks, not a plan of Ray Data, whose worker deaths name no row: here a series that ends its
    worker twice has an outcome.

    Raises:
        OSError, RayError: an error that concerns every series.
    """
    task = ray.remote(num_cpus=1, max_retries=1)(export_series)
    max_running = SERIES_PER_CPU * max(1, int(ray.cluster_resources().get("CPU", 0)))
    remaining = iter(rows)
    running: dict[Any, str] = {}
    while True:
        for row in islice(remaining, max_running - len(running)):
            running[task.remote(row, results, server)] = row["series_key"]
        if not running:
            return
        (ended,), _ = ray.wait(list(running), num_returns=1)
        series_key = running.pop(ended)
        try:
            yield ray.get(ended)
        except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError):
            yield outcome_of(series_key, Reason.WORKER_DIED)


def report_outcomes(outcomes: Iterable[dict[str, Any]]) -> int:
    """Log every series that was not exported and the counts; return the exit code."""
    counts: Counter[str] = Counter()
    for row in outcomes:
        outcome = row["outcome"]
        counts[outcome] += 1
        if outcome not in DONE:
            _warn(row["series_key"], outcome, row["detail"])
    logger.info("%s", ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())))
    return ExitCode.DONE if set(counts) <= DONE else ExitCode.BELOW_BOUND


def _warn(series_key: str, outcome: str, detail: str) -> None:
    extra = {"series_key": series_key, "reason": outcome}
    suffix = f", {detail}" if detail else ""
    logger.warning("series %s: %s%s", series_key, outcome, suffix, extra=extra)
