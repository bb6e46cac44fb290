"""Screenings of a PACS: jobs, their ledgers, and the same objects in a folder to compare with."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from pacs import uids_of
from running import S3, Cluster

from covtanet import storage
from covtanet.ledger.finished_rows import num_finished
from infra.local.jobs import Job

CONFIG = '[screening]\nengine = "eager"\n'


@dataclass(frozen=True)
class PacsRuns:
    """Starts screenings and reads their ledgers."""

    cluster: Cluster
    s3: S3
    model: Path
    config: Path

    def arguments(self, name: str, archive: str, date: str = "2026-11-23") -> list[str]:
        """Return the arguments of a screening; its ledger is named after it."""
        return [
            "--archive", archive, "--ledger", f"{self.s3.uri}/{name}", "--model", str(self.model),
            "--config", str(self.config), "--run-date", date,
        ]  # fmt: skip

    def screen(self, name: str, archive: str, *more: str, expect: int = 0, **date: str) -> str:
        """Screen and return the output."""
        arguments = [*self.arguments(name, archive, **date), *more]
        return self.cluster.run_job("screen.py", *arguments, expect=expect)

    def start(self, name: str, archive: str) -> Job:
        """Start a screening."""
        return self.cluster.start_job("screen.py", *self.arguments(name, archive))

    def rows_done(self, name: str) -> int:
        """Return the number of series that are finished in a run that goes on."""
        return sum(map(num_finished, map(str, (self.s3.folder / name).glob("_work/*"))))

    def rows(self, name: str, date: str = "2026-11-23") -> list[dict[str, Any]]:
        """Return the rows of a night; empty without a committed run."""
        paths = (self.s3.folder / name / f"date={date}").glob("*.parquet")
        return [row for path in paths for row in pq.ParquetFile(path).read().to_pylist()]


def write_folder(uri: str, contents: Iterable[bytes]) -> None:
    """Write objects into a folder for each series, named by their UIDs."""
    for content in contents:
        _, series_uid, uid = uids_of(content)
        storage.write_bytes(storage.join(uri, series_uid, uid), content)
