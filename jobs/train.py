"""Train CovTANet in its two phases on Ray, and register the model.

python jobs/train.py --config recipes/demo.toml --data URI --storage URI
ray job submit --working-dir . -- python jobs/train.py --config recipes/demo.toml --data URI --storage URI

The data set is a folder or s3:// prefix with NIfTI volumes, their lesion masks and labels.parquet. Runs and models
go to MLFLOW_TRACKING_URI. Exit codes: 0 registered, 2 usage, 3 refused to start, 1 anything else.
"""

import argparse
import logging
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import ray
from cluster import check_tracking, connect, parser, place, start_logging

from covtanet import storage, tracking
from covtanet.config import load_config
from covtanet.data import labels
from covtanet.errors import CheckpointError, ConfigError
from covtanet.model.checkpoint import save_model
from covtanet.training.distributed import train

logger = logging.getLogger("covtanet.train")


def parse() -> argparse.Namespace:
    """Read the command line."""
    options = parser(__doc__)
    options.add_argument("--config", type=Path, required=True, help="TOML file with a [training] table")
    options.add_argument("--data", required=True, help="folder or s3:// prefix of the data set")
    options.add_argument("--storage", required=True, help="folder or s3:// prefix for checkpoints")
    options.add_argument("--experiment", default="covtanet", help="MLflow experiment")
    options.add_argument("--artifacts", default="", help="where a new experiment keeps its files; default: MLflow's")
    options.add_argument("--alias", default="challenger", help="alias for the registered version")
    return options.parse_args()


def main() -> int:
    """Run the job; what refuses to start is told in one line."""
    arguments = parse()
    start_logging()
    try:
        return run(arguments)
    except (ConfigError, CheckpointError) as error:
        logger.error("%s", error)
        return 3
    except OSError as error:
        logger.error("storage: %s", type(error).__name__)
        return 1
    finally:
        ray.shutdown()


def run(arguments: argparse.Namespace) -> int:
    """Train, save, register."""
    check_tracking()
    data_uri, storage_uri = place(arguments.data, "--data"), place(arguments.storage, "--storage")
    artifacts = place(arguments.artifacts, "--artifacts") if arguments.artifacts else ""
    config = load_config(arguments.config).training
    volumes = labels.read_labels(storage.join(data_uri, "labels.parquet"))
    data_digest = labels.digest(volumes)
    connect()
    parameters = {**asdict(config), "data_digest": data_digest}
    with (
        tracking.training_run(arguments.experiment, arguments.config.stem, artifacts, parameters) as run_id,
        tempfile.TemporaryDirectory() as folder,
    ):
        model = train(config, volumes, data_uri, storage_uri, run_id)
        provenance = {
            "data_digest": data_digest,
            "num_volumes": len(volumes),
            "mlflow_run_id": run_id,
            "recipe": asdict(config),
            "software_version": tracking.software_version(),
        }
        place_of_model = Path(folder) / "model"
        digest = save_model(place_of_model, replace(model, provenance=provenance))
        version = tracking.register_model(run_id, place_of_model, {"covtanet.data_digest": data_digest})
        tracking.set_alias(version, arguments.alias)
    print(f"registered {tracking.MODEL_NAME} version {version} as {arguments.alias}, digest {digest[:12]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
