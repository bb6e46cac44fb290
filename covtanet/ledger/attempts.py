"""Attempts at a series: how often a stage may begin one whose workers die.

Ray gives a series that kills its worker to the next worker, without end; this count ends it. It is
kept in memory, on the node of the driver, and each driver counts for itself: its own death is no
attempt at the series in flight. Only a second attempt is noted in storage, so that a series that
also takes the counting process down comes to its end.
"""

import json
import logging
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass

from covtanet import storage
from covtanet.ledger.run import Run

logger = logging.getLogger(__name__)

# Per stage and driver, of workers that died on nodes that live on.
MAX_ATTEMPTS = 3
# Attempts of any kind: a series that kills its node each time ends as well. Choice: a series that
# is interrupted by five pre-empted nodes in one night is less likely than one that kills them.
MAX_ATTEMPTS_WITH_LOST_NODES = 6


@dataclass(frozen=True, kw_only=True)
class Worker:
    """A process that makes attempts. worker_id: Ray's, unlike a pid never used again."""

    worker_id: str
    node_id: str
    pid: int


# By series key and stage, of series whose worker has not begun another since.
AttemptsOfSeries = Mapping[tuple[str, str], list[Worker]]


class Attempts:
    """Counts of the attempts of one driver's workers.

    living_nodes: returns the ids of the nodes that are alive. earlier: attempts of earlier plans of
    the same driver.
    """

    def __init__(
        self, run: Run, living_nodes: Callable[[], set[str]], earlier: AttemptsOfSeries
    ) -> None:
        self._run = run
        self._living_nodes = living_nodes
        self._attempts: defaultdict[tuple[str, str], list[Worker]] = defaultdict(list)
        self._attempts.update({key: list(workers) for key, workers in earlier.items()})
        self._series_at_work: dict[tuple[Worker, str], str] = {}
        self._restore()

    def begin(self, series_key: str, stage: str, worker: Worker) -> bool:
        """Count one more attempt of a stage at a series; return whether it may be made.

        A worker that begins the next series has survived the one before, whose attempts are
        forgotten. An attempt does not count if its node has been lost with all its workers.
        """
        self._forget_survived(series_key, stage, worker)
        attempts = self._attempts[series_key, stage]
        if worker not in attempts:
            if attempts and self._is_exhausted(attempts):
                return False
            attempts.append(worker)
        self._series_at_work[worker, stage] = series_key
        if len(attempts) > 1:
            # Before the attempt begins: it may be the one that takes this process down.
            self._note(series_key, stage, attempts)
        return True

    def _forget_survived(self, series_key: str, stage: str, worker: Worker) -> None:
        survived = self._series_at_work.get((worker, stage))
        if survived in (None, series_key):  # Ray repeats a call whose answer was lost
            return
        attempts = self._attempts.pop((survived, stage), [])
        if len(attempts) > 1:  # the note would be taken up after a restart
            with suppress(OSError):
                storage.delete(self._note_uri(survived, stage))

    def on_lost_nodes(self) -> AttemptsOfSeries:
        """Return the attempts on nodes that were lost, for the next plan."""
        living = self._living_nodes()
        lost = {
            key: [worker for worker in workers if worker.node_id not in living]
            for key, workers in self._attempts.items()
        }
        return {key: workers for key, workers in lost.items() if workers}

    def _is_exhausted(self, attempts: list[Worker]) -> bool:
        living = self._living_nodes()
        num_deaths = sum(worker.node_id in living for worker in attempts)
        return num_deaths >= MAX_ATTEMPTS or len(attempts) >= MAX_ATTEMPTS_WITH_LOST_NODES

    def _note(self, series_key: str, stage: str, attempts: list[Worker]) -> None:
        # Node and process name the log in which Ray keeps the worker's last lines.
        noted = {"series_key": series_key, "stage": stage, "workers": list(map(asdict, attempts))}
        try:
            storage.write_bytes(self._note_uri(series_key, stage), json.dumps(noted).encode())
        except OSError as error:  # the count in memory stands
            logger.warning("an attempt could not be noted: %s", type(error).__name__)

    def _note_uri(self, series_key: str, stage: str) -> str:
        return self._run.work_uri("attempts", self._run.driver, f"{series_key}-{stage}.json")

    def _restore(self) -> None:
        """Take up the counts of a process before this one, which died."""
        folder = self._run.work_uri("attempts", self._run.driver)
        try:
            for name in storage.list_names(folder):
                noted = json.loads(storage.read_bytes(storage.join(folder, name)))
                workers = [Worker(**worker) for worker in noted["workers"]]
                self._attempts[noted["series_key"], noted["stage"]] = workers
        except OSError as error:
            logger.warning("attempts that were noted cannot be read: %s", type(error).__name__)
