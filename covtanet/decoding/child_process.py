"""The parent's side of the sandbox: a confined child process that answers one request at a time.

Every request carries a nonce that the answer repeats, so that no request gets the answer to
another. One thread asks; any thread may kill the child.
"""

import logging
import secrets
import signal
import threading
from collections.abc import Callable, Iterable
from functools import cache
from typing import IO, Any, TypeVar

from covtanet.decoding.framing import HEADER_BYTES, frame_request, parse_header, parse_refusal
from covtanet.decoding.process import (
    Limits,
    Process,
    end_process,
    kill_process,
    killed_after,
    start_process,
    write_within,
)
from covtanet.errors import (
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
NONCE_BYTES = 16
# A child that an input has taken over lives for at most so many requests.
REQUESTS_PER_CHILD = 200
START_TIMEOUT_S, DEATH_S = 60.0, 5.0
# A request gets a second more for each of these bytes.
BYTES_PER_EXTRA_S = 8 << 20


class Child:
    """A confined child process, started when first needed and replaced when it is not fit any more.

    program: ``DECODER`` or ``HEADER_READER``.
    """

    def __init__(self, program: str, limits: Limits) -> None:
        self.program, self.limits = program, limits
        self._process: Process | None = None
        self._num_requests = 0
        self._is_killed = False
        self._busy = threading.Lock()  # held while a request is under way
        self._state = threading.Lock()  # held for moments: orders a start and a kill

    def ask(
        self,
        request: dict[str, Any],
        objects: Iterable[Iterable[bytes]],
        read: Callable[[dict[str, Any], IO[bytes]], T],
    ) -> T:
        """Send a request with its objects and read the answer.

        objects: each in chunks. read: takes the answer's header and the pipe with the bytes that
        follow.

        Raises:
            StudyError: the child's refusal, or ``decode_crash`` if it died of the input or
                contradicts itself.
            StudyTimeoutError: the child takes longer than it may.
            SandboxClosedError: the child was killed, now or before.
            DecoderError: a fault of this software in the child.
            WeakSandboxError: the kernel cannot confine the child.
            RuntimeError: a request is under way, which is a fault of the caller.
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
            # A kill that came before the release could not drop the process.
            if self._is_killed:
                self.kill()

    def kill(self) -> None:
        """End the child for good, and a request under way with an error; from any thread."""
        with self._state:
            self._is_killed = True
            if self._process is not None:
                kill_process(self._process)
        # If a thread is inside ``ask``, it drops the process on its way out.
        if self._busy.acquire(blocking=False):
            try:
                self._drop()
            finally:
                self._busy.release()

    def check_open(self) -> None:
        """Refuse to go on with a child that was killed.

        Raises:
            SandboxClosedError: it was killed.
        """
        if self._is_killed:
            raise SandboxClosedError("the sandbox is closed")

    def warm(self) -> Process:
        """Return the running process; start one if it is missing, dead or due to be replaced."""
        process = self._process
        is_spent = self._num_requests >= REQUESTS_PER_CHILD
        if process is not None and (process.poll() is not None or is_spent):
            self._drop()
        if self._process is None:
            try:
                self._start()
            except DecoderStartError:  # the machine may have ended it, not a series: once more
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
            left_s = self._send(process, frame_request({**request, "nonce": nonce}, objects))
            with killed_after(process, left_s) as is_late:
                header = self._read_header(process, is_late)
                if header.get("nonce") != nonce:
                    # Perhaps an input has taken the child over. A crash is tried once more with a
                    # new child; a DecoderError would let one hostile file fail a sound one.
                    logger.warning("the decoder answered another request; it is replaced")
                    raise StudyError(Reason.DECODE_CRASH, "the decoder answered another request")
                refusal = parse_refusal(header)
                answer = None if refusal else read(header, process.stdout)
            is_clean = header.get("is_last", False) is False
        finally:
            # Bytes that are left in the pipes would be taken for the next answer.
            if not is_clean:
                self._drop()
        if refusal:
            raise refusal
        return answer  # type: ignore[return-value]

    def _start(self) -> None:
        """Start a process and wait until it has loaded its code and confined itself."""
        # Under the lock: a kill comes before and forbids the start, or after and sees the process.
        with self._state:
            self.check_open()
            try:
                process = self._process = start_process(self.program, self.limits)
            except OSError as error:  # which means a failure of storage elsewhere
                raise DecoderStartError("the decoder's child process does not start") from error
        assert process.stdout is not None
        with killed_after(process, START_TIMEOUT_S):
            header = parse_header(process.stdout.readline(HEADER_BYTES))
        if header is None or "missing_confinement" not in header:
            self._drop()
            raise DecoderStartError("the decoder's child process does not start")
        missing = header["missing_confinement"]
        if missing and not self.limits.allow_weak:
            self._drop()
            raise WeakSandboxError(
                f"the decoder cannot be confined here ({'; '.join(missing)}), expected Linux with "
                "seccomp on x86_64 or aarch64, and for root the right to become another user; "
                "allow_weak_sandbox = true under [screening] decodes all the same"
            )

    def _drop(self) -> None:
        """End the process and free its pipes; the next request starts another."""
        with self._state:
            process, self._process = self._process, None
        if process is not None:
            end_process(process)

    def _send(self, process: Process, pieces: Iterable[bytes | memoryview]) -> float:
        """Write a request; return how long the child may still take.

        The child works on the request while it comes. Only the time that the child keeps the pipe
        waiting counts, not the time that storage takes for the next piece.
        """
        assert process.stdin is not None
        left_s = self.limits.timeout_s
        for piece in pieces:  # errors of storage are raised here, outside the try
            self.check_open()
            left_s += len(piece) / BYTES_PER_EXTRA_S
            try:
                left_s -= write_within(process.stdin.fileno(), piece, left_s)
            except BrokenPipeError:  # the child ended early; its answer or its exit says why
                self._num_requests = REQUESTS_PER_CHILD
                break
            except TimeoutError:
                raise self._timeout_error() from None
        return left_s

    def _read_header(self, process: Process, is_late: threading.Event) -> dict[str, Any]:
        assert process.stdout is not None
        header = parse_header(process.stdout.readline(HEADER_BYTES))
        if header is None:
            raise self._death_error(process, is_late)
        return header

    def _death_error(self, process: Process, is_late: threading.Event) -> Exception:
        """Return the error for a child that gave no answer."""
        with killed_after(process, DEATH_S) as is_stuck:
            code = process.wait()
        if is_stuck.is_set():
            return StudyError(Reason.DECODE_CRASH, "the decoder's answer is missing")
        if is_late.is_set() or code == -signal.SIGXCPU:
            return self._timeout_error()
        cause = f"signal {-code}" if code < 0 else f"exit code {code}"
        return StudyError(Reason.DECODE_CRASH, f"the decoder died of this input, {cause}")

    def _timeout_error(self) -> Exception:
        return StudyTimeoutError(f"decoding took longer than {self.limits.timeout_s:g} s")


@cache
def refuse_weak_sandbox(limits: Limits) -> None:
    """Start a child once, before any series, to learn whether this machine can confine it.

    Raises:
        WeakSandboxError: it cannot, and the limits do not allow that.
    """
    if limits.allow_weak:
        logger.warning("allow_weak_sandbox = true: a decoder that cannot be confined is used, too")
    child = Child(HEADER_READER, limits)
    try:
        child.warm()
    finally:
        child.kill()


@cache
def header_reader(limits: Limits) -> Child:
    """Return the child of this process that reads headers; it stays warm from call to call."""
    return Child(HEADER_READER, limits)
