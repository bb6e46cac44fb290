"""CPU seconds of a job by stage, from the accounting of its processes."""

import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field

import psutil

SAMPLE_EVERY_S = 0.25
OTHER = "Ray's own processes"
# Part of a process's command line, and the stage that it works for. Ray names a worker after the
# task or the actor that it runs.
STAGES = {
    "sandbox_child": "decoding and lungs",
    "header_child": "headers",
    "Decoder": "decoder's worker",
    "PredictorWorker": "network",
    "measure": "measuring",
    "scan_folders": "headers",
    "jobs/screen.py": "driver",
}


@dataclass
class ProcessTimes:
    """CPU seconds of a process and all its descendants, sampled while they run.

    A process that ends between two samples loses at most the time since the first of them.
    """

    pid: int
    samples: list[tuple[float, dict[str, float]]] = field(default_factory=list)
    """Time, and the CPU seconds of every stage up to then."""
    _stage_of: dict[int, str] = field(default_factory=dict)
    _seconds_of: dict[int, float] = field(default_factory=dict)
    _stopped: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "ProcessTimes":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stopped.set()
        self._thread.join()

    def seconds(self, after: float, before: float) -> dict[str, float]:
        """Return the CPU seconds of every stage between two times."""
        first, last = self._at(after), self._at(before)
        return {stage: spent - first.get(stage, 0.0) for stage, spent in last.items()}

    def _at(self, moment: float) -> dict[str, float]:
        past = [by_stage for when, by_stage in self.samples if when <= moment]
        return past[-1] if past else {}

    def _watch(self) -> None:
        while not self._stopped.wait(SAMPLE_EVERY_S):
            try:
                parent = psutil.Process(self.pid)
                processes = [parent, *parent.children(recursive=True)]
            except psutil.Error:  # the job has ended
                return
            for process in processes:
                self._note(process)
            self.samples.append((time.time(), self._by_stage()))

    def _note(self, process: psutil.Process) -> None:
        try:
            with process.oneshot():
                times = process.cpu_times()
                command = " ".join(process.cmdline())
        except psutil.Error:
            return
        self._seconds_of[process.pid] = times.user + times.system
        stage = next((name for part, name in STAGES.items() if part in command), None)
        # An idle worker has lost the name of its last task; its time belongs to that.
        self._stage_of[process.pid] = stage or self._stage_of.get(process.pid, OTHER)

    def _by_stage(self) -> dict[str, float]:
        by_stage: dict[str, float] = defaultdict(float)
        for pid, seconds in self._seconds_of.items():
            by_stage[self._stage_of[pid]] += seconds
        return dict(by_stage)
