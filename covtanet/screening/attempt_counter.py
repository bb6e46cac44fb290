"""The attempts of a run's workers, counted by an actor on the node of the driver."""

import os
from functools import cache

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from covtanet.ledger.attempts import Attempts, Worker
from covtanet.ledger.run import Run


class AttemptCounter:
    """Counts attempts for all workers of a run; called in a worker before it begins a series.

    It lives as long as its driver. If its process dies, Ray starts it again and repeats the call.
    """

    def __init__(self, run: Run) -> None:
        """Start the actor; called in the driver."""
        node_id = ray.get_runtime_context().get_node_id()
        self._actor = _AttemptsActor.options(  # type: ignore[attr-defined]
            num_cpus=0,
            max_restarts=-1,
            max_task_retries=-1,
            # With the driver: a node that is lost takes no counts along.
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
        ).remote(run)

    def begin(self, series_key: str, stage: str) -> bool:
        """Count one more attempt of this worker at a series; return whether it may be made."""
        # About a millisecond: nothing to what a stage takes for a series that can be decoded.
        may_begin: bool = ray.get(self._actor.begin.remote(series_key, stage, _this_worker()))
        return may_begin


@ray.remote
class _AttemptsActor(Attempts):
    """``Attempts`` in a process of its own."""

    def __init__(self, run: Run) -> None:
        super().__init__(run, _living_nodes)


def _living_nodes() -> set[str]:
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


@cache
def _this_worker() -> Worker:
    context = ray.get_runtime_context()
    return Worker(worker_id=context.get_worker_id(), node_id=context.get_node_id(), pid=os.getpid())
