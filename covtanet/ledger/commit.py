"""The commit: one write that publishes a run, after every series of the manifest has its row."""

import json
import logging
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from covtanet import storage
from covtanet.errors import AlreadyCommittedError
from covtanet.ledger.accounting import Accounting
from covtanet.ledger.deidentify import LINKAGE_SCHEMA, hide_identities
from covtanet.ledger.finished_rows import read_chunks
from covtanet.ledger.run import Run, is_committed
from covtanet.ledger.schema import LEDGER_SCHEMA
from covtanet.ledger.series_keys import SeriesKeys, join_keys, keys_of, position_of, sort_distinct
from covtanet.ledger.work import KEYS_PER_BATCH, manifest_batches, remove_work

logger = logging.getLogger(__name__)

# Rows that are sorted together, which bounds the memory: about 100 MB, twice while they are sorted.
ROWS_PER_WINDOW = 1 << 17
# A filter by status or involvement reads one or two of the 16 groups of a window.
ROWS_PER_GROUP = 1 << 13
# Within a window. The series key makes the order of rows the same in each run.
ORDER = [("status", "ascending"), ("involvement", "ascending"), ("series_key", "ascending")]
# Metadata of a committed file: the token of the commit that wrote it, and when its run began by the
# clock of the first driver.
COMMIT_TOKEN, BEGUN_AT = b"covtanet.driver", b"covtanet.begun_at"
# The clock of a driver may be this far ahead of the one that commits before its time is replaced.
CLOCK_TOLERANCE = timedelta(minutes=5)


def commit_run(run: Run, *, is_exclusive: bool = True) -> Accounting:
    """Check that every series of the manifest has its row, and publish the run.

    The ledger is published by one PUT that replaces nothing.

    is_exclusive: the store keeps such a PUT from replacing; if it does not, the file is compared
    after the PUT.

    Raises:
        RuntimeError: rows and manifest differ; nothing is published then.
        AlreadyCommittedError: another driver of this run was first.
    """
    # Not Run.driver: it distinguishes this commit from another start of the same driver.
    commit_token = uuid.uuid4().hex.encode()
    keys = _expected_keys(run)
    accounting = Accounting()
    # Arrow keeps what it freed: 100 MB of the plan of a million series.
    pa.default_memory_pool().release_unused()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.parquet"
        linkage_path = Path(folder) / "linkage.parquet"
        num_rows = _write_ledger(run, keys, accounting, path, linkage_path, commit_token)
        num_accounted = accounting.screened + accounting.rejected.total() + accounting.failed
        # Before anything is published: a run is visible whole or not at all.
        if not num_rows == num_accounted == len(keys):
            raise RuntimeError(
                f"{num_accounted} of {num_rows} rows have a known status, expected {len(keys)}"
            )
        # The linkage comes first: pseudonyms in a committed ledger can always be resolved.
        if run.site_key:
            name = f"{run.run_id}.parquet"
            storage.upload(
                linkage_path, storage.join(run.linkage, f"date={run.run_date.isoformat()}", name)
            )
        is_new = _create(path, run)
    # A PUT whose answer was lost counts as refused although it was ours: the file tells whose it
    # is.
    if not (is_new and is_exclusive) and _commit_token_of(run) != commit_token:
        raise AlreadyCommittedError("another driver of this run committed first; its ledger stands")
    # Last, since until the commit the rows of the work are the only checkpoint.
    remove_work(run)
    return accounting


def _create(path: Path, run: Run) -> bool:
    """Publish the file; return whether it is surely this one that was published."""
    try:
        return storage.create(path, run.committed_uri)
    except OSError:
        # The answer of a request that was carried out may be lost: the file tells whose it is.
        if is_committed(run):
            return False
        raise


def _expected_keys(run: Run) -> SeriesKeys:
    """Return the series keys of the manifest, sorted; each of them has a row.

    Raises:
        RuntimeError: two series share a key.
    """
    # The manifest, not the rows, says which series a run has.
    keys = join_keys(manifest_batches(run, ["series_key"], KEYS_PER_BATCH))
    distinct = sort_distinct(keys)
    if len(distinct) != len(keys):
        raise RuntimeError(
            f"{len(keys) - len(distinct)} series of the manifest share a key, expected none"
        )
    return distinct


