"""What is known of an archive: the newest row of each series over all runs, and how two ledgers differ. Reads alone.

Not covered: series that are no longer in the archive keep their newest row.
"""

import json
import logging
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from io import BytesIO
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from covtanet import storage
from covtanet.errors import ConfigError, LedgerVersionError
from covtanet.screening.ledger import BEGUN_AT, WORK, Accounting, latest_date
from covtanet.screening.records import LEDGER_SCHEMA, REJECTED, SCHEMA_VERSION, SCREENED

logger = logging.getLogger(__name__)

ACCOUNTED_COLUMNS = ["status", "reason", "diagnosis", "severity", "severity_by_involvement"]
KNOWN_COLUMNS = ["series_key", "source_version", "status", "software_version", "series_uid"]


def committed_files(ledger: str) -> list[str]:
    """URIs of all committed runs, oldest date first.

    A run with a date in the future is left out: it would be the newest of all for ever.
    """
    found, num_ahead, latest = [], 0, f"date={latest_date().isoformat()}"
    for name in storage.list_names(ledger):
        if name > latest and name.startswith("date="):
            num_ahead += 1
        elif name.startswith("date="):
            folder = storage.join(ledger, name)
            names = storage.list_names(folder)
            found += [storage.join(folder, each) for each in names if each.endswith(".parquet") and each[0] not in "._"]
    if num_ahead:
        logger.warning("runs of %d dates in the future are left out", num_ahead)
    return found


def file_of(ledger: str, run_id: str) -> str:
    """The committed file of a run.

    Raises:
        ConfigError: where there is none.
    """
    for uri in committed_files(ledger):
        if uri.endswith(f"/{run_id}.parquet"):
            return uri
    raise ConfigError(f"run {run_id} is not committed in this ledger")


def read(uri: str, columns: list[str] | None = None) -> pa.Table:
    """One committed file.

    Raises:
        LedgerVersionError: a schema of another version than ours.
    """
    return _open(uri).read(columns)


def _open(uri: str) -> pq.ParquetFile:
    file = pq.ParquetFile(BytesIO(storage.read_bytes(uri)))
    version = (file.schema_arrow.metadata or {}).get(b"covtanet.schema_version", b"none").decode()
    if version != str(SCHEMA_VERSION):
        raise LedgerVersionError(f"a ledger of schema version {version}, expected {SCHEMA_VERSION}")
    return file


def account(uri: str) -> Accounting:
    """Return the counts of a committed file's rows."""
    counts = Accounting()
    for row in read(uri, ACCOUNTED_COLUMNS).to_pylist():
        counts.add(row)
    return counts


def _begun_at(uri: str, file: pq.ParquetFile) -> datetime:
    """When a run began, by its driver's clock; the first moment of its date if it did not note more.

    A moment that lies in the future is not believed.
    """
    ledger, folder, name = uri.rsplit("/", 2)
    run_date = datetime.fromisoformat(folder.removeprefix("date=")).replace(tzinfo=UTC)
    noted = (file.schema_arrow.metadata or {}).get(BEGUN_AT, b"").decode()
    try:
        if not noted:  # written by older software, which noted it beside
            work = storage.join(ledger, WORK, name.removesuffix(".parquet"), "run.json")
            noted = json.loads(storage.read_bytes(work))["begun_at"]
        begun_at = datetime.fromisoformat(noted).astimezone(UTC)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return run_date
    return run_date if begun_at > datetime.now(UTC) + timedelta(days=1) else begun_at


