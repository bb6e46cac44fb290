"""The scan of an archive: headers of listed folders to series and ignored objects.

A small archive is scanned by this process, since a plan of Ray Data takes seconds to start; a large
one by tasks on the cluster.
"""

import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from covtanet import ray_data, storage
from covtanet.archive import manifest
from covtanet.archive.object_kinds import Identify
from covtanet.decoding import headers
from covtanet.decoding.child_process import header_reader
from covtanet.decoding.process import Limits
from covtanet.ledger.run import Run
from covtanet.screening.listing import FOLDERS_PER_SCAN, SCAN_SCHEMA

Row = dict[str, Any]
# Choice: up to so many objects are scanned without Ray: 2 s of a local disk, less than half a
# minute of a store that answers after 20 ms. The start of a plan takes 5 s.
MAX_OBJECTS_HERE = 10_000
# Folders whose headers are read at the same time, since a store answers after some milliseconds.
READING_THREADS = 8


def scan(run: Run, limits: Limits, listing: Path, num_objects: int) -> Iterator[Row]:
    """Yield series and ignored objects of a listing, in its order.

    listing: local file of LISTING_SCHEMA with so many objects.
    """
    if num_objects <= MAX_OBJECTS_HERE:
        batches = _scan_here(run, limits, listing)
    else:
        batches = _scan_on_cluster(run, limits, listing)
    for batch in batches:
        yield from batch.to_pylist()


def _scan_here(run: Run, limits: Limits, listing: Path) -> Iterator[pa.Table]:
    for batch in pq.ParquetFile(listing).iter_batches(FOLDERS_PER_SCAN):
        yield scan_folders(pa.Table.from_batches([batch]), run.archive, limits)


def _scan_on_cluster(run: Run, limits: Limits, listing: Path) -> Iterator[pa.Table]:
    uri = run.work_uri("drivers", uuid.uuid4().hex, "listing.parquet")
    storage.upload(listing, uri)
    scanned = ray_data.read_in_blocks(uri, FOLDERS_PER_SCAN).map_batches(
        scan_folders,
        fn_kwargs={"archive": run.archive, "limits": limits},
        batch_format="pyarrow",
        batch_size=None,
    )
    yield from scanned.iter_batches(batch_format="pyarrow", batch_size=None)


def scan_folders(batch: pa.Table, archive: str, limits: Limits) -> pa.Table:
    """Sort the objects of some folders into series; their headers are parsed in a sandbox."""
    child = header_reader(limits)
    one_at_a_time = threading.Lock()

    def identify(contents: list[bytes], header_bytes: int) -> headers.Identities:
        with one_at_a_time:  # threads wait for storage at the same time, and for the child in turn
            return headers.read_identities(child, contents, header_bytes)

    with ThreadPoolExecutor(READING_THREADS) as pool:
        folders = pool.map(partial(_scan_folder, archive, identify), batch.to_pylist())
        rows = [row for folder_rows in folders for row in folder_rows]
    return pa.Table.from_pylist(rows, schema=SCAN_SCHEMA)


def _scan_folder(archive: str, identify: Identify, folder: Row) -> list[Row]:
    def read_head(path: str, num_bytes: int) -> bytes:
        return storage.read_bytes(storage.join(archive, path), num_bytes)

    objects = [storage.ObjectInfo(**item) for item in folder["objects"]]
    series, ignored = manifest.scan_folder(folder["folder"], objects, read_head, identify)
    rows = [{**item.to_row(), "is_ignored": False} for item in series]
    return rows + [_ignored_row(item) for item in ignored]


def _ignored_row(item: storage.ObjectInfo) -> Row:
    series = manifest.Series(source_path=item.path, source_format="other", objects=(item,))
    return {**series.to_row(), "is_ignored": True}
