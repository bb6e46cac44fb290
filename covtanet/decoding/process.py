"""A child process with two pipes: its start, its end, and writing to it within a time."""

import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from covtanet.decoding import seccomp
from covtanet.decoding.framing import PIPE_BYTES

Process = subprocess.Popen[bytes]

CODE = "import sys; sys.path.insert(0, sys.argv[1]); from covtanet.decoding.{} import main; main()"
ROOT = str(Path(__file__).resolve().parents[2])
# Unlike its parent, the child keeps freed memory for its next series: fresh pages for every slice
# would cost it as much as decoding does. It is replaced long before that could pile up. Above
# 256 MiB, which an ordinary series does not need, it gives memory back: the bytes of a large series
# are freed before its masks are made, and its limit of memory leaves no room for both.
ENVIRONMENT = {
    "LANG": "C.UTF-8",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(256 << 20),
}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Resources that a child may use."""

    memory_mib: int
    """Memory in addition to the code that the child has loaded."""
    timeout_s: float
    """Wall-clock time of a request, not counting the time that storage takes."""
    allow_weak: bool = False
    """Use a child even if the kernel cannot confine it in every way."""


def start_process(program: str, limits: Limits) -> Process:
    """Start a child. program: its module in covtanet.decoding.

    Raises:
        OSError: the system starts no process.
    """
    # Before the child exists, which could read this process's memory otherwise.
    seccomp.hide_memory()
    # The interpreter itself may need this one variable to start.
    inherited = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    process = subprocess.Popen(
        [sys.executable, "-I", "-c", CODE.format(program), ROOT, json.dumps(asdict(limits))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=inherited | ENVIRONMENT,
        cwd="/",
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    for pipe in (process.stdin, process.stdout):
        # The kernel limits the large pipes of a user; a small pipe is slower, but does.
        with suppress(OSError):
            fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    os.set_blocking(process.stdin.fileno(), False)
    return process


@contextmanager
def killed_after(process: Process, timeout_s: float) -> Iterator[threading.Event]:
    """Kill the process if the block takes longer than a time; the event is set if it did."""
    is_late = threading.Event()

    def kill() -> None:
        is_late.set()
        kill_process(process)

    timer = threading.Timer(max(0.0, timeout_s), kill)
    timer.daemon = True
    timer.start()
    try:
        yield is_late
    finally:
        timer.cancel()


def kill_process(process: Process) -> None:
    """Kill the process and its group; nothing happens if it has ended and been waited for."""
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def end_process(process: Process) -> None:
    """Kill the process, wait for it and close its pipes."""
    kill_process(process)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is None:
            continue
        with suppress(OSError):  # unsent bytes are lost with the process
            pipe.close()


def write_within(descriptor: int, data: bytes | memoryview, timeout_s: float) -> float:
    """Write all of the data to a non-blocking pipe; return how long that took, in seconds.

    Raises:
        TimeoutError: the reader did not take it within the time.
        BrokenPipeError: the reader has ended.
    """
    ready = select.poll()
    ready.register(descriptor, select.POLLOUT)
    unsent = memoryview(data)
    started_s = time.monotonic()
    while unsent:
        spent_s = time.monotonic() - started_s
        if not ready.poll(max(0.0, timeout_s - spent_s) * 1000):
            raise TimeoutError
        unsent = unsent[os.write(descriptor, unsent) :]
    return time.monotonic() - started_s
