"""A run's place in storage: its identity, its frozen manifest, the rows finished so far, and the one commit.

LEDGER/date=YYYY-MM-DD/<run_id>.parquet   the run, published by one PUT
LEDGER/_work/<run_id>/run.json            what the run is
LEDGER/_work/<run_id>/manifest.parquet    its series, frozen
LEDGER/_work/<run_id>/ignored.parquet     objects that are no series
LEDGER/_work/<run_id>/folders.parquet     every folder as it was listed, so that the next night reads only what changed
LEDGER/_work/<run_id>/drivers/, model/    what workers read; gone after the commit
LEDGER/_work/<run_id>/attempts/<driver>/<series_key>.json  how often each stage was tried; gone after the commit
LEDGER/_work/<run_id>/rows/<series_key>.parquet   one finished series; gone after the commit

LEDGER/_batches/<batch_id>.run            which run a batch of the endpoint is

A run that hides identities has its ``_work`` under the linkage prefix instead, where they may stand.

A finished row is one object named by its series, written whole; so a series that is screened twice leaves one row,
and what is left to do is the manifest less the names under ``rows/``. Readers of Parquet skip ``_work``.
"""

import hashlib
import hmac
import json
import logging
import os
import tempfile
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from covtanet import storage
from covtanet.data.manifest import IGNORED_SCHEMA, MANIFEST_SCHEMA
from covtanet.errors import AlreadyCommittedError, ConfigError
from covtanet.screening.records import FAILED, LEDGER_SCHEMA, REJECTED, SCHEMA_VERSION, SCREENED

logger = logging.getLogger(__name__)

WORK = "_work"
BATCHES = "_batches"
RUN_ID_DIGITS = 16
ROWS_PER_GROUP = 1024
SERIES_PER_GROUP = 64
NUM_READ_THREADS = 16
MAX_ATTEMPTS = 3
PSEUDONYM_DIGITS = 32
# Metadata of a committed file: the driver that wrote it, and when its run began by the clock of the first driver.
DRIVER, BEGUN_AT = b"covtanet.driver", b"covtanet.begun_at"
IDENTITIES = ("source_uri", "study_uid", "series_uid")
# Plain digests of names and of content would link a row to its images.
HIDDEN = (*IDENTITIES, "source_version", "source_digest")
# How far the clock of a worker may be ahead of the driver's before its time is not believed.
CLOCK_TOLERANCE = timedelta(minutes=5)
FOLDERS_SCHEMA = pa.schema([
    pa.field("folder", pa.string(), nullable=False),
    pa.field("version", pa.string(), nullable=False),
    pa.field("series_keys", pa.list_(pa.string()), nullable=False),
])  # fmt: skip
LINKAGE_SCHEMA = pa.schema([
    pa.field("series_key", pa.string(), nullable=False), *(pa.field(name, pa.string()) for name in IDENTITIES)
])  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Run:
    """One screening of one archive with one model on one date.

    model_ref: the name that the model was asked for by. limit: 0 screens all. since_last: only what is new or changed.
    site_key, linkage: if identities are hidden, the key of their pseudonyms and the place that may hold them; the key
    does not leave the driver. driver: the process that made this run's object, by which attempts are counted.
    """

    archive: str
    ledger: str
    run_date: date
    model_name: str
    model_version: str
    model_digest: str
    config_digest: str
    software_version: str
    model_ref: str = ""
    limit: int = 0
    since_last: bool = False
    site_key: bytes = field(default=b"", repr=False)
    linkage: str = ""
    driver: str = field(default_factory=lambda: uuid.uuid4().hex, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        """Travel to workers without the site's key, which none of them needs."""
        return {**self.__dict__, "site_key": b""}

    @property
    def key(self) -> dict[str, Any]:
        """What makes two starts the same run, but for the date."""
        return {
            "archive": self.archive,
            "model_digest": self.model_digest,
            "config_digest": self.config_digest,
            "limit": self.limit,
            "since_last": self.since_last,
        }

    @property
    def run_id(self) -> str:
        """Digest of archive, model, configuration, limit and date."""
        return digest_of({**self.key, "run_date": self.run_date.isoformat()})[:RUN_ID_DIGITS]

    @property
    def committed_uri(self) -> str:
        """Where the finished ledger of this run lies."""
        return storage.join(self.ledger, f"date={self.run_date.isoformat()}", f"{self.run_id}.parquet")

    @property
    def work_root(self) -> str:
        """Where work in progress of all runs lies."""
        return storage.join(self.linkage or self.ledger, WORK)

    def work_uri(self, *parts: str) -> str:
        """A place under this run's work in progress."""
        return storage.join(self.work_root, self.run_id, *parts)

    @property
    def line(self) -> str:
        """The name by which the model was asked for; its name alone, of a run that did not note more."""
        return self.model_ref or self.model_name

    def pseudonym(self, text: str) -> str:
        """A keyed digest in place of an identity; the text itself where identities are not hidden."""
        if not self.site_key:
            return text
        return hmac.new(self.site_key, text.encode("utf-8", "surrogateescape"), "sha256").hexdigest()[:PSEUDONYM_DIGITS]

    def row_uri(self, series_key: str) -> str:
        """Where one finished series lies."""
        return self.work_uri("rows", f"{series_key}.parquet")


@dataclass(kw_only=True)
class Accounting:
    """Counts of a run's rows."""

    series: int = 0
    screened: int = 0
    failed: int = 0
    diagnosed: int = 0
    infected: int = 0
    severe: int = 0
    severe_by_involvement: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)

    def add(self, row: dict[str, Any]) -> None:
        """Count one ledger row."""
        self.series += 1
        self.screened += row["status"] == SCREENED
        self.failed += row["status"] == FAILED
        self.diagnosed += row["diagnosis"] is not None
        self.infected += row["diagnosis"] == "infected"
        self.severe += row["severity"] == "severe"
        self.severe_by_involvement += row["severity_by_involvement"] == "severe"
        if row["status"] == REJECTED:
            self.rejected[row["reason"]] += 1
        if row["status"] == FAILED:
            self.failures[row["reason"]] += 1


