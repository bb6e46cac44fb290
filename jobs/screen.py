"""Screen an archive of chest CT into a Parquet ledger, one row per series.

python jobs/screen.py --archive URI --ledger URI --model REF
ray job submit --working-dir . -- python jobs/screen.py --archive URI --ledger URI --model REF

URIs are local paths or s3://BUCKET/PREFIX. REF is models:/NAME@ALIAS, models:/NAME/VERSION, or the path or URI of a
saved model. The last line of the log says how it ended:

0  committed, now or before, or nothing new; a run that was committed before is judged by its file once more
2  usage
3  refused to start
4  committed, but more series were rejected or failed than --max-rejected and --max-failed allow, or all were rejected
5  another driver of this run committed first
1  anything else; the same command continues, unless the log speaks of a fault of this software: then the ledger is
   committed with it, and stays so

Research use only, not a medical device.
"""

import argparse
import logging
import sys
import tempfile
import time
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import ray
from cluster import check_tracking, connect, parser, place, start_logging

from covtanet import storage, tracking
from covtanet.config import load_config
from covtanet.errors import AlreadyCommittedError, CheckpointError, ConfigError, WeakSandboxError
from covtanet.inference.predictor import refuse_without_segmentation, window_of
from covtanet.ledger.accounting import Accounting
from covtanet.ledger.batch import name_batch
from covtanet.ledger.commit import commit_run
from covtanet.ledger.read import account_run
from covtanet.ledger.run import (
    Run,
    begin_run,
    check_locations,
    choose_date,
    digest_of,
    is_committed,
    latest_date,
)
from covtanet.ledger.work import read_ignored, read_manifest, remove_work
from covtanet.model.checkpoint import load_model
from covtanet.report.summary import ignored_line, plan_table, screening_table
from covtanet.screening import pipeline
from covtanet.screening.stages import config_values, for_model

logger = logging.getLogger("covtanet.screen")

ENDINGS = {
    0: "committed, or nothing to do",
    1: "not as it should, the lines above say why",
    3: "refused to start",
    4: "committed, with more rejected or failed series than allowed",
    5: "another driver committed this run",
}
MIN_SITE_KEY_BYTES = 16
# What a stage lets through because it is no matter of one series.
ENDING_ERRORS = (storage.AccessError, WeakSandboxError, CheckpointError)


def parse() -> argparse.Namespace:
    """Read the command line."""
    options = parser(__doc__)
    options.add_argument("--archive", required=True, help="folder or s3:// prefix with the CT")
    options.add_argument("--ledger", required=True, help="folder or s3:// prefix for the ledger")
    options.add_argument(
        "--model", required=True, help="models:/NAME@ALIAS, models:/NAME/VERSION, path or URI"
    )
    options.add_argument(
        "--run-date",
        type=date.fromisoformat,
        help="YYYY-MM-DD; default: the unfinished run's, or today",
    )
    options.add_argument(
        "--results", default="", help="folder or s3:// prefix for masks and previews; default: none"
    )
    options.add_argument(
        "--limit", type=int, default=0, help="screen only the first N series; default: all"
    )
    options.add_argument(
        "--group-by", choices=("folder", "uid"), help="what makes DICOM objects a series"
    )
    options.add_argument("--config", type=Path, help="TOML file with a [screening] table")
    options.add_argument(
        "--since",
        choices=("last",),
        help="last: only series that are new, changed or failed since earlier runs",
    )
    options.add_argument(
        "--max-rejected",
        type=share,
        default=1.0,
        help="largest share of rejected series for exit code 0; default 1.0",
    )
    options.add_argument(
        "--max-failed",
        type=share,
        default=0.05,
        help="largest share of failed series for exit code 0; default 0.05",
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
        "--batch", default="", help="name under which the endpoint finds this run again"
    )
    options.add_argument(
        "--plan", action="store_true", help="freeze the manifest, print what would be done, stop"
    )
    arguments = options.parse_args()
    if arguments.limit < 0:
        options.error("--limit must be at least 0")
    return arguments


