"""The end of a plan that stands still because nodes were lost.

Ray starts the workers of a lost node again on the CPUs that are left, and the workers of one stage
may take all of them. Ray Data then waits for a node to join; a new plan needs none.
"""

import time
from typing import Any

import ray
from ray.data._internal.execution.execution_callback import ExecutionCallback

from covtanet.cluster import nodes_with_cpus
from covtanet.errors import NodesLostError
from covtanet.screening.worker_counts import num_cpus_needed

LOOK_EVERY_S = 5.0
# Longer than most series take: a plan that only seems to stand still loses the series in flight.
STANDS_STILL_S = 120.0


class StandStill:
    """A plan in which nothing has moved for long since a node was lost.

    nodes: that the plan starts with. Pure: its callers read the clock.
    """

    def __init__(self, nodes: set[str], now: float) -> None:
        self.nodes = nodes
        self.num_moved = 0
        self.moved_at = now

    def lasts(self, nodes: set[str], num_moved: int, now: float) -> bool:
        """Return whether the plan stands still for longer than a series may take.

        nodes: that live. num_moved: blocks that have left a stage so far.
        """
        has_moved = num_moved != self.num_moved
        # None is lost, or the plan goes on with another in its place.
        if self.nodes <= nodes or (has_moved and len(nodes) >= len(self.nodes)):
            self.nodes = nodes
            self.moved_at = now
        if has_moved:
            self.num_moved = num_moved
            self.moved_at = now
        return now - self.moved_at >= STANDS_STILL_S


class NodeWatch(ExecutionCallback):  # type: ignore[misc]
    """Ray Data's callback that looks at the nodes while it executes a plan."""

    def __init__(self) -> None:
        self.looked_at = time.monotonic()
        self.stand_still = StandStill(set(cpus_by_node()), self.looked_at)
        self.began_with_gpus = _num_gpus() > 0

    def on_execution_step(self, executor: Any) -> None:
        """End the plan if it stands still.

        Raises:
            NodesLostError: the driver gets it in place of the next row.
        """
        now = time.monotonic()
        if now - self.looked_at < LOOK_EVERY_S:
            return
        self.looked_at = now
        # Ray Data has no public count of what moves between its stages.
        num_moved = sum(operator.metrics.num_outputs_taken for operator in executor._topology)
        nodes = cpus_by_node()
        lasts = self.stand_still.lasts(set(nodes), num_moved, now)
        node_cpus = list(nodes.values())
        if lasts and has_room(node_cpus, _num_gpus(), needs_gpu=self.began_with_gpus):
            num_lost = len(self.stand_still.nodes - set(nodes))
            raise NodesLostError(f"{num_lost} nodes were lost and no series moves")


def cpus_by_node() -> dict[str, int]:
    """Return the number of CPUs of every living node that has any, by its ID."""
    return {node["NodeID"]: int(node["Resources"]["CPU"]) for node in nodes_with_cpus()}


def has_room(node_cpus: list[int], num_gpus: int, *, needs_gpu: bool) -> bool:
    """Return whether the rest of a screening can be planned for the nodes that are left.

    node_cpus: CPUs of each node. needs_gpu: the screening began on GPUs. On CPUs the same series
    would get other figures, so it waits for a GPU instead.
    """
    if needs_gpu and not num_gpus:
        return False
    return sum(node_cpus) >= num_cpus_needed(node_cpus, num_gpus)


def _num_gpus() -> int:
    return int(ray.cluster_resources().get("GPU", 0))
