"""Digests of objects: of the entries of a listing, and of the bytes themselves."""

import hashlib
from collections.abc import Iterable, Iterator

from covtanet.storage.store import ObjectInfo


def version_digest(objects: list[ObjectInfo]) -> str:
    """Return SHA-256 over path, size and version of each object, sorted by path.

    It changes when the listing does.
    """
    digest = hashlib.sha256()
    for item in sorted(objects, key=lambda item: item.path):
        # NUL and line feed separate the fields.
        line = f"{item.path}\0{item.num_bytes}\0{item.version}\n"
        # surrogateescape: names on a disk need not be UTF-8.
        digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


class ContentDigest:
    """SHA-256 over path, size and SHA-256 of each object's bytes, sorted by path.

    It is taken while the bytes are read, so that nothing is read twice.
    """

    def __init__(self) -> None:
        self._lines: dict[str, str] = {}
        self.num_bytes = 0
        """Bytes of these objects."""

    @property
    def num_objects(self) -> int:
        """Number of objects that were read to their end."""
        return len(self._lines)

    def tee(self, path: str, chunks: Iterable[bytes]) -> Iterator[bytes]:
        """Yield the chunks of an object unchanged and add them to the digest."""
        digest = hashlib.sha256()
        num_bytes = 0
        for chunk in chunks:
            digest.update(chunk)
            num_bytes += len(chunk)
            yield chunk
        self.num_bytes += num_bytes
        self._lines[path] = f"{path}\0{num_bytes}\0{digest.hexdigest()}\n"

    def hexdigest(self) -> str:
        """Return the digest of all objects that were read to their end."""
        # Sorted: objects may be read in any order.
        lines = "".join(line for _, line in sorted(self._lines.items()))
        return hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()
