"""The commit: one write that publishes a run, after every series of the manifest has its row."""

import json
import logging
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from covtanet import storage
from covtanet.errors import AlreadyCommittedError
from covtanet.ledger.accounting import Accounting
from covtanet.ledger.deidentify import LINKAGE_SCHEMA, ROWS_PER_GROUP, hide_identities
from covtanet.ledger.run import Run
from covtanet.ledger.schema import LEDGER_SCHEMA
from covtanet.ledger.work import batched, finished_keys, read_manifest, remove_work, write_rows

logger = logging.getLogger(__name__)

# A row is a small object: the time goes to waiting for storage.
NUM_READ_THREADS = 16
# Metadata of a committed file: the token of the commit that wrote it, and when its run began by the
# clock of the first driver.
DRIVER, BEGUN_AT = b"covtanet.driver", b"covtanet.begun_at"
# A worker's clock may be this far ahead of the driver's before its time is replaced.
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
        is_new = storage.create(path, run.committed_uri)
    # A PUT whose answer was lost counts as refused although it was ours: the file tells whose it
    # is.
    if not (is_new and is_exclusive) and _commit_token_of(run) != commit_token:
        raise AlreadyCommittedError("another driver of this run committed first; its ledger stands")
    # Last, since until the commit the rows of the work are the only checkpoint.
    remove_work(run)
    return accounting


def _expected_keys(run: Run) -> list[str]:
    """Return the series keys of the manifest, each of which has a row.

    Raises:
        RuntimeError: two series share a key, or a series has no row.
    """
    # The manifest, not the rows, says which series a run has.
    keys = [row["series_key"] for row in read_manifest(run, ["series_key"])]
    if len(set(keys)) != len(keys):
        raise RuntimeError(
            f"{len(keys) - len(set(keys))} series of the manifest share a key, expected none"
        )
    missing = set(keys) - finished_keys(run)
    if missing:
        raise RuntimeError(
            f"{len(missing)} of {len(keys)} series have no row; start the same command again"
        )
    return keys


def _write_ledger(
    run: Run,
    keys: list[str],
    accounting: Accounting,
    path: Path,
    linkage_path: Path,
    commit_token: bytes,
) -> int:
    """Write all rows in the manifest's order to a local file; return their number."""
    now = datetime.now(UTC)
    metadata = {
        **LEDGER_SCHEMA.metadata,
        DRIVER: commit_token,
        BEGUN_AT: _begun_at(run, now).encode(),
    }
    schema = LEDGER_SCHEMA.with_metadata(metadata)
    with pq.ParquetWriter(linkage_path, LINKAGE_SCHEMA) as linkage:
        rows = _correct_times(_read_rows(run, keys, accounting), now)
        return write_rows(path, schema, hide_identities(run, rows, linkage), ROWS_PER_GROUP)


def _begun_at(run: Run, now: datetime) -> str:
    """Return the time at which the run began by its first driver's clock."""
    try:
        return str(json.loads(storage.read_bytes(run.work_uri("run.json")))["begun_at"])
    except (FileNotFoundError, ValueError, KeyError):
        return now.isoformat()


def _correct_times(rows: Iterable[dict[str, Any]], now: datetime) -> Iterator[dict[str, Any]]:
    """Replace times after the commit, of workers with a wrong clock, by the commit's time."""
    num_ahead = 0
    for row in rows:
        # The newest row of a series counts, so that a clock far ahead would hide later rows.
        if row["screened_at"] > now + CLOCK_TOLERANCE:
            num_ahead += 1
            row = {**row, "screened_at": now}
        yield row
    if num_ahead:
        logger.warning(
            "%d rows have a time ahead of this machine's clock; they get that of the commit",
            num_ahead,
        )


def _commit_token_of(run: Run) -> bytes:
    """Return the token of the commit that wrote the file."""
    filesystem, path = storage.filesystem(run.committed_uri)
    metadata = pq.read_schema(path, filesystem=filesystem).metadata or {}
    return bytes(metadata.get(DRIVER, b""))


def _read_rows(run: Run, keys: list[str], accounting: Accounting) -> Iterator[dict[str, Any]]:
    def read(series_key: str) -> dict[str, Any]:
        row: dict[str, Any] = pq.read_table(
            BytesIO(storage.read_bytes(run.row_uri(series_key)))
        ).to_pylist()[0]
        return row

    with ThreadPoolExecutor(NUM_READ_THREADS) as pool:
        for group in batched(keys, ROWS_PER_GROUP):
            # map keeps the manifest's order; groups bound the rows in memory.
            for row in pool.map(read, group):
                accounting.add(row)
                yield row
