"""Ray's job server, as the batches of the endpoint use it."""

from typing import Any

import ray
from ray.job_submission import JobStatus, JobSubmissionClient

OPEN = {JobStatus.PENDING, JobStatus.RUNNING}
CALLER_KEY = "covtanet_caller"  # in the metadata of a Ray job


class JobsUnavailableError(OSError):
    """Ray's job server does not answer, or answers with an error of its own."""


def is_open(job: Any) -> bool:
    """Return whether a job waits or runs; a job of an earlier Ray is None."""
    return job is not None and job.status in OPEN


def submit_job(
    job_id: str, command: str, caller: str, num_cpus: float | None, memory_bytes: int | None
) -> None:
    """Submit a job.

    num_cpus, memory_bytes: of the job's driver; None asks Ray for none.

    Raises:
        JobsUnavailableError: Ray does not take the job.
    """
    client = _client()
    try:
        client.submit_job(
            entrypoint=command,
            submission_id=job_id,
            metadata={CALLER_KEY: caller},
            entrypoint_num_cpus=num_cpus,
            entrypoint_memory=memory_bytes,
        )
    except RuntimeError:
        # If two replicas get one request at once, the second submission is a duplicate of the
        # first.
        if job_details(job_id) is None:
            raise JobsUnavailableError("Ray does not take the job") from None


def stop_job(job_id: str) -> None:
    """Stop a job.

    Raises:
        JobsUnavailableError: Ray does not stop it.
    """
    client = _client()
    try:
        client.stop_job(job_id)
    except RuntimeError:
        raise JobsUnavailableError("Ray does not stop the job") from None


def job_details(job_id: str) -> Any:
    """Return Ray's details of a job; None if Ray has restarted since.

    Raises:
        JobsUnavailableError: the job server does not answer.
    """
    client = _client()
    try:
        return client.get_job_info(job_id)
    except RuntimeError as error:
        if "status code 404" not in str(error):
            raise JobsUnavailableError("Ray's job server answers with an error") from None
        return None


def callers_of_open_jobs() -> list[str]:
    """Return the caller of each open batch, from the metadata of Ray's jobs.

    Raises:
        JobsUnavailableError: the job server does not answer.
    """
    client = _client()
    try:
        jobs = client.list_jobs()
    except RuntimeError:
        raise JobsUnavailableError("Ray's jobs cannot be listed") from None
    return [str(job.metadata[CALLER_KEY]) for job in jobs if _is_open_batch(job)]


def _is_open_batch(job: Any) -> bool:
    return is_open(job) and CALLER_KEY in (job.metadata or {})


def _client() -> JobSubmissionClient:
    """Return a client of the Ray that this replica runs in, not of another Ray of the machine.

    A new client each time: it asks for the version twice, but survives a restart of the dashboard.

    Raises:
        JobsUnavailableError: the job server does not answer.
    """
    # Without this check asking for the context would start a new Ray.
    if not ray.is_initialized():
        raise JobsUnavailableError(
            "Ray's job server does not answer: this process is in no cluster"
        )
    try:
        return JobSubmissionClient(ray.get_runtime_context().gcs_address)
    except (RuntimeError, ConnectionError):
        raise JobsUnavailableError("Ray's job server does not answer") from None
