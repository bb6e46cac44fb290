"""The cluster: its nodes, and the CPUs and GPUs that nobody uses.

An endpoint on the same cluster keeps those that it holds.
"""

import time
from collections.abc import Callable, Iterable
from typing import Any

import ray

# Ray has no public way to ask for them by node.
from ray._private.state import available_resources_per_node

from covtanet.errors import ConfigError

# A second driver on a cluster with room for one waits this long and then refuses to start.
TIMEOUT_S = 60.0
# A plan that starts with too few CPUs or GPUs keeps them to its end.
SETTLED_AFTER_S = 5.0
# Name and namespace of the actor that holds the turn.
TURN = "covtanet-turn"


def nodes_with_cpus() -> list[dict[str, Any]]:
    """Return Ray's description of every living node that has CPUs."""
    return [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]


class Turn:
    """The turn of a driver to choose its workers and to start them, one driver at a time.

    Two that look at the same moment would both plan with all idle CPUs, and each would wait for
    those that the other one got. A named actor holds the turn: it ends with its driver, however
    that ends.
    """

    def __init__(self) -> None:
        self._holder: Any = None

    def __enter__(self) -> "Turn":
        deadline = time.monotonic() + TIMEOUT_S
        while self._holder is None and time.monotonic() < deadline:
            try:
                self._holder = _Holder.options(name=TURN, namespace=TURN).remote()  # type: ignore[attr-defined]
            except ValueError:  # the name is taken
                time.sleep(0.5)
        # Without its turn after a minute a driver finds no idle CPUs either.
        return self

    def end(self) -> None:
        """Let the next driver look: the workers of this one hold their CPUs."""
        self._holder = None  # Ray ends an actor without handles

    def __exit__(self, *error: object) -> None:
        self.end()


@ray.remote(num_cpus=0)
class _Holder:
    """Does nothing but bear the name."""


def wait_for_idle(num_cpus_needed: Callable[[int], int]) -> tuple[int, int]:
    """Return the numbers of idle CPUs and GPUs; wait for those that a dead driver still holds.

    num_cpus_needed: of so many idle GPUs. With fewer idle after a minute, or fewer CPUs in all, the
    answer is below it. A GPU of which an endpoint holds a share is not idle.

    Raises:
        ConfigError: the cluster has GPUs, all of which are in use. On CPUs it would give other
            figures, and more slowly.
    """
    deadline = time.monotonic() + TIMEOUT_S
    most_idle = (0, 0)
    settled_at = time.monotonic()
    while True:
        in_all = _whole([ray.cluster_resources()])
        # Halves of GPUs on two nodes are no GPU.
        idle = _whole(available_resources_per_node().values())
        num_needed = num_cpus_needed(idle[1])
        now = time.monotonic()
        if idle > most_idle:
            most_idle, settled_at = idle, now
        # The workers of a dead driver end one after the other: not all is free at once.
        is_settled = idle == in_all or now - settled_at >= SETTLED_AFTER_S
        is_enough = idle[0] >= num_needed and (idle[1] > 0 or not in_all[1])
        if is_enough and is_settled:
            return idle
        if in_all[0] < num_needed or now > deadline:
            break
        time.sleep(1)
    if in_all[1] and not idle[1]:
        raise ConfigError(f"all {in_all[1]} GPUs of the cluster are in use, expected one to spare")
    return idle


def wait_for_gpus() -> int:
    """Return the number of idle GPUs; 0 on a cluster without any.

    Raises:
        ConfigError: all of them are in use.
    """
    return wait_for_idle(lambda _: 0)[1]


def _whole(nodes: Iterable[dict[str, float]]) -> tuple[int, int]:
    """Return the sums of whole CPUs and of whole GPUs of some nodes."""
    counts = [(int(node.get("CPU", 0)), int(node.get("GPU", 0))) for node in nodes]
    return sum(cpus for cpus, _ in counts), sum(gpus for _, gpus in counts)
