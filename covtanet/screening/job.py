"""One screening run from its arguments to the committed ledger."""

import logging
import tempfile
import time
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path

from covtanet import runtime, storage, tracking
from covtanet.ct.window import WindowConfig
from covtanet.errors import AlreadyCommittedError, ConfigError, Reason
from covtanet.inference.model_window import check_capabilities, model_window
from covtanet.ledger.accounting import Accounting
from covtanet.ledger.batch import name_batch
from covtanet.ledger.commit import commit_run
from covtanet.ledger.finished_rows import finished_keys
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
from covtanet.ledger.work import remove_work
from covtanet.model.model_files import ModelDescription, describe_model
from covtanet.runtime import ExitCode
from covtanet.screening import pipeline
from covtanet.screening.config import ScreeningConfig, config_values, for_model
from covtanet.screening.plan import Plan, make_manifest, make_plan
from covtanet.shared_folders import check_shared

logger = logging.getLogger(__name__)

MIN_SITE_KEY_BYTES = 16


@dataclass(frozen=True, kw_only=True)
class ScreeningJob:
    """A screening as it was asked for; locations are absolute paths or s3:// URIs."""

    archive: str
    """A path, an s3:// URI, or the root of a DICOMweb server."""
    ledger: str
    model: str
    """``models:/NAME@ALIAS``, ``models:/NAME/VERSION``, or the location of a saved model."""
    config: ScreeningConfig
    results: str = ""
    """Location for masks and previews; empty for none."""
    run_date: date | None = None
    """Null takes the date of the unfinished run, or today."""
    filters: str = ""
    """Query of a DICOMweb archive, such as ``StudyDate=20260101-``."""
    limit: int = 0
    """Screen only the first so many series; 0 screens all."""
    since_last: bool = False
    """Screen only series that are new, changed or failed since earlier runs."""
    batch: str = ""
    """Name under which the endpoint finds the run."""
    site_key: Path | None = field(default=None, repr=False)
    """File with the secret of the pseudonyms."""
    linkage: str = ""
    """Location for the table of pseudonyms and identities."""

    def __post_init__(self) -> None:
        check_locations(self.archive, self.ledger)
        if self.results:
            check_locations(self.archive, self.results)
        if self.run_date is not None and self.run_date > latest_date():
            # Until that day it would count as the newest run.
            raise ConfigError(
                f"--run-date {self.run_date} lies in the future, expected at most {latest_date()}"
            )


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A run that is committed, or that only was planned."""

    run: Run
    accounting: Accounting | None = None
    """Null for a plan."""
    plan: Plan | None = None
    elapsed_s: float = 0.0
    is_new: bool = True
    """Whether this start committed the run."""


def run_screening(job: ScreeningJob, *, plan_only: bool = False) -> Outcome:
    """Resolve the model once, then make or continue the run, up to the commit.

    plan_only: stop after the manifest is frozen.

    Raises:
        ConfigError, CheckpointError: the run cannot start as asked.
        AlreadyCommittedError: another driver of this run committed first.
        OSError, RayError: storage or Ray failed; the same call continues.
    """
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        model = tracking.resolve_model(job.model, Path(folder))
        # The description alone: torch and the networks are the predictors' to import.
        description = describe_model(model.folder, model.digest)
        check_model(description)
        window = model_window(description.preprocessing, description.in_channels)
        config = for_model(job.config, description.preprocessing, description.readout)
        run = make_run(job, model, window, config)
        runtime.start_logging(run_id=run.run_id)
        logger.info(
            "run %s of %s with %s version %s", run.run_id, run.run_date, model.name, model.version
        )
        if job.batch:
            name_batch(run, job.batch)
        if is_committed(run):
            return _committed_before(run)
        return _screen(run, job, config, window, model.folder, started, plan_only)


def _committed_before(run: Run) -> Outcome:
    """Return a run that an earlier start committed; the rest of its work is removed."""
    remove_work(run)
    logger.info("this run is committed; nothing to do: %s", run.committed_uri)
    return Outcome(run=run, accounting=account_run(run.committed_uri), is_new=False)


def _screen(
    run: Run,
    job: ScreeningJob,
    config: ScreeningConfig,
    window: WindowConfig,
    model_folder: Path,
    started: float,
    plan_only: bool,
) -> Outcome:
    is_exclusive = storage.honours_create(run.ledger)
    if not is_exclusive:
        logger.warning(
            "this store lets a PUT replace a file: two drivers of one run are detected, but not "
            "kept apart"
        )
    runtime.connect()
    check_shared(
        written={"--ledger": run.ledger, "--results": job.results, "--linkage": run.linkage},
        read={"--archive": run.archive},
    )
    begin_run(run)
    try:
        make_manifest(run, config)
        if plan_only:
            return Outcome(run=run, plan=make_plan(run, config, finished_keys(run)))
        pipeline.screen(run, config, window, model_folder, job.results)
        accounting = commit_run(run, is_exclusive=is_exclusive)
    except Exception as error:
        # After another driver's commit its clean-up makes this driver fail in many ways.
        if isinstance(error, AlreadyCommittedError):
            remove_work(run)  # of this driver, after the other removed its own
        elif _is_known_as_committed(run):
            remove_work(run)
            raise AlreadyCommittedError(
                "another driver of this run committed while this one worked"
            ) from error
        raise
    return Outcome(run=run, accounting=accounting, elapsed_s=time.monotonic() - started)


def _is_known_as_committed(run: Run) -> bool:
    """Return whether a run is committed; False if storage fails, so that the first error stands."""
    try:
        return is_committed(run)
    except OSError:
        return False


def check_model(model: ModelDescription) -> None:
    """Refuse a model that cannot screen; log a model's limits.

    Raises:
        CheckpointError: the model marks no lesions.
    """
    check_capabilities(model.capabilities)
    if model.readout.burden is not None:
        logger.warning(
            "the model was trained in phase 1 alone: diagnosis and severity follow from the "
            "involvement"
        )
    elif not model.capabilities.diagnoses:
        logger.warning(
            "the model was trained in phase 1 alone: diagnosis and severity are null, apart from "
            "the severity by involvement"
        )
    if "hu" not in model.preprocessing.intensities:
        logger.warning("the model was trained on grey values alone and has never seen HU")


def make_run(
    job: ScreeningJob, model: tracking.ModelRef, window: WindowConfig, config: ScreeningConfig
) -> Run:
    """Return the identity of the run, with the key of its pseudonyms and its date."""
    run = Run(
        archive=job.archive,
        ledger=job.ledger,
        run_date=date.min,
        model_name=model.name,
        model_version=model.version,
        model_digest=model.digest,
        config_digest=digest_of(config_values(window, config)),
        software_version=tracking.software_version(),
        model_ref=job.model,
        filters=job.filters,
        limit=job.limit,
        since_last=job.since_last,
    )
    if config.deidentify:
        run = _with_pseudonyms(run, job)
    return replace(run, run_date=job.run_date or choose_date(run))


def _with_pseudonyms(run: Run, job: ScreeningJob) -> Run:
    """Return the run with the site's key and the location of its linkage table.

    Raises:
        ConfigError: either is missing, or the key can be read by others.
    """
    if job.site_key is None or not job.linkage:
        raise ConfigError("deidentify = true needs --site-key FILE and --linkage URI")
    try:
        key = job.site_key.read_bytes().strip()
        mode = job.site_key.stat().st_mode
    except OSError as error:
        raise ConfigError("the site key cannot be read") from error
    if len(key) < MIN_SITE_KEY_BYTES or mode & 0o077:
        raise ConfigError(f"the site key needs {MIN_SITE_KEY_BYTES} bytes and mode 0600")
    for other in (run.archive, run.ledger):
        check_locations(other, job.linkage)
    return replace(run, site_key=key, linkage=job.linkage)


def judge(accounting: Accounting, max_rejected: float, max_failed: float) -> ExitCode:
    """Return the exit code of a committed run.

    max_rejected, max_failed: the largest shares of the series; a run whose series
    are all rejected always exceeds its limits.
    """
    num_rejected = accounting.rejected.total()
    num_series = accounting.series
    if num_faults := accounting.failures[Reason.INTERNAL_ERROR]:
        logger.error("%d series met a fault of this software", num_faults)
        return ExitCode.ERROR
    exceeds_limits = (
        num_rejected > max_rejected * num_series
        or accounting.failed > max_failed * num_series
        or num_rejected == num_series
    )
    if num_series and exceeds_limits:
        logger.error(
            "%d rejected and %d failed of %d series", num_rejected, accounting.failed, num_series
        )
        return ExitCode.BELOW_BOUND
    return ExitCode.DONE