def share(text: str) -> float:
    """A share between 0 and 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise ValueError("expected a share between 0 and 1")
    return value


def main() -> int:
    """Run the job; how it ended is told in one line."""
    arguments = parse()
    start_logging()
    code = 1
    try:
        with tempfile.TemporaryDirectory() as folder:
            code = screen(arguments, Path(folder))
    except (ConfigError, CheckpointError) as error:
        logger.error("%s", error)
        code = 3
    except AlreadyCommittedError as error:
        logger.error("%s", error)
        code = 5
    except OSError as error:  # its text may name a study
        logger.error("storage: %s; the same command continues", type(error).__name__)
    except ray.exceptions.RayError as error:  # as may that of a worker's error
        logger.error("Ray: %s; the same command continues", cause_of(error))
    finally:
        ray.shutdown()
        logger.info("exit code %d: %s", code, ENDINGS[code])
    return code


def cause_of(error: BaseException) -> str:
    """Return the type of an error of Ray's and of the error of ours within it.

    Of an error in a worker Ray Data hands on the text of its traceback alone, a line of which begins with the type.
    """
    text = str(error)
    for own in ENDING_ERRORS:
        if f"\n{own.__module__}.{own.__qualname__}:" in text:
            return f"{type(error).__name__} of {own.__name__}"
    cause = getattr(error, "cause", None)
    return (
        f"{type(error).__name__} of {type(cause).__name__}"
        if cause is not None
        else type(error).__name__
    )


def screen(arguments: argparse.Namespace, folder: Path) -> int:
    """Resolve the model once, then make or continue the run."""
    started = time.monotonic()
    check_tracking()
    archive, ledger_uri = place(arguments.archive, "--archive"), place(arguments.ledger, "--ledger")
    results = place(arguments.results, "--results") if arguments.results else ""
    check_locations(archive, ledger_uri)
    if results:
        check_locations(archive, results)
    config = load_config(arguments.config).screening
    if arguments.group_by:
        config = replace(config, group_by=arguments.group_by)
    check_date(arguments.run_date)
    is_path = not arguments.model.startswith("models:")
    ref = place(arguments.model, "--model") if is_path else arguments.model
    model = tracking.resolve_model(ref, folder)
    loaded = load_model(model.folder, model.digest)
    window, config = window_of(loaded), for_model(config, loaded.preprocessing)
    refuse_without_segmentation(loaded)
    if not loaded.capabilities.diagnoses:
        logger.warning(
            "the model was trained in phase 1 alone: diagnosis and severity are null, but for the rule's"
        )
    if "hu" not in loaded.preprocessing.intensities:
        logger.warning("the model was trained on grey values alone and has never seen HU")
    run = make_run(arguments, archive, ledger_uri, model, config_values(window, config))
    run = replace(run, model_ref=ref)
    run = hide_identities(run, arguments) if config.deidentify else run
    run = replace(run, run_date=arguments.run_date or choose_date(run))
    start_logging(run_id=run.run_id)
    logger.info(
        "run %s of %s with %s version %s", run.run_id, run.run_date, model.name, model.version
    )
    if arguments.batch:
        name_batch(run, arguments.batch)
    if is_committed(run):
        remove_work(run)
        logger.info("this run is committed; nothing to do: %s", run.committed_uri)
        return judge(account_run(run.committed_uri), arguments.max_rejected, arguments.max_failed)
    is_exclusive = storage.honours_create(run.ledger)
    if not is_exclusive:
        logger.warning(
            "this store lets a PUT replace a file; two drivers of one run are found out, not kept apart"
        )
    connect()
    begin_run(run)
    try:
        pipeline.make_manifest(run, config)
        if arguments.plan:
            print(plan_table(run, pipeline.plan(run), read_manifest(run)))
            return 0
        pipeline.screen(run, config, window, model.folder, results)
        accounting = commit_run(run, is_exclusive=is_exclusive)
    except Exception as error:
        if not isinstance(error, AlreadyCommittedError) and is_known_as_committed(run):
            raise AlreadyCommittedError(
                "another driver of this run committed while this one worked"
            ) from error
        raise
    print(screening_table(run, accounting, time.monotonic() - started))
    print(ignored_line(read_ignored(run)))
    return judge(accounting, arguments.max_rejected, arguments.max_failed)


def is_known_as_committed(run: Run) -> bool:
    """Return whether a run is committed; False if storage does not say, so that the first error stands."""
    try:
        return is_committed(run)
    except OSError:
        return False


def check_date(run_date: date | None) -> None:
    """Refuse a date in the future, which would make the run the newest of all for as long.

    Raises:
        ConfigError: with the latest date.
    """
    if run_date is not None and run_date > latest_date():
        raise ConfigError(
            f"--run-date {run_date} lies in the future, expected at most {latest_date()}"
        )


def judge(accounting: Accounting, max_rejected: float, max_failed: float) -> int:
    """The exit code of a committed run."""
    num_rejected, num_series = accounting.rejected.total(), accounting.series
    if accounting.failures["internal_error"]:
        logger.error(
            "%d series met a fault of this software", accounting.failures["internal_error"]
        )
        return 1
    if num_series and (
        num_rejected > max_rejected * num_series
        or accounting.failed > max_failed * num_series
        or num_rejected == num_series
    ):
        logger.error(
            "%d rejected and %d failed of %d series", num_rejected, accounting.failed, num_series
        )
        return 4
    return 0


def hide_identities(run: Run, arguments: argparse.Namespace) -> Run:
    """The run with the site's key and the place of its linkage table.

    Raises:
        ConfigError: without either, or with a key that others can read.
    """
    if arguments.site_key is None or not arguments.linkage:
        raise ConfigError("deidentify = true needs --site-key FILE and --linkage URI")
    try:
        key = arguments.site_key.read_bytes().strip()
        mode = arguments.site_key.stat().st_mode
    except OSError as error:
        raise ConfigError("the site key cannot be read") from error
    if len(key) < MIN_SITE_KEY_BYTES or mode & 0o077:
        raise ConfigError(f"the site key needs {MIN_SITE_KEY_BYTES} bytes and mode 0600")
    linkage = place(arguments.linkage, "--linkage")
    for other in (run.archive, run.ledger):
        check_locations(other, linkage)
    return replace(run, site_key=key, linkage=linkage)


def make_run(
    arguments: argparse.Namespace,
    archive: str,
    ledger_uri: str,
    model: tracking.ModelRef,
    values: dict[str, Any],
) -> Run:
    """The run's identity, but for its date."""
    return Run(
        archive=archive,
        ledger=ledger_uri,
        run_date=date.min,
        model_name=model.name,
        model_version=model.version,
        model_digest=model.digest,
        config_digest=digest_of(values),
        software_version=tracking.software_version(),
        limit=arguments.limit,
        since_last=arguments.since == "last",
    )


if __name__ == "__main__":
    sys.exit(main())
