"""Train CovTANet in its two phases on Ray, fold by fold, and register the model as challenger.

python jobs/train.py --config recipes/demo.toml --data URI --storage URI
ray job submit --working-dir . -- python jobs/train.py --config recipes/mosmed.toml

Started again, the same command goes on where the last one stopped. Runs and models go to MLFLOW_TRACKING_URI; without
an answer from there the training goes on, and the command, started again, logs and registers what is finished.

Exit codes: 0 done and registered, 2 usage, 3 refused to start, 4 stopped by a loss or gradient that is no number,
5 trained but not all of it is in the tracker yet, 1 anything else; after 1 and 5 the same command continues, unless the
log shows a traceback: then it met a fault of this software.
"""

import argparse
import logging
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import torch
from cluster import check_tracking, connect, parser, place, start_logging
from ray.util import ActorPool
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from covtanet import tracking
from covtanet.config import load_config
from covtanet.errors import CheckpointError, ConfigError, TrainingError
from covtanet.model.covtanet import CovTANet
from covtanet.model.registry import CLASSIFIERS, SEGMENTERS
from covtanet.model.segnet import TABLE_I
from covtanet.training import experiment
from covtanet.training.config import TrainingConfig

logger = logging.getLogger("covtanet.train")

ALIASES = {"TA-SegNet": "V7", "Unet": "V1"}


def parse() -> argparse.Namespace:
    """Read the command line."""
    options = parser(__doc__)
    options.add_argument(
        "--config", type=Path, required=True, help="TOML file with a [training] table"
    )
    options.add_argument(
        "--data", help="folder or s3:// prefix of the data set; default: the configuration's"
    )
    options.add_argument(
        "--storage",
        help="folder or s3:// prefix for all that is kept; default: the configuration's",
    )
    options.add_argument(
        "--experiment",
        default="covtanet",
        help="MLflow experiment; also names the folder in storage",
    )
    options.add_argument(
        "--artifacts", default="", help="where a new experiment keeps its files; default: MLflow's"
    )
    options.add_argument(
        "--fold", type=int, action="append", help="train this fold only; may be repeated"
    )
    which = options.add_mutually_exclusive_group()
    which.add_argument(
        "--ablation",
        choices=[*TABLE_I, "all"],
        help="a row of Table I, or all: phase 1 alone, nothing is registered",
    )
    which.add_argument(
        "--network",
        action="append",
        choices=[*ALIASES, "V8", *SEGMENTERS, *CLASSIFIERS, "all"],
        help="a row of Tables II to IV, or V8, the pretrained TA-SegNet; may be repeated; or all that the data set has "
        "truth for, without V8",
    )
    options.add_argument(
        "--encoder-weights", type=Path, help="V8: timm's ImageNet weights as a local .safetensors"
    )
    return options.parse_args()


def main() -> int:
    """Run the job; what refuses to start is told in one line, and a fault of this software with its traceback."""
    arguments = parse()
    start_logging()
    try:
        return run(arguments)
    except (ConfigError, CheckpointError) as error:
        logger.error("%s", error)
        return 3
    except FloatingPointError as error:
        logger.error("%s", error)
        return 4
    except TrainingError as error:
        logger.error("%s; the same command continues", error)
        return 1
    except ray.exceptions.RayError as error:
        logger.error("Ray: %s; the same command continues", type(error).__name__)
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
    data, storage_uri = (
        arguments.data or loaded.places.data,
        arguments.storage or loaded.places.storage,
    )
    if not data or not storage_uri:
        raise ConfigError("--data and --storage are needed, or the configuration's [places]")
    config = loaded.training
    if arguments.fold:
        config = changed(config, folds=tuple(sorted(set(arguments.fold))))
    address = tracking.RunAddress(
        uri=tracking.tracking_uri(),
        experiment=arguments.experiment,
        name=arguments.experiment,
        key="",
        artifacts=place(arguments.artifacts, "--artifacts") if arguments.artifacts else "",
    )
    connect(with_dashboard=True)
    opened = experiment.open_experiment(
        config, place(data, "--data"), place(storage_uri, "--storage"), address
    )
    is_published = True
    chosen = variants(config, arguments.ablation, arguments.network, opened)
    for variant in chosen:
        with torch.device("meta"):  # what a network lacks is found out now, not hours later
            CovTANet(variant.architecture)
    with tracking.tolerated("the training"):
        tracking.open_run(opened.run)  # before any of its children ask for it at once
    items = [
        (replace(opened, config=variant), fold) for variant in chosen for fold in variant.folds
    ]
    left = Counter(current.config.network for current, _ in items)
    failures: list[Exception] = []
    for current, fold, failure in train_all(items, arguments.encoder_weights):
        if failure is not None:
            logger.error("%s fold %d: %s", current.config.network, fold, failure)
            failures.append(failure)
            continue
        logger.info("%s fold %d is trained and evaluated", current.config.network, fold)
        left[current.config.network] -= 1
        with tracking.tolerated("the finished fold"):
            experiment.publish(current)
        if not left[current.config.network]:
            is_published = finish(current) and is_published
    if failures:  # the other networks and folds went on
        raise failures[0]
    if not is_published:
        return 5
    print(
        f"trained  {opened.uri}\nnext     python jobs/evaluate.py --model {opened.uri} --out FOLDER"
    )
    return 0


