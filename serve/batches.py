"""Batches: the screening job of ``jobs/screen.py`` on this cluster, submitted over HTTP.

A batch is a small JSON object in the ledger's storage and a Ray job; nothing of it lives in a replica, so that every
process of the endpoint may die.

LEDGER/_batches/ledger/                           their own ledger: no batch settles or hides a study of the nights
LEDGER/_batches/callers/CALLER/<batch_id>.json    what was asked for, the Ray jobs started for it, and how it ended
LEDGER/_batches/callers/CALLER/newest/ORDER-<batch_id>   empty; the names list a caller's batches, the newest first

CALLER is a digest of the caller's name, so that one caller's requests read no record of another's. ORDER falls with
time.
"""

import hashlib
import json
import logging
import shlex
import sys
import threading
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
from ray.job_submission import JobStatus, JobSubmissionClient

from covtanet import storage
from covtanet.errors import ConfigError
from covtanet.ledger.batch import BATCHES, BatchRun, progress, run_of_batch
from covtanet.ledger.read import read_run
from serve.schemas import BatchRequest, BatchState
from serve.settings import Caller, ServeConfig

logger = logging.getLogger("ray.serve")

ROOT = Path(__file__).resolve().parents[1]
ID_DIGITS = 16
LEDGERS_KEPT = 4
OPEN = {JobStatus.PENDING, JobStatus.RUNNING}
CALLER_KEY = "covtanet_caller"  # in the metadata of a Ray job
ENDS_OF_JOB = {
    JobStatus.STOPPED: "cancelled",
    JobStatus.FAILED: "failed",
    JobStatus.SUCCEEDED: "failed",
}
KILL_AFTER_S = 60  # a job whose time is over gets this long to end by itself
LAST_ORDER = (
    10**13
)  # milliseconds; ORDER is this less the time, and has as many digits until the year 2286


class BatchConflictError(ConfigError):
    """The idempotency key was used for another request."""


class ModelNotAllowedError(ConfigError):
    """The request names a model that the endpoint's configuration does not."""


class TooManyBatchesError(ConfigError):
    """As many batches are open as may be."""


class JobsUnavailableError(OSError):
    """Ray's job server does not answer, or answers with an error of its own."""


