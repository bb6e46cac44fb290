"""Objects under a local path or an s3:// URI: listing, reading and writing them whole.

``open_store`` chooses the store of a URI. Every failure is an ``OSError``. A DICOMweb server is no
such store: ``storage.dicomweb`` searches it.
"""

import io
import math
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pyarrow.fs as pafs

from covtanet.errors import (
    AccessError,
    ObjectChangedError,
    TooLargeError,
    TooManyObjectsError,
    UnreachableError,
)
from covtanet.storage.digest import ContentDigest, version_digest
from covtanet.storage.local import LocalStore
from covtanet.storage.s3 import S3Store
from covtanet.storage.store import CHUNK_BYTES, OUTSIDE, Folder, ObjectInfo, Store
from covtanet.storage.uri import (
    absolute,
    is_dicomweb,
    is_s3,
    join,
    local_path,
    resolve,
    split_query,
)

__all__ = [
    "CHUNK_BYTES",
    "OUTSIDE",
    "AccessError",
    "ContentDigest",
    "ObjectChangedError",
    "ObjectInfo",
    "TooLargeError",
    "TooManyObjectsError",
    "UnreachableError",
    "absolute",
    "create",
    "delete",
    "delete_folder",
    "describe",
    "download_files",
    "exists",
    "filesystem",
    "honours_create",
    "is_dicomweb",
    "is_s3",
    "join",
    "list_names",
    "local_copy",
    "local_path",
    "open_store",
    "read_bytes",
    "read_chunks",
    "read_whole",
    "resolve",
    "save_chunks",
    "split_query",
    "upload",
    "version_digest",
    "walk",
    "write_bytes",
]

LOCAL, OBJECT_STORE = LocalStore(), S3Store()


def open_store(uri: str) -> Store:
    """Return the store that a URI belongs to.

    Raises:
        OSError: a DICOMweb server.
    """
    if is_dicomweb(uri):
        raise OSError("a DICOMweb server is an archive of series, expected a path or s3:// URI")
    return OBJECT_STORE if is_s3(uri) else LOCAL


def walk(
    root: str, *, max_objects: int | None = None, leaves_root: bool = False
) -> Iterator[Folder]:
    """List a tree folder by folder: (path of the folder, its objects).

    The path is relative to the root, with a trailing slash or empty. Memory holds the objects of
    one folder and of those above it, never the whole tree.

    leaves_root: follow links of a disk out of the root, for data that the caller has put together.
    Otherwise a link that leads out, to a file or a folder, is listed as an object with version
    ``OUTSIDE``, and reading it is refused: through such a link in an archive any file of the
    machine could be read.

    Raises:
        TooManyObjectsError: the tree holds more than ``max_objects``; the listing stops there.
    """
    limit = math.inf if max_objects is None else max_objects
    return open_store(root).walk(root, limit, leaves_root)


def list_names(folder: str) -> list[str]:
    """Return the names directly in a folder, sorted; empty if the folder is missing."""
    return open_store(folder).list_names(folder)


def exists(uri: str) -> bool:
    """Return whether an object exists."""
    return describe(uri) is not None


def describe(uri: str) -> ObjectInfo | None:
    """Return one object as a listing of its folder shows it; None if it is missing."""
    return open_store(uri).describe(uri)


def read_bytes(uri: str, max_bytes: int | None = None) -> bytes:
    """Read an object, or only its first bytes."""
    return open_store(uri).read(uri, max_bytes)


def read_chunks(uri: str, expected: ObjectInfo) -> Iterator[bytes]:
    """Read an object in chunks, if it is the object that was listed.

    Raises:
        FileNotFoundError: it does not exist any more.
        ObjectChangedError: size, ETag or time of change differ from the listing, or the number of
            bytes that come.
    """
    num_bytes = 0
    for chunk in open_store(uri).read_chunks(uri, expected):
        num_bytes += len(chunk)
        yield chunk
    if num_bytes != expected.num_bytes:
        raise ObjectChangedError("an object has another size than it was listed with")


def read_whole(uri: str) -> Iterator[bytes]:
    """Read an object in chunks without comparing it with a listing."""
    return open_store(uri).read_chunks(uri, None)


def local_copy(uri: str, folder: Path) -> Path:
    """Return a file's own path if it is local, else that of a copy in a folder."""
    if not is_s3(uri):
        return Path(uri)
    path = folder / uuid.uuid4().hex
    with path.open("wb") as out:
        out.writelines(read_whole(uri))
    return path


def write_bytes(uri: str, data: bytes) -> None:
    """Write an object; a reader sees all of it or nothing."""
    open_store(uri).put(uri, io.BytesIO(data), only_new=False)


def upload(path: Path, uri: str) -> None:
    """Publish a local file as one object, by one PUT or a rename.

    A reader sees all of it or nothing.
    """
    with path.open("rb") as file:
        open_store(uri).put(uri, file, only_new=False)


def create(path: Path, uri: str) -> bool:
    """Publish a local file as ``upload`` does, unless the object exists; return whether it did."""
    with path.open("rb") as file:
        return open_store(uri).put(uri, file, only_new=True)


def honours_create(folder: str) -> bool:
    """Return whether the store keeps ``create`` from replacing an object.

    Some S3 servers ignore the condition of the PUT; two PUTs of a probe show it.
    """
    if not is_s3(folder):
        return True
    store = open_store(folder)
    uri = join(folder, f"_probe-{uuid.uuid4().hex}")
    try:
        is_first_written = store.put(uri, io.BytesIO(b"1"), only_new=True)
        is_second_written = store.put(uri, io.BytesIO(b"2"), only_new=True)
        return is_first_written and not is_second_written
    finally:
        store.delete(uri)


def download_files(uri: str, sizes: Mapping[str, int], target: Path) -> None:
    """Copy files of a folder by their names to a local folder; nothing is listed.

    sizes: by name, the largest size in bytes.

    Raises:
        FileNotFoundError: a file is missing.
        TooLargeError: a file is larger.
        ValueError: a name leads out of the target.
    """
    target.mkdir(parents=True, exist_ok=True)
    for name, max_bytes in sizes.items():
        save_chunks(read_whole(join(uri, name)), local_path(target, name), max_bytes)


def save_chunks(chunks: Iterable[bytes], path: Path, max_bytes: int) -> None:
    """Write chunks to a local file.

    Raises:
        TooLargeError: there are more than ``max_bytes``.
    """
    num_bytes = 0
    with path.open("wb") as out:
        for chunk in chunks:
            num_bytes += len(chunk)
            if num_bytes > max_bytes:
                raise TooLargeError(f"{path.name} has more than {max_bytes} bytes")
            out.write(chunk)


def delete(uri: str) -> None:
    """Delete an object, if it exists."""
    open_store(uri).delete(uri)


def delete_folder(uri: str) -> None:
    """Delete a folder and everything below it, if it exists.

    Raises:
        OSError: some objects could not be deleted.
    """
    open_store(uri).delete_folder(uri)


def filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """Return a pyarrow file system for a URI, and the path in it."""
    return open_store(uri).filesystem(uri)
