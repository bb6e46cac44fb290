"""One phase of a screening of series that exist in the manifest alone: ``benchmarks.scale``.

python -m benchmarks.synthetic_run FOLDER NUM_SERIES {screen,view} NOTES [--stored ROWS]
    [--die-at ROWS]

Stages are replaced by functions that count an attempt and return records of usual size, without
pixels; plan, Ray Data, finished rows, commit and view are those of a real run. Adds a line of JSON
to NOTES: seconds, and the peak memory of the driver and of Ray's head. ``--stored``: rows that a
new run has already, as if an earlier driver had stored them. ``--die-at`` notes and then kills this
process when so many rows are stored.
"""

import argparse
import json
import os
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
import pyarrow.parquet as pq

from benchmarks.synthetic_series import (
    Decoder,
    Predictor,
    finished,
    measure,
    run_of,
    series_rows,
)
from covtanet import ray_data, runtime
from covtanet.archive.manifest import IGNORED_SCHEMA
from covtanet.cluster import Turn
from covtanet.commands import ledger as ledger_command
from covtanet.ledger import finished_rows
from covtanet.ledger.commit import commit_run
from covtanet.ledger.finished_rows import finished_keys
from covtanet.ledger.run import Run, begin_run
from covtanet.ledger.work import batched, write_manifest
from covtanet.screening.assembly import Stages, limit_object_store
from covtanet.screening.attempt_counter import AttemptCounter
from covtanet.screening.config import ScreeningConfig
from covtanet.screening.pipeline import screen_with
from covtanet.screening.plan import make_plan
from covtanet.screening.stages import new_record

SAMPLE_EVERY_S = 0.5
ROWS_PER_CHUNK = 1000
# Ray's own processes of a head, by parts of their command lines.
HEAD = ("gcs_server", "raylet/raylet", "dashboard")


class Peaks:
    """The largest memory of this process and of Ray's head, sampled in a thread."""

    def __init__(self) -> None:
        self.driver_mb = 0.0
        self.head_mb = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._over.wait(SAMPLE_EVERY_S):
            self.sample()

    def sample(self) -> None:
        """Look at the memory now."""
        driver = psutil.Process()
        head = [each for each in driver.children(recursive=True) if _is_of_head(each)]
        # Unshared: the object store is bounded by itself.
        self.driver_mb = max(self.driver_mb, _unshared_mb(driver))
        self.head_mb = max(self.head_mb, sum(map(_unshared_mb, head)))

    def __enter__(self) -> "Peaks":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()


def _is_of_head(process: psutil.Process) -> bool:
    try:
        command = " ".join(process.cmdline())
    except psutil.Error:
        return False
    return any(part in command for part in HEAD)


def _unshared_mb(process: psutil.Process) -> float:
    try:
        return float(process.memory_full_info().uss) / 1e6
    except psutil.Error:
        return 0.0


def _cpu_s() -> float:
    """Return the CPU seconds of this process and its descendants, ended ones included."""
    process = psutil.Process()
    total = 0.0
    for each in [process, *process.children(recursive=True)]:
        try:
            total += sum(each.cpu_times()[:4])
        except psutil.Error:
            continue
    return total


