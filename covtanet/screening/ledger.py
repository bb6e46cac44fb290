"""A run's place in storage: its identity, its frozen manifest, the rows finished so far, and the one commit.

LEDGER/date=YYYY-MM-DD/<run_id>.parquet   the run, published by one PUT
LEDGER/_work/<run_id>/run.json            what the run is
LEDGER/_work/<run_id>/manifest.parquet    its series, frozen
LEDGER/_work/<run_id>/ignored.parquet     objects that are no series
LEDGER/_work/<run_id>/listing.parquet, todo.parquet, model/   what workers read; gone after the commit
LEDGER/_work/<run_id>/rows/<series_key>.parquet   one finished series; gone after the commit

A finished row is one object named by its series, written whole; so a series that is screened twice leaves one row,
and what is left to do is the manifest less the names under ``rows/``. Readers of Parquet skip ``_work``.
"""

import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from covtanet import storage
from covtanet.data.manifest import IGNORED_SCHEMA, MANIFEST_SCHEMA
from covtanet.errors import ConfigError
from covtanet.screening.records import FAILED, LEDGER_SCHEMA, REJECTED, SCHEMA_VERSION, SCREENED

WORK = "_work"
RUN_ID_DIGITS = 16
ROWS_PER_GROUP = 1024
SERIES_PER_GROUP = 64
NUM_READ_THREADS = 16


@dataclass(frozen=True, kw_only=True)
class Run:
    """One screening of one archive with one model on one date. limit: 0 screens all."""

    archive: str
    ledger: str
    run_date: date
    model_name: str
    model_version: str
    model_digest: str
    config_digest: str
    software_version: str
    limit: int = 0

    @property
    def key(self) -> dict[str, Any]:
        """What makes two starts the same run, but for the date."""
        return {
            "archive": self.archive,
            "model_digest": self.model_digest,
            "config_digest": self.config_digest,
            "limit": self.limit,
        }

    @property
    def run_id(self) -> str:
        """Digest of archive, model, configuration, limit and date."""
        return digest_of({**self.key, "run_date": self.run_date.isoformat()})[:RUN_ID_DIGITS]

    @property
    def committed_uri(self) -> str:
        """Where the finished ledger of this run lies."""
        return storage.join(self.ledger, f"date={self.run_date.isoformat()}", f"{self.run_id}.parquet")

    def work_uri(self, *parts: str) -> str:
        """A place under this run's work in progress."""
        return storage.join(self.ledger, WORK, self.run_id, *parts)

    def row_uri(self, series_key: str) -> str:
        """Where one finished series lies."""
        return self.work_uri("rows", f"{series_key}.parquet")


@dataclass(kw_only=True)
class Accounting:
    """Counts of a run's rows."""

    series: int = 0
    screened: int = 0
    failed: int = 0
    infected: int = 0
    severe: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)

    def add(self, row: dict[str, Any]) -> None:
        """Count one ledger row."""
        self.series += 1
        self.screened += row["status"] == SCREENED
        self.failed += row["status"] == FAILED
        self.infected += row["diagnosis"] == "infected"
        self.severe += row["severity"] == "severe"
        if row["status"] == REJECTED:
            self.rejected[row["reason"]] += 1
        if row["status"] == FAILED:
            self.failures[row["reason"]] += 1


def digest_of(values: dict[str, Any]) -> str:
    """SHA-256 of plain values as canonical JSON."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def choose_date(ledger: str, key: dict[str, Any]) -> date:
    """The date of the newest unfinished run with this key, else today in UTC."""
    unfinished = []
    for run_id in storage.list_names(storage.join(ledger, WORK)):
        uri = storage.join(ledger, WORK, run_id, "run.json")
        if not storage.exists(uri):
            continue
        description = json.loads(storage.read_bytes(uri))
        is_same = all(description.get(name) == value for name, value in key.items())
        committed = storage.join(ledger, f"date={description['run_date']}", f"{run_id}.parquet")
        if is_same and not storage.exists(committed):
            unfinished.append(date.fromisoformat(description["run_date"]))
    return max(unfinished, default=datetime.now(UTC).date())


def begin(run: Run) -> None:
    """Note that the run has begun, so that it is continued if it dies."""
    description = {**run.key, "run_date": run.run_date.isoformat(), "model": f"{run.model_name}/{run.model_version}"}
    storage.write_bytes(run.work_uri("run.json"), json.dumps(description, indent=2).encode())


def check_places(archive: str, ledger: str) -> None:
    """Refuse a ledger inside the archive or the archive inside the ledger.

    Raises:
        ConfigError: for either.
    """
    for outer, inner in ((archive, ledger), (ledger, archive)):
        if f"{inner}/".startswith(f"{outer}/"):
            raise ConfigError(f"{inner} lies in {outer}; the archive and what is written must be apart")


def write_manifest(run: Run, rows: Iterable[dict[str, Any]], ignored: Path) -> int:
    """Publish the frozen manifest and the list of ignored objects; returns the number of series."""
    storage.upload(ignored, run.work_uri("ignored.parquet"))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "manifest.parquet"
        count = write_rows(path, MANIFEST_SCHEMA, rows, SERIES_PER_GROUP)
        storage.upload(path, run.work_uri("manifest.parquet"))
    return count


def write_rows(path: Path, schema: pa.Schema, rows: Iterable[dict[str, Any]], rows_per_group: int) -> int:
    """Write rows to a local Parquet file, row group by row group; returns how many."""
    count = 0
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for group in batched(rows, rows_per_group):
            writer.write_table(pa.Table.from_pylist(group, schema=schema))
            count += len(group)
    return count


def batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of at most ``size`` items."""
    iterator = iter(items)
    while group := list(islice(iterator, size)):
        yield group


