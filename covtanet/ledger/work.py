"""Work in progress of a run: its frozen manifest and the rows finished so far."""

import logging
import tempfile
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from covtanet import storage
from covtanet.archive.manifest import IGNORED_SCHEMA, MANIFEST_SCHEMA
from covtanet.ledger.record import ScreeningRecord
from covtanet.ledger.run import Run
from covtanet.ledger.schema import LEDGER_SCHEMA, SCHEMA_VERSION

logger = logging.getLogger(__name__)

# Rows in memory at a time: a row of the manifest lists all objects of its series.
SERIES_PER_GROUP = 64
FOLDERS_SCHEMA = pa.schema([
    pa.field("folder", pa.string(), nullable=False),
    pa.field("version", pa.string(), nullable=False),
    pa.field("series_keys", pa.list_(pa.string()), nullable=False),
])  # fmt: skip


def write_manifest(
    run: Run, rows: Iterable[dict[str, Any]], ignored: Path, folders: Path | None = None
) -> None:
    """Publish the frozen manifest; of several drivers the first one's counts.

    The manifest comes last: a run that has one also has its ignored objects and its folders.
    """
    storage.upload(ignored, run.work_uri("ignored.parquet"))
    if folders is not None:
        storage.upload(folders, run.work_uri("folders.parquet"))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "manifest.parquet"
        write_rows(path, MANIFEST_SCHEMA, rows, SERIES_PER_GROUP)
        # Created, not replaced: a second driver takes the manifest of the first.
        storage.create(path, run.work_uri("manifest.parquet"))


def read_manifest(run: Run, columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """Yield the manifest's rows, row group by row group."""
    filesystem, path = storage.filesystem(run.work_uri("manifest.parquet"))
    with filesystem.open_input_file(path) as file:
        for batch in pq.ParquetFile(file).iter_batches(SERIES_PER_GROUP, columns=columns):
            yield from batch.to_pylist()


def read_ignored(run: Run) -> pa.Table:
    """Return the objects that belong to no series."""
    filesystem, path = storage.filesystem(run.work_uri("ignored.parquet"))
    return pq.read_table(path, filesystem=filesystem, schema=IGNORED_SCHEMA)


def read_folders(work_root: str, run_id: str) -> dict[str, tuple[str, list[str]]]:
    """Return version and series keys of each folder as a run listed it, if it noted them."""
    uri = storage.join(work_root, run_id, "folders.parquet")
    if not storage.exists(uri):
        return {}
    rows = pq.read_table(BytesIO(storage.read_bytes(uri)), schema=FOLDERS_SCHEMA).to_pylist()
    return {row["folder"]: (row["version"], row["series_keys"]) for row in rows}


def finished_keys(run: Run) -> set[str]:
    """Return the keys of the series that have a row."""
    # A listing instead of a read of every row: the name is the key.
    names = storage.list_names(run.work_uri("rows"))
    return {
        name.removesuffix(".parquet")
        for name in names
        if name.endswith(".parquet") and not name.startswith(".")
    }


def complete_row(run: Run, record: ScreeningRecord) -> dict[str, Any]:
    """Return a ledger row: the record, the columns of the run, and the time."""
    columns = record.to_columns()
    row = {name: columns.get(name) for name in LEDGER_SCHEMA.names}
    row.update(
        schema_version=SCHEMA_VERSION,
        run_id=run.run_id,
        run_date=run.run_date,
        screened_at=datetime.now(UTC),
        model_name=run.model_name,
        model_version=run.model_version,
        model_digest=run.model_digest,
        config_digest=run.config_digest,
        software_version=run.software_version,
    )
    return row


def store_row(run: Run, record: ScreeningRecord) -> dict[str, Any]:
    """Write one finished series and return its ledger row."""
    row = complete_row(run, record)
    buffer = BytesIO()
    pq.write_table(pa.Table.from_pylist([row], schema=LEDGER_SCHEMA), buffer)
    # A series that two workers finish leaves one row, since the key is its name.
    storage.write_bytes(run.row_uri(row["series_key"]), buffer.getvalue())
    return row


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


def write_rows(
    path: Path, schema: pa.Schema, rows: Iterable[dict[str, Any]], rows_per_group: int
) -> int:
    """Write rows to a local Parquet file, row group by row group; return their number."""
    num_rows = 0
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for group in batched(rows, rows_per_group):
            writer.write_table(pa.Table.from_pylist(group, schema=schema))
            num_rows += len(group)
    return num_rows


def batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Yield lists of at most ``size`` items."""
    iterator = iter(items)
    while group := list(islice(iterator, size)):
        yield group
