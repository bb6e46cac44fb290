"""Train CovTANet in its two phases on Ray, fold by fold, and register the model as challenger.

python jobs/train.py --config recipes/demo.toml --data URI --storage URI
ray job submit --working-dir . -- python jobs/train.py --config recipes/mosmed.toml

Started again, the same command goes on where the last one stopped. Runs and models go to MLFLOW_TRACKING_URI; without
an answer from there the training goes on, and the command, started again, logs and registers what is finished.

Exit codes: 0 done and registered, 2 usage, 3 refused to start, 4 stopped by a loss or gradient that is no number,
5 trained but not all of it is in the tracker yet, 1 anything else; after 1 and 5 the same command continues.
"""

import argparse
import logging
import sys
from dataclasses import replace
from pathlib import Path

import ray
from cluster import check_tracking, connect, parser, place, start_logging

from covtanet import tracking
from covtanet.config import load_config
from covtanet.errors import CheckpointError, ConfigError, TrainingError
from covtanet.model.segnet import TABLE_I
from covtanet.training import experiment
from covtanet.training.config import TrainingConfig

logger = logging.getLogger("covtanet.train")


def parse() -> argparse.Namespace:
    """Read the command line."""
    options = parser(__doc__)
    options.add_argument("--config", type=Path, required=True, help="TOML file with a [training] table")
    options.add_argument("--data", help="folder or s3:// prefix of the data set; default: the configuration's")
    options.add_argument("--storage", help="folder or s3:// prefix for all that is kept; default: the configuration's")
    options.add_argument("--experiment", default="covtanet", help="MLflow experiment; also names the folder in storage")
    options.add_argument("--artifacts", default="", help="where a new experiment keeps its files; default: MLflow's")
    options.add_argument("--fold", type=int, action="append", help="train this fold only; may be repeated")
    options.add_argument(
        "--ablation", choices=[*TABLE_I, "all"], help="a row of Table I, or all: phase 1 alone, nothing is registered"
    )
    options.add_argument("--encoder-weights", type=Path, help="V8: timm's ImageNet weights as a local .safetensors")
    return options.parse_args()


def main() -> int:
    """Run the job; what refuses to start is told in one line."""
    arguments = parse()
    start_logging()
    try:
        return run(arguments)
    except (ConfigError, CheckpointError, ValueError) as error:
        logger.error("%s", error)
        return 3
    except FloatingPointError as error:
        logger.error("%s", error)
        return 4
    except TrainingError as error:
        logger.error("%s; the same command continues", error)
        return 1
    except OSError as error:
        logger.error("storage: %s; the same command continues", type(error).__name__)
        return 1
    finally:
        ray.shutdown()


def run(arguments: argparse.Namespace) -> int:
    """Open the experiment, train what is not trained, publish, register."""
    check_tracking()
    loaded = load_config(arguments.config)
    data, storage_uri = arguments.data or loaded.places.data, arguments.storage or loaded.places.storage
    if not data or not storage_uri:
        raise ConfigError("--data and --storage are needed, or the configuration's [places]")
    config = loaded.training
    if arguments.fold:
        config = replace(config, folds=tuple(sorted(set(arguments.fold))))
    address = tracking.RunAddress(
        uri=tracking.tracking_uri(),
        experiment=arguments.experiment,
        name=arguments.experiment,
        key="",
        artifacts=place(arguments.artifacts, "--artifacts") if arguments.artifacts else "",
    )
    connect(with_dashboard=True)
    opened = experiment.open_experiment(config, place(data, "--data"), place(storage_uri, "--storage"), address)
    is_published = True
    for variant in variants(config, arguments.ablation):
        current = replace(opened, config=variant)
        for fold in variant.folds:
            experiment.train_fold(current, fold, arguments.encoder_weights)
            with tracking.tolerated("the finished fold"):
                experiment.publish(current)
        is_published = finish(current) and is_published
    if not is_published:
        return 5
    print(f"trained  {opened.uri}\nnext     python jobs/evaluate.py --model {opened.uri} --out FOLDER")
    return 0


def variants(config: TrainingConfig, ablation: str | None) -> list[TrainingConfig]:
    """The networks to train: the configured one in both phases, or rows of Table I in phase 1."""
    if ablation is None:
        return [config]
    rows = list(TABLE_I) if ablation == "all" else [ablation]
    return [replace(config, ablation=row, phases=(1,)) for row in rows]


def finish(current: experiment.Experiment) -> bool:
    """Publish all, and register where phase 2 was trained; whether the tracker took it."""
    is_done = False
    with tracking.tolerated("the training"):
        experiment.publish(current)
        if 2 in current.config.phases:
            version, digest = experiment.register(current)
            print(f"registered {tracking.MODEL_NAME} version {version} as challenger, digest {digest[:12]}")
        is_done = True
    if not is_done:
        logger.error("trained, but the tracker did not take it: started again, the same command publishes it")
    return is_done


if __name__ == "__main__":
    sys.exit(main())
