"""The current view of a ledger: the newest row of every series.

The files of all runs are read twice, first the series keys and then the rows that are newest: so
that memory holds some 100 bytes for each row of the ledger, and not the rows.

Not covered: series that are no longer in the archive keep their newest row.
"""

import json
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from covtanet import storage
from covtanet.ledger.commit import BEGUN_AT
from covtanet.ledger.read import committed_files, joined, open_run, read_batches
from covtanet.ledger.run import WORK
from covtanet.ledger.schema import LEDGER_SCHEMA
from covtanet.ledger.series_keys import join_keys

# The file of a night is small: the time goes to waiting for storage.
NUM_FETCH_THREADS = 16


def newest_rows(
    ledger: str, columns: list[str] | None = None, run_ids: set[str] | None = None
) -> pa.Table:
    """Return the newest row of every series; see ``iter_newest_rows``."""
    names = LEDGER_SCHEMA.names if columns is None else columns
    return joined(iter_newest_rows(ledger, names, run_ids), names)


def iter_newest_rows(
    ledger: str, columns: list[str] | None = None, run_ids: set[str] | None = None
) -> Iterator[pa.Table]:
    """Yield the current view: for each series the row of the run that began last.

    run_ids: only of these runs. A committed run has one row for each of its series.
    """
    with tempfile.TemporaryDirectory() as folder:
        runs = _runs_in_order(ledger, run_ids, Path(folder))
        for path, is_newest in zip(runs, _newest_of(runs), strict=True):
            first = 0
            for table in read_batches(open_run(path), columns):
                chosen = is_newest[first : first + table.num_rows]
                first += table.num_rows
                if chosen.any():
                    yield table.filter(pa.array(chosen))


def _runs_in_order(ledger: str, run_ids: set[str] | None, folder: Path) -> list[Path]:
    """Return local files of the committed runs, those that began first at first.

    folder: gets copies of files that are not local.
    """
    uris = [uri for uri in committed_files(ledger) if run_ids is None or _run_id(uri) in run_ids]
    with ThreadPoolExecutor(NUM_FETCH_THREADS) as pool:
        paths = list(pool.map(partial(storage.local_copy, folder=folder), uris))
    begun_at = [_begun_at(uri, open_run(path)) for uri, path in zip(uris, paths, strict=True)]
    # Stable: of runs that began at the same time the one of the later date counts.
    return [paths[index] for index in sorted(range(len(paths)), key=lambda index: begun_at[index])]


def _run_id(uri: str) -> str:
    return uri.rsplit("/", 1)[-1].removesuffix(".parquet")


def _newest_of(runs: list[Path]) -> list[NDArray[np.bool_]]:
    """Return for each run which of its rows are the newest of their series."""
    # Run by run; the keys are (N,) over all rows of the ledger.
    tables = [list(read_batches(open_run(path), ["series_key"])) for path in runs]
    lengths = [sum(table.num_rows for table in run) for run in tables]
    keys = join_keys(table for run in tables for table in run)
    del tables
    # Stable: rows of one series stay in the order of the runs.
    order = np.argsort(keys, kind="stable")
    is_last = np.ones(len(order), bool)
    is_last[:-1] = keys[order[1:]] != keys[order[:-1]]
    is_newest = np.zeros(len(order), bool)
    is_newest[order[is_last]] = True
    return np.split(is_newest, np.cumsum(lengths)[:-1]) if runs else []


def _begun_at(uri: str, file: pq.ParquetFile) -> datetime:
    """Return the time at which a run began by its driver's clock.

    It is the start of the run's date if the run did not note more.

    A time in the future is replaced too: such a run would stay the newest of all.
    """
    ledger, folder, name = uri.rsplit("/", 2)
    run_date = datetime.fromisoformat(folder.removeprefix("date=")).replace(tzinfo=UTC)
    noted = (file.schema_arrow.metadata or {}).get(BEGUN_AT, b"").decode()
    try:
        if not noted:  # older software noted the time in run.json alone
            description_uri = storage.join(ledger, WORK, name.removesuffix(".parquet"), "run.json")
            noted = json.loads(storage.read_bytes(description_uri))["begun_at"]
        begun_at = datetime.fromisoformat(noted).astimezone(UTC)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return run_date
    return run_date if begun_at > datetime.now(UTC) + timedelta(days=1) else begun_at