def digest_of(values: dict[str, Any]) -> str:
    """SHA-256 of plain values as canonical JSON."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class KnownRun:
    """A run that has begun, as its ``run.json`` tells. begun_at: in UTC, to order runs of one date."""

    run_id: str
    description: dict[str, Any]
    is_committed: bool

    @property
    def order(self) -> tuple[str, str]:
        """By date, then by when it began."""
        return str(self.description["run_date"]), str(self.description.get("begun_at", ""))

    @property
    def is_ahead(self) -> bool:
        """Whether the run's date lies in the future, as no night's does."""
        return str(self.description["run_date"]) > latest_date().isoformat()

    @property
    def begun_on(self) -> date:
        """The day on which the run began, in UTC; that of the run if it did not note more."""
        try:
            return datetime.fromisoformat(self.description["begun_at"]).astimezone(UTC).date()
        except (KeyError, ValueError, TypeError):
            return date.fromisoformat(self.description["run_date"])

    @property
    def listing_of(self) -> tuple[str, str]:
        """The archive that the run listed, and the name by which it asked for its model."""
        line = self.description.get("model_ref") or self.description.get("model", "")
        return str(self.description.get("archive")), str(line)

    def is_of(self, run: Run) -> bool:
        """Whether the run screened the same archive with a model that was asked for by the same name.

        A run of older software noted name and version instead.
        """
        line = self.description.get("model_ref")
        name = str(self.description.get("model", "")).rpartition("/")[0]
        is_same_line = line == run.line if line else name == run.model_name
        return is_same_line and self.description.get("archive") == run.archive


def latest_date() -> date:
    """The latest date that a run may have: tomorrow in UTC, which is today somewhere."""
    return datetime.now(UTC).date() + timedelta(days=1)


def known_runs(ledger: str, work_root: str) -> list[KnownRun]:
    """Return all runs with this ledger, oldest first; an unreadable run.json is left out and counted."""
    found, num_odd = [], 0
    for run_id in storage.list_names(work_root):
        try:
            description = json.loads(storage.read_bytes(storage.join(work_root, run_id, "run.json")))
            date.fromisoformat(description["run_date"])
        except FileNotFoundError:
            continue
        except (ValueError, KeyError, TypeError):
            num_odd += 1
            continue
        committed = storage.join(ledger, f"date={description['run_date']}", f"{run_id}.parquet")
        is_committed = storage.exists(committed)
        found.append(KnownRun(run_id=run_id, description=description, is_committed=is_committed))
    if num_odd:
        logger.warning("%d runs are left out: their run.json cannot be read", num_odd)
    return sorted(found, key=lambda run: run.order)


def choose_date(run: Run) -> date:
    """The date of the newest unfinished run that is this one but for its date, else today in UTC."""
    for known in reversed(known_runs(run.ledger, run.work_root)):
        is_same = all(known.description.get(name) == value for name, value in run.key.items())
        if is_same and not known.is_committed and not known.is_ahead:
            return date.fromisoformat(known.description["run_date"])
    return datetime.now(UTC).date()


@dataclass(frozen=True, kw_only=True)
class NamedRun:
    """The run that a batch asked for. begun_at: in UTC, when the batch's job named it."""

    run_id: str
    run_date: date
    begun_at: datetime

    def committed_uri(self, ledger: str) -> str:
        """Where its finished ledger lies, once it is there."""
        return storage.join(ledger, f"date={self.run_date.isoformat()}", f"{self.run_id}.parquet")


