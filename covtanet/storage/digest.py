"""Digests of objects: of a listing's entries, and of the bytes themselves."""

import hashlib
from collections.abc import Iterable, Iterator

from covtanet.storage.store import ObjectInfo


def version_digest(objects: list[ObjectInfo]) -> str:
    """Return SHA-256 over path, size and version of each object, by path; it changes when the listing does."""
    digest = hashlib.sha256()
    for item in sorted(objects, key=lambda item: item.path):
        digest.update(
            f"{item.path}\0{item.num_bytes}\0{item.version}\n".encode("utf-8", "surrogateescape")
        )
    return digest.hexdigest()


class ContentDigest:
    """SHA-256 over path, size and SHA-256 of each object's bytes, by path, taken as the bytes pass."""

    def __init__(self) -> None:
        self._lines: dict[str, str] = {}

    @property
    def num_objects(self) -> int:
        """Number of objects that have passed to their end."""
        return len(self._lines)

    def passing(self, path: str, chunks: Iterable[bytes]) -> Iterator[bytes]:
        """Yield the same chunks and add them to the digest."""
        digest = hashlib.sha256()
        num_bytes = 0
        for chunk in chunks:
            digest.update(chunk)
            num_bytes += len(chunk)
            yield chunk
        self._lines[path] = f"{path}\0{num_bytes}\0{digest.hexdigest()}\n"

    def hexdigest(self) -> str:
        """Return the digest of all objects that have passed."""
        lines = "".join(line for _, line in sorted(self._lines.items()))
        return hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()
