"""Untrusted bytes are decoded in a child process that can do nothing but compute.

The child has an empty environment, may open neither files nor sockets, may write nothing, and has limits of memory,
CPU time and wall-clock time. It stays warm from series to series. Bytes go in and arrays come out through two pipes,
framed by lengths and JSON: nothing is pickled in either direction, and every length that the child names is checked.

Not covered: the child runs as the same user, so a decoder that an input takes over could send signals; and it lives
on for later series until it is replaced.
"""

import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from covtanet.ct.window import WindowConfig
from covtanet.errors import DecoderError, StudyError, StudyTimeoutError
from covtanet.screening.decode import Prepared
from covtanet.screening.records import REASONS

CHILD = "import sys; sys.path.insert(0, sys.argv[1]); from covtanet.screening.sandbox_child import main; main()"
ROOT = str(Path(__file__).resolve().parents[2])
PIPE_BYTES = 1 << 20
HEADER_BYTES = 1 << 16
LENGTH_BYTES = 4
SERIES_PER_CHILD = 200
START_TIMEOUT_S, DEATH_S = 60.0, 5.0
# Time that a series gets beyond the fixed limit, by what it weighs.
BYTES_PER_EXTRA_S = 8 << 20
# The child keeps what it has freed for its next series, unlike its parent: fresh pages for every slice would cost it as
# much as decoding does. It is replaced long before that could pile up.
ENVIRONMENT = {
    "LANG": "C.UTF-8",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one series may cost. memory_mib: beyond the child's own. timeout_s: not counting what storage takes."""

    memory_mib: int
    timeout_s: float


class Sandbox:
    """Decodes and prepares one series at a time in a child process, started when first needed."""

    def __init__(self, window: WindowConfig, slice_step_mm: float, limits: Limits) -> None:
        self.window, self.slice_step_mm, self.limits = window, slice_step_mm, limits
        self._child: subprocess.Popen[bytes] | None = None
        self._num_series = 0

    def __call__(self, source_format: str, objects: Iterable[Iterable[bytes]]) -> Prepared:
        """Decode and prepare a series. objects: the bytes of its objects, each in chunks.

        Raises:
            StudyError: what the readers raise, or ``decode_crash`` where the child died of the input.
            StudyTimeoutError: where it takes longer than it may.
            DecoderError: a fault of this software, found in the child.
        """
        child = self._warm_child()
        assert child.stdin is not None
        assert child.stdout is not None
        is_clean = False
        try:
            left_s = self._send(child.stdin, self._request(source_format, objects))
            with _killed_after(child, left_s) as is_late:
                header = self._answer(child, is_late)
                is_refused = "num_slices" not in header
                prepared = None if is_refused else self._read_prepared(child.stdout, header)
            is_clean = not header.get("is_last")
        finally:
            if not is_clean:  # what is in the pipes belongs to no series
                self.close()
        if prepared is None:
            raise _refusal(header)
        return prepared

    def close(self) -> None:
        """End the child."""
        if self._child is not None:
            _end(self._child)
            self._child = None

    def _warm_child(self) -> subprocess.Popen[bytes]:
        if self._child is not None and (self._child.poll() is not None or self._num_series >= SERIES_PER_CHILD):
            self.close()
        if self._child is None:
            try:
                self._child = _start(self.limits)
            except DecoderError:  # the machine may have ended it; no series is to blame
                self._child = _start(self.limits)
            self._num_series = 0
        self._num_series += 1
        return self._child

    def _request(self, source_format: str, objects: Iterable[Iterable[bytes]]) -> Iterator[bytes | memoryview]:
        """A line of JSON, then each object: a 1, chunks behind their lengths, a length of 0. A 0 ends the request."""
        request = {
            "source_format": source_format,
            "window": asdict(self.window),
            "slice_step_mm": self.slice_step_mm,
        }
        yield json.dumps(request).encode() + b"\n"
        for chunks in objects:
            yield b"\x01"
            for chunk in chunks:
                for part in _parts(chunk):
                    yield len(part).to_bytes(LENGTH_BYTES, "little")
                    yield part
            yield bytes(LENGTH_BYTES)
        yield b"\x00"

    def _send(self, pipe: IO[bytes], request: Iterable[bytes | memoryview]) -> float:
        """Write a request; returns how long the child may still take, which works on it while it comes."""
        left_s = self.limits.timeout_s
        for part in request:  # which is read from storage; its errors are not those of the pipe
            left_s += len(part) / BYTES_PER_EXTRA_S
            try:
                left_s -= _put(pipe.fileno(), part, left_s)
            except BrokenPipeError:  # it gave up before the end, and says or shows why
                self._num_series = SERIES_PER_CHILD
                break
            except TimeoutError:
                raise self._too_long() from None
        return left_s

    def _answer(self, child: subprocess.Popen[bytes], is_late: threading.Event) -> dict[str, Any]:
        """The header of the child's answer."""
        assert child.stdout is not None
        try:
            header = json.loads(child.stdout.readline(HEADER_BYTES) or "null")
        except ValueError:
            header = None
        if not isinstance(header, dict):
            raise self._death(child, is_late)
        return header

    def _death(self, child: subprocess.Popen[bytes], is_late: threading.Event) -> Exception:
        with _killed_after(child, DEATH_S) as is_stuck:
            code = child.wait()
        if is_stuck.is_set():
            return StudyError("decode_crash", "the decoder's answer is none")
        if is_late.is_set() or code == -signal.SIGXCPU:
            return self._too_long()
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return StudyError("decode_crash", f"the decoder died of this input, {how}")

    def _too_long(self) -> StudyTimeoutError:
        return StudyTimeoutError(f"decoding took longer than {self.limits.timeout_s:g} s")

    def _read_prepared(self, pipe: IO[bytes], header: dict[str, Any]) -> Prepared:
        """The arrays behind the header; every length in it is checked before it is believed."""
        size = self.window.size_px
        num_slices, num_chosen, num_mask_bytes = (int(header[k]) for k in ("num_slices", "num_chosen", "mask_bytes"))
        total = num_chosen * (size * size * 2 + 8) + num_mask_bytes
        is_sound = 0 < num_chosen <= num_slices and num_mask_bytes >= 0
        if not is_sound or total > self.limits.memory_mib << 20:
            raise StudyError("decode_crash", "the decoder's answer contradicts itself")
        chosen = np.frombuffer(_read(pipe, num_chosen * 8), np.int64)
        slices = np.frombuffer(_read(pipe, num_chosen * size * size * 2), np.uint16).reshape(num_chosen, size, size)
        z, y, x = (float(mm) for mm in header["spacing_mm"])
        return Prepared(
            num_slices=num_slices,
            spacing_mm=(z, y, x),
            qc_flags=tuple(str(flag) for flag in header["qc_flags"]),
            chosen=chosen,
            slices=slices,
            masks=bytes(_read(pipe, num_mask_bytes)),
        )


def _refusal(header: dict[str, Any]) -> Exception:
    if header.get("reason") in REASONS:
        return StudyError(header["reason"], str(header.get("message"))[:300])
    return DecoderError(str(header.get("internal"))[:200])


def _start(limits: Limits) -> subprocess.Popen[bytes]:
    """Start a child and wait until it has imported what it needs and shut the doors behind it."""
    library_path = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    child = subprocess.Popen(
        [sys.executable, "-I", "-c", CHILD, ROOT, json.dumps(asdict(limits))],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=library_path | ENVIRONMENT,
        cwd="/", start_new_session=True,
    )  # fmt: skip
    assert child.stdin is not None
    assert child.stdout is not None
    for pipe in (child.stdin, child.stdout):
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    os.set_blocking(child.stdin.fileno(), False)
    with _killed_after(child, START_TIMEOUT_S):
        if child.stdout.readline(HEADER_BYTES) != b"ready\n":
            _end(child)
            raise DecoderError("the decoder's child process does not start")
    return child


@contextmanager
def _killed_after(child: subprocess.Popen[bytes], timeout_s: float) -> Iterator[threading.Event]:
    """Kill the child where the block takes longer; the event says that it did."""
    is_late = threading.Event()

    def kill() -> None:
        is_late.set()
        child.kill()

    timer = threading.Timer(timeout_s, kill)
    timer.daemon = True
    timer.start()
    try:
        yield is_late
    finally:
        timer.cancel()


def _end(child: subprocess.Popen[bytes]) -> None:
    """Kill the child and close its pipes."""
    child.kill()
    child.wait()
    for pipe in (child.stdin, child.stdout):
        with suppress(OSError):  # what was not sent is lost with the child
            if pipe is not None:
                pipe.close()


def _put(descriptor: int, data: bytes | memoryview, timeout_s: float) -> float:
    """Write all of it to a pipe that does not block; returns how long its reader let us wait.

    Raises:
        TimeoutError: where that is longer than it may be.
        BrokenPipeError: where there is no reader any more.
    """
    ready, view, started = select.poll(), memoryview(data), time.monotonic()
    ready.register(descriptor, select.POLLOUT)
    while view:
        spent_s = time.monotonic() - started
        if not ready.poll(max(0.0, timeout_s - spent_s) * 1000):
            raise TimeoutError
        view = view[os.write(descriptor, view) :]
    return time.monotonic() - started


def _parts(chunk: bytes) -> Iterator[memoryview]:
    view = memoryview(chunk)
    for start in range(0, len(view), PIPE_BYTES):
        yield view[start : start + PIPE_BYTES]


def _read(pipe: IO[bytes], num_bytes: int) -> bytearray:
    kept = bytearray(num_bytes)
    view, done = memoryview(kept), 0
    while done < num_bytes:
        count = pipe.readinto(view[done:])  # type: ignore[attr-defined]
        if not count:
            raise StudyError("decode_crash", "the decoder died in the middle of its answer")
        done += count
    return kept
