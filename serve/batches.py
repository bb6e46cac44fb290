"""Batches: the screening job of ``jobs/screen.py`` on this cluster, submitted over HTTP.

A batch is a small JSON object in the ledger's storage and a Ray job; nothing of it lives in a replica, so that every
process of the endpoint may die.

LEDGER/_batches/<batch_id>.json   who asked for what, and the Ray jobs that were started for it
LEDGER/_batches/<batch_id>.run    written by the job: which run it is
"""

import hashlib
import json
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
from ray.job_submission import JobStatus, JobSubmissionClient

from covtanet import storage
from covtanet.errors import ConfigError
from covtanet.screening import ledger, view
from serve.schemas import BatchRequest, BatchState
from serve.settings import Caller, ServeConfig

ROOT = Path(__file__).resolve().parents[1]
ID_DIGITS = 16
LEDGERS_KEPT = 4
OPEN = {JobStatus.PENDING, JobStatus.RUNNING}


class BatchConflictError(ConfigError):
    """The idempotency key was used for another request."""


class Batches:
    """All batches of one ledger."""

    def __init__(self, settings: ServeConfig) -> None:
        self.settings = settings
        self.ledger = storage.absolute(settings.ledger)
        self.client = JobSubmissionClient()
        self.read: dict[str, pa.Table] = {}

    def submit(self, request: BatchRequest, caller: Caller, idempotency_key: str) -> BatchState:
        """Start a batch, continue one that died, or find one that was started before.

        Raises:
            BatchConflictError: where the key stands for another request.
        """
        asked = request.model_dump(mode="json")
        asked["run_date"] = asked["run_date"] or datetime.now(UTC).date().isoformat()
        identity = json.dumps([caller.name, idempotency_key or asked], sort_keys=True)
        batch_id = hashlib.sha256(identity.encode()).hexdigest()[:ID_DIGITS]
        known = self._read(batch_id)
        if known is not None and {**known["asked"], "run_date": None} != {**asked, "run_date": None}:
            raise BatchConflictError("this idempotency key was used for another request")
        if known is not None and self._state(known).state not in ("failed", "cancelled", "interrupted"):
            return self._state(known)
        record = known or {"batch_id": batch_id, "caller": caller.name, "asked": asked, "jobs": []}
        job = f"screen-{batch_id}-{len(record['jobs']) + 1}"
        record["jobs"].append(job)
        record["submitted_at"] = datetime.now(UTC).isoformat()
        self._write(record)  # before the job starts: one that nobody knows of would be lost
        try:
            self.client.submit_job(entrypoint=shlex.join(self._command(record)), submission_id=job)
        except RuntimeError:  # the same request came twice at once: the other one has started it
            if self._job_status(job) is None:
                raise
        return self._state(record)

    def _command(self, record: dict[str, Any]) -> list[str]:
        asked = record["asked"]
        command = [
            sys.executable, str(ROOT / "jobs" / "screen.py"), "--archive", asked["archive"], "--ledger", self.ledger,
            "--model", asked["model"] or self.settings.model, "--run-date", asked["run_date"],
            "--results", storage.join(self.ledger, "_results"), "--batch", record["batch_id"],
        ]  # fmt: skip
        if self.settings.config:
            command += ["--config", self.settings.config]
        for name in ("since", "group_by", "limit"):
            if asked[name]:
                command += [f"--{name.replace('_', '-')}", str(asked[name])]
        return command

    def find(self, batch_id: str, caller: Caller) -> BatchState:
        """One batch of a caller.

        Raises:
            KeyError: where the caller has no such batch.
        """
        return self._state(self._owned(batch_id, caller))

    def all_of(self, caller: Caller) -> list[BatchState]:
        """A caller's batches, the newest first."""
        names = storage.list_names(storage.join(self.ledger, ledger.BATCHES))
        records = [self._read(name.removesuffix(".json")) for name in names if name.endswith(".json")]
        mine = [record for record in records if record is not None and record["caller"] == caller.name]
        mine.sort(key=lambda record: str(record["submitted_at"]), reverse=True)
        return [self._state(record) for record in mine]

    def cancel(self, batch_id: str, caller: Caller) -> BatchState:
        """Stop a batch; what is finished of it is kept, and submitting it again goes on."""
        record = self._owned(batch_id, caller)
        if record["jobs"] and self._job_status(record["jobs"][-1]) in OPEN:
            self.client.stop_job(record["jobs"][-1])
        return self._state(record)

    def rows(self, batch_id: str, caller: Caller) -> pa.Table:
        """The ledger of a finished batch.

        Raises:
            KeyError: where the caller has no such batch.
            FileNotFoundError: where it is not committed yet.
        """
        uri = self._committed(self._run_of(self._owned(batch_id, caller)))
        if uri not in self.read:  # a committed file never changes
            while len(self.read) >= LEDGERS_KEPT:
                self.read.pop(next(iter(self.read)))
            self.read[uri] = view.read(uri)
        return self.read[uri]

    def result_uri(self, batch_id: str, caller: Caller, series_key: str, name: str) -> str:
        """Where a result file of a series lies."""
        run = self._run_of(self._owned(batch_id, caller))
        if run is None:
            raise KeyError(batch_id)
        return storage.join(self.ledger, "_results", run.run_id, series_key, name)

    def _committed(self, run: ledger.NamedRun | None) -> str:
        uri = "" if run is None else run.committed_uri(self.ledger)
        if not uri or not storage.exists(uri):
            raise FileNotFoundError("the batch is not committed yet")
        return uri

    def _owned(self, batch_id: str, caller: Caller) -> dict[str, Any]:
        record = self._read(batch_id)
        if record is None or record["caller"] != caller.name:
            raise KeyError(batch_id)
        return record

    def _uri(self, batch_id: str) -> str:
        return storage.join(self.ledger, ledger.BATCHES, f"{batch_id}.json")

    def _read(self, batch_id: str) -> dict[str, Any] | None:
        if len(batch_id) != ID_DIGITS or set(batch_id) - set("0123456789abcdef"):
            return None
        try:
            found: dict[str, Any] = json.loads(storage.read_bytes(self._uri(batch_id)))
        except FileNotFoundError:
            return None
        return found

    def _write(self, record: dict[str, Any]) -> None:
        storage.write_bytes(self._uri(record["batch_id"]), json.dumps(record, indent=2).encode())

    def _run_of(self, record: dict[str, Any]) -> ledger.NamedRun | None:
        """The run that the batch's job began."""
        return ledger.run_of_batch(self.ledger, record["batch_id"])

    def _job_status(self, job: str) -> JobStatus | None:
        try:
            return self.client.get_job_status(job)
        except RuntimeError:  # Ray was started anew since
            return None

    def _state(self, record: dict[str, Any]) -> BatchState:
        run, status = self._run_of(record), self._job_status(record["jobs"][-1])
        found = BatchState(
            batch_id=record["batch_id"],
            state="waiting",
            submitted_at=record["submitted_at"],
            run_id=None if run is None else run.run_id,
            **record["asked"],
        )
        if run is not None and storage.exists(run.committed_uri(self.ledger)):
            counts = view.read(run.committed_uri(self.ledger), ["status"])["status"].value_counts().to_pylist()
            by_status = {each["values"]: each["counts"] for each in counts}
            return found.model_copy(
                update={"state": "committed", "counts": by_status, "series": sum(by_status.values())}
            )
        states = {
            None: "interrupted", JobStatus.PENDING: "waiting", JobStatus.RUNNING: "running",
            JobStatus.STOPPED: "cancelled", JobStatus.FAILED: "failed", JobStatus.SUCCEEDED: "failed",
        }  # fmt: skip
        return found.model_copy(update={"state": states[status], **(self._progress(run) if run is not None else {})})

    def _progress(self, run: ledger.NamedRun) -> dict[str, Any]:
        series, finished = ledger.progress(self.ledger, run)
        if series is None:
            return {}
        spent_s = (datetime.now(UTC) - run.begun_at).total_seconds()
        left_s = (series - finished) * spent_s / finished if finished else None
        return {
            "series": series,
            "finished": finished,
            "per_minute": 60 * finished / spent_s,
            "seconds_left": left_s,
        }
