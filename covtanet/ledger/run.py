"""The identity of a run, its description in storage, and the runs that a ledger knows."""

import hashlib
import hmac
import json
import logging
import uuid
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from typing import Any

from covtanet import storage
from covtanet.errors import ConfigError

logger = logging.getLogger(__name__)

WORK = "_work"
RUN_ID_DIGITS = 16
PSEUDONYM_DIGITS = 32


@dataclass(frozen=True, kw_only=True)
class Run:
    """One screening of one archive with one model on one date."""

    archive: str
    ledger: str
    run_date: date
    model_name: str
    model_version: str
    model_digest: str
    config_digest: str
    software_version: str
    model_ref: str = ""
    """The name by which the model was asked for, such as ``models:/covtanet@champion``."""
    filters: str = ""
    """Query of a DICOMweb archive, such as ``StudyDate=20260101-``; it is no part of the archive's
    identity, so that a series of another night is known."""
    limit: int = 0
    """Largest number of series; 0 screens all."""
    since_last: bool = False
    """Screen only series that are new or changed since the previous run."""
    site_key: bytes = field(default=b"", repr=False)
    """Key of the pseudonyms if identities are hidden; it does not leave the driver."""
    linkage: str = ""
    """Location that may hold identities if they are hidden."""
    driver: str = field(default_factory=lambda: uuid.uuid4().hex, repr=False, compare=False)
    """The process that made this object; attempts are counted for each driver."""

    def __getstate__(self) -> dict[str, Any]:
        """Travel to workers without the site's key, which none of them needs."""
        return {**self.__dict__, "site_key": b""}

    @property
    def key(self) -> dict[str, Any]:
        """Values that two starts of the same run share, the date aside."""
        key = {
            "archive": self.archive,
            "model_digest": self.model_digest,
            "config_digest": self.config_digest,
            "limit": self.limit,
            "since_last": self.since_last,
        }
        # Only if there are any: runs of other archives keep the ids that they always had.
        return {**key, "filters": self.filters} if self.filters else key

    @property
    def run_id(self) -> str:
        """Digest of archive, filters, model, configuration, limit, since_last and date."""
        return digest_of({**self.key, "run_date": self.run_date.isoformat()})[:RUN_ID_DIGITS]

    @property
    def committed_uri(self) -> str:
        """URI of the committed file."""
        return committed_uri(self.ledger, self.run_date, self.run_id)

    @property
    def work_root(self) -> str:
        """Folder of the work in progress of all runs."""
        return storage.join(self.linkage or self.ledger, WORK)

    def work_uri(self, *parts: str) -> str:
        """Return a URI below this run's work in progress."""
        return storage.join(self.work_root, self.run_id, *parts)

    @property
    def requested_model(self) -> str:
        """The name by which the model was asked for, else the model's name."""
        return self.model_ref or self.model_name

    def pseudonym(self, text: str) -> str:
        """Return a keyed digest of an identity; the text itself if identities are not hidden."""
        if not self.site_key:
            return text
        digest = hmac.new(self.site_key, text.encode("utf-8", "surrogateescape"), "sha256")
        return digest.hexdigest()[:PSEUDONYM_DIGITS]


@dataclass(frozen=True, kw_only=True)
class KnownRun:
    """A run that has begun, as its ``run.json`` describes it."""

    run_id: str
    description: dict[str, Any]
    is_committed: bool

    @property
    def order(self) -> tuple[str, str]:
        """Sort key: the date, then the time at which the run began (UTC)."""
        return str(self.description["run_date"]), str(self.description.get("begun_at", ""))

    @property
    def is_ahead(self) -> bool:
        """Whether the run's date lies in the future."""
        return str(self.description["run_date"]) > latest_date().isoformat()

    @property
    def begun_on(self) -> date:
        """The day in UTC on which the run began; the run's date if it did not note more."""
        try:
            return datetime.fromisoformat(self.description["begun_at"]).astimezone(UTC).date()
        except (KeyError, ValueError, TypeError):
            return date.fromisoformat(self.description["run_date"])

    @property
    def listing_of(self) -> tuple[str, str]:
        """The archive that the run listed, and the name by which it asked for its model."""
        requested_model = self.description.get("model_ref") or self.description.get("model", "")
        return str(self.description.get("archive")), str(requested_model)

    def is_of(self, run: Run) -> bool:
        """Return whether this run screened the same archive with a model of the same name.

        A run of older software noted name and version of the model instead.
        """
        if self.description.get("archive") != run.archive:
            return False
        requested_model = self.description.get("model_ref")
        if requested_model:
            return bool(requested_model == run.requested_model)
        return str(self.description.get("model", "")).rpartition("/")[0] == run.model_name


def digest_of(values: dict[str, Any]) -> str:
    """Return SHA-256 of plain values as canonical JSON."""
    return hashlib.sha256(
        json.dumps(values, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()


def committed_uri(ledger: str, run_date: date, run_id: str) -> str:
    """Return the URI of a run's committed file."""
    return storage.join(ledger, f"date={run_date.isoformat()}", f"{run_id}.parquet")


def latest_date() -> date:
    """Return the latest date that a run may have: tomorrow in UTC, today in some time zone."""
    return datetime.now(UTC).date() + timedelta(days=1)


def known_runs(ledger: str, work_root: str) -> list[KnownRun]:
    """Return all runs of a ledger, oldest first; runs with an unreadable run.json are left out."""
    runs = []
    num_unreadable = 0
    for run_id in storage.list_names(work_root):
        try:
            description = json.loads(
                storage.read_bytes(storage.join(work_root, run_id, "run.json"))
            )
            run_date = date.fromisoformat(description["run_date"])
        except FileNotFoundError:
            continue
        except (ValueError, KeyError, TypeError):
            num_unreadable += 1
            continue
        is_committed = storage.exists(committed_uri(ledger, run_date, run_id))
        runs.append(KnownRun(run_id=run_id, description=description, is_committed=is_committed))
    if num_unreadable:
        logger.warning("%d runs are left out: their run.json cannot be read", num_unreadable)
    return sorted(runs, key=lambda run: run.order)


def choose_date(run: Run) -> date:
    """Return the date of the newest unfinished run with the same key, else today in UTC."""
    for known in reversed(known_runs(run.ledger, run.work_root)):
        described = {"filters": "", **known.description}
        wanted = {"filters": "", **run.key}
        is_same = all(described.get(name) == value for name, value in wanted.items())
        if is_same and not known.is_committed and not known.is_ahead:
            return date.fromisoformat(known.description["run_date"])
    return datetime.now(UTC).date()


def begin_run(run: Run) -> None:
    """Note that the run has begun, so that it is continued if its driver dies."""
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


def is_committed(run: Run) -> bool:
    """Return whether the run's ledger is published."""
    return storage.exists(run.committed_uri)


def check_locations(archive: str, ledger: str) -> None:
    """Refuse a ledger inside the archive or the archive inside the ledger.

    Raises:
        ConfigError: either lies in the other.
    """
    for outer, inner in ((archive, ledger), (ledger, archive)):
        if f"{inner}/".startswith(f"{outer}/"):
            raise ConfigError(
                f"{inner} lies in {outer}; the archive and what is written must be apart"
            )