def newest_rows(ledger: str, columns: list[str] | None = None, run_ids: set[str] | None = None) -> pa.Table:
    """The current view: of each series the row of the run that began last, and of its rows the one screened last.

    run_ids: only of these runs. Runs come before rows, since a driver's clock orders them; a row's time is that of
    whichever worker made it.
    """
    wanted = None if columns is None else sorted({*columns, "series_key", "screened_at"})
    runs: list[tuple[datetime, pa.Table]] = []
    for uri in committed_files(ledger):
        if run_ids is None or uri.rsplit("/", 1)[-1].removesuffix(".parquet") in run_ids:
            file = _open(uri)
            runs.append((_begun_at(uri, file), file.read(wanted)))
    if not runs:
        return LEDGER_SCHEMA.empty_table().select(wanted or LEDGER_SCHEMA.names)
    runs.sort(key=lambda run: run[0])
    tables = [table for _, table in runs]
    table = pa.concat_tables([each.replace_schema_metadata(LEDGER_SCHEMA.metadata) for each in tables])
    places = [place for place, each in enumerate(tables) for _ in range(each.num_rows)]
    numbered = table.append_column("run", pa.array(places, pa.int64()))
    numbered = numbered.append_column("row", pa.array(range(table.num_rows), pa.int64()))
    ordered = numbered.select(["series_key", "run", "screened_at", "row"]).sort_by(
        [("run", "ascending"), ("screened_at", "ascending"), ("row", "ascending")]
    )
    last = ordered.group_by("series_key", use_threads=False).aggregate([("row", "last")])
    return table.take(last["row_last"].combine_chunks().sort())


@dataclass(frozen=True)
class Known:
    """What is known of one series."""

    source_version: str
    status: str
    software_version: str
    series_uid: str | None

    def is_settled(self, source_versions: Collection[str], software_version: str) -> bool:
        """Whether there is no reason to look again: the same bytes, screened, or refused by this very software.

        source_versions: the forms that the version of the bytes may have in a ledger.
        """
        if self.source_version not in source_versions:
            return False
        return self.status == SCREENED or (self.status == REJECTED and self.software_version == software_version)


def known_series(ledger: str, run_ids: set[str]) -> dict[str, Known]:
    """The newest row of each series of these runs, as far as it decides whether to screen it again."""
    return {key: Known(*values) for key, *values in _tuples(newest_rows(ledger, KNOWN_COLUMNS, run_ids))}


def _tuples(table: pa.Table) -> Iterator[tuple[Any, ...]]:
    for batch in table.select(KNOWN_COLUMNS).to_batches():
        yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)


# What a spreadsheet would take for a formula.
FORMULA = ("=", "+", "-", "@", "\t", "\r")


def for_spreadsheet(table: pa.Table) -> pa.Table:
    """Lists as text, and text that a spreadsheet would run disarmed by a quote."""
    columns = {}
    for field in table.schema:
        values = table[field.name].to_pylist()
        if pa.types.is_list(field.type):
            values = [" ".join(value) for value in values]
        if pa.types.is_list(field.type) or pa.types.is_string(field.type):
            values = [f"'{value}" if value and value.startswith(FORMULA) else value for value in values]
            columns[field.name] = pa.array(values, pa.string())
        else:
            columns[field.name] = table[field.name]
    return pa.table(columns)


NOT_COMPARED = ("run_id", "run_date", "screened_at", "decode_s", "predict_s")
PROBABILITIES = ("p_infected", "p_severe")
MEASUREMENTS = ("lesion_volume_ml", "lung_volume_ml", "involvement")
PROBABILITY_TOLERANCE, MEASUREMENT_TOLERANCE = 1e-4, 1e-3


def differences(one: pa.Table, other: pa.Table) -> list[str]:
    """Where two ledgers differ, one line per series and column; empty where they are equal.

    Probabilities may differ by 1e-4 and volumes and involvement by 0.1 %; the time of a run is not compared.
    """
    left, right = ({row["series_key"]: row for row in table.to_pylist()} for table in (one, other))
    found = [f"{key}: in one ledger only" for key in sorted(left.keys() ^ right.keys())]
    if one.num_rows != len(left) or other.num_rows != len(right):
        found.append("a series has more than one row")
    for key in sorted(left.keys() & right.keys()):
        for name in LEDGER_SCHEMA.names:
            if name not in NOT_COMPARED and not _is_equal(name, left[key][name], right[key][name]):
                found.append(f"{key}: {name} is {left[key][name]} and {right[key][name]}")
    return found


def _is_equal(name: str, one: Any, other: Any) -> bool:
    if one is None or other is None:
        return one is other
    if name in PROBABILITIES:
        return bool(abs(one - other) <= PROBABILITY_TOLERANCE)
    if name in MEASUREMENTS:
        return bool(abs(one - other) <= MEASUREMENT_TOLERANCE * max(abs(one), abs(other)))
    return bool(one == other)
