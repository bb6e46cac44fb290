"""The CPUs and GPUs of the cluster that nobody uses, for the workers of a plan."""

import time

import ray

from covtanet.errors import ConfigError
from covtanet.screening.worker_counts import num_cpus_needed

# A second driver on a cluster with room for one waits this long and then refuses to start.
FREE_ROOM_TIMEOUT_S = 60.0
# A plan that starts with too few CPUs or GPUs keeps them to its end.
SETTLED_AFTER_S = 5.0


def wait_for_room(node_cpus: list[int]) -> tuple[int, int]:
    """Return the numbers of idle CPUs and GPUs; wait for those that a dead driver still holds.

    A GPU of which an endpoint holds a share is not idle.

    Raises:
        ConfigError: too few are idle, or the cluster has too few in all, which is not waited for.
    """
    deadline = time.monotonic() + FREE_ROOM_TIMEOUT_S
    most_idle = (0, 0)
    settled_at = time.monotonic()
    while True:
        in_all = _cpus_and_gpus(ray.cluster_resources())
        idle = _cpus_and_gpus(ray.available_resources())
        num_needed = num_cpus_needed(node_cpus, idle[1])
        now = time.monotonic()
        if idle > most_idle:
            most_idle, settled_at = idle, now
        # The workers of a dead driver end one after the other: not all is free at once.
        is_settled = idle == in_all or now - settled_at >= SETTLED_AFTER_S
        # On CPUs a cluster with GPUs would give other figures, and more slowly.
        is_enough = idle[0] >= num_needed and (idle[1] > 0 or not in_all[1])
        if is_enough and is_settled:
            return idle
        if in_all[0] < num_needed or now > deadline:
            break
        time.sleep(1)
    if in_all[1] and not idle[1]:
        raise ConfigError(f"all {in_all[1]} GPUs of the cluster are in use, expected one to spare")
    raise ConfigError(
        f"the cluster has {idle[0]} of {in_all[0]} CPUs free, expected at least {num_needed}: "
        f"{num_needed - 2} to predict, 1 to decode and 1 to measure (ray start --num-cpus)"
    )


def _cpus_and_gpus(resources: dict[str, float]) -> tuple[int, int]:
    return int(resources.get("CPU", 0)), int(resources.get("GPU", 0))
