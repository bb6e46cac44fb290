"""Screen an archive of chest CT into a Parquet ledger, one row per series.

python jobs/screen.py --archive URI --ledger URI --model REF
ray job submit --working-dir . -- python jobs/screen.py --archive URI --ledger URI --model REF

URIs are local paths or s3://BUCKET/PREFIX. REF is models:/NAME@ALIAS, models:/NAME/VERSION, or the path or URI of a
saved model. Exit codes: 0 committed now or before, 2 usage, 3 refused to start, 1 anything else: the same command
continues, but where the log speaks of a fault of this software. Research use only, not a medical device.
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

from covtanet import tracking
from covtanet.config import load_config
from covtanet.errors import CheckpointError, ConfigError
from covtanet.model.checkpoint import load_model
from covtanet.report.summary import ignored_line, plan_table, screening_table
from covtanet.screening import ledger, pipeline
from covtanet.screening.predictor import window_of
from covtanet.screening.stages import config_values, for_model

logger = logging.getLogger("covtanet.screen")


def parse() -> argparse.Namespace:
    """Read the command line."""
    options = parser(__doc__)
    options.add_argument("--archive", required=True, help="folder or s3:// prefix with the CT")
    options.add_argument("--ledger", required=True, help="folder or s3:// prefix for the ledger")
    options.add_argument("--model", required=True, help="models:/NAME@ALIAS, models:/NAME/VERSION, path or URI")
    options.add_argument(
        "--run-date", type=date.fromisoformat, help="YYYY-MM-DD; default: the unfinished run's, or today"
    )
    options.add_argument("--results", default="", help="folder or s3:// prefix for masks and previews; default: none")
    options.add_argument("--limit", type=int, default=0, help="screen only the first N series; default: all")
    options.add_argument("--group-by", choices=("folder", "uid"), help="what makes DICOM objects a series")
    options.add_argument("--config", type=Path, help="TOML file with a [screening] table")
    options.add_argument("--plan", action="store_true", help="freeze the manifest, print what would be done, stop")
    arguments = options.parse_args()
    if arguments.limit < 0:
        options.error("--limit must be at least 0")
    return arguments


def main() -> int:
    """Run the job; what refuses to start is told in one line."""
    arguments = parse()
    start_logging()
    try:
        with tempfile.TemporaryDirectory() as folder:
            return screen(arguments, Path(folder))
    except (ConfigError, CheckpointError) as error:
        logger.error("%s", error)
        return 3
    except OSError as error:  # its text may name a study
        logger.error("storage: %s; the same command continues", type(error).__name__)
        return 1
    finally:
        ray.shutdown()


def screen(arguments: argparse.Namespace, folder: Path) -> int:
    """Resolve the model once, then make or continue the run."""
    started = time.monotonic()
    check_tracking()
    archive, ledger_uri = place(arguments.archive, "--archive"), place(arguments.ledger, "--ledger")
    results = place(arguments.results, "--results") if arguments.results else ""
    ledger.check_places(archive, ledger_uri)
    if results:
        ledger.check_places(archive, results)
    config = load_config(arguments.config).screening
    if arguments.group_by:
        config = replace(config, group_by=arguments.group_by)
    is_path = not arguments.model.startswith("models:")
    model = tracking.resolve_model(place(arguments.model, "--model") if is_path else arguments.model, folder)
    loaded = load_model(model.folder, model.digest)
    window, config = window_of(loaded), for_model(config, loaded.preprocessing)
    if not loaded.provenance.get("has_diagnosis", True):
        raise CheckpointError("the model was trained in phase 1 alone and gives no diagnosis")
    if "hu" not in loaded.preprocessing.get("intensities", ["hu"]):
        logger.warning("the model was trained on grey values alone and has never seen HU")
    run = make_run(arguments, archive, ledger_uri, model, config_values(window, config))
    logger.info("run %s of %s with %s version %s", run.run_id, run.run_date, model.name, model.version)
    if ledger.is_committed(run):
        ledger.clean_up(run)
        logger.info("this run is committed; nothing to do: %s", run.committed_uri)
        return 0
    connect()
    ledger.begin(run)
    pipeline.make_manifest(run, config)
    if arguments.plan:
        print(plan_table(run, pipeline.plan(run), ledger.read_manifest(run)))
        return 0
    pipeline.screen(run, config, window, model.folder, results)
    accounting = ledger.commit(run)
    print(screening_table(run, accounting, time.monotonic() - started))
    print(ignored_line(ledger.read_ignored(run)))
    if accounting.failures["internal_error"]:
        logger.error("%d series met a fault of this software", accounting.failures["internal_error"])
        return 1
    return 0


def make_run(
    arguments: argparse.Namespace, archive: str, ledger_uri: str, model: tracking.ModelRef, values: dict[str, Any]
) -> ledger.Run:
    """The run's identity; without a date the newest unfinished one of the same kind, else today's."""
    run = ledger.Run(
        archive=archive,
        ledger=ledger_uri,
        run_date=date.min,
        model_name=model.name,
        model_version=model.version,
        model_digest=model.digest,
        config_digest=ledger.digest_of(values),
        software_version=tracking.software_version(),
        limit=arguments.limit,
    )
    return replace(run, run_date=arguments.run_date or ledger.choose_date(ledger_uri, run.key))


if __name__ == "__main__":
    sys.exit(main())
