"""The bytes of a series' objects, read ahead and digested as they pass."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

from covtanet import storage
from covtanet.archive.manifest import Series

NUM_FETCH_THREADS = 8
# Larger objects are not read ahead, which bounds the memory by threads times this size.
SMALL_OBJECT_BYTES = 8 << 20

Pending = tuple[storage.ObjectInfo, Future[list[bytes]] | None]


def fetch_series(
    series: Series,
    archive: str,
    digest: storage.ContentDigest,
    max_bytes: int | None = None,
) -> Iterator[Iterator[bytes]]:
    """Yield the objects of a series, each in chunks, and add them to the digest.

    max_bytes: of the whole series, if its listing does not tell its size.

    Raises:
        StudyError: ``too_large``.
        OSError: an object is missing, has changed since it was listed, or cannot be read.
    """
    if not storage.is_dicomweb(archive):
        yield from _read_objects(series, archive, digest)
        return
    # Only here: other archives do without its libraries.
    from covtanet.archive.dicomweb_series import fetch_instances

    for uid, chunks in fetch_instances(series, archive, max_bytes):
        yield digest.tee(uid, chunks)


def _read_objects(
    series: Series, archive: str, digest: storage.ContentDigest
) -> Iterator[Iterator[bytes]]:
    """Yield the objects of a series in order.

    A few threads read small objects ahead; of a large object there is never more than a chunk in
    memory.
    """
    folder = series.source_path[: series.source_path.rfind("/") + 1]
    remaining = iter(series.objects)
    ahead: deque[Pending] = deque()
    with ThreadPoolExecutor(NUM_FETCH_THREADS) as pool:
        try:
            while True:
                for item in islice(remaining, NUM_FETCH_THREADS - len(ahead)):
                    ahead.append((item, _read_ahead(pool, series, archive, item)))
                if not ahead:
                    return
                # In the order of the listing, whichever read ends first.
                item, future = ahead.popleft()
                chunks = _chunks(archive, item) if future is None else iter(future.result())
                yield digest.tee(item.path.removeprefix(folder), chunks)
        finally:
            # If the reader stops early, reads that have not begun are left out.
            for _, future in ahead:
                if future is not None:
                    future.cancel()


def _read_ahead(
    pool: ThreadPoolExecutor, series: Series, archive: str, item: storage.ObjectInfo
) -> Future[list[bytes]] | None:
    """Start to read a small object; a large one, or the only one, is read when its turn comes."""
    if (item.num_bytes or 0) > SMALL_OBJECT_BYTES or len(series.objects) == 1:
        return None
    return pool.submit(lambda: list(_chunks(archive, item)))


def _chunks(archive: str, item: storage.ObjectInfo) -> Iterator[bytes]:
    return storage.read_chunks(storage.join(archive, item.path), item)
