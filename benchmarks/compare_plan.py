"""Trainings of the comparison of all segmenters: their order, learning rates and memory.

Rates are chosen first, then networks are trained in order of value. No torch is needed.
"""

import threading
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

# Pairs of a scan with much and a scan with little lesion, so that training sees both in every fold.
FOLDS = (
    ("coronacases-003", "coronacases-005"),
    ("coronacases-001", "coronacases-002"),
    ("coronacases-007", "coronacases-008"),
)
# A rate is chosen by a training on one patient of fold 1 and the single slices, judged on the other
# patient of fold 1. So no patient that is tested in fold 0 or 2 has any part in the choice; for
# fold 1 the choice is not independent of its two patients. Fixed before any result.
RATE_JUDGE = "coronacases-002"
RATE_TRAINED = ("coronacases-001", "slices")
RATES = (1e-3, 3e-3, 6e-3)
# FCN has no batch norm and diverged at 2e-3.
FCN_RATES = (1e-4, 3e-4, 6e-4)
ONE_VIEW = "one view"
FOUR_FLIPS = "four flips"
MAIN = ("V8", "Unet", "V8 without TAU", "V7")
OTHERS = (
    "Unet++",
    "Attention-Unet",
    "MultiResUnet",
    "Inf-Net",
    "Gated-Unet",
    "COPLE-Net",
    "CPF-Net",
    "FCN",
    "Vnet",
    "Mini-SegNet",
    "V2",
    "V3",
    "V4",
    "V5",
    "V6",
)
# Variants of V8, which take its rate.
RATE_OF = {"V8, one slice": "V8", "V8, random start": "V8"}
# Fold 2 first: on it, V8 and the Unet differed most in the first comparison.
FOLD_ORDER = (2, 0, 1)
# Memory of a training whose peak is not measured yet, in GiB.
UNKNOWN_GIB = 8.0
# Memory at half the side over that at full size, weights included.
SMALL_SHARE = 0.4
# Time to build, move and evaluate a network beside the steps, in seconds.
OVERHEAD_S = 8.0
# Seconds per step before the first measurement: the Unet took 0.03, V8 0.10.
UNKNOWN_STEP_S = 0.1
# A step takes longer when more trainings share the card.
STEP_MARGIN = 1.25


@dataclass(frozen=True, kw_only=True)
class Task:
    """One training: of a network on one fold, or a short one for the choice of its rate."""

    kind: str
    """``rate`` or ``training``."""
    network: str
    num_steps: int
    fold: int | None = None
    rate: float = 0.0
    """Learning rate; 0 until it is chosen."""
    seed: int = 0
    is_probe: bool = False
    """Measure a step at full size, too."""

    @property
    def label(self) -> str:
        """Identity of the task in results: everything but the chosen rate and the probe."""
        rate = f"rate {self.rate:g}" if self.kind == "rate" else f"fold {self.fold}"
        return f"{self.network}, {rate}, {self.num_steps} steps, seed {self.seed}"


def rate_tasks(num_steps: int) -> list[Task]:
    """Return the trainings that choose the rates, of the main networks first."""
    tasks = []
    for network in (*MAIN, *OTHERS):
        for index, rate in enumerate(FCN_RATES if network == "FCN" else RATES):
            tasks.append(
                Task(
                    kind="rate",
                    network=network,
                    num_steps=num_steps,
                    rate=rate,
                    is_probe=index == 0,
                )
            )
    return tasks


def training_tasks(main_steps: int, other_steps: int) -> list[Task]:
    """Return the trainings on folds in order of value, without repetitions."""
    plan = [(name, fold, main_steps, 0) for fold in FOLD_ORDER for name in MAIN]
    # The others with equal, fewer steps, and V8 and the Unet at that number.
    compared = (*MAIN[:2], *OTHERS)
    plan += [(name, fold, other_steps, 0) for fold in FOLD_ORDER for name in compared]
    # Other seeds, one slice and random start: on fold 2 only.
    plan += [(name, FOLD_ORDER[0], main_steps, 1) for name in MAIN[:2]]
    plan += [(name, FOLD_ORDER[0], main_steps, 0) for name in RATE_OF]
    return [
        Task(kind="training", network=name, fold=fold, num_steps=steps, seed=seed)
        for name, fold, steps, seed in dict.fromkeys(plan)
    ]