class Batches:
    """All batches of one endpoint. ledger: their own."""

    def __init__(self, settings: ServeConfig) -> None:
        self.settings = settings
        self.root = storage.join(storage.absolute(settings.ledger), BATCHES)
        self.ledger = storage.join(self.root, "ledger")
        self._submitting = threading.Lock()
        self._committed_rows = lru_cache(LEDGERS_KEPT)(read_run)  # a committed file never changes

    def submit(self, request: BatchRequest, caller: Caller, idempotency_key: str) -> BatchState:
        """Start a batch, continue one that died, or find one that was started before.

        Raises:
            BatchConflictError: the key stands for another request.
            ModelNotAllowedError: the endpoint's configuration does not name the model.
            TooManyBatchesError: as many batches are open, of this caller or in all, as may be.
            OSError: storage or Ray does not answer.
        """
        if request.model not in ("", self.settings.model, *self.settings.models):
            raise ModelNotAllowedError(
                "the configuration of this endpoint does not name this model for batches"
            )
        asked = request.model_dump(mode="json")
        asked["run_date"] = asked["run_date"] or datetime.now(UTC).date().isoformat()
        identity = json.dumps([caller.name, idempotency_key or asked], sort_keys=True)
        batch_id = hashlib.sha256(identity.encode("utf-8", "surrogatepass")).hexdigest()[:ID_DIGITS]
        with self._submitting:  # two replicas may let one batch too many in, two threads may not
            known = self._read(batch_id, caller)
            if known is not None:
                if {**known["asked"], "run_date": None} != {**asked, "run_date": None}:
                    raise BatchConflictError("this idempotency key was used for another request")
                state = self._state(known, caller)
                if state.state not in ("failed", "cancelled", "interrupted"):
                    return state
            self._check_room(caller)
            return self._start(known or {"batch_id": batch_id, "asked": asked, "jobs": []}, caller)

    def _check_room(self, caller: Caller) -> None:
        callers = self._callers_of_open_jobs()
        if callers.count(caller.name) >= self.settings.max_batches_per_caller:
            limit = self.settings.max_batches_per_caller
            raise TooManyBatchesError(
                f"{limit} of your batches are open, expected fewer; wait for one to end"
            )
        if len(callers) >= self.settings.max_batches:
            raise TooManyBatchesError("as many batches are open as this endpoint runs at a time")

    def _callers_of_open_jobs(self) -> list[str]:
        """Return the caller of each open batch, from the metadata of Ray's jobs."""
        try:
            jobs = self._client().list_jobs()
        except RuntimeError:
            raise JobsUnavailableError("Ray's jobs cannot be listed") from None
        open_jobs = [
            job for job in jobs if job.status in OPEN and CALLER_KEY in (job.metadata or {})
        ]
        return [str(job.metadata[CALLER_KEY]) for job in open_jobs]

    def _start(self, record: dict[str, Any], caller: Caller) -> BatchState:
        job = f"screen-{record['batch_id']}-{len(record['jobs']) + 1}"
        is_new = not record["jobs"]
        now = datetime.now(UTC)
        record = {
            **record,
            "jobs": [*record["jobs"], job],
            "submitted_at": now.isoformat(),
            "ended": None,
        }
        if is_new:
            order = LAST_ORDER - int(now.timestamp() * 1000)
            storage.write_bytes(self._uri(caller, "newest", f"{order}-{record['batch_id']}"), b"")
        self._write(record, caller)  # before the job starts: a job without a record would be lost
        try:
            self._client().submit_job(
                entrypoint=shlex.join(self._command(record)),
                submission_id=job,
                metadata={CALLER_KEY: caller.name},
                entrypoint_num_cpus=self.settings.driver_cpus or None,
                entrypoint_memory=self.settings.driver_memory_mib << 20 or None,
            )
        except (
            RuntimeError
        ):  # the same request came to two replicas at once: the other one has started it
            if self._job(job) is None:
                raise JobsUnavailableError("Ray does not take the job") from None
        return self._state(record, caller)

    def _command(self, record: dict[str, Any]) -> list[str]:
        asked = record["asked"]
        command = [
            # Ray ends a job by its process group, which --foreground leaves as it is.
            "timeout", "--foreground", f"--kill-after={KILL_AFTER_S}", str(self.settings.batch_timeout_s),
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
        return self._state(self._owned(batch_id, caller), caller)

    def page_of(self, caller: Caller, offset: int, limit: int) -> list[BatchState]:
        """Return some of a caller's batches, the newest first; those that have ended cost one read each."""
        names = storage.list_names(self._uri(caller, "newest"))
        ids = [name.rpartition("-")[2] for name in names[offset : offset + limit]]
        records = [self._read(batch_id, caller) for batch_id in ids]
        return [self._state(record, caller) for record in records if record is not None]

    def cancel(self, batch_id: str, caller: Caller) -> BatchState:
        """Stop a batch; what is finished of it is kept, and submitting it again goes on."""
        record = self._owned(batch_id, caller)
        job = self._job(record["jobs"][-1])
        if job is not None and job.status in OPEN:
            try:
                self._client().stop_job(record["jobs"][-1])
            except RuntimeError:
                raise JobsUnavailableError("Ray does not stop the job") from None
        return self._state(record, caller)

    def rows(self, batch_id: str, caller: Caller) -> pa.Table:
        """The ledger of a finished batch.

        Raises:
            KeyError: where the caller has no such batch.
            FileNotFoundError: where it is not committed yet.
            ConfigError: it was written by a version of this software with another schema.
        """
        self._owned(batch_id, caller)
        run = self._run_of(batch_id)
        uri = "" if run is None else run.committed_uri(self.ledger)
        if not uri or not storage.exists(uri):
            raise FileNotFoundError("the batch is not committed yet")
        return self._committed_rows(uri)

    def result_uri(self, batch_id: str, caller: Caller, series_key: str, name: str) -> str:
        """Where a result file of a series lies."""
        self._owned(batch_id, caller)
        run = self._run_of(batch_id)
        if run is None:
            raise KeyError(batch_id)
        return storage.join(self.ledger, "_results", run.run_id, series_key, name)

    def _owned(self, batch_id: str, caller: Caller) -> dict[str, Any]:
        record = self._read(batch_id, caller)
        if record is None:
            raise KeyError(batch_id)
        return record

    def _uri(self, caller: Caller, *parts: str) -> str:
        digest = hashlib.sha256(caller.name.encode()).hexdigest()[:ID_DIGITS]
        return storage.join(self.root, "callers", digest, *parts)

    def _read(self, batch_id: str, caller: Caller) -> dict[str, Any] | None:
        """Return a record; None if it is missing or unreadable."""
        if len(batch_id) != ID_DIGITS or set(batch_id) - set("0123456789abcdef"):
            return None
        try:
            record: dict[str, Any] = json.loads(
                storage.read_bytes(self._uri(caller, f"{batch_id}.json"))
            )
        except FileNotFoundError:
            return None
        except ValueError:
            logger.error("the record of batch %s is not JSON", batch_id)
            return None
        return record

    def _write(self, record: dict[str, Any], caller: Caller) -> None:
        uri = self._uri(caller, f"{record['batch_id']}.json")
        storage.write_bytes(uri, json.dumps(record, indent=2).encode())

    def _run_of(self, batch_id: str) -> BatchRun | None:
        """The run that the batch's job began."""
        return run_of_batch(self.ledger, batch_id)

    def _client(self) -> JobSubmissionClient:
        """Ask the Ray that this replica runs in, and no other one of the machine.

        A new client each time: it asks for the version twice, and lives through a restart of the dashboard.

        Raises:
            JobsUnavailableError: it does not answer.
        """
        if not ray.is_initialized():  # else asking for it would start one
            raise JobsUnavailableError(
                "Ray's job server does not answer: this process is in no cluster"
            )
        try:
            return JobSubmissionClient(ray.get_runtime_context().gcs_address)
        except (RuntimeError, ConnectionError):
            raise JobsUnavailableError("Ray's job server does not answer") from None

    def _job(self, job: str) -> Any:
        """Return Ray's details of a job; None if Ray was restarted since."""
        try:
            return self._client().get_job_info(job)
        except RuntimeError as error:
            if "status code 404" not in str(error):
                raise JobsUnavailableError("Ray's job server answers with an error") from None
            return None

    def _state(self, record: dict[str, Any], caller: Caller) -> BatchState:
        known = {
            "batch_id": record["batch_id"],
            "submitted_at": record["submitted_at"],
            **record["asked"],
        }
        if record.get("ended"):
            return BatchState(**known, **record["ended"])
        run, job = self._run_of(record["batch_id"]), self._job(record["jobs"][-1])
        is_open = job is not None and job.status in OPEN
        found = {"run_id": None if run is None else run.run_id, **self._found(run, job)}
        if not is_open:  # as it is now it stays
            self._write({**record, "ended": found}, caller)
        return BatchState(**known, **found)

    def _found(self, run: BatchRun | None, job: Any) -> dict[str, Any]:
        """Return how far a batch is, by its run's ledger and Ray's word on its job."""
        exit_code = None if job is None else job.driver_exit_code
        if run is not None and storage.exists(run.committed_uri(self.ledger)):
            table = read_run(run.committed_uri(self.ledger), ["status"])
            counts = {
                each["values"]: each["counts"]
                for each in table["status"].value_counts().to_pylist()
            }
            return {
                "state": "committed",
                "counts": counts,
                "series": table.num_rows,
                "exit_code": exit_code,
            }
        if job is None:
            return {"state": "interrupted"}
        if job.status in OPEN:
            progress = {} if run is None else self._progress(run)
            return {
                "state": "waiting" if job.status == JobStatus.PENDING else "running",
                **progress,
            }
        return {"state": ENDS_OF_JOB[job.status], "exit_code": exit_code}

    def _progress(self, run: BatchRun) -> dict[str, Any]:
        series, finished = progress(self.ledger, run)
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
