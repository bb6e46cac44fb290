"""Compiled networks kept on disk, so that a worker that starts again need not convert anew.

The folder belongs to this user alone: a compiled network is machine code of sorts, and one that
another user wrote is never read. A damaged entry counts as missing.
"""

import hashlib
import logging
import os
import stat
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)

FOLDER = "covtanet"
SUFFIX = ".compiled"
DIGEST_BYTES = 32
# Champion and challenger with some engines each; an entry takes as much as the weights.
MAX_ENTRIES = 8


def cache_folder() -> Path | None:
    """Return the private folder, created if it is missing; None if there is no safe one.

    It is that of COVTANET_CACHE, which may be empty for none; else ``covtanet`` in XDG_CACHE_HOME
    or ``~/.cache``.
    """
    named = os.environ.get("COVTANET_CACHE")
    if named == "":
        return None
    try:
        parent = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = Path(named) if named else parent / FOLDER
        folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.mkdir(exist_ok=True, mode=0o700)
        is_private = _is_private(folder) and _keeps_names(folder.parent)
    # RuntimeError: the user has no home folder.
    except (OSError, RuntimeError) as error:
        logger.debug("compiled networks are not kept: %s", type(error).__name__)
        return None
    if not is_private:
        logger.warning(
            "compiled networks are not kept: others can change the cache folder, expected mode "
            "0700 and this user as its owner; COVTANET_CACHE names another one"
        )
        return None
    return folder


def _is_private(folder: Path) -> bool:
    """Return whether a folder, and no link, is this user's alone."""
    status = folder.lstat()
    is_own = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
    return is_own and not status.st_mode & 0o077


def _keeps_names(parent: Path) -> bool:
    """Return whether no other user may put another folder in the place of ours."""
    status = parent.stat()
    if status.st_uid not in (os.geteuid(), 0):
        return False
    return not status.st_mode & 0o022 or bool(status.st_mode & stat.S_ISVTX)


def entry_name(*parts: object) -> str:
    """Return the name of the entry of these values."""
    return hashlib.sha256(repr(parts).encode()).hexdigest() + SUFFIX


def read_entry(folder: Path, name: str) -> bytes | None:
    """Return an entry; None if it is missing, damaged, or not a file of this user."""
    try:
        # No link is followed, and a pipe would not block.
        descriptor = os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            return None
        content = file.read()
    digest, data = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
    if hashlib.sha256(data).digest() != digest:
        logger.warning("a compiled network on disk is damaged; it is converted anew")
        return None
    return data


def write_entry(folder: Path, name: str, data: bytes) -> None:
    """Keep an entry, and drop the oldest ones; a disk that is full costs nothing but the entry.

    Of several writers the last one's counts; readers see one whole entry.
    """
    try:
        descriptor, temporary = tempfile.mkstemp(dir=folder, prefix=".new-")
        try:
            with open(descriptor, "wb") as file:
                file.write(hashlib.sha256(data).digest())
                file.write(data)
            Path(temporary).replace(folder / name)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        _drop_oldest(folder)
    except OSError as error:
        logger.warning("a compiled network could not be kept: %s", type(error).__name__)


def _drop_oldest(folder: Path) -> None:
    entries = [path for path in folder.iterdir() if path.name.endswith(SUFFIX)]
    by_age = sorted(entries, key=lambda path: path.lstat().st_mtime, reverse=True)
    for path in by_age[MAX_ENTRIES:]:
        path.unlink(missing_ok=True)
