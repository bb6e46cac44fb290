"""The store of local paths.

A file name that is not UTF-8 is listed with each such byte as a character of a private range, and found again by it.
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

# Python decodes a byte that is not UTF-8 as U+DC00 + byte, which no Parquet file or URI takes; listings show it as
# U+F700 + byte, a private character.
SURROGATE_AT = 0xDC00
ODD_BYTE_AT = 0xF700
FIRST_ODD_BYTE, LAST_ODD_BYTE = 0x80, 0xFF


class LocalStore:
    """Files of this machine. URIs are absolute paths."""

    def walk(self, root: str, max_objects: float, leaves_root: bool) -> Iterator[Folder]:
        """List a tree folder by folder, depth first, names sorted; a folder reached twice by links is listed once."""
        top = Path(root)
        if not top.is_dir():
            raise FileNotFoundError("there is no such folder")
        num_objects = 0
        visited: set[tuple[int, int]] = set()
        for folder, subfolders, names in os.walk(
            top, onerror=_raise_listing_error, followlinks=True
        ):
            status = Path(folder).stat()
            if (status.st_dev, status.st_ino) in visited:  # a link back into the tree
                subfolders.clear()
                continue
            visited.add((status.st_dev, status.st_ino))
            outside = (
                set()
                if leaves_root
                else _names_leading_out(Path(folder), [*subfolders, *names], top)
            )
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
        return sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []

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
            status = os.fstat(file.fileno())
            found = (status.st_size, str(status.st_mtime_ns))
            if expected is not None and found != (expected.num_bytes, expected.version):
                raise ObjectChangedError("a file is another than was listed")
            while chunk := file.read(CHUNK_BYTES):
                yield chunk

    def put(self, uri: str, file: IO[bytes], *, only_new: bool) -> bool:
        """Write a file beside its target and rename it, so that a reader sees all of it or nothing."""
        target = Path(uri)
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, partial = tempfile.mkstemp(prefix="._", dir=target.parent)
        try:
            with os.fdopen(descriptor, "wb") as out:
                shutil.copyfileobj(file, out)
                out.flush()
                os.fsync(
                    out.fileno()
                )  # before the rename: a crash must not leave an empty file under the name
            Path(partial).chmod(0o644)
            if only_new:
                with suppress(FileExistsError):
                    os.link(
                        partial, target
                    )  # fails if the target exists, which a rename would replace
                    return True
                return False
            Path(partial).replace(target)
        finally:
            Path(partial).unlink(missing_ok=True)
        return True

    def delete(self, uri: str) -> None:
        """Delete a file, if it exists."""
        Path(uri).unlink(missing_ok=True)

    def delete_folder(self, uri: str) -> None:
        """Delete a folder and everything below it."""
        shutil.rmtree(uri, ignore_errors=True)

    def filesystem(self, uri: str) -> tuple[pafs.FileSystem, str]:
        """Return pyarrow's local file system."""
        return pafs.LocalFileSystem(), uri


def _names_leading_out(folder: Path, names: list[str], root: Path) -> set[str]:
    """Return the names in a folder that are links out of the root. A link to nowhere is not one of them."""
    real_root = root.resolve()
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
    """Return a file's entry in the listing; a link to nowhere stays in the list, pipes and sockets do not."""
    try:
        status = path.stat()
    except OSError:
        return ObjectInfo(listed_path, 0, "unreadable")
    if not S_ISREG(status.st_mode):
        return None
    return ObjectInfo(listed_path, status.st_size, str(status.st_mtime_ns))


def _listed_name(name: str) -> str:
    """Return a name from the disk as valid Unicode."""
    low, high = SURROGATE_AT + FIRST_ODD_BYTE, SURROGATE_AT + LAST_ODD_BYTE
    return "".join(
        chr(ord(c) - SURROGATE_AT + ODD_BYTE_AT) if low <= ord(c) <= high else c for c in name
    )


def _path_on_disk(path: str) -> Path:
    """Return the file that a listed path names; the inverse of ``_listed_name`` unless a file has the path itself."""
    low, high = ODD_BYTE_AT + FIRST_ODD_BYTE, ODD_BYTE_AT + LAST_ODD_BYTE
    if not any(low <= ord(c) <= high for c in path) or Path(path).exists():
        return Path(path)
    return Path(
        "".join(
            chr(ord(c) - ODD_BYTE_AT + SURROGATE_AT) if low <= ord(c) <= high else c for c in path
        )
    )


def _raise_listing_error(error: OSError) -> None:
    raise OSError(f"a folder of the archive cannot be listed: {type(error).__name__}") from None
