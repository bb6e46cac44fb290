"""Trainings of several networks and folds, as many at a time as the cluster has room for."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.util import ActorPool
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from covtanet.cluster import wait_for_idle
from covtanet.errors import CheckpointError, ConfigError, TrainingError
from covtanet.experiments.experiment import Experiment
from covtanet.experiments.fold import train_fold
from covtanet.runtime import start_logging
from covtanet.training.config import TrainingConfig

logger = logging.getLogger(__name__)

Item = tuple[Experiment, int]
Result = tuple[Experiment, int, Exception | None]


def train_all(items: Sequence[Item], encoder_weights: Path | None) -> Iterator[Result]:
    """Train experiments and folds; yield each as it ends, with the error that ended it.

    encoder_weights: a file on this node.
    """
    num_at_once = min(_room(items[0][0].config), len(items))
    if num_at_once == 1:
        for experiment, fold in items:
            yield train_one(experiment, fold, encoder_weights)
        return
    logger.info("%d trainings, %d at a time", len(items), num_at_once)
    # On the driver's node: files that the command names may lie there alone.
    node_id = ray.get_runtime_context().get_node_id()
    strategy = NodeAffinitySchedulingStrategy(node_id, soft=False)
    trainers = [
        _RemoteTrainer.options(scheduling_strategy=strategy).remote() for _ in range(num_at_once)
    ]
    shared = [(replace(experiment, num_at_once=num_at_once), fold) for experiment, fold in items]
    yield from ActorPool(trainers).map_unordered(
        lambda trainer, item: trainer.train.remote(*item, encoder_weights), shared
    )


def _room(config: TrainingConfig) -> int:
    """Return the number of trainings that the idle CPUs and GPUs can hold, at least one.

    Raises:
        ConfigError: fewer CPUs or GPUs are idle than a training needs.
    """
    # A training needs a CPU in addition, to feed its workers.
    num_needed = config.fewest_workers + 1
    num_cpus, num_gpus = wait_for_idle(lambda _: num_needed)
    if num_cpus < num_needed:
        raise ConfigError(
            f"{num_cpus} CPUs of the cluster are idle, expected {num_needed}: one for each worker "
            "of a training, and another for their data (ray start --num-cpus)"
        )
    room = num_cpus // (config.num_workers + 1)
    if 0 < num_gpus < config.fewest_workers:
        raise ConfigError(
            f"{num_gpus} GPUs of the cluster are idle, expected {config.fewest_workers}: one for "
            "each worker of a training"
        )
    if num_gpus:
        room = min(room, num_gpus // config.num_workers)
    return max(1, room)


def train_one(experiment: Experiment, fold: int, encoder_weights: Path | None) -> Result:
    """Train one fold of one network; an error that ends it is returned."""
    try:
        train_fold(experiment, fold, encoder_weights)
    except (ConfigError, CheckpointError, TrainingError, FloatingPointError) as error:
        return experiment, fold, error
    except ValueError as error:
        # A fault of this software. Its traceback is logged here, as an actor's answer loses it.
        logger.exception("%s fold %d", experiment.config.network, fold)
        return experiment, fold, error
    return experiment, fold, None


class _Trainer:
    """Trains one fold at a time."""

    def train(self, experiment: Experiment, fold: int, encoder_weights: Path | None) -> Result:
        """Train one fold, see ``train_one``."""
        start_logging()
        return train_one(experiment, fold, encoder_weights)


# Without a CPU: its workers hold them.
_RemoteTrainer: Any = ray.remote(num_cpus=0)(_Trainer)
