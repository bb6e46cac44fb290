"""Screen an archive of chest CT into a Parquet ledger, one row per series.

covtanet screen --archive URI --ledger URI --model REF
ray job submit --working-dir . -- python jobs/screen.py --archive URI --ledger URI --model REF

URIs are local paths or s3://BUCKET/PREFIX. The archive may also be a PACS that speaks DICOMweb:
dicomweb+https://HOST/PATH?StudyDate=20260101-20260131, with any attributes that it can search by;
docs/pacs.md says where its password comes from. REF is models:/NAME@ALIAS, models:/NAME/VERSION, or
the path or URI of a saved model. Started again, the same command continues the run. Exit codes:

0  committed, now or before, or nothing new; a run that was committed before is judged once more
1  storage, Ray or this software failed; the same command continues. If series met a fault of this
   software, the ledger is committed with them
2  wrong arguments
3  refused to start
4  committed, but more series were rejected or failed than --max-rejected and --max-failed allow, or
   all were rejected
5  another driver of this run committed first

Research use only, not a medical device.
"""

import argparse
import logging
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path

from covtanet import storage
from covtanet.config import load_screening
from covtanet.ledger.work import read_ignored, read_manifest
from covtanet.report.summary import ignored_line, plan_table, screening_table
from covtanet.runtime import (
    ExitCode,
    check_tracking,
    location,
    parser,
    run_command,
)
from covtanet.screening.job import Outcome, ScreeningJob, judge, run_screening

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run_command(screen, parse(argv))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    options = parser(__doc__, "screen")
    add = options.add_argument
    add("--archive", required=True, help="folder, s3:// prefix or DICOMweb server with the CT")
    add("--ledger", required=True, help="folder or s3:// prefix for the ledger")
    add("--model", required=True, help="models:/NAME@ALIAS, models:/NAME/VERSION, path or URI")
    add(
        "--run-date",
        type=date.fromisoformat,
        help="YYYY-MM-DD; default: the unfinished run's, or today",
    )
    add(
        "--results", default="", help="folder or s3:// prefix for masks and previews; default: none"
    )
    add("--limit", type=int, default=0, help="screen only the first N series; default: all")
    add("--group-by", choices=("folder", "uid"), help="scope in which DICOM objects form a series")
    add(
        "--accurate",
        action="store_true",
        help="mean of four flips of every slice; the network takes four times as long",
    )
    add("--config", type=Path, help="TOML file with a [screening] table")
    add(
        "--since",
        choices=("last",),
        help="last: only series that are new, changed or failed since earlier runs",
    )
    add(
        "--max-rejected",
        type=share,
        default=1.0,
        help="largest share of rejected series for exit code 0; default 1.0",
    )
    add(
        "--max-failed",
        type=share,
        default=0.05,
        help="largest share of failed series for exit code 0; default 0.05",
    )
    add("--site-key", type=Path, help="file with the secret of the pseudonyms (deidentify = true)")
    add("--linkage", default="", help="folder or s3:// prefix for identities (deidentify = true)")
    add("--batch", default="", help="name under which the endpoint finds this run")
    add("--plan", action="store_true", help="freeze the manifest, print the plan, stop")
    arguments = options.parse_args(argv)
    if arguments.limit < 0:
        options.error("--limit must be at least 0")
    return arguments


def share(text: str) -> float:
    """Return a share between 0 and 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise ValueError("expected a share between 0 and 1")
    return value


def screen(arguments: argparse.Namespace) -> int:
    """Screen, print the summary and judge the run."""
    check_tracking()
    outcome = run_screening(make_job(arguments), plan_only=arguments.plan)
    if outcome.plan is not None:
        print(plan_table(outcome.run, outcome.plan, read_manifest(outcome.run)))
        return ExitCode.DONE
    assert outcome.accounting is not None
    if outcome.is_new:
        print_summary(outcome)
    return judge(outcome.accounting, arguments.max_rejected, arguments.max_failed)


def make_job(arguments: argparse.Namespace) -> ScreeningJob:
    """Return the screening that the arguments ask for.

    Raises:
        ConfigError: a location or the configuration does not allow it.
    """
    root, filters = storage.split_query(arguments.archive)
    archive = location(root, "--archive")
    ledger = location(arguments.ledger, "--ledger")
    results = location(arguments.results, "--results") if arguments.results else ""
    linkage = location(arguments.linkage, "--linkage") if arguments.linkage else ""
    is_registered = arguments.model.startswith("models:")
    config = load_screening(arguments.config)
    if arguments.accurate:
        config = replace(config, flips=True)
    if arguments.group_by:
        config = replace(config, group_by=arguments.group_by)
    return ScreeningJob(
        archive=archive,
        filters=filters,
        ledger=ledger,
        model=arguments.model if is_registered else location(arguments.model, "--model"),
        config=config,
        results=results,
        run_date=arguments.run_date,
        limit=arguments.limit,
        since_last=arguments.since == "last",
        batch=arguments.batch,
        site_key=arguments.site_key,
        linkage=linkage,
    )


def print_summary(outcome: Outcome) -> None:
    """Print the counts of a run that this start committed."""
    assert outcome.accounting is not None
    print(screening_table(outcome.run, outcome.accounting, outcome.elapsed_s))
    print(ignored_line(read_ignored(outcome.run)))