def chosen_rate(rows: Iterable[dict[str, Any]], network: str) -> float | None:
    """Return the rate with the largest Dice per slice on the judging patient, if there is any.

    rows: results, of which those that chose this network's rate count.
    """
    judged = RATE_OF.get(network, network)
    dice = {}
    for row in rows:
        if row["kind"] == "rate" and row["network"] == judged and row["status"] == "done":
            dice[row["rate"]] = rate_dice(row)
    return max(dice, key=lambda rate: dice[rate]) if dice else None


def rate_dice(row: dict[str, Any]) -> float:
    """Return the mean Dice per slice of a training that chooses a rate, with four flips.

    As ``per_slice`` of ``overlap``, without its bootstrap: the plan asks for it often.
    """
    slices = [counts for views in row["counts"].values() for counts in views[FOUR_FLIPS]]
    marked = [(tp, fp, fn) for tp, fp, fn in slices if tp + fp + fn]
    dice: float = sum(2 * tp / (2 * tp + fp + fn) for tp, fp, fn in marked)
    return dice / max(1, len(marked))


class Plan:
    """Tasks that several threads take: the first that is ready and fits time and memory."""

    def __init__(self, tasks: Sequence[Task], rows: Sequence[dict[str, Any]], memory_gib: float):
        """rows: results of an earlier run, whose tasks are not repeated if they would end alike."""
        self.rows = list(rows)
        finished = {row["label"] for row in rows if row["status"] in ("done", "diverged")}
        self.waiting = deque(task for task in tasks if task.label not in finished)
        self.running: list[Task] = []
        self.repeated: set[str] = set()
        self.memory_gib = memory_gib
        self.changed = threading.Condition()

    def take(self, left_s: float) -> Task | None:
        """Remove and return a task that would end in ``left_s``; None if no task would.

        Returns None also while tasks wait for others: ``is_waiting`` tells.
        """
        with self.changed:
            for task in self.waiting:
                if self._is_ready(task, left_s):
                    self.waiting.remove(task)
                    started = self._with_rate(task)
                    self.running.append(started)
                    return started
        return None

    def is_waiting(self, left_s: float) -> bool:
        """Whether a task may become ready when a running one ends."""
        with self.changed:
            fitting = any(self._fits_time(task, left_s) for task in self.waiting)
            return bool(self.running) and fitting

    def finish(self, task: Task, row: dict[str, Any]) -> None:
        """Record a task's result; one that met out of memory is put back once, at the end."""
        with self.changed:
            self.rows.append(row)
            self.running.remove(task)
            if row["status"] == "out_of_memory" and task.label not in self.repeated:
                self.repeated.add(task.label)
                self.waiting.append(task)
            self.changed.notify_all()

    def _is_ready(self, task: Task, left_s: float) -> bool:
        used_gib = sum(self._peak_gib(other) for other in self.running)
        has_memory = not self.running or used_gib + self._peak_gib(task) <= self.memory_gib
        if not has_memory or not self._fits_time(task, left_s):
            return False
        return task.kind == "rate" or self._has_rate(task.network)

    def _has_rate(self, network: str) -> bool:
        judged = RATE_OF.get(network, network)
        pending = [*self.waiting, *self.running]
        if any(task.kind == "rate" and task.network == judged for task in pending):
            return False
        return chosen_rate(self.rows, network) is not None

    def _with_rate(self, task: Task) -> Task:
        if task.kind == "rate":
            return task
        rate = chosen_rate(self.rows, task.network)
        return Task(**{**asdict(task), "rate": rate})

    def _fits_time(self, task: Task, left_s: float) -> bool:
        return self._step_s(task) * task.num_steps * STEP_MARGIN + OVERHEAD_S <= left_s

    def _step_s(self, task: Task) -> float:
        measured = self._measured(task.network, "step_s")
        return measured[-1] if measured else UNKNOWN_STEP_S

    def _peak_gib(self, task: Task) -> float:
        measured = self._measured(task.network, "peak_gib")
        if not measured:
            return UNKNOWN_GIB
        is_small = task.kind == "rate" and not task.is_probe
        return max(measured) * (SMALL_SHARE if is_small else 1.0)

    def _measured(self, network: str, name: str) -> list[float]:
        """Return the measurements at full size, the newest last; V8's for its variants."""
        judged = RATE_OF.get(network, network)
        return [row[name] for row in self.rows if row["network"] == judged and row.get(name)]
