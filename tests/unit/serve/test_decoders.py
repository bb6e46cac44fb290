"""Decoder slots belong to threads: a request that ends early leaves nothing to the next study."""

import asyncio
import threading
from contextlib import ExitStack
from typing import Any

import pytest

from serve.decoders import BusyError, DeadlineError, Decoders, Slot

WAIT_S = 30.0


class Work:
    """A study whose thread waits for the test, and tells the test that it has begun."""

    def __init__(self) -> None:
        self.has_begun, self.may_end = threading.Event(), threading.Event()
        self.seen: list[object] = []

    def __call__(self, slot: Slot) -> str:
        self.has_begun.set()
        assert self.may_end.wait(WAIT_S)
        self.seen.append(slot)
        return "done"

    async def begun(self) -> None:
        assert await asyncio.to_thread(self.has_begun.wait, WAIT_S)


def test_cancelled_request_frees_its_slot_only_when_its_thread_has_ended() -> None:
    async def scenario() -> None:
        decoders, first, removed = Decoders(1, 1, WAIT_S), Work(), threading.Event()
        resources = ExitStack()
        resources.callback(removed.set)
        task = asyncio.create_task(decoders.run(first, resources))
        await first.begun()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        second = Work()
        second.may_end.set()
        waiting = asyncio.create_task(decoders.run(second, ExitStack()))
        await asyncio.to_thread(second.has_begun.wait, 0.2)
        assert not second.has_begun.is_set()  # the first thread still reads
        assert not removed.is_set()  # and its files are there
        first.may_end.set()
        assert await waiting == "done"
        assert removed.is_set()
        assert second.seen[0] is not first.seen[0]  # an abandoned slot is not used again

    asyncio.run(scenario())


def test_request_past_its_deadline_raises_and_closes_the_screener(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Closed:
        model_digest = "one"

        def __init__(self) -> None:
            self.is_closed = threading.Event()

        def close(self) -> None:
            self.is_closed.set()

    screener: Any = Closed()

    def work(slot: Slot) -> None:
        slot.screener("one", lambda: screener)
        assert screener.is_closed.wait(WAIT_S)
        slot.check()

    async def scenario() -> None:
        decoders = Decoders(1, 1, 0.1)
        with pytest.raises(DeadlineError, match="took too long"):
            await decoders.run(work, ExitStack())
        assert screener.is_closed.is_set()
        slot = Slot()
        slot.abandon()
        with pytest.raises(DeadlineError, match="ended before"):  # the thread, at its next check
            slot.check()

    asyncio.run(scenario())


def test_request_beyond_max_waiting_is_busy_and_keeps_its_resources() -> None:
    async def scenario() -> None:
        decoders, first, removed = Decoders(1, 0, WAIT_S), Work(), threading.Event()
        task = asyncio.create_task(decoders.run(first, ExitStack()))
        await first.begun()
        resources = ExitStack()
        resources.callback(removed.set)
        with pytest.raises(BusyError):
            await decoders.run(Work(), resources)
        assert not removed.is_set()  # they still belong to the caller
        first.may_end.set()
        assert await task == "done"

    asyncio.run(scenario())