def _write_ledger(
    run: Run,
    keys: SeriesKeys,
    accounting: Accounting,
    path: Path,
    linkage_path: Path,
    commit_token: bytes,
) -> int:
    """Write one row for each key to a local file; return their number."""
    now = datetime.now(UTC)
    metadata = {
        **LEDGER_SCHEMA.metadata,
        COMMIT_TOKEN: commit_token,
        BEGUN_AT: _begun_at(run, now).encode(),
    }
    schema = LEDGER_SCHEMA.with_metadata(metadata)
    num_rows = 0
    with (
        pq.ParquetWriter(linkage_path, LINKAGE_SCHEMA) as linkage,
        pq.ParquetWriter(path, schema, compression="zstd") as ledger,
    ):
        for window in _windows(_one_row_each(read_chunks(run), keys)):
            accounting.add(window)
            rows = hide_identities(run, _correct_times(window, now).sort_by(ORDER), linkage)
            ledger.write_table(rows.cast(schema), row_group_size=ROWS_PER_GROUP)
            num_rows += rows.num_rows
            # Before the next window is read: none of this one is kept beside it.
            del window, rows
    return num_rows


def _one_row_each(chunks: Iterable[pa.Table], keys: SeriesKeys) -> Iterator[pa.Table]:
    """Yield the rows of chunks, without further rows of series that had one before.

    Rows of series that the manifest does not have are left out: if a store lets a second driver
    replace the manifest, the last one counts.

    Raises:
        RuntimeError: a series has no row.
    """
    has_row = np.zeros(len(keys), bool)
    for listed_or_not in chunks:
        positions = position_of(keys_of(listed_or_not), keys)
        chunk = listed_or_not.filter(pa.array(positions >= 0))
        positions = positions[positions >= 0]
        if num_left_out := listed_or_not.num_rows - chunk.num_rows:
            logger.warning("%d rows are of no series of the manifest", num_left_out)
        # Within the chunk the first of equal keys counts, among chunks that of the earlier one.
        _, first = np.unique(positions, return_index=True)
        new = np.sort(first[~has_row[positions[first]]])
        has_row[positions] = True
        yield chunk.take(new)
    if num_missing := len(keys) - int(has_row.sum()):
        raise RuntimeError(
            f"{num_missing} of {len(keys)} series have no row; start the same command again"
        )


def _windows(chunks: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Join chunks to tables of about ``ROWS_PER_WINDOW`` rows."""
    window: list[pa.Table] = []
    num_rows = 0
    for chunk in chunks:
        window.append(chunk)
        num_rows += chunk.num_rows
        if num_rows >= ROWS_PER_WINDOW:
            yield _joined(window)
            num_rows = 0
    if window:
        yield _joined(window)


def _joined(chunks: list[pa.Table]) -> pa.Table:
    """Return one table of chunks, which leave the list: none is kept beside it."""
    table = pa.concat_tables(chunks).combine_chunks()
    chunks.clear()
    return table


def _begun_at(run: Run, now: datetime) -> str:
    """Return the time at which the run began by its first driver's clock."""
    try:
        return str(json.loads(storage.read_bytes(run.work_uri("run.json")))["begun_at"])
    except (FileNotFoundError, ValueError, KeyError):
        return now.isoformat()


def _correct_times(rows: pa.Table, now: datetime) -> pa.Table:
    """Replace times after the commit, of drivers with a wrong clock, by the commit's time."""
    times = rows["screened_at"]
    is_ahead = pc.greater(times, pa.scalar(now + CLOCK_TOLERANCE, times.type))
    num_ahead = pc.sum(is_ahead).as_py()
    if not num_ahead:
        return rows
    logger.warning(
        "%d rows have a time ahead of this machine's clock; they get that of the commit", num_ahead
    )
    # Readers who sort by time would take such a row for the newest.
    corrected = pc.if_else(is_ahead, pa.scalar(now, times.type), times)
    index = rows.schema.get_field_index("screened_at")
    return rows.set_column(index, rows.schema.field(index), corrected)


def _commit_token_of(run: Run) -> bytes:
    """Return the token of the commit that wrote the file."""
    filesystem, path = storage.filesystem(run.committed_uri)
    metadata = pq.read_schema(path, filesystem=filesystem).metadata or {}
    return bytes(metadata.get(COMMIT_TOKEN, b""))
