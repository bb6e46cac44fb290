"""A model and archives to screen, and the screening job with the memory that it takes."""

import math
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.measure import CORES, ROOT, WORK, say
from benchmarks.process_times import ProcessTimes
from covtanet.model.covtanet import INPUT_PX, SIZES, CovTANet
from covtanet.model.description import Capabilities, Preprocessing
from covtanet.model.saved_model import SavedModel, save_model
from covtanet.phantoms.archive import write_archive
from covtanet.phantoms.sampling import configs
from covtanet.runtime import ExitCode

# Series that ``write_archive`` damages, beside the sound ones.
NUM_DAMAGED = 17
SINCE_FIRST = re.compile(r"series in ([\d.]+) s since work on the first began")


def model_folder(seed: int = 0) -> Path:
    """Return an untrained network: speed does not depend on the weights."""
    folder = WORK / (f"model{seed}" if seed else "model")
    if not folder.exists():
        torch.manual_seed(seed)
        model = SavedModel(
            network=CovTANet(SIZES["small"]),
            preprocessing=Preprocessing(size_px=INPUT_PX["small"]),
            capabilities=Capabilities(segments=True, diagnoses=True),
        )
        save_model(folder, model)
    return folder


def archive(count: int, size_px: int, num_slices: int) -> Path:
    """Return an archive of sound phantoms, NIfTI and DICOM in turn, and the damaged kinds."""
    folder = WORK / f"archive-{count}-{size_px}-{num_slices}"
    if not folder.exists():
        say(f"making {count} series of {size_px} x {size_px} x {num_slices}")
        phantoms = list(configs(count - NUM_DAMAGED, 5, size_px, num_slices))
        write_archive(str(folder), f"{folder}-truth", phantoms, CORES)
    return folder


def held_bytes(pid: int) -> int:
    """Return the proportional set size of a process and all its children.

    Raises:
        psutil.NoSuchProcess: if the process has ended.
    """
    parent = psutil.Process(pid)
    total = 0
    for process in [parent, *parent.children(recursive=True)]:
        try:
            total += process.memory_full_info().pss
        except psutil.Error:
            continue
    return int(total)


class Memory:
    """Sample the memory of a process and all its children twice a second, while it runs.

    samples: time and bytes.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.samples: list[tuple[float, int]] = []
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Memory":
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stopped.set()
        self.thread.join()

    def _watch(self) -> None:
        while not self.stopped.wait(0.5):
            try:
                self.samples.append((time.time(), held_bytes(self.pid)))
            except psutil.Error:  # the process has ended
                return

    def peak_bytes(self, after: float = 0, before: float = math.inf) -> int:
        """Return the most memory between two times."""
        return max(held for moment, held in self.samples if after <= moment <= before)


@dataclass(frozen=True, kw_only=True)
class JobRun:
    """A screening of a folder, from the begin of its first series to its committed ledger."""

    launched: float
    started: float
    ended: float
    memory: Memory
    times: ProcessTimes
    ledger: pa.Table

    @property
    def cpu_s(self) -> float:
        """CPU seconds of all processes without the start of Ray and of the workers."""
        return sum(self.times.seconds(self.started, self.ended).values())

    @property
    def spent_s(self) -> float:
        """Seconds without the start of Ray and of the workers."""
        return self.ended - self.started

    @property
    def start_s(self) -> float:
        """Seconds from the command to the work on the first series."""
        return self.started - self.launched


def run_job(
    archive: Path | str,
    disturb: Callable[[int, threading.Event], None] | None = None,
    model: Path | None = None,
    root: Path = ROOT,
    options: Sequence[str] = (),
) -> JobRun:
    """Screen an archive on a Ray that the job starts.

    model: null for the untrained network of ``model_folder``. root: a copy of this repository.
    options: further ones of the command.
    disturb: runs in a thread; gets the job's pid, and an event that is set when the job ends.
    """
    with tempfile.TemporaryDirectory() as ledger:
        launched = time.time()
        process = start_screening(
            str(archive), ledger, model or model_folder(), root=root, options=options
        )
        is_over = threading.Event()
        if disturb is not None:
            threading.Thread(target=disturb, args=(process.pid, is_over), daemon=True).start()
        with Memory(process.pid) as memory, ProcessTimes(process.pid) as times:
            started, output = _follow(process)
        is_over.set()
        # Committed; an archive of which all series are refused ends with BELOW_BOUND.
        if process.wait() not in (ExitCode.DONE, ExitCode.BELOW_BOUND):
            raise SystemExit(output)
        (committed,) = Path(ledger).glob("date=*/*.parquet")
        return JobRun(
            launched=launched,
            started=started,
            ended=committed.stat().st_mtime,
            memory=memory,
            times=times,
            ledger=pq.ParquetFile(committed).read(),
        )


def start_screening(
    archive: str,
    ledger: str,
    model: Path,
    root: Path = ROOT,
    environment: Mapping[str, str] = MappingProxyType({}),
    options: Sequence[str] = (),
) -> "subprocess.Popen[str]":
    """Start the job of a copy of this repository, with further variables and options."""
    command = [
        sys.executable, str(root / "jobs" / "screen.py"), "--archive", archive,
        "--ledger", ledger, "--model", str(model), *options,
    ]  # fmt: skip
    own_ray = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # Workers import the package from the driver's folder first, which is that of the copy.
        cwd=root,
        env={**own_ray, "PYTHONPATH": str(root), **environment},
    )


def _follow(process: "subprocess.Popen[str]") -> tuple[float, str]:
    """Read a job's output to its end; return the time when its first series began, and
    the output.
    """
    assert process.stdout is not None
    started = 0.0
    lines = []
    for line in process.stdout:
        lines.append(line)
        if since_first := SINCE_FIRST.search(line):
            started = time.time() - float(since_first[1])
    return started, "".join(lines)
