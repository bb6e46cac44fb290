"""A decoder slot belongs to the thread that uses it: requests that end early leave nothing to the next one."""

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from conftest import small_model
from hostile import gz, plain_nifti

from covtanet.ct.window import WindowConfig
from covtanet.decoding.sandbox import Sandbox
from covtanet.inference.predictor import Predictor
from covtanet.screening.config import ScreeningConfig
from covtanet.screening.study import Screener
from serve.decoders import BusyError, DeadlineError, Decoders, Slot

WAIT_S = 30.0


class Work:
    """A study whose thread stops where a test wants it, and says that it has come that far."""

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
        assert not second.has_begun.is_set()  # the first one's thread still reads
        assert not removed.is_set()  # and what it reads is there
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

    screener = Closed()

    def work(slot: Slot) -> None:
        assert slot.screener("one", lambda: screener).is_closed.wait(WAIT_S)
        slot.check()

    async def scenario() -> None:
        decoders = Decoders(1, 1, 0.1)
        with pytest.raises(DeadlineError, match="longer than it may"):
            await decoders.run(work, ExitStack())
        assert screener.is_closed.is_set()
        slot = Slot()
        slot.abandon()
        with pytest.raises(
            DeadlineError, match="ended before"
        ):  # its own thread, at its next check
            slot.check()

    asyncio.run(scenario())


def test_request_beyond_max_waiting_is_busy_and_keeps_its_upload() -> None:
    async def scenario() -> None:
        decoders, first, removed = Decoders(1, 0, WAIT_S), Work(), threading.Event()
        task = asyncio.create_task(decoders.run(first, ExitStack()))
        await first.begun()
        resources = ExitStack()
        resources.callback(removed.set)
        with pytest.raises(BusyError):
            await decoders.run(Work(), resources)
        assert not removed.is_set()  # they are still the caller's
        first.may_end.set()
        assert await task == "done"

    asyncio.run(scenario())


@pytest.fixture
def predictor() -> Predictor:
    return Predictor(small_model(), engine="eager")


def test_study_after_an_abandoned_one_gets_its_own_rows(
    predictor: Predictor, tmp_path: Path
) -> None:
    """The next caller never gets slices of the study before: it waits, and reads with a decoder of its own."""
    study, alone = tmp_path / "b.nii.gz", []
    study.write_bytes(gz(plain_nifti()))
    config = ScreeningConfig(engine="eager", decode_timeout_s=WAIT_S)
    begun, go_on = threading.Event(), threading.Event()

    def make() -> Screener:
        return Screener(predictor, WindowConfig(size_px=64), config, "digest")

    def screen(slot: Slot) -> list[dict[str, object]]:
        return list(slot.screener("digest", make)(str(study)))

    def slow(slot: Slot) -> None:
        """A series that comes slice by slice from a slow store."""

        def objects() -> Iterator[list[bytes]]:
            yield [plain_nifti()[:400]]
            begun.set()
            assert go_on.wait(WAIT_S)
            yield [plain_nifti()[400:]]

        decoder = slot.screener("digest", make).decoder
        assert isinstance(decoder, Sandbox)
        decoder("nifti", objects())

    async def scenario() -> None:
        decoders = Decoders(1, 1, WAIT_S)
        alone.extend(await decoders.run(screen, ExitStack()))
        task = asyncio.create_task(decoders.run(slow, ExitStack()))
        assert await asyncio.to_thread(begun.wait, WAIT_S)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        after = asyncio.create_task(decoders.run(screen, ExitStack()))
        await asyncio.sleep(0)
        go_on.set()
        rows = await after
        names = ("status", "num_slices", "lesion_volume_ml", "source_digest", "series_key")
        assert [[row[name] for name in names] for row in rows] == [
            [row[name] for name in names] for row in alone
        ]
        (await decoders._take(WAIT_S + time.monotonic())).screener("digest", make).close()

    started = time.monotonic()
    asyncio.run(scenario())
    assert time.monotonic() - started < WAIT_S
