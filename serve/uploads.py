"""Bodies of studies on their way to disk, before any decoder is taken: a slow line holds nobody up but itself."""

import asyncio
import fcntl
import hashlib
import logging
import os
import shutil
import tempfile
from collections import Counter
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from starlette.requests import Request

from covtanet.errors import UploadError
from serve.decoders import BusyError
from serve.refusals import RefusedError
from serve.settings import Caller, ServeConfig

logger = logging.getLogger("ray.serve")

PREFIX = "covtanet-serve-"
LOCK = "lock"


@dataclass(frozen=True)
class Upload:
    """A received body: its file, a folder to be made for what it holds, and the SHA-256 of its bytes."""

    path: Path
    objects: Path
    digest: str


class Uploads:
    """Receives bodies, so many at a time in all and of one caller."""

    def __init__(self, settings: ServeConfig) -> None:
        self.settings = settings
        self.folder = ReplicaFolder()
        self._num_by_caller: Counter[str] = Counter()

    async def receive(self, request: Request, caller: Caller, resources: ExitStack) -> Upload:
        """Write the body to disk as it comes. resources: gets the folder, to be removed with them.

        Raises:
            UploadError: ``too_large``.
            BusyError: as many bodies are being received as may.
            RefusedError: 408, it takes longer than it may.
            OSError: the disk is full.
        """
        self._check_length(int(request.headers.get("content-length") or 0))
        per_caller = self.settings.max_uploads_per_caller
        if (
            self._num_by_caller.total() >= self.settings.max_uploads
            or self._num_by_caller[caller.name] >= per_caller
        ):
            raise BusyError
        self._num_by_caller[caller.name] += 1
        try:
            folder = Path(
                resources.enter_context(tempfile.TemporaryDirectory(dir=self.folder.path))
            )
            digest = await self._write(request, folder / "upload")
        finally:
            self._num_by_caller[caller.name] -= 1
        return Upload(path=folder / "upload", objects=folder / "objects", digest=digest)

    async def _write(self, request: Request, path: Path) -> str:
        digest, num_bytes, limit_s = hashlib.sha256(), 0, self.settings.upload_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                with path.open("wb") as file:
                    async for chunk in request.stream():
                        num_bytes += len(chunk)
                        self._check_length(num_bytes)
                        digest.update(chunk)
                        file.write(chunk)
        except TimeoutError:
            raise RefusedError(408, "slow_upload", f"the body took over {limit_s:g} s") from None
        return digest.hexdigest()

    def _check_length(self, num_bytes: int) -> None:
        limit = self.settings.limits.max_bytes
        if num_bytes > limit:
            raise UploadError("too_large", f"expected at most {limit} bytes")


class ReplicaFolder:
    """A folder for the studies of this process, locked while it lives; removes those of processes that were killed.

    A killed replica cannot remove what it had received, and these are images of patients.
    """

    def __init__(self, parent: Path | None = None) -> None:
        parent = parent or Path(tempfile.gettempdir())
        for left in parent.glob(f"{PREFIX}*"):
            _remove_if_left(left)
        made = Path(tempfile.mkdtemp(prefix=f".{PREFIX}", dir=parent))
        self._lock = os.open(made / LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        # Only now under a name that others look for: before it was locked they would have removed it.
        self.path = made.rename(parent / made.name.removeprefix("."))


def _remove_if_left(folder: Path) -> None:
    """Remove the folder of a process that has ended; the kernel gave its lock back then."""
    try:
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CLOEXEC)
    except OSError:  # of another user, or gone this moment
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return  # it lives
    else:
        shutil.rmtree(folder, ignore_errors=True)
        logger.warning("removed the studies that a killed replica had left")
    finally:
        with suppress(OSError):
            os.close(lock)
