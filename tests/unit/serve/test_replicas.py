"""What replicas of API and model ask Ray for, and how many there may be."""

from typing import Any

import pytest

from serve.replicas import api_options, model_options, model_threads
from serve.settings import Caller, ServeConfig


def settings(**values: Any) -> ServeConfig:
    return ServeConfig(callers=(Caller(name="any", token_sha256="0" * 64),), **values)


def test_model_without_gpu_reserves_its_threads_and_sees_no_gpu() -> None:
    options = model_options(settings(model_cpus=2.5))["ray_actor_options"]
    assert (options["num_cpus"], options["num_gpus"]) == (2.5, 0)
    assert options["runtime_env"] == {"env_vars": {"CUDA_VISIBLE_DEVICES": ""}}
    assert model_threads(settings(model_cpus=2.5)) == 3
    assert model_threads(settings(model_cpus=0.5, model_threads=2)) == 2


def test_model_with_gpu_share_gets_its_card_from_ray() -> None:
    options = model_options(settings(model_gpus=0.5))["ray_actor_options"]
    assert options["num_gpus"] == 0.5
    assert "runtime_env" not in options


@pytest.mark.parametrize(("num_replicas", "max_replicas", "expected"), [(1, 4, 4), (3, 1, 3)])
def test_model_replicas_follow_load_with_one_per_node(
    num_replicas: int, max_replicas: int, expected: int
) -> None:
    configured = settings(num_model_replicas=num_replicas, max_model_replicas=max_replicas)
    options = model_options(configured)
    assert options["max_replicas_per_node"] == 1
    autoscaling = options["autoscaling_config"]
    assert (autoscaling.min_replicas, autoscaling.max_replicas) == (num_replicas, expected)
    assert autoscaling.target_ongoing_requests == configured.model_requests


def test_api_replica_reserves_cpus_and_memory_of_its_decoders() -> None:
    configured = settings(num_decoders=3, cpus_per_decoder=0.5)
    options = api_options(configured)["ray_actor_options"]
    assert options["num_cpus"] == 1.5
    assert options["memory"] == configured.replica_memory_bytes > 3 * 3072 << 20


@pytest.mark.parametrize("name", ["cpus_per_decoder", "model_cpus"])
def test_replica_without_cpus_is_refused(name: str) -> None:
    """Ray may place it on a head without CPUs."""
    with pytest.raises(ValueError, match=f"{name} is 0, expected a number above 0"):
        settings(**{name: 0})


@pytest.mark.parametrize("num_gpus", [1.5, -1.0])
def test_share_of_several_gpus_is_refused(num_gpus: float) -> None:
    with pytest.raises(ValueError, match="model_gpus is"):
        settings(model_gpus=num_gpus)