def changed(config: TrainingConfig, **values: Any) -> TrainingConfig:
    """The configuration with values that the command line asks for.

    Raises:
        ConfigError: the configuration does not allow them.
    """
    try:
        return replace(config, **values)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def variants(
    config: TrainingConfig,
    ablation: str | None,
    networks: list[str] | None,
    opened: experiment.Experiment,
) -> list[TrainingConfig]:
    """The networks to train: the configured one, rows of Table I in phase 1, or rows of Tables II to IV.

    Of the latter, ``all`` is what the data set has truth for: masks for the segmentation, grades for the diagnosis
    unless the configuration leaves phase 2 out.
    """
    if networks is None:
        rows = [] if ablation is None else list(TABLE_I) if ablation == "all" else [ablation]
        return [changed(config, network=row, phases=(1,)) for row in rows] or [config]
    volumes = opened.volumes.values()
    has_masks = any(volume.lesion_px is not None for volume in volumes)
    has_grades = 2 in config.phases and any(volume.grade for volume in volumes)
    if networks == ["all"] and not (has_masks or has_grades):
        raise ConfigError("nothing to train: the data set has neither masks nor grades")
    if "all" not in networks:
        names = [ALIASES.get(network, network) for network in dict.fromkeys(networks)]
    else:
        names = ["V7", "V1", *SEGMENTERS] if has_masks else []
        names += CLASSIFIERS if has_grades else []
    found = []
    for name in names:
        phases = (
            (2,) if name in CLASSIFIERS else (1, 2) if name in ("V7", "V8") and has_grades else (1,)
        )
        found.append(changed(config, network=name, phases=phases))
    return found


Item = tuple[experiment.Experiment, int]
Done = tuple[experiment.Experiment, int, Exception | None]


def train_all(items: Sequence[Item], encoder_weights: Path | None) -> Iterator[Done]:
    """Train networks and folds, as many at a time as the cluster has room for; each as it ends, with why it failed."""
    needed = items[0][0].config.num_workers + 1  # a CPU to feed the workers
    room = max(1, int(ray.cluster_resources().get("CPU", 0)) // needed)
    if gpus := int(ray.cluster_resources().get("GPU", 0)):
        room = max(1, min(room, gpus // items[0][0].config.num_workers))
    if min(room, len(items)) == 1:
        for current, fold in items:
            yield train_one(current, fold, encoder_weights)
        return
    logger.info("%d trainings, %d at a time", len(items), room)
    # Where this process is, since files that the command names may lie here alone.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    pool = ActorPool(
        [_Trainer.options(scheduling_strategy=here).remote() for _ in range(min(room, len(items)))]  # type: ignore[attr-defined]
    )
    shared = [
        (replace(current, num_at_once=min(room, len(items))), fold) for current, fold in items
    ]
    yield from pool.map_unordered(
        lambda actor, item: actor.train.remote(*item, encoder_weights), shared
    )


def train_one(current: experiment.Experiment, fold: int, encoder_weights: Path | None) -> Done:
    """Train one fold of one network, and catch what ends it but not the others."""
    try:
        experiment.train_fold(current, fold, encoder_weights)
    except (ConfigError, CheckpointError, TrainingError, FloatingPointError) as error:
        return current, fold, error
    except (
        ValueError
    ) as error:  # a fault of ours: here it still has its traceback, which an actor's answer loses
        logger.exception("%s fold %d", current.config.network, fold)
        return current, fold, error
    return current, fold, None


@ray.remote(num_cpus=0)
class _Trainer:
    """Trains one fold at a time; its workers, not it, hold the CPUs."""

    def train(
        self, current: experiment.Experiment, fold: int, encoder_weights: Path | None
    ) -> Done:
        """See ``train_one``."""
        start_logging()
        return train_one(current, fold, encoder_weights)


def finish(current: experiment.Experiment) -> bool:
    """Publish all, and register where phase 2 was trained; whether the tracker took it."""
    is_done = False
    with tracking.tolerated("the training"):
        experiment.publish(current)
        if current.config.phases == (1, 2):
            version, digest = experiment.register(current)
            print(
                f"registered {tracking.MODEL_NAME} version {version} as challenger, digest {digest[:12]}"
            )
        is_done = True
    if not is_done:
        logger.error(
            "trained, but the tracker did not take it: started again, the same command publishes it"
        )
    return is_done


if __name__ == "__main__":
    sys.exit(main())
