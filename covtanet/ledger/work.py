"""Work in progress of a run: its frozen manifest. ``finished_rows`` has the rows so far."""

import logging
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from covtanet import storage
from covtanet.archive.manifest import IGNORED_SCHEMA, MANIFEST_SCHEMA
from covtanet.ledger.row_groups import RowGroupWriter
from covtanet.ledger.run import Run
from covtanet.ledger.series_keys import SeriesKeys, keys_of, position_of

logger = logging.getLogger(__name__)

# Rows in memory at a time: a row of the manifest lists all objects of its series.
SERIES_PER_BATCH = 64
KEYS_PER_BATCH = 1 << 16
FOLDERS_SCHEMA = pa.schema([
    pa.field("folder", pa.string(), nullable=False),
    pa.field("version", pa.string(), nullable=False),
    pa.field("series_keys", pa.list_(pa.string()), nullable=False),
    # Null in listings of older software. The version is of the software that read the folder.
    pa.field("num_ignored", pa.int32()),
    pa.field("software_version", pa.string()),
])  # fmt: skip


class ListedFolder(NamedTuple):
    """A folder of an archive, as a run listed it."""

    version: str = ""
    """Digest of names, sizes and versions of its objects; empty for one that was not listed."""
    series_keys: Sequence[str] = ()
    num_ignored: int | None = None
    """Objects that are no series; None if it is not known."""
    software_version: str | None = None
    """Of the software that read the folder."""


def write_manifest(
    run: Run, rows: Iterable[dict[str, Any]], ignored: Path, folders: Path | None = None
) -> None:
    """Publish the frozen manifest; of several drivers the first one's counts.

    A run that has a manifest also has its ignored objects. It has its folders, unless the driver
    ended between the two: the next night reads every folder then.
    """
    storage.upload(ignored, run.work_uri("ignored.parquet"))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "manifest.parquet"
        write_rows(path, MANIFEST_SCHEMA, rows)
        # Created, not replaced: a second driver takes the manifest of the first.
        is_ours = storage.create(path, run.work_uri("manifest.parquet"))
    # The listing of another driver may be later: its folders would settle series that changed after
    # this manifest.
    if folders is not None and is_ours:
        storage.upload(folders, run.work_uri("folders.parquet"))


def read_manifest(run: Run, columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """Yield the manifest's rows, some at a time in memory."""
    for batch in manifest_batches(run, columns):
        yield from batch.to_pylist()


def manifest_batches(
    run: Run, columns: list[str] | None = None, num_rows: int = SERIES_PER_BATCH
) -> Iterator[pa.RecordBatch]:
    """Yield the manifest in batches. num_rows: the largest number in one."""
    filesystem, path = storage.filesystem(run.work_uri("manifest.parquet"))
    with filesystem.open_input_file(path) as file:
        yield from pq.ParquetFile(file).iter_batches(num_rows, columns=columns)


def unfinished_series(run: Run, finished: SeriesKeys) -> Iterator[pa.Table]:
    """Yield the rows of the manifest without those of finished series.

    finished: their keys, sorted.
    """
    for batch in manifest_batches(run):
        is_unfinished = position_of(keys_of(batch), finished) < 0
        yield pa.Table.from_batches([batch.filter(pa.array(is_unfinished))])


def read_ignored(run: Run) -> pa.Table:
    """Return the objects that belong to no series."""
    filesystem, path = storage.filesystem(run.work_uri("ignored.parquet"))
    return pq.read_table(path, filesystem=filesystem, schema=IGNORED_SCHEMA)


def read_folders(work_root: str, run_id: str) -> dict[str, ListedFolder]:
    """Return each folder as a run listed it, if it noted them."""
    uri = storage.join(work_root, run_id, "folders.parquet")
    if not storage.exists(uri):
        return {}
    rows = pq.read_table(BytesIO(storage.read_bytes(uri)), schema=FOLDERS_SCHEMA).to_pylist()
    return {row.pop("folder"): ListedFolder(**row) for row in rows}


def remove_work(run: Run) -> None:
    """Remove the work of a committed run; run.json, manifest, folders and ignored objects stay.

    The ledger stands even if the store keeps some of it; the next start of the run tries again.
    """
    for name in ("rows", "model", "drivers", "attempts"):
        try:
            storage.delete_folder(run.work_uri(name))
        except OSError as error:
            logger.warning(
                "work that is needed no more could not be removed: %s", type(error).__name__
            )


def write_rows(path: Path, schema: pa.Schema, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows to a local Parquet file, some at a time in memory."""
    with closing(RowGroupWriter(path, schema)) as writer:
        for group in batched(rows, SERIES_PER_BATCH):
            writer.write(pa.Table.from_pylist(group, schema=schema))


def batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Yield lists of at most ``size`` items."""
    iterator = iter(items)
    while group := list(islice(iterator, size)):
        yield group
