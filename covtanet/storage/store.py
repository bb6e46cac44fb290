"""The protocol of a store of objects, and the entries of its listings."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Protocol

import pyarrow.fs as pafs

from covtanet.errors import TooManyObjectsError

CHUNK_BYTES = 1 << 20
# Version of a link that leads out of the listed root; such an object is never read.
OUTSIDE = "outside"
# A folder: its path relative to the listed root, with a trailing slash or empty, and its objects.
Folder = tuple[str, list["ObjectInfo"]]


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One object of a listing.

    path: relative to the listed root. num_bytes: None if the server does not tell, as DICOMweb.
    version: ETag, or time of change on a disk.
    """

    path: str
    num_bytes: int | None
    version: str


class Store(Protocol):
    """Objects under URIs.

    Every failure is an ``OSError``; a missing object is a ``FileNotFoundError``.
    """

    def walk(self, root: str, max_objects: float, leaves_root: bool) -> Iterator[Folder]:
        """List a tree folder by folder."""

    def list_names(self, folder: str) -> list[str]:
        """Return the names directly in a folder, sorted; empty if the folder is missing."""

    def describe(self, uri: str) -> ObjectInfo | None:
        """Return one object as a listing of its folder shows it; None if it is missing."""

    def read(self, uri: str, max_bytes: int | None) -> bytes:
        """Read an object, or only its first bytes."""

    def read_chunks(self, uri: str, expected: ObjectInfo | None) -> Iterator[bytes]:
        """Read an object in chunks.

        expected: raise ``ObjectChangedError`` if the object differs from this entry.
        """

    def put(self, uri: str, file: IO[bytes], *, only_new: bool) -> bool:
        """Write an object whole; return whether it was written.

        only_new: leave an existing object unchanged.
        """

    def honours_create(self, folder: str) -> bool:
        """Return whether ``only_new`` keeps an object of the folder from being replaced."""

    def delete(self, uri: str) -> None:
        """Delete an object, if it exists."""

    def delete_folder(self, uri: str) -> None:
        """Delete a folder and everything below it, if it exists."""

    def filesystem(self, uri: str) -> tuple[pafs.FileSystem, str]:
        """Return a pyarrow file system and the path in it."""


def check_count(num_objects: int, max_objects: float) -> None:
    """Stop a listing that grows too long.

    Raises:
        TooManyObjectsError: there are more objects than allowed.
    """
    if num_objects > max_objects:
        raise TooManyObjectsError(f"more than {max_objects} objects")
