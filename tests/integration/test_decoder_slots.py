"""A slot whose caller is gone: real decoders, in child processes."""

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from saved_models import small_model
from sound_input import gz, plain_nifti

from covtanet.ct.window import WindowConfig
from covtanet.decoding.sandbox import Sandbox
from covtanet.inference.predictor import Predictor
from covtanet.screening.config import ScreeningConfig
from covtanet.screening.study import Screener
from serve.decoders import Decoders, Slot

WAIT_S = 30.0


@pytest.fixture
def predictor() -> Predictor:
    return Predictor(small_model(), engine="eager")


def test_study_after_abandoned_request_gets_its_own_rows(
    predictor: Predictor, tmp_path: Path
) -> None:
    """The next study waits for the slot and gets a new decoder, so it meets no other slices."""
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
