"""The decoders of one API replica: each belongs to the thread that uses it, never to a request.

A request may end before its thread does: the caller hangs up, or the deadline passes. Then the
thread's decoder is killed, so the thread ends soon, and only the end of the thread gives its slot
back. So no study ever meets the bytes or the answer of another study in a decoder, and no temporary
folder is removed while a thread reads it.
"""

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import TypeVar

from covtanet.screening.study import Screener

T = TypeVar("T")


class BusyError(Exception):
    """The limit of requests that wait for a decoder, or that are being received, is reached."""


class DeadlineError(Exception):
    """The deadline has passed, or the caller has hung up, before the study was screened."""


class Slot:
    """Capacity for one study at a time, with a screener that stays loaded from study to study."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._screener: Screener | None = None
        self._is_abandoned = False

    def screener(self, digest: str, make: Callable[[], Screener]) -> Screener:
        """Return the slot's screener if it has this version of the model, else a new screener.

        Raises:
            DeadlineError: the request has ended.
        """
        with self._lock:
            self.check()
            # One version per screener: no study mixes two.
            if self._screener is None or self._screener.model_digest != digest:
                if self._screener is not None:
                    self._screener.close()
                self._screener = make()
            return self._screener

    def check(self) -> None:
        """Raise if the caller does not wait for the answer any more.

        Raises:
            DeadlineError: the request has ended.
        """
        if self._is_abandoned:
            raise DeadlineError("the request ended before its study was read")

    def abandon(self) -> None:
        """Close the screener that the slot's thread waits for; its request has ended."""
        with self._lock:
            self._is_abandoned = True
            if self._screener is not None:
                self._screener.close()

    def renewed(self) -> "Slot":
        """Return this slot, or a new slot if its screener was closed."""
        return Slot() if self._is_abandoned else self


class Decoders:
    """The slots of a replica.

    max_waiting: requests that may wait for a slot. timeout_s: time limit from the request for a
    slot to the answer.
    """

    def __init__(self, num_slots: int, max_waiting: int, timeout_s: float) -> None:
        self.max_waiting = max_waiting
        self.timeout_s = timeout_s
        self._threads = ThreadPoolExecutor(num_slots, "decoder")
        # First come, first served.
        self._free: asyncio.Queue[Slot] = asyncio.Queue()
        for _ in range(num_slots):
            self._free.put_nowait(Slot())
        self._num_waiting = 0

    async def run(self, work: Callable[[Slot], T], resources: ExitStack) -> T:
        """Run one study's work in a thread that holds a slot.

        resources: files that the work reads. The thread takes them over when it begins and closes
        them when it has ended; until then they belong to the caller.

        Raises:
            BusyError: ``max_waiting`` requests wait already.
            DeadlineError: the answer takes over ``timeout_s``.
        """
        # Waiting for a slot counts.
        deadline = time.monotonic() + self.timeout_s
        slot = await self._take(deadline)
        # No await between taking a slot and starting its thread: a cancellation cannot come between
        # them.
        loop = asyncio.get_running_loop()
        thread = loop.run_in_executor(
            self._threads, partial(_work_with, work, slot, resources.pop_all())
        )
        # The end of the thread alone frees the slot, whatever became of the request.
        thread.add_done_callback(partial(self._give_back, slot))
        try:
            async with asyncio.timeout(deadline - time.monotonic()) as limit:
                # A thread cannot be cancelled; it keeps its slot until it ends.
                return await asyncio.shield(thread)
        except TimeoutError:
            if not limit.expired():  # the work itself raised it
                raise
            slot.abandon()
            raise DeadlineError("the request took too long") from None
        except asyncio.CancelledError:  # the caller hung up
            slot.abandon()
            raise

    async def _take(self, deadline: float) -> Slot:
        if self._free.empty() and self._num_waiting >= self.max_waiting:
            raise BusyError
        self._num_waiting += 1
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                return await self._free.get()
        except TimeoutError:
            raise BusyError from None
        finally:
            self._num_waiting -= 1

    def _give_back(self, slot: Slot, thread: "asyncio.Future[T]") -> None:
        """Free the slot once its thread has ended."""
        # asyncio logs the text of an exception that is never retrieved, and it may quote a study.
        thread.exception()
        self._free.put_nowait(slot.renewed())


def _work_with(work: Callable[[Slot], T], slot: Slot, resources: ExitStack) -> T:
    """Do the work in this thread and close its resources when it has ended."""
    with resources:
        return work(slot)