class Phases:
    """Seconds of each phase, CPU seconds too, and peaks of memory; noted at the end or before a
    death.
    """

    def __init__(self, notes: Path) -> None:
        self.notes = notes
        self.peaks = Peaks()
        self._seconds: dict[str, float] = defaultdict(float)
        self._started: dict[str, tuple[float, float]] = {}

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Measure how long a phase takes, in all its parts."""
        self._started[phase] = time.monotonic(), _cpu_s()
        yield
        self._end(phase, *self._started.pop(phase))

    def _end(self, phase: str, started: float, cpu_before_s: float) -> None:
        self._seconds[phase] += time.monotonic() - started
        self._seconds[f"{phase}_cpu"] += _cpu_s() - cpu_before_s

    def note(self) -> None:
        """Write what was measured so far; a phase that goes on counts up to now."""
        self.peaks.sample()  # also of what was over before the first sample
        for phase, before in self._started.items():
            self._end(phase, *before)
        seconds = {phase: round(value, 1) for phase, value in self._seconds.items()}
        memory = {
            "driver_mb": round(self.peaks.driver_mb),
            "head_mb": round(self.peaks.head_mb),
        }
        with self.notes.open("a") as file:
            file.write(json.dumps({**seconds, **memory}) + "\n")


def screen(folder: Path, num_series: int, phases: Phases, num_stored: int, die_at: int) -> None:
    """Make or continue the run.

    num_stored: rows that a new run has already. die_at: rows after which this process kills itself;
    0 for never.
    """
    run = run_of(folder)
    with phases.timed("start of Ray"):
        runtime.connect()
    is_new = not Path(run.work_uri("manifest.parquet")).exists()
    with phases.timed("plan"):
        begin_run(run)
        if is_new:
            ignored = folder / "ignored.parquet"
            pq.write_table(IGNORED_SCHEMA.empty_table(), ignored)
            write_manifest(run, series_rows(0, num_series), ignored)
    if is_new:
        store(run, num_stored)
    with phases.timed("plan"):
        finished_before = finished_keys(run)
        plan = make_plan(run, ScreeningConfig(), finished_before)
    if die_at:
        threading.Thread(target=_die, args=(run, die_at, phases), daemon=True).start()
    with phases.timed("screen"):
        ray_data.configure(preserve_order=False)
        limit_object_store(160, plan.workers)
        begin_attempt = AttemptCounter(run, {}).begin
        stages = Stages(
            decoder=Decoder,
            decoder_arguments={"run": run, "begin_attempt": begin_attempt},
            predictor=Predictor,
            predictor_arguments={"begin_attempt": begin_attempt},
            measure=partial(measure, begin_attempt=begin_attempt),
        )
        # The series are called 30 MB large, as they usually are, but nothing is read of them.
        grouped = replace(plan, num_bytes=plan.num_series)
        screen_with(run, grouped, stages, finished_before, Turn())
    with phases.timed("commit"):
        counts = commit_run(run)
    if counts.series != num_series:
        raise SystemExit(f"{counts.series} rows, expected {num_series}")


def store(run: Run, num_rows: int) -> None:
    """Store the rows of the first series, without Ray."""
    records = (finished(new_record(row, run.archive)) for row in series_rows(0, num_rows))
    for chunk in batched(records, ROWS_PER_CHUNK):
        finished_rows.store_rows(run, chunk)


def _die(run: Run, num_rows: int, phases: Phases) -> None:
    while finished_rows.num_finished(run.work_uri()) < num_rows:
        time.sleep(1)
    phases.note()
    os.kill(os.getpid(), signal.SIGKILL)


def view(folder: Path, phases: Phases) -> None:
    """Write the newest rows of the ledger to a file, as ``covtanet ledger view --out``."""
    with phases.timed("view"):
        ledger_command.main([run_of(folder).ledger, "view", "--out", str(folder / "view.parquet")])


def main() -> int:
    """Run one phase and print what it took."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("folder", type=Path)
    options.add_argument("num_series", type=int)
    options.add_argument("phase", choices=("screen", "view"))
    options.add_argument("notes", type=Path)
    options.add_argument("--stored", type=int, default=0)
    options.add_argument("--die-at", type=int, default=0)
    arguments = options.parse_args()
    phases = Phases(arguments.notes)
    with phases.peaks:
        if arguments.phase == "view":
            view(arguments.folder, phases)
        else:
            screen(
                arguments.folder,
                arguments.num_series,
                phases,
                arguments.stored,
                arguments.die_at,
            )
    phases.note()
    return 0


if __name__ == "__main__":
    sys.exit(main())
