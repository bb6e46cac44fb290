"""Batches: the screening job of ``jobs/screen.py`` on this cluster, submitted over HTTP.

A batch is a record in the ledger's storage (see ``batch_records``) and a Ray job. A replica holds
no state of it, so every process of the endpoint may die.

LEDGER/_batches/ledger/ is a ledger for batches alone: no batch settles or hides a study of the
nightly runs.
"""

import hashlib
import json
import shlex
import sys
import threading
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
from ray.job_submission import JobStatus

from covtanet import storage
from covtanet.errors import ConfigError
from covtanet.ledger.batch import BATCHES, BatchRun, progress, run_of_batch
from covtanet.ledger.read import read_run
from serve import job_server
from serve.batch_records import ID_DIGITS, BatchRecords
from serve.job_server import JobsUnavailableError
from serve.schemas import BatchRequest, BatchState
from serve.settings import Caller, ServeConfig

__all__ = [
    "BatchConflictError",
    "Batches",
    "JobsUnavailableError",
    "ModelNotAllowedError",
    "TooManyBatchesError",
]

ROOT = Path(__file__).resolve().parents[1]
LEDGERS_KEPT = 4
# A job that ended without a commit: exit code 0 without a ledger is a failure too.
ENDS_OF_JOB = {
    JobStatus.STOPPED: "cancelled",
    JobStatus.FAILED: "failed",
    JobStatus.SUCCEEDED: "failed",
}
RESTARTABLE = ("failed", "cancelled", "interrupted")
KILL_AFTER_S = 60  # a job past its time limit gets this long to end by itself


class BatchConflictError(ConfigError):
    """The idempotency key was used for another request."""


class ModelNotAllowedError(ConfigError):
    """The configuration of the endpoint does not name the model of the request."""


class TooManyBatchesError(ConfigError):
    """The limit of open batches is reached."""


