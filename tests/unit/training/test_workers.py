"""Number of workers and micro-batches that a cluster gives a training."""

from dataclasses import replace
from pathlib import Path

import pytest
from repository import ROOT

from covtanet.config import load_config
from covtanet.errors import ConfigError
from covtanet.training.config import TrainingConfig
from covtanet.training.phase_config import PhaseConfig


def counts(config: TrainingConfig) -> tuple[int, int, int]:
    return config.num_workers, config.phase1.micro_batches, config.phase2.micro_batches


@pytest.mark.parametrize(("num_gpus", "num_workers"), [(0, 1), (1, 1), (4, 4)])
def test_default_is_a_worker_and_a_micro_batch_per_gpu(num_gpus: int, num_workers: int) -> None:
    assert counts(TrainingConfig().resolved(num_gpus)) == (num_workers,) * 3


@pytest.mark.parametrize(("num_gpus", "num_workers"), [(0, 1), (1, 1), (3, 3), (4, 3), (8, 6)])
def test_micro_batches_that_are_set_bound_the_workers(num_gpus: int, num_workers: int) -> None:
    config = TrainingConfig(phase1=PhaseConfig(micro_batches=6), phase2=PhaseConfig())
    assert counts(config.resolved(num_gpus)) == (num_workers, 6, num_workers)


def test_workers_that_are_set_do_not_follow_the_gpus() -> None:
    assert counts(TrainingConfig(num_workers=2).resolved(8)) == (2, 2, 2)


def test_workers_that_do_not_divide_the_micro_batches_are_a_configuration_error() -> None:
    with pytest.raises(ValueError, match=r"phase2.micro_batches is 3, expected a multiple of 2"):
        TrainingConfig(num_workers=2, phase2=PhaseConfig(micro_batches=3))


def test_training_is_elastic_between_min_workers_and_num_workers() -> None:
    config = TrainingConfig(num_workers=4, min_workers=1, phase1=PhaseConfig(micro_batches=4))
    assert (config.fewest_workers, config.num_workers) == (1, 4)
    assert TrainingConfig(num_workers=4).fewest_workers == 4
    # The same experiment: results do not depend on the number of workers.
    assert config.identity == replace(config, num_workers=2, min_workers=0).identity
    with pytest.raises(ValueError, match="min_workers is 5, expected at most 4 workers"):
        replace(config, min_workers=5)


def test_impossible_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="num_workers is -1, expected at least 0"):
        TrainingConfig(num_workers=-1)
    with pytest.raises(ValueError, match="micro_batches is -1, expected at least 0"):
        PhaseConfig(micro_batches=-1)


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda p: p.stem)
def test_recipe_trains_on_no_gpu_and_on_one(path: Path) -> None:
    """With one worker there is one micro-batch, unless the recipe sets another number."""
    config = load_config(path).training
    for num_gpus in (0, 1):
        resolved = config.resolved(num_gpus)
        assert resolved.num_workers == (config.num_workers or 1)


def test_cluster_with_fewer_gpus_than_min_workers_is_refused() -> None:
    with pytest.raises(ConfigError, match="min_workers is 4, expected at most the 2 workers"):
        TrainingConfig(min_workers=4).resolved(num_gpus=2)
