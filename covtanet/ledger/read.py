"""Reading of committed runs: one run, the newest row of every series, spreadsheets.

Not covered: series that are no longer in the archive keep their newest row.
"""

import json
import logging
from datetime import UTC, datetime, timedelta
from io import BytesIO

import pyarrow as pa
import pyarrow.parquet as pq

from covtanet import storage
from covtanet.errors import ConfigError, LedgerVersionError
from covtanet.ledger.accounting import ACCOUNTED_COLUMNS, Accounting
from covtanet.ledger.commit import BEGUN_AT
from covtanet.ledger.run import WORK, latest_date
from covtanet.ledger.schema import LEDGER_SCHEMA, READABLE_VERSIONS, with_columns

logger = logging.getLogger(__name__)

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
    return _read(_open(uri), columns)


def account_run(uri: str) -> Accounting:
    """Return the counts of a committed file's rows."""
    accounting = Accounting()
    accounting.add(read_run(uri, ACCOUNTED_COLUMNS))
    return accounting


def newest_rows(
    ledger: str, columns: list[str] | None = None, run_ids: set[str] | None = None
) -> pa.Table:
    """Return the current view: for each series the latest row of the run that began last.

    run_ids: only of these runs. Runs are ordered before rows, since one driver's clock orders them;
    a row's time is that of its worker's clock.
    """
    wanted = None if columns is None else sorted({*columns, "series_key", "screened_at"})
    runs: list[tuple[datetime, pa.Table]] = []
    for uri in committed_files(ledger):
        if run_ids is None or uri.rsplit("/", 1)[-1].removesuffix(".parquet") in run_ids:
            file = _open(uri)
            runs.append((_begun_at(uri, file), _read(file, wanted)))
    if not runs:
        return LEDGER_SCHEMA.empty_table().select(wanted or LEDGER_SCHEMA.names)
    runs.sort(key=lambda run: run[0])
    return _last_by_series([table for _, table in runs])


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


def _open(uri: str) -> pq.ParquetFile:
    file = pq.ParquetFile(BytesIO(storage.read_bytes(uri)))
    version = (file.schema_arrow.metadata or {}).get(b"covtanet.schema_version", b"none").decode()
    if version not in map(str, READABLE_VERSIONS):
        expected = " or ".join(map(str, READABLE_VERSIONS))
        raise LedgerVersionError(f"a ledger of schema version {version}, expected {expected}")
    return file


def _read(file: pq.ParquetFile, columns: list[str] | None) -> pa.Table:
    """Read columns of one file, in the order in which they are asked for or the schema has them."""
    wanted = LEDGER_SCHEMA.names if columns is None else columns
    stored = set(file.schema_arrow.names)
    return with_columns(file.read([name for name in wanted if name in stored]), wanted)


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


def _last_by_series(tables: list[pa.Table]) -> pa.Table:
    """Join runs, oldest first, and keep each series' last row by run, time and order in
    the file.
    """
    joined = pa.concat_tables(
        [table.replace_schema_metadata(LEDGER_SCHEMA.metadata) for table in tables]
    )
    runs = [number for number, table in enumerate(tables) for _ in range(table.num_rows)]
    numbered = joined.append_column("run", pa.array(runs, pa.int64()))
    numbered = numbered.append_column("row", pa.array(range(joined.num_rows), pa.int64()))
    ordered = numbered.select(["series_key", "run", "screened_at", "row"]).sort_by(
        [("run", "ascending"), ("screened_at", "ascending"), ("row", "ascending")]
    )
    last = ordered.group_by("series_key", use_threads=False).aggregate([("row", "last")])
    return joined.take(last["row_last"].combine_chunks().sort())