class Batches:
    """All batches of one endpoint.

    ledger: the ledger of the batches.
    """

    def __init__(self, settings: ServeConfig) -> None:
        self.settings = settings
        root = storage.join(storage.absolute(settings.ledger), BATCHES)
        self.ledger = storage.join(root, "ledger")
        self.records = BatchRecords(root)
        self._submitting = threading.Lock()
        self._committed_rows = lru_cache(LEDGERS_KEPT)(read_run)  # a committed file never changes

    def submit(self, request: BatchRequest, caller: Caller, idempotency_key: str) -> BatchState:
        """Start a batch, restart a batch that failed, or return the batch of an earlier request.

        Raises:
            BatchConflictError: the key stands for another request.
            ModelNotAllowedError: the endpoint's configuration does not name the model.
            TooManyBatchesError: the limit of open batches, of this caller or of all callers, is
            reached.
            OSError: storage or Ray does not answer.
        """
        if request.model not in ("", self.settings.model, *self.settings.models):
            raise ModelNotAllowedError(
                "the configuration of this endpoint does not name this model for batches"
            )
        values = request.model_dump(mode="json")
        values["run_date"] = values["run_date"] or datetime.now(UTC).date().isoformat()
        batch_id = _batch_id(caller, idempotency_key, values)
        # Two replicas may let one batch too many in; two threads of a replica may not.
        with self._submitting:
            record = self.records.read(batch_id, caller)
            if record is not None:
                # Without the date, which is filled in if the caller gives none.
                if {**record["asked"], "run_date": None} != {**values, "run_date": None}:
                    raise BatchConflictError("this idempotency key was used for another request")
                state = self._state(record, caller)
                # A request that is repeated returns its batch and starts nothing.
                if state.state not in RESTARTABLE:
                    return state
            # After the earlier batch is looked up: its answer needs no room.
            self._check_room(caller)
            new = {"batch_id": batch_id, "asked": values, "jobs": []}
            return self._start(record or new, caller)

    def _check_room(self, caller: Caller) -> None:
        callers = job_server.callers_of_open_jobs()
        limit = self.settings.max_batches_per_caller
        if callers.count(caller.name) >= limit:
            raise TooManyBatchesError(
                f"{limit} of your batches are open, expected fewer; wait for one to end"
            )
        if len(callers) >= self.settings.max_batches:
            raise TooManyBatchesError("as many batches are open as this endpoint runs at a time")

    def _start(self, record: dict[str, Any], caller: Caller) -> BatchState:
        batch_id = record["batch_id"]
        # Numbered: Ray refuses an identifier that was used before.
        job_id = f"screen-{batch_id}-{len(record['jobs']) + 1}"
        now = datetime.now(UTC)
        # A batch that starts again keeps its position in the list.
        if not record["jobs"]:
            self.records.list_as_newest(batch_id, caller, now)
        record = {
            **record,
            "jobs": [*record["jobs"], job_id],
            "submitted_at": now.isoformat(),
            "ended": None,
        }
        # Before the job starts: a job without a record would be lost.
        self.records.write(record, caller)
        job_server.submit_job(
            job_id,
            shlex.join(self.command(record)),
            caller.name,
            self.settings.driver_cpus or None,
            self.settings.driver_memory_mib << 20 or None,
        )
        return self._state(record, caller)

    def command(self, record: dict[str, Any]) -> list[str]:
        """Return the command line of a batch's job."""
        values = record["asked"]
        # Ray ends a job by its process group, which --foreground leaves as it is.
        command = ["timeout", "--foreground", f"--kill-after={KILL_AFTER_S}"]
        command += [str(self.settings.batch_timeout_s)]
        command += [sys.executable, str(ROOT / "jobs" / "screen.py")]
        command += ["--archive", values["archive"]]
        command += ["--ledger", self.ledger]
        command += ["--model", values["model"] or self.settings.model]
        command += ["--run-date", values["run_date"]]
        command += ["--results", storage.join(self.ledger, "_results")]
        command += ["--batch", record["batch_id"]]
        if self.settings.config:
            command += ["--config", self.settings.config]
        for name in ("since", "group_by", "limit"):
            if values[name]:
                command += [f"--{name.replace('_', '-')}", str(values[name])]
        return command

    def find(self, batch_id: str, caller: Caller) -> BatchState:
        """Return one batch of a caller.

        Raises:
            KeyError: the caller has no such batch.
        """
        return self._state(self.records.read_owned(batch_id, caller), caller)

    def page_of(self, caller: Caller, offset: int, limit: int) -> list[BatchState]:
        """Return some of a caller's batches, the newest first.

        A batch that has ended costs one read.
        """
        records = self.records.newest(caller, offset, limit)
        return [self._state(record, caller) for record in records]

    def cancel(self, batch_id: str, caller: Caller) -> BatchState:
        """Stop a batch; its finished series are kept, and submitting it again continues it."""
        record = self.records.read_owned(batch_id, caller)
        job_id = record["jobs"][-1]
        if job_server.is_open(job_server.job_details(job_id)):
            job_server.stop_job(job_id)
        return self._state(record, caller)

    def rows(self, batch_id: str, caller: Caller) -> pa.Table:
        """Return the ledger of a committed batch.

        Raises:
            KeyError: the caller has no such batch.
            FileNotFoundError: the batch is not committed yet.
            ConfigError: a version of this software with another schema wrote it.
        """
        self.records.read_owned(batch_id, caller)
        run = run_of_batch(self.ledger, batch_id)
        if run is None or not self._is_committed(run):
            raise FileNotFoundError("the batch is not committed yet")
        return self._committed_rows(run.committed_uri(self.ledger))

    def result_uri(self, batch_id: str, caller: Caller, series_key: str, name: str) -> str:
        """Return the URI of a result file of a series.

        Raises:
            KeyError: the caller has no such batch, or its job has not begun a run yet.
        """
        self.records.read_owned(batch_id, caller)
        run = run_of_batch(self.ledger, batch_id)
        if run is None:
            raise KeyError(batch_id)
        return storage.join(self.ledger, "_results", run.run_id, series_key, name)

    def _is_committed(self, run: BatchRun) -> bool:
        return storage.exists(run.committed_uri(self.ledger))

    def _state(self, record: dict[str, Any], caller: Caller) -> BatchState:
        request = {
            "batch_id": record["batch_id"],
            "submitted_at": record["submitted_at"],
            **record["asked"],
        }
        # One read, without a question to Ray.
        if record.get("ended"):
            return BatchState(**request, **record["ended"])
        run = run_of_batch(self.ledger, record["batch_id"])
        job = job_server.job_details(record["jobs"][-1])
        run_id = None if run is None else run.run_id
        outcome = {"run_id": run_id, **self._outcome(run, job)}
        # The state of a batch whose job has ended does not change any more.
        if not job_server.is_open(job):
            self.records.write({**record, "ended": outcome}, caller)
        return BatchState(**request, **outcome)

    def _outcome(self, run: BatchRun | None, job: Any) -> dict[str, Any]:
        """Return state and progress of a batch, from its run's ledger and its Ray job."""
        # The ledger decides before Ray's job does: a committed run is finished, however its driver
        # ended.
        if run is not None and self._is_committed(run):
            return self._committed(run, job)
        if job is None:
            return {"state": "interrupted"}
        if job.status == JobStatus.PENDING:
            return {"state": "waiting", **self._progress(run)}
        if job.status == JobStatus.RUNNING:
            return {"state": "running", **self._progress(run)}
        return {"state": ENDS_OF_JOB[job.status], "exit_code": job.driver_exit_code}

    def _committed(self, run: BatchRun, job: Any) -> dict[str, Any]:
        table = read_run(run.committed_uri(self.ledger), ["status"])
        counts = table["status"].value_counts().to_pylist()
        return {
            "state": "committed",
            "counts": {count["values"]: count["counts"] for count in counts},
            "series": table.num_rows,
            "exit_code": None if job is None else job.driver_exit_code,
        }

    def _progress(self, run: BatchRun | None) -> dict[str, Any]:
        """Return counts, rate and remaining time of a run; empty until its manifest is written."""
        if run is None:
            return {}
        num_series, num_finished = progress(self.ledger, run)
        if num_series is None:
            return {}
        elapsed_s = (datetime.now(UTC) - run.begun_at).total_seconds()
        seconds_left = None
        if num_finished:
            seconds_left = (num_series - num_finished) * elapsed_s / num_finished
        return {
            "series": num_series,
            "finished": num_finished,
            "per_minute": 60 * num_finished / elapsed_s,
            "seconds_left": seconds_left,
        }


def _batch_id(caller: Caller, idempotency_key: str, values: dict[str, Any]) -> str:
    """Return the id of a batch: a digest of the idempotency key, or else of the request."""
    identity = json.dumps([caller.name, idempotency_key or values], sort_keys=True)
    return hashlib.sha256(identity.encode("utf-8", "surrogatepass")).hexdigest()[:ID_DIGITS]
