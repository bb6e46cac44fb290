"""Rows of finished series, which the driver stores in chunks until the commit.

_work/<run_id>/rows/<time>-<id>-<number of rows>.parquet   one chunk, written whole

A series may have rows in two chunks, if two drivers screened it or Ray repeated a block; the commit
takes that of the earlier chunk. Runs of older software have one chunk for each series, named by its
key.
"""

import re
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from io import BytesIO
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from covtanet import storage
from covtanet.ledger.record import ScreeningRecord
from covtanet.ledger.run import Run
from covtanet.ledger.schema import LEDGER_SCHEMA, SCHEMA_VERSION, with_columns
from covtanet.ledger.series_keys import SeriesKeys, join_keys, sort_distinct
from covtanet.ledger.work import batched

# A driver that is killed loses the rows that came within so many seconds after the last chunk;
# their series are screened again. An object for each row would be a request for each series, and
# as many for the commit.
STORE_EVERY_S = 2.0
MAX_ROWS_PER_CHUNK = 1000
# A chunk is a small object: the time goes to waiting for storage.
NUM_READ_THREADS = 8
NUM_ROWS = re.compile(r"-(\d+)\.parquet$")


class FinishedRows:
    """Rows of finished series, of which a chunk is stored every few seconds.

    Used within ``contextlib.closing``, so that it stores the rest at the end, also after an error.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._rows: list[dict[str, Any]] = []
        # The first row is stored at once: then the run is known to work.
        self._stored_at = -STORE_EVERY_S

    def add(self, record: ScreeningRecord) -> None:
        """Take the record of a finished series."""
        self._rows.append(complete_row(self._run, record))
        is_due = time.monotonic() - self._stored_at >= STORE_EVERY_S
        if is_due or len(self._rows) >= MAX_ROWS_PER_CHUNK:
            self._store()

    def close(self) -> None:
        """Store the rows that are left."""
        self._store()

    def _store(self) -> None:
        if self._rows:
            _store_chunk(self._run, self._rows)
        self._rows = []
        self._stored_at = time.monotonic()


def store_rows(run: Run, records: Sequence[ScreeningRecord]) -> None:
    """Store the rows of finished series as one chunk."""
    _store_chunk(run, [complete_row(run, record) for record in records])


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


def check_row(run: Run, record: ScreeningRecord) -> None:
    """Check that a record can be read from its columns and fits the ledger's schema.

    Raises:
        ValueError, TypeError, OverflowError, pa.ArrowException: it does not.
    """
    record = ScreeningRecord.from_columns(record.to_columns())
    pa.RecordBatch.from_pylist([complete_row(run, record)], schema=LEDGER_SCHEMA)


def finished_keys(run: Run) -> SeriesKeys:
    """Return the keys of the series that have a row, sorted."""
    return sort_distinct(join_keys(read_chunks(run, ["series_key"])))


def read_chunks(run: Run, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """Yield the chunks of finished rows, a few of which are read ahead."""
    folder = run.work_uri("rows")

    def read(name: str) -> pa.Table:
        data = storage.read_bytes(storage.join(folder, name))
        table = pq.read_table(BytesIO(data), columns=columns)
        return with_columns(table, columns or LEDGER_SCHEMA.names)

    with ThreadPoolExecutor(NUM_READ_THREADS) as pool:
        for group in batched(_chunk_names(folder), NUM_READ_THREADS):
            yield from pool.map(read, group)


def num_finished(work_folder: str) -> int:
    """Return the number of rows in a run's chunks by their names; nothing is read."""
    names = _chunk_names(storage.join(work_folder, "rows"))
    counts = (NUM_ROWS.search(name) for name in names)
    return sum(int(count[1]) if count else 1 for count in counts)


def _chunk_names(folder: str) -> list[str]:
    """Return the names of the chunks, without files that are still being written."""
    names = storage.list_names(folder)
    return [name for name in names if name.endswith(".parquet") and not name.startswith(".")]


def _store_chunk(run: Run, rows: list[dict[str, Any]]) -> None:
    buffer = BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=LEDGER_SCHEMA), buffer, compression="zstd")
    # By their names chunks are in the order of time; two drivers may store at the same time.
    name = f"{time.time_ns():020d}-{uuid.uuid4().hex}-{len(rows)}.parquet"
    storage.write_bytes(run.work_uri("rows", name), buffer.getvalue())
