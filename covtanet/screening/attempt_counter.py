"""The attempts of a run's workers, counted by an actor on the node of the driver."""

import os
from functools import cache

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from covtanet.ledger.attempts import Attempts, AttemptsOfSeries, Worker
from covtanet.ledger.run import Run

# The driver waits so long for the attempts of a plan that ended, and then counts anew.
ANSWER_TIMEOUT_S = 10.0


class AttemptCounter:
    """The counts of attempts of all workers of a run.

    It lives as long as its driver. If its process dies, Ray starts it again and repeats the call.
    """

    def __init__(self, run: Run, earlier: AttemptsOfSeries) -> None:
        """Start the actor; called in the driver. earlier: attempts of earlier plans."""
        node_id = ray.get_runtime_context().get_node_id()
        self._actor = _AttemptsActor.options(  # type: ignore[attr-defined]
            num_cpus=0,
            max_restarts=-1,
            max_task_retries=-1,
            # Ray's head would keep a record of every call.
            enable_task_events=False,
            # With the driver: a node that is lost takes no counts along.
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
        ).remote(run, earlier)

    def begin(self, series_key: str, stage: str) -> bool:
        """Count one more attempt of this worker at a series; return whether it may be made.

        Called in a worker before it begins a series.
        """
        # About a millisecond: nothing to what a stage takes for a series that can be decoded.
        may_begin: bool = ray.get(self._actor.begin.remote(series_key, stage, _this_worker()))
        return may_begin

    def on_lost_nodes(self) -> AttemptsOfSeries:
        """Return the attempts on nodes that were lost, for the next plan."""
        try:
            attempts: AttemptsOfSeries = ray.get(
                self._actor.on_lost_nodes.remote(), timeout=ANSWER_TIMEOUT_S
            )
        except ray.exceptions.RayError:
            return {}
        return attempts


@ray.remote
class _AttemptsActor(Attempts):
    """``Attempts`` in a process of its own."""

    def __init__(self, run: Run, earlier: AttemptsOfSeries) -> None:
        super().__init__(run, _living_nodes, earlier)


def _living_nodes() -> set[str]:
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


@cache
def _this_worker() -> Worker:
    context = ray.get_runtime_context()
    return Worker(worker_id=context.get_worker_id(), node_id=context.get_node_id(), pid=os.getpid())
