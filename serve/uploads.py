"""Bodies of studies on their way to disk.

A body is received before its study takes a decoder, so a slow connection delays no other caller.
"""

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
    """A received body."""

    path: Path
    """File with the body."""
    objects: Path
    """Folder for the unpacked objects; not made yet."""
    digest: str
    """SHA-256 of the body."""


class Uploads:
    """Receives bodies, up to a limit in all and a limit per caller."""

    def __init__(self, settings: ServeConfig) -> None:
        self.settings = settings
        self.folder = ReplicaFolder()
        self._num_by_caller: Counter[str] = Counter()

    async def receive(self, request: Request, caller: Caller, resources: ExitStack) -> Upload:
        """Write the body to disk as it arrives.

        resources: get the body's folder, which is removed when they are closed.

        Raises:
            UploadError: ``too_large``.
            BusyError: the limit of bodies at a time is reached.
            RefusedError: 408, the body takes too long.
            OSError: the disk is full.
        """
        # The stated length refuses early; the bytes are counted all the same.
        self._check_length(int(request.headers.get("content-length") or 0))
        # No await until the count goes up, so that no other request comes between.
        self._check_room(caller)
        self._num_by_caller[caller.name] += 1
        try:
            temporary = tempfile.TemporaryDirectory(dir=self.folder.path)
            folder = Path(resources.enter_context(temporary))
            digest = await self._write(request, folder / "upload")
        finally:
            self._num_by_caller[caller.name] -= 1
        return Upload(path=folder / "upload", objects=folder / "objects", digest=digest)

    def _check_room(self, caller: Caller) -> None:
        if self._num_by_caller.total() >= self.settings.max_uploads:
            raise BusyError
        if self._num_by_caller[caller.name] >= self.settings.max_uploads_per_caller:
            raise BusyError

    async def _write(self, request: Request, path: Path) -> str:
        digest = hashlib.sha256()
        num_bytes = 0
        limit_s = self.settings.upload_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                with path.open("wb") as file:
                    async for chunk in request.stream():
                        num_bytes += len(chunk)
                        # Before the chunk is written to disk.
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
    """A folder for the studies of this process, locked while the process lives.

    A killed replica cannot remove its studies, which are images of patients. So every new replica
    removes the folders whose lock is free.
    """

    def __init__(self, parent: Path | None = None) -> None:
        parent = parent or Path(tempfile.gettempdir())
        for folder in parent.glob(f"{PREFIX}*"):
            _remove_if_abandoned(folder)
        # The dot keeps it out of the pattern above.
        hidden = Path(tempfile.mkdtemp(prefix=f".{PREFIX}", dir=parent))
        self._lock = os.open(hidden / LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        # Renamed only once it is locked: before, another replica would have removed it.
        self.path = hidden.rename(parent / hidden.name.removeprefix("."))


def _remove_if_abandoned(folder: Path) -> None:
    """Remove the folder of a process that has ended; the kernel has released its lock."""
    try:
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CLOEXEC)
    except OSError:  # it belongs to another user, or was removed meanwhile
        return
    try:
        # Without waiting: the lock of a living process stays.
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return  # its process lives
    else:
        shutil.rmtree(folder, ignore_errors=True)
        logger.warning("removed the studies that a killed replica had left")
    finally:
        with suppress(OSError):
            os.close(lock)
