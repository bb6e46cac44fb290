"""Uploads: limits per caller, a full disk, and the folders of killed replicas."""

import asyncio
import errno
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request

from serve.decoders import BusyError
from serve.settings import Caller, ServeConfig
from serve.uploads import Uploads

ANN, BOB = Caller(name="ann", token_sha256="a" * 64), Caller(name="bob", token_sha256="b" * 64)


@pytest.fixture
def uploads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Uploads:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return Uploads(ServeConfig(callers=(ANN, BOB), max_uploads=3, max_uploads_per_caller=2))


def body_of(messages: AsyncIterator[dict[str, Any]]) -> Request:
    async def receive() -> dict[str, Any]:
        return await anext(messages)

    return Request({"type": "http", "headers": []}, receive)


async def one_chunk(data: bytes) -> AsyncIterator[dict[str, Any]]:
    yield {"type": "http.request", "body": data, "more_body": False}


async def stalled(go_on: asyncio.Event) -> AsyncIterator[dict[str, Any]]:
    yield {"type": "http.request", "body": b"first", "more_body": True}
    await go_on.wait()
    yield {"type": "http.request", "body": b"last", "more_body": False}


def test_stalled_uploads_of_one_caller_leave_room_for_another(uploads: Uploads) -> None:
    async def scenario() -> None:
        go_on, resources = asyncio.Event(), ExitStack()
        slow = [
            asyncio.create_task(uploads.receive(body_of(stalled(go_on)), ANN, resources))
            for _ in range(2)
        ]
        await asyncio.sleep(0)
        with pytest.raises(BusyError):
            await uploads.receive(body_of(one_chunk(b"x")), ANN, resources)
        received = await uploads.receive(body_of(one_chunk(b"x")), BOB, resources)
        assert received.path.read_bytes() == b"x"
        go_on.set()
        assert [(await task).path.read_bytes() for task in slow] == [b"firstlast"] * 2
        assert (await uploads.receive(body_of(one_chunk(b"y")), ANN, resources)).digest.startswith(
            "a1fce436"
        )
        resources.close()
        assert not received.path.exists()

    asyncio.run(scenario())


def test_full_disk_raises_enospc_and_frees_the_upload_slot(
    uploads: Uploads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device /dev/full replaces the file."""

    async def scenario() -> None:
        full = Path("/dev/full")
        monkeypatch.setattr(Path, "__truediv__", _to_full(Path.__truediv__, full))
        for _ in range(3):
            with ExitStack() as resources, pytest.raises(OSError, match="No space left") as error:
                await uploads.receive(body_of(one_chunk(bytes(1 << 16))), ANN, resources)
            assert error.value.errno == errno.ENOSPC

    asyncio.run(scenario())


def _to_full(join: Callable[[Path, str], Path], full: Path) -> Callable[[Path, str], Path]:
    return lambda folder, name: full if name == "upload" else join(folder, name)