def name_batch(run: Run, batch: str) -> None:
    """Tell those who asked for a batch which run it is."""
    named = {
        "run_id": run.run_id,
        "run_date": run.run_date.isoformat(),
        "begun_at": datetime.now(UTC).isoformat(),
    }
    storage.write_bytes(storage.join(run.ledger, BATCHES, f"{batch}.run"), json.dumps(named).encode())


def run_of_batch(ledger: str, batch: str) -> NamedRun | None:
    """The run of a batch, where its job has come that far."""
    try:
        found = json.loads(storage.read_bytes(storage.join(ledger, BATCHES, f"{batch}.run")))
    except FileNotFoundError:
        return None
    return NamedRun(
        run_id=found["run_id"],
        run_date=date.fromisoformat(found["run_date"]),
        begun_at=datetime.fromisoformat(found["begun_at"]),
    )


def progress(ledger: str, run: NamedRun) -> tuple[int | None, int]:
    """Series of a run's manifest, null where it is not written yet, and how many of them are finished."""
    work = storage.join(ledger, WORK, run.run_id)
    filesystem, path = storage.filesystem(storage.join(work, "manifest.parquet"))
    try:
        with filesystem.open_input_file(path) as file:
            num_series = pq.ParquetFile(file).metadata.num_rows
    except FileNotFoundError:
        return None, 0
    return num_series, len(storage.list_names(storage.join(work, "rows")))


def begin(run: Run) -> None:
    """Note that the run has begun, so that it is continued if it dies."""
    uri = run.work_uri("run.json")
    if storage.exists(uri):
        return
    description = {
        **run.key,
        "run_date": run.run_date.isoformat(),
        "begun_at": datetime.now(UTC).isoformat(),
        "model": f"{run.model_name}/{run.model_version}",
        "model_ref": run.model_ref,
    }
    storage.write_bytes(uri, json.dumps(description, indent=2).encode())


def check_places(archive: str, ledger: str) -> None:
    """Refuse a ledger inside the archive or the archive inside the ledger.

    Raises:
        ConfigError: for either.
    """
    for outer, inner in ((archive, ledger), (ledger, archive)):
        if f"{inner}/".startswith(f"{outer}/"):
            raise ConfigError(f"{inner} lies in {outer}; the archive and what is written must be apart")


def write_manifest(run: Run, rows: Iterable[dict[str, Any]], ignored: Path, folders: Path | None = None) -> None:
    """Publish the frozen manifest, last, after the ignored objects and the folders; the first driver's counts."""
    storage.upload(ignored, run.work_uri("ignored.parquet"))
    if folders is not None:
        storage.upload(folders, run.work_uri("folders.parquet"))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "manifest.parquet"
        write_rows(path, MANIFEST_SCHEMA, rows, SERIES_PER_GROUP)
        storage.create(path, run.work_uri("manifest.parquet"))


def read_folders(work_root: str, run_id: str) -> dict[str, tuple[str, list[str]]]:
    """Version and series of each folder as a run listed them; empty where it noted none."""
    uri = storage.join(work_root, run_id, "folders.parquet")
    if not storage.exists(uri):
        return {}
    rows = pq.read_table(BytesIO(storage.read_bytes(uri)), schema=FOLDERS_SCHEMA).to_pylist()
    return {row["folder"]: (row["version"], row["series_keys"]) for row in rows}


def may_try(run: Run, series_key: str, stage: str) -> bool:
    """Count one more attempt of a stage at a series; returns whether it may be made.

    A series that kills its worker comes back with the next worker, without end; this is what ends it. Each driver
    counts for itself: its own death does not count as an attempt at the series in flight. The process of the newest
    attempt is noted beside the counts.
    """
    uri = run.work_uri("attempts", run.driver, f"{series_key}.json")
    try:
        counts = json.loads(storage.read_bytes(uri))
    except FileNotFoundError:
        counts = {}
    if counts.get(stage, 0) >= MAX_ATTEMPTS:
        return False
    counts[stage] = counts.get(stage, 0) + 1
    counts["pid"] = os.getpid()  # Ray names a worker's log by its process
    storage.write_bytes(uri, json.dumps(counts).encode())
    return True


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


