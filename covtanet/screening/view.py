"""What is known of an archive: the newest row of each series over all runs, and how two ledgers differ. Reads alone.

Not covered: series that are no longer in the archive keep their newest row.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from covtanet import storage
from covtanet.errors import ConfigError
from covtanet.screening.records import LEDGER_SCHEMA, REJECTED, SCHEMA_VERSION, SCREENED

KNOWN_COLUMNS = ["series_key", "source_version", "status", "software_version", "series_uid"]


def committed_files(ledger: str) -> list[str]:
    """URIs of all committed runs, oldest date first."""
    found = []
    for name in storage.list_names(ledger):
        if name.startswith("date="):
            folder = storage.join(ledger, name)
            names = storage.list_names(folder)
            found += [storage.join(folder, each) for each in names if each.endswith(".parquet") and each[0] not in "._"]
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
        ConfigError: a schema of another version than ours.
    """
    file = pq.ParquetFile(BytesIO(storage.read_bytes(uri)))
    version = (file.schema_arrow.metadata or {}).get(b"covtanet.schema_version", b"none").decode()
    if version != str(SCHEMA_VERSION):
        raise ConfigError(f"a ledger of schema version {version}, expected {SCHEMA_VERSION}")
    return file.read(columns)


def newest_rows(ledger: str, columns: list[str] | None = None, run_ids: set[str] | None = None) -> pa.Table:
    """The current view: of each series the row that was screened last.

    run_ids: only of these runs. Rows of one series differ in when they were screened, whatever the runs' dates say.
    """
    wanted = None if columns is None else sorted({*columns, "series_key", "screened_at"})
    tables = [
        read(uri, wanted)
        for uri in committed_files(ledger)
        if run_ids is None or uri.rsplit("/", 1)[-1].removesuffix(".parquet") in run_ids
    ]
    if not tables:
        return LEDGER_SCHEMA.empty_table().select(wanted or LEDGER_SCHEMA.names)
    table = pa.concat_tables([each.replace_schema_metadata(LEDGER_SCHEMA.metadata) for each in tables])
    numbered = table.append_column("row", pa.array(range(table.num_rows), pa.int64()))
    ordered = numbered.select(["series_key", "screened_at", "row"]).sort_by(
        [("screened_at", "ascending"), ("row", "ascending")]
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

    def is_settled(self, source_version: str, software_version: str) -> bool:
        """Whether there is no reason to look again: the same bytes, screened, or refused by this very software."""
        if self.source_version != source_version:
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
