"""Reading of committed runs. ``covtanet.ledger.view`` has the newest row of every series."""

import logging
from collections.abc import Iterable, Iterator
from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from covtanet import storage
from covtanet.errors import ConfigError, LedgerVersionError
from covtanet.ledger.accounting import ACCOUNTED_COLUMNS, Accounting
from covtanet.ledger.run import latest_date
from covtanet.ledger.schema import LEDGER_SCHEMA, READABLE_VERSIONS, with_columns

logger = logging.getLogger(__name__)

ROWS_PER_BATCH = 1 << 16
# First characters that make a spreadsheet take a text for a formula.
FORMULA = ("=", "+", "-", "@", "\t", "\r")


def committed_files(ledger: str) -> list[str]:
    """Return the URIs of all committed runs, oldest date first.

    A run with a date in the future is left out: it would stay the newest of all.
    """
    uris: list[str] = []
    num_ahead = 0
    latest = f"date={latest_date().isoformat()}"
    for folder_name in storage.list_names(ledger):
        if not folder_name.startswith("date="):
            continue
        if folder_name > latest:
            num_ahead += 1
            continue
        folder = storage.join(ledger, folder_name)
        for name in storage.list_names(folder):
            if name.endswith(".parquet") and name[0] not in "._":
                uris.append(storage.join(folder, name))
    if num_ahead:
        logger.warning("runs of %d dates in the future are left out", num_ahead)
    return uris


def find_run_file(ledger: str, run_id: str) -> str:
    """Return the URI of a run's committed file.

    Raises:
        ConfigError: the run is not committed in this ledger.
    """
    for uri in committed_files(ledger):
        if uri.endswith(f"/{run_id}.parquet"):
            return uri
    raise ConfigError(f"run {run_id} is not committed in this ledger")


def read_run(uri: str, columns: list[str] | None = None) -> pa.Table:
    """Read one committed file; columns that its schema version lacks are null.

    Raises:
        LedgerVersionError: the file has a schema version that this software does not know.
    """
    wanted = LEDGER_SCHEMA.names if columns is None else columns
    file = open_run(BytesIO(storage.read_bytes(uri)))
    return joined(read_batches(file, wanted), wanted)


def joined(tables: Iterable[pa.Table], columns: list[str]) -> pa.Table:
    """Return the rows of tables with these columns as one table; an empty one if there are none."""
    empty = LEDGER_SCHEMA.empty_table().select(columns).replace_schema_metadata(None)
    return pa.concat_tables(list(tables) or [empty])


def account_run(uri: str) -> Accounting:
    """Return the counts of a committed file's rows."""
    accounting = Accounting()
    accounting.add(read_run(uri, ACCOUNTED_COLUMNS))
    return accounting


def for_spreadsheet(table: pa.Table) -> pa.Table:
    """Return lists as text, and put a quote before text that a spreadsheet would run."""
    columns = {}
    for field in table.schema:
        if pa.types.is_list(field.type):
            texts = [" ".join(value) for value in table[field.name].to_pylist()]
            columns[field.name] = pa.array(map(_disarm, texts), pa.string())
        elif pa.types.is_string(field.type):
            columns[field.name] = pa.array(map(_disarm, table[field.name].to_pylist()), pa.string())
        else:
            columns[field.name] = table[field.name]
    return pa.table(columns)


def _disarm(text: str | None) -> str | None:
    return f"'{text}" if text and text.startswith(FORMULA) else text


def open_run(path: Path | BytesIO) -> pq.ParquetFile:
    """Open a committed file.

    Raises:
        LedgerVersionError: the file has a schema version that this software does not know.
    """
    file = pq.ParquetFile(path)
    version = (file.schema_arrow.metadata or {}).get(b"covtanet.schema_version", b"none").decode()
    if version not in map(str, READABLE_VERSIONS):
        expected = " or ".join(map(str, READABLE_VERSIONS))
        raise LedgerVersionError(f"a ledger of schema version {version}, expected {expected}")
    return file


def read_batches(file: pq.ParquetFile, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """Yield columns of an open file, in the order in which they are asked for.

    columns: null for those of the schema. Those that the file's schema version lacks are null.
    """
    wanted = LEDGER_SCHEMA.names if columns is None else columns
    stored = set(file.schema_arrow.names)
    for batch in file.iter_batches(ROWS_PER_BATCH, columns=[n for n in wanted if n in stored]):
        yield with_columns(pa.Table.from_batches([batch]), wanted)