def read_manifest(run: Run, columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """The manifest's rows, row group by row group."""
    filesystem, path = storage.filesystem(run.work_uri("manifest.parquet"))
    with filesystem.open_input_file(path) as file:
        for batch in pq.ParquetFile(file).iter_batches(SERIES_PER_GROUP, columns=columns):
            yield from batch.to_pylist()


def read_ignored(run: Run) -> pa.Table:
    """The objects that are no series."""
    filesystem, path = storage.filesystem(run.work_uri("ignored.parquet"))
    return pq.read_table(path, filesystem=filesystem, schema=IGNORED_SCHEMA)


def finished_keys(run: Run) -> set[str]:
    """Series whose row is there."""
    names = storage.list_names(run.work_uri("rows"))
    return {name.removesuffix(".parquet") for name in names if name.endswith(".parquet") and not name.startswith(".")}


def complete_row(run: Run, record: dict[str, Any]) -> dict[str, Any]:
    """Add what is the same for the whole run, and the time; missing fields are null."""
    row = {name: record.get(name) for name in LEDGER_SCHEMA.names}
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


def store_row(run: Run, record: dict[str, Any]) -> dict[str, Any]:
    """Write one finished series and return its ledger row."""
    row = complete_row(run, record)
    buffer = BytesIO()
    pq.write_table(pa.Table.from_pylist([row], schema=LEDGER_SCHEMA), buffer)
    storage.write_bytes(run.row_uri(row["series_key"]), buffer.getvalue())
    return row


def commit(run: Run) -> Accounting:
    """Check that every series of the manifest has its row, and publish the run by one PUT.

    Raises:
        RuntimeError: where rows and manifest differ; nothing is published then.
    """
    expected = [row["series_key"] for row in read_manifest(run, ["series_key"])]
    if len(set(expected)) != len(expected):
        raise RuntimeError(f"{len(expected) - len(set(expected))} series of the manifest share a key, expected none")
    missing = set(expected) - finished_keys(run)
    if missing:
        raise RuntimeError(f"{len(missing)} of {len(expected)} series have no row; start the same command again")
    accounting = Accounting()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.parquet"
        count = write_rows(path, LEDGER_SCHEMA, _read_rows(run, expected, accounting), ROWS_PER_GROUP)
        assert count == len(expected), "one row per series"
        storage.upload(path, run.committed_uri)
    clean_up(run)
    return accounting


def clean_up(run: Run) -> None:
    """Remove what a committed run needs no more; run.json, manifest and ignored objects stay."""
    for name in ("rows", "model"):
        storage.delete_folder(run.work_uri(name))
    for name in ("listing.parquet", "todo.parquet"):
        storage.delete(run.work_uri(name))


def _read_rows(run: Run, keys: list[str], accounting: Accounting) -> Iterator[dict[str, Any]]:
    def read(series_key: str) -> dict[str, Any]:
        row: dict[str, Any] = pq.read_table(BytesIO(storage.read_bytes(run.row_uri(series_key)))).to_pylist()[0]
        return row

    with ThreadPoolExecutor(NUM_READ_THREADS) as pool:
        for group in batched(keys, ROWS_PER_GROUP):
            for row in pool.map(read, group):
                accounting.add(row)
                yield row


def is_committed(run: Run) -> bool:
    """Whether the run's ledger is published."""
    return storage.exists(run.committed_uri)


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
