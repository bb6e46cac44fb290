"""Disturbances of a night: kills, a full disk, a store at fault; one falls upon a job."""

import os
import random
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks.soak.cluster import RAYLET, Cluster
from benchmarks.soak.faulty_store import FaultyStore, StoreFault
from infra.local.jobs import Job
from infra.local.ray_processes import signal_first

DRIVER, DISK_FULL = "driver killed", "disk full"
# Texts in the command lines of the processes that are killed. Not "ray::" alone: it stands in that
# of the node's agent as well, without which the node dies.
VICTIMS = {
    "decoder killed": "Decoder",
    "decoder's child killed": "sandbox_child",
    "predictor killed": "PredictorWorker",
    "measuring task killed": "_measure",
    "idle worker killed": "ray::IDLE",
    "node killed": RAYLET,
}
KINDS = (DRIVER, DISK_FULL, *VICTIMS, *StoreFault)
# A disturbance falls upon a job from its start on, or once it has said that workers start.
MARKS = ("", "screening ", "screening ")
MAX_DELAY_S = 8.0
# A victim that has not started yet is waited for.
WAIT_FOR_VICTIM_S = 60.0
# A store recovers while the job still runs, or its next start finds it sound.
HOLD_S = (5.0, 40.0)
LEFT_BYTES = 16 << 10


@dataclass(frozen=True, kw_only=True)
class Disturbance:
    """What happens to one start of a night. mark: a text of its log, from which delay_s counts."""

    kind: str
    mark: str = ""
    delay_s: float = 0.0
    hold_s: float = 0.0


def deck(rng: random.Random, kinds: tuple[str, ...]) -> Iterator[Disturbance]:
    """Yield disturbances for ever: every kind once, in random order, then every kind again."""
    while True:
        for kind in rng.sample(kinds, len(kinds)):
            yield Disturbance(
                kind=kind,
                mark=rng.choice(MARKS),
                delay_s=rng.uniform(0, MAX_DELAY_S),
                hold_s=rng.uniform(*HOLD_S),
            )


@contextmanager
def small_disk(folder: Path, num_bytes: int) -> Iterator[bool]:
    """Make a folder a disk of its own, which can run full; yields whether it is (as root only)."""
    folder.mkdir(parents=True, exist_ok=True)
    if os.geteuid() != 0:
        yield False
        return
    options = ["-t", "tmpfs", "-o", f"size={num_bytes}"]
    subprocess.run(["mount", *options, "covtanet-soak", str(folder)], check=True)
    try:
        yield True
    finally:
        # Lazy: the server of the bucket may still be about to end.
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@dataclass(frozen=True, kw_only=True)
class Machinery:
    """What the disturbances reach. disk: of the ledger."""

    cluster: Cluster
    store: FaultyStore
    disk: Path


class Strike:
    """One disturbance of one job, in a thread of its own. happened: whether it met anything."""

    def __init__(self, disturbance: Disturbance, job: Job, machinery: Machinery) -> None:
        self.disturbance = disturbance
        self.job = job
        self.machinery = machinery
        self.happened = False
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._strike, daemon=True)
        self._thread.start()

    def end(self) -> None:
        """End the disturbance, once its job has ended."""
        self._is_over.set()
        self._thread.join()

    def _strike(self) -> None:
        kind = self.disturbance.kind
        while self.disturbance.mark not in self.job.output:
            if self._is_over.wait(0.1):
                return
        if self._is_over.wait(self.disturbance.delay_s):
            return
        if kind == DRIVER:
            self.happened = self.job.process.poll() is None
            self.job.kill()
        elif kind in VICTIMS:
            self._kill(VICTIMS[kind])
        elif kind == DISK_FULL:
            self._fill_disk()
        else:
            self._break_store(StoreFault(kind))

    def _kill(self, victim: str) -> None:
        deadline = time.monotonic() + WAIT_FOR_VICTIM_S
        while not self.happened and time.monotonic() < deadline:
            self.happened = signal_first(self.machinery.cluster.environment, victim)
            if self._is_over.wait(0.1):
                return

    def _fill_disk(self) -> None:
        filler = self.machinery.disk / "filler"
        state = os.statvfs(self.machinery.disk)
        try:
            with filler.open("wb") as file, suppress(OSError):
                os.posix_fallocate(file.fileno(), 0, state.f_bavail * state.f_frsize - LEFT_BYTES)
                self.happened = True
            self._is_over.wait(self.disturbance.hold_s)
        finally:
            filler.unlink(missing_ok=True)

    def _break_store(self, fault: StoreFault) -> None:
        store = self.machinery.store
        before = store.num_affected(fault)
        store.faults.add(fault)
        self._is_over.wait(self.disturbance.hold_s)
        store.faults.discard(fault)
        self.happened = store.num_affected(fault) > before
