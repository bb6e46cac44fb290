"""Two thousand small series while a worker is killed every minute: rows, and memory over time."""

import os
import threading
from pathlib import Path

import psutil

from benchmarks.measure import CORES, WORK, Result, say
from benchmarks.screening_runs import run_job
from covtanet.phantoms.sampling import configs
from covtanet.phantoms.training_set import write_training_set

NUM_SERIES, NUM_DISTINCT = 2000, 20
KILL_EVERY_S = 60
# Texts in the command lines of the job's workers, killed in turn.
VICTIMS = ("Decoder", "PredictorWorker", "_measure")


class Killer:
    """Kill one of the job's workers every minute; a turn without such a worker is skipped."""

    def __init__(self) -> None:
        self.num_killed = 0

    def __call__(self, pid: int, is_over: threading.Event) -> None:
        """Kill until the job is over."""
        turn = 0
        while not is_over.wait(KILL_EVERY_S):
            self._kill(pid, VICTIMS[turn % len(VICTIMS)])
            turn += 1

    def _kill(self, pid: int, victim: str) -> None:
        for process in psutil.Process(pid).children(recursive=True):
            command = " ".join(process.cmdline())
            if victim in command:
                process.kill()
                self.num_killed += 1
                say(f"killed {command}")
                return


def measure() -> list[Result]:
    """(n) one row per series, and peak memory in the second half over that in the first."""
    folder = WORK / f"many-{NUM_SERIES}"
    if not folder.exists():
        _write_series(folder)
    killer = Killer()
    run = run_job(folder, killer)
    half = (run.started + run.ended) / 2
    growth = run.memory.peak_bytes(after=half) / run.memory.peak_bytes(before=half)
    statuses = run.ledger["status"].to_pylist()
    num_keys = len(set(run.ledger["series_key"].to_pylist()))
    rows = f"rows for {NUM_SERIES} small series, {killer.num_killed} workers killed"
    bound = str(NUM_SERIES)
    return [
        Result("n", rows, f"{run.ledger.num_rows}", bound),
        Result("n", "distinct series among them", f"{num_keys}", bound),
        Result("n", "screened", f"{statuses.count('screened')}", bound),
        Result("n", "peak memory, second half over first half", f"{growth:.2f} x", "<= 1.1 x"),
    ]


def _write_series(folder: Path) -> None:
    """Write few distinct series, and link them many times: the archive takes little room."""
    say(f"making {NUM_SERIES} series, {NUM_DISTINCT} of them distinct")
    write_training_set(str(WORK / "distinct"), configs(NUM_DISTINCT, 6, 64, 14), CORES)
    distinct = sorted((WORK / "distinct" / "volumes").iterdir())
    for number in range(NUM_SERIES):
        study = folder / f"{number // 100:02d}" / f"study-{number:04d}"
        study.mkdir(parents=True)
        os.link(distinct[number % NUM_DISTINCT], study / "ct.nii.gz")
