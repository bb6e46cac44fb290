"""The store of local paths.

A file name that is not UTF-8 is listed with each such byte as a character of a private range, which
leads back to the file.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from stat import S_ISREG
from typing import IO

import pyarrow.fs as pafs

from covtanet.errors import ObjectChangedError
from covtanet.storage.store import CHUNK_BYTES, OUTSIDE, Folder, ObjectInfo, check_count

# Python decodes a byte that is not UTF-8 as U+DC00 + byte, which Parquet and URIs refuse; listings
# show it as U+F700 + byte, a private character.
SURROGATE_AT = 0xDC00
ODD_BYTE_AT = 0xF700
FIRST_ODD_BYTE, LAST_ODD_BYTE = 0x80, 0xFF


class LocalStore:
    """Files of this machine. URIs are absolute paths."""

    def walk(self, root: str, max_objects: float, leaves_root: bool) -> Iterator[Folder]:
        """List a tree folder by folder, depth first, names sorted.

        A folder that links reach twice is listed once.
        """
        top = Path(root)
        if not top.is_dir():
            raise FileNotFoundError("the folder is missing")
        real_top = top.resolve()
        num_objects = 0
        visited: set[tuple[int, int]] = set()
        for folder, subfolders, names in os.walk(
            top, onerror=_raise_listing_error, followlinks=True
        ):
            status = Path(folder).stat()
            # Device and inode: two paths to one folder have the same pair.
            if (status.st_dev, status.st_ino) in visited:  # a link back into the tree
                subfolders.clear()
                continue
            visited.add((status.st_dev, status.st_ino))
            outside: set[str] = set()
            if not leaves_root:
                outside = _names_leading_out(Path(folder), [*subfolders, *names], real_top)
            # In place: os.walk goes on with this list, in this order.
            subfolders[:] = sorted(set(subfolders) - outside)
            prefix = _prefix_of(Path(folder), top)
            objects = _list_files(Path(folder), prefix, sorted({*names, *outside}), outside)
            num_objects += len(objects)
            check_count(num_objects, max_objects)
            if objects:
                yield prefix, objects

    def list_names(self, folder: str) -> list[str]:
        """Return the names directly in a folder."""
        path = Path(folder)
        if not path.is_dir():
            return []
        return sorted(entry.name for entry in path.iterdir())

    def describe(self, uri: str) -> ObjectInfo | None:
        """Return one file as a listing shows it."""
        path = _path_on_disk(uri)
        return _file_info(path, uri.rpartition("/")[2]) if path.is_file() else None

    def read(self, uri: str, max_bytes: int | None) -> bytes:
        """Read a file, or only its first bytes."""
        with _path_on_disk(uri).open("rb") as file:
            return file.read(-1 if max_bytes is None else max_bytes)

    def read_chunks(self, uri: str, expected: ObjectInfo | None) -> Iterator[bytes]:
        """Read a file in chunks; compare size and time of change with the listing first."""
        with _path_on_disk(uri).open("rb") as file:
            # Of the open file: a file that is renamed over the path meanwhile has another one.
            status = os.fstat(file.fileno())
            version = (status.st_size, str(status.st_mtime_ns))
            if expected is not None and version != (expected.num_bytes, expected.version):
                raise ObjectChangedError("a file differs from its entry in the listing")
            while chunk := file.read(CHUNK_BYTES):
                yield chunk

    def put(self, uri: str, file: IO[bytes], *, only_new: bool) -> bool:
        """Write a file next to its target and rename it: a reader sees all of it or nothing."""
        target = Path(uri)
        target.parent.mkdir(parents=True, exist_ok=True)
        # In the folder of the target, since a rename works within one file system only.
        descriptor, partial = tempfile.mkstemp(prefix="._", dir=target.parent)
        try:
            with os.fdopen(descriptor, "wb") as out:
                shutil.copyfileobj(file, out)
                out.flush()
                # Before the rename: a crash must not leave an empty file under the name.
                os.fsync(out.fileno())
            # mkstemp gives mode 0600, and other users read the ledger.
            Path(partial).chmod(0o644)
            if only_new:
                # A link fails if the target exists; a rename would replace it.
                with suppress(FileExistsError):
                    os.link(partial, target)
                    return True
                return False
            Path(partial).replace(target)
        finally:
            Path(partial).unlink(missing_ok=True)
        return True

    def honours_create(self, folder: str) -> bool:
        """Return True: a link never replaces a file."""
        return True

    def delete(self, uri: str) -> None:
        """Delete a file, if it exists."""
        Path(uri).unlink(missing_ok=True)

    def delete_folder(self, uri: str) -> None:
        """Delete a folder and everything below it."""
        with suppress(FileNotFoundError):
            shutil.rmtree(uri)

    def filesystem(self, uri: str) -> tuple[pafs.FileSystem, str]:
        """Return pyarrow's local file system."""
        return pafs.LocalFileSystem(), uri


def _names_leading_out(folder: Path, names: list[str], real_root: Path) -> set[str]:
    """Return the names in a folder that are links out of the root, dangling links left out."""
    outside = set()
    for name in names:
        path = folder / name
        if path.is_symlink() and not path.resolve().is_relative_to(real_root) and path.exists():
            outside.add(name)
    return outside


def _prefix_of(folder: Path, root: Path) -> str:
    relative = _listed_name(folder.relative_to(root).as_posix())
    return "" if relative == "." else f"{relative}/"


def _list_files(folder: Path, prefix: str, names: list[str], outside: set[str]) -> list[ObjectInfo]:
    objects = []
    for name in names:
        path = f"{prefix}{_listed_name(name)}"
        info = ObjectInfo(path, 0, OUTSIDE) if name in outside else _file_info(folder / name, path)
        if info is not None:
            objects.append(info)
    return objects


def _file_info(path: Path, listed_path: str) -> ObjectInfo | None:
    """Return a file's entry in the listing; None for pipes and sockets.

    A dangling link is listed, as unreadable.
    """
    try:
        status = path.stat()
    except OSError:
        return ObjectInfo(listed_path, 0, "unreadable")
    if not S_ISREG(status.st_mode):
        return None
    return ObjectInfo(listed_path, status.st_size, str(status.st_mtime_ns))


def _listed_name(name: str) -> str:
    """Return a name from the disk as valid Unicode."""
    # The usual name needs no look at its characters.
    if name.isascii():
        return name
    return "".join(_shifted(c, SURROGATE_AT, ODD_BYTE_AT) for c in name)


def _path_on_disk(path: str) -> Path:
    """Return the file of a listed path: the inverse of ``_listed_name``.

    Unless a file has the private characters in its real name.
    """
    if path.isascii():
        return Path(path)
    shifted = "".join(_shifted(c, ODD_BYTE_AT, SURROGATE_AT) for c in path)
    if shifted == path or Path(path).exists():
        return Path(path)
    return Path(shifted)


def _shifted(character: str, source_at: int, target_at: int) -> str:
    """Move a character that stands for an odd byte from one range of code points to another."""
    byte = ord(character) - source_at
    return chr(target_at + byte) if FIRST_ODD_BYTE <= byte <= LAST_ODD_BYTE else character


def _raise_listing_error(error: OSError) -> None:
    # os.walk skips such a folder by default, and its series would be lost.
    raise OSError(f"a folder of the archive cannot be listed: {type(error).__name__}") from None
