"""Handles of the services that the session's fixtures start."""

from dataclasses import dataclass
from pathlib import Path

from infra.local.jobs import Job, start_job


@dataclass(frozen=True)
class S3:
    """A running S3 server with one bucket; ``folder`` holds the bucket's objects as files."""

    uri: str
    folder: Path
    environment: dict[str, str]


@dataclass(frozen=True)
class Cluster:
    """A running Ray cluster and the environment in which jobs reach it."""

    environment: dict[str, str]

    def start_job(self, script: str, *arguments: str) -> Job:
        """Start a job as its own process group."""
        return start_job(self.environment, script, *arguments)

    def run_job(self, script: str, *arguments: str, expect: int = 0) -> str:
        """Run a job to its end, check its exit code and return its output."""
        job = self.start_job(script, *arguments)
        code = job.finish()
        assert code == expect, job.output
        return job.output