def commit(run: Run, *, is_exclusive: bool = True) -> Accounting:
    """Check that every series of the manifest has its row, and publish the run by one PUT that replaces nothing.

    is_exclusive: the store keeps such a PUT from replacing; if not, the file is compared after the PUT.

    Raises:
        RuntimeError: where rows and manifest differ; nothing is published then.
        AlreadyCommittedError: another driver of this run was first.
    """
    driver, now = uuid.uuid4().hex.encode(), datetime.now(UTC)
    expected = [row["series_key"] for row in read_manifest(run, ["series_key"])]
    if len(set(expected)) != len(expected):
        raise RuntimeError(f"{len(expected) - len(set(expected))} series of the manifest share a key, expected none")
    missing = set(expected) - finished_keys(run)
    if missing:
        raise RuntimeError(f"{len(missing)} of {len(expected)} series have no row; start the same command again")
    accounting = Accounting()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.parquet"
        about = {DRIVER: driver, BEGUN_AT: _begun_at(run, now).encode()}
        schema = LEDGER_SCHEMA.with_metadata({**LEDGER_SCHEMA.metadata, **about})
        hidden = Path(folder) / "linkage.parquet"
        with pq.ParquetWriter(hidden, LINKAGE_SCHEMA) as linkage:
            stored = _believe_times(_read_rows(run, expected, accounting), now)
            rows = _hide(run, stored, linkage)
            count = write_rows(path, schema, rows, ROWS_PER_GROUP)
        accounted = accounting.screened + accounting.rejected.total() + accounting.failed
        if not count == accounted == len(expected):
            raise RuntimeError(f"{accounted} of {count} rows have a known status, expected {len(expected)}")
        if run.site_key:
            name = f"{run.run_id}.parquet"
            storage.upload(hidden, storage.join(run.linkage, f"date={run.run_date.isoformat()}", name))
        is_new = storage.create(path, run.committed_uri)
    if not (is_new and is_exclusive) and _driver_of(run) != driver:
        raise AlreadyCommittedError("another driver of this run committed first; its ledger stands")
    clean_up(run)
    return accounting


def _begun_at(run: Run, now: datetime) -> str:
    """When the run began by its first driver's clock."""
    try:
        return str(json.loads(storage.read_bytes(run.work_uri("run.json")))["begun_at"])
    except (FileNotFoundError, ValueError, KeyError):
        return now.isoformat()


def _believe_times(rows: Iterable[dict[str, Any]], now: datetime) -> Iterator[dict[str, Any]]:
    """Replace times that lie ahead of the commit, from workers with a wrong clock, by the commit's time."""
    num_ahead = 0
    for row in rows:
        if row["screened_at"] > now + CLOCK_TOLERANCE:
            num_ahead += 1
            row = {**row, "screened_at": now}
        yield row
    if num_ahead:
        logger.warning("%d rows have a time ahead of this machine's clock; they get that of the commit", num_ahead)


def _driver_of(run: Run) -> bytes:
    """Who wrote the committed file; a PUT whose answer was lost was ours all the same."""
    filesystem, path = storage.filesystem(run.committed_uri)
    metadata = pq.read_schema(path, filesystem=filesystem).metadata or {}
    return bytes(metadata.get(DRIVER, b""))


def _hide(run: Run, rows: Iterable[dict[str, Any]], linkage: pq.ParquetWriter) -> Iterator[dict[str, Any]]:
    """Put pseudonyms in place of identities and note which is whose; rows pass as they are where nothing is hidden."""
    for group in batched(rows, ROWS_PER_GROUP):
        if run.site_key:
            linkage.write_table(
                pa.Table.from_pylist([{name: row[name] for name in LINKAGE_SCHEMA.names} for row in group],
                                     schema=LINKAGE_SCHEMA)
            )  # fmt: skip
        for row in group:
            yield {**row, **{name: run.pseudonym(row[name]) for name in HIDDEN if row[name] is not None}}


def clean_up(run: Run) -> None:
    """Remove the work of a committed run; run.json, manifest, folders and ignored objects stay.

    The ledger stands whether the store lets us or not; the next start of the run tries again.
    """
    for name in ("rows", "model", "drivers", "attempts"):
        try:
            storage.delete_folder(run.work_uri(name))
        except OSError as error:
            logger.warning("work that is needed no more could not be removed: %s", type(error).__name__)


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
