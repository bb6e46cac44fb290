"""Replicas of API and model: how many, and the CPUs, GPUs and memory that each asks Ray for.

Every replica asks for CPUs, so that none is placed on a head without CPUs.
"""

import math
from typing import Any

from ray.serve.config import AutoscalingConfig, BackpressureConfig

from serve.settings import ServeConfig


def api_options(settings: ServeConfig) -> dict[str, Any]:
    """Return the options of the deployment ``Api``; its replicas come and go with the load."""
    busy = settings.num_decoders + settings.max_waiting + settings.max_uploads
    return {
        "ray_actor_options": {
            "num_cpus": settings.num_decoders * settings.cpus_per_decoder,
            "memory": settings.replica_memory_bytes,
        },
        # Twice as many as it serves: the replica itself refuses the rest, since it knows which
        # requests are heavy.
        "max_ongoing_requests": 2 * busy,
        "max_queued_requests": 4 * busy,
        "backpressure_config": BackpressureConfig(
            status_code=503, retry_after_s=settings.retry_after_s
        ),
        "autoscaling_config": AutoscalingConfig(
            min_replicas=settings.num_api_replicas,
            max_replicas=max(settings.num_api_replicas, settings.max_api_replicas),
            target_ongoing_requests=(settings.num_decoders + settings.max_waiting) / 2,
        ),
    }


def model_options(settings: ServeConfig) -> dict[str, Any]:
    """Return the options of the deployment ``Segmenter``, whose replicas hold the model."""
    actor: dict[str, Any] = {"num_cpus": settings.model_cpus, "num_gpus": settings.model_gpus}
    if not settings.model_gpus:
        # Ray leaves the GPUs of the node visible to an actor that asks for none.
        actor["runtime_env"] = {"env_vars": {"CUDA_VISIBLE_DEVICES": ""}}
    return {
        "ray_actor_options": actor,
        "max_replicas_per_node": settings.max_model_replicas_per_node,
        "autoscaling_config": AutoscalingConfig(
            min_replicas=settings.num_model_replicas,
            max_replicas=max(settings.num_model_replicas, settings.max_model_replicas),
            target_ongoing_requests=settings.model_requests,
        ),
    }


def model_threads(settings: ServeConfig) -> int:
    """Return the threads of a model replica's network on CPUs: by default, those it asks for."""
    return settings.model_threads or math.ceil(settings.model_cpus)
