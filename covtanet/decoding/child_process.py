"""The parent's side of the sandbox: a child process that answers one request at a time, and its end.

Every request carries a nonce that the answer repeats, so that no request is given another one's
answer. One thread asks; any thread may kill.
"""

import fcntl
import json
import logging
import os
import secrets
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any, TypeVar

from covtanet.decoding import seccomp
from covtanet.errors import (
    REJECTION_REASONS,
    DecoderError,
    DecoderStartError,
    Reason,
    SandboxClosedError,
    StudyError,
    StudyTimeoutError,
    WeakSandboxError,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")
DECODER, HEADER_READER = "sandbox_child", "header_child"
CODE = "import sys; sys.path.insert(0, sys.argv[1]); from covtanet.decoding.{} import main; main()"
ROOT = str(Path(__file__).resolve().parents[2])
PIPE_BYTES = 1 << 20
HEADER_BYTES = 1 << 16
LENGTH_BYTES = 4
NONCE_BYTES = 16
REQUESTS_PER_CHILD = 200
START_TIMEOUT_S, DEATH_S = 60.0, 5.0
MAX_MESSAGE, MAX_PLACE = 300, 200
# A request gets a second more for each of these bytes.
BYTES_PER_EXTRA_S = 8 << 20
# The child keeps what it has freed for its next series, unlike its parent: fresh pages for every
# slice would cost it as much as decoding does. It is replaced long before that could pile up. Above
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
    """What a child may cost. memory_mib: beyond its own. timeout_s: of a request, not counting what storage takes.

    allow_weak: use a child even if the kernel cannot shut all its doors.
    """

    memory_mib: int
    timeout_s: float
    allow_weak: bool = False


class Child:
    """A child process behind shut doors, started when first needed and replaced when it is no longer fit.

    program: ``DECODER`` or ``HEADER_READER``.
    """

    def __init__(self, program: str, limits: Limits) -> None:
        self.program, self.limits = program, limits
        self._process: subprocess.Popen[bytes] | None = None
        self._num_requests = 0
        self._is_killed = False
        self._busy = threading.Lock()  # held while a request is under way
        self._state = threading.Lock()  # for moments: between a start and a kill

    def ask(
        self,
        request: dict[str, Any],
        objects: Iterable[Iterable[bytes]],
        read: Callable[[dict[str, Any], IO[bytes]], T],
    ) -> T:
        """Send a request, and what it is about, and read the answer.

        objects: each in chunks. read: takes the answer's header and the pipe behind it.

        Raises:
            StudyError: the child's refusal, or ``decode_crash`` if it died of the input or contradicts itself.
            StudyTimeoutError: if it takes longer than it may.
            SandboxClosedError: if the child was killed, now or before.
            DecoderError: a fault of this software, found in the child.
            WeakSandboxError: if the kernel cannot shut it in.
            RuntimeError: if a request is under way, which is a fault of the caller's.
        """
        if not self._busy.acquire(blocking=False):
            raise RuntimeError("two threads use one sandbox at a time, expected a sandbox for each")
        try:
            return self._ask(request, objects, read)
        except Exception as error:
            if self._is_killed and not isinstance(error, SandboxClosedError):
                raise SandboxClosedError("the sandbox was closed while it worked") from None
            raise
        finally:
            self._busy.release()
            if self._is_killed:  # while this thread was on its way out, perhaps
                self.kill()

    def kill(self) -> None:
        """End the child, and any request with an error; from any thread, at any time. It cannot be used again."""
        with self._state:
            self._is_killed = True
            if self._process is not None:
                _kill(self._process)
        if self._busy.acquire(blocking=False):  # else the thread that is inside does it
            try:
                self._drop()
            finally:
                self._busy.release()

    def check_open(self) -> None:
        """Refuse to go on with a child that was killed.

        Raises:
            SandboxClosedError: it was.
        """
        if self._is_killed:
            raise SandboxClosedError("the sandbox is closed")

    def warm(self) -> subprocess.Popen[bytes]:
        """Return the running process; start one if it is missing, dead or due to be replaced."""
        process = self._process
        if process is not None and (
            process.poll() is not None or self._num_requests >= REQUESTS_PER_CHILD
        ):
            self._drop()
        if self._process is None:
            try:
                self._start()
            except DecoderStartError:  # the machine may have ended it; no series is to blame
                self._start()
            self._num_requests = 0
        assert self._process is not None
        return self._process

    def _ask(
        self,
        request: dict[str, Any],
        objects: Iterable[Iterable[bytes]],
        read: Callable[[dict[str, Any], IO[bytes]], T],
    ) -> T:
        self.check_open()
        process = self.warm()
        self._num_requests += 1
        assert process.stdout is not None
        nonce = secrets.token_hex(NONCE_BYTES)
        is_clean = False
        try:
            left_s = self._send(process, _framed({**request, "nonce": nonce}, objects))
            with _killed_after(process, left_s) as is_late:
                header = self._header(process, is_late)
                if header.get("nonce") != nonce:
                    # As of a child that an input has taken over. As a crash it is tried once more,
                    # with a new child; a DecoderError would make one hostile file fail a sound one.
                    logger.warning("the decoder answered another request; it is replaced")
                    raise StudyError(Reason.DECODE_CRASH, "the decoder answered another request")
                refusal = _refusal(header)
                answer = None if refusal else read(header, process.stdout)
            is_clean = header.get("is_last", False) is False
        finally:
            if not is_clean:  # bytes in the pipes would be taken for the next answer
                self._drop()
        if refusal:
            raise refusal
        return answer  # type: ignore[return-value]

    def _start(self) -> None:
        """Start a process and wait until it has loaded what it needs and shut the doors behind it."""
        with self._state:  # a kill comes before, and forbids it, or after, and finds the process
            self.check_open()
            try:
                process = self._process = _started(self.program, self.limits)
            except (
                OSError
            ) as error:  # no process to be had; not storage, which an OSError means elsewhere
                raise DecoderStartError("the decoder's child process does not start") from error
        assert process.stdout is not None
        with _killed_after(process, START_TIMEOUT_S):
            try:
                open_doors = json.loads(process.stdout.readline(HEADER_BYTES) or "null")[
                    "open_doors"
                ]
            except (ValueError, TypeError, KeyError):
                self._drop()
                raise DecoderStartError("the decoder's child process does not start") from None
        if open_doors and not self.limits.allow_weak:
            self._drop()
            raise WeakSandboxError(
                f"the decoder cannot be shut in here ({'; '.join(open_doors)}), expected Linux with "
                "seccomp on x86_64 or aarch64, and for root the right to become another user; "
                "allow_weak_sandbox = true under [screening] decodes all the same"
            )

    def _drop(self) -> None:
        """End the process and free its pipes; the next request starts another."""
        with self._state:
            process, self._process = self._process, None
        if process is not None:
            _end(process)

    def _send(self, process: subprocess.Popen[bytes], parts: Iterable[bytes | memoryview]) -> float:
        """Write a request; returns how long the child may still take, which works on it while it comes."""
        assert process.stdin is not None
        left_s = self.limits.timeout_s
        for part in parts:  # which are read from storage; its errors are not those of the pipe
            self.check_open()
            left_s += len(part) / BYTES_PER_EXTRA_S
            try:
                left_s -= _put(process.stdin.fileno(), part, left_s)
            except BrokenPipeError:  # it gave up before the end, and says or shows why
                self._num_requests = REQUESTS_PER_CHILD
                break
            except TimeoutError:
                raise self._too_long() from None
        return left_s

    def _header(self, process: subprocess.Popen[bytes], is_late: threading.Event) -> dict[str, Any]:
        assert process.stdout is not None
        try:
            header = json.loads(process.stdout.readline(HEADER_BYTES) or "null")
        except (ValueError, RecursionError):
            header = None
        if not isinstance(header, dict):
            raise self._death(process, is_late)
        return header

    def _death(self, process: subprocess.Popen[bytes], is_late: threading.Event) -> Exception:
        with _killed_after(process, DEATH_S) as is_stuck:
            code = process.wait()
        if is_stuck.is_set():
            return StudyError(Reason.DECODE_CRASH, "the decoder's answer is missing")
        if is_late.is_set() or code == -signal.SIGXCPU:
            return self._too_long()
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return StudyError(Reason.DECODE_CRASH, f"the decoder died of this input, {how}")

    def _too_long(self) -> Exception:
        return StudyTimeoutError(f"decoding took longer than {self.limits.timeout_s:g} s")


@cache
def refuse_weak_sandbox(limits: Limits) -> None:
    """Start a child once, to find out before any series whether this machine can shut it in.

    Raises:
        WeakSandboxError: if it cannot, and the limits do not allow that.
    """
    if limits.allow_weak:
        logger.warning("allow_weak_sandbox = true: a decoder that cannot be shut in is used, too")
    child = Child(HEADER_READER, limits)
    try:
        child.warm()
    finally:
        child.kill()


@cache
def header_reader(limits: Limits) -> Child:
    """Return the child of this process that reads headers; it stays warm from call to call."""
    return Child(HEADER_READER, limits)


def read_exactly(pipe: IO[bytes], num_bytes: int) -> bytearray:
    """Read the bytes that an answer's header announces.

    Raises:
        StudyError: ``decode_crash`` if less comes.
    """
    kept = bytearray(num_bytes)
    view, done = memoryview(kept), 0
    while done < num_bytes:
        count = pipe.readinto(view[done:])  # type: ignore[attr-defined]
        if not count:
            raise StudyError(Reason.DECODE_CRASH, "the decoder died in the middle of its answer")
        done += count
    return kept


def _refusal(header: dict[str, Any]) -> Exception | None:
    """The error that an answer stands for; of its text no more is believed than that it is a line."""
    if header.get("reason") in REJECTION_REASONS:
        return StudyError(header["reason"], _line(header.get("message"), MAX_MESSAGE))
    if "internal" in header:
        return DecoderError(_line(header["internal"], MAX_PLACE))
    return None


def _line(text: object, length: int) -> str:
    return "".join(c if c.isprintable() else " " for c in str(text)[:length])


def _framed(
    request: dict[str, Any], objects: Iterable[Iterable[bytes]]
) -> Iterator[bytes | memoryview]:
    """A line of JSON, then each object: a 1, chunks behind their lengths, a length of 0. A 0 ends the request."""
    yield json.dumps(request).encode() + b"\n"
    for chunks in objects:
        yield b"\x01"
        for chunk in chunks:
            for part in _parts(chunk):
                yield len(part).to_bytes(LENGTH_BYTES, "little")
                yield part
        yield bytes(LENGTH_BYTES)
    yield b"\x00"


def _started(program: str, limits: Limits) -> subprocess.Popen[bytes]:
    seccomp.hide_memory()  # before there is anybody to read it
    library_path = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    process = subprocess.Popen(
        [sys.executable, "-I", "-c", CODE.format(program), ROOT, json.dumps(asdict(limits))],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=library_path | ENVIRONMENT,
        cwd="/", start_new_session=True,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    for pipe in (process.stdin, process.stdout):
        with suppress(OSError):  # a user may have so many large pipes; a small one is but slower
            fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    os.set_blocking(process.stdin.fileno(), False)
    return process


@contextmanager
def _killed_after(process: subprocess.Popen[bytes], timeout_s: float) -> Iterator[threading.Event]:
    """Kill the process if the block takes longer; the event says that it did."""
    is_late = threading.Event()

    def kill() -> None:
        is_late.set()
        _kill(process)

    timer = threading.Timer(max(0.0, timeout_s), kill)
    timer.daemon = True
    timer.start()
    try:
        yield is_late
    finally:
        timer.cancel()


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and whatever is of its group; nothing happens once it has been waited for."""
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and close its pipes."""
    _kill(process)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with suppress(OSError):  # unsent bytes are lost with the process
            if pipe is not None:
                pipe.close()


def _put(descriptor: int, data: bytes | memoryview, timeout_s: float) -> float:
    """Write all of it to a pipe that does not block; returns how long its reader let us wait.

    Raises:
        TimeoutError: if that is longer than it may be.
        BrokenPipeError: the reader has gone.
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
