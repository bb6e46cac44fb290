"""The run that a batch of the endpoint started, and how far it is."""

import json
from dataclasses import dataclass
from datetime import UTC, date, datetime

import pyarrow.parquet as pq

from covtanet import storage
from covtanet.ledger.finished_rows import num_finished
from covtanet.ledger.run import WORK, Run, committed_uri

BATCHES = "_batches"


@dataclass(frozen=True, kw_only=True)
class BatchRun:
    """The run of a batch. begun_at: in UTC, when the batch's job chose the run."""

    run_id: str
    run_date: date
    begun_at: datetime

    def committed_uri(self, ledger: str) -> str:
        """Return the URI of the run's committed file."""
        return committed_uri(ledger, self.run_date, self.run_id)


def name_batch(run: Run, batch: str) -> None:
    """Note which run a batch is, for the endpoint."""
    values = {
        "run_id": run.run_id,
        "run_date": run.run_date.isoformat(),
        "begun_at": datetime.now(UTC).isoformat(),
    }
    storage.write_bytes(_batch_uri(run.ledger, batch), json.dumps(values).encode())


def run_of_batch(ledger: str, batch: str) -> BatchRun | None:
    """Return the run of a batch; None until its job has chosen one."""
    try:
        values = json.loads(storage.read_bytes(_batch_uri(ledger, batch)))
    except FileNotFoundError:
        return None
    return BatchRun(
        run_id=values["run_id"],
        run_date=date.fromisoformat(values["run_date"]),
        begun_at=datetime.fromisoformat(values["begun_at"]),
    )


def progress(ledger: str, run: BatchRun) -> tuple[int | None, int]:
    """Return the number of series of the run's manifest, and of the finished ones.

    The first is null until the manifest is written.
    """
    work = storage.join(ledger, WORK, run.run_id)
    filesystem, path = storage.filesystem(storage.join(work, "manifest.parquet"))
    try:
        with filesystem.open_input_file(path) as file:
            num_series = pq.ParquetFile(file).metadata.num_rows
    except FileNotFoundError:
        return None, 0
    # Two drivers may have finished a series.
    return num_series, min(num_series, num_finished(work))


def _batch_uri(ledger: str, batch: str) -> str:
    return storage.join(ledger, BATCHES, f"{batch}.run")
