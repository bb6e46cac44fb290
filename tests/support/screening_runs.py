"""Screenings of phantoms in a real S3 server on a real Ray: started, watched,
disturbed, compared.
"""

import contextlib
import json
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from saved_models import small_model

from covtanet.ledger.diff import differences
from covtanet.ledger.finished_rows import num_finished
from covtanet.model.saved_model import save_model
from covtanet.phantoms.archive import write_archive
from covtanet.phantoms.sampling import configs
from infra.local.jobs import Job, start_job
from infra.local.ray_processes import ray_processes, signal_first

DATE = "2026-11-23"
NUM_SOUND = 8
CONFIG = '[screening]\nengine = "eager"\ndecode_timeout_s = 6\n'
# Texts in the command lines of a decoding worker, a predicting worker and a decoder's child.
DECODER, PREDICTOR, CHILD = "Map(Decoder)", "Map(PredictorWorker)", "sandbox_child"


@dataclass(frozen=True)
class Planned:
    """Output of ``screen.py --plan``, and the state of its ledger right after it."""

    output: str = ""
    has_manifest: bool = False
    num_rows: int = 0
    is_committed: bool = False


@dataclass
class Screening:
    """A Ray, an archive in S3, and the ledger of an undisturbed run of it.

    bucket: the folder on this disk that holds the bucket's objects. truth: the rows that are right.
    inside: a command that runs jobs, such as ``nsenter`` with its options.
    """

    folder: Path
    bucket: Path
    environment: dict[str, str] = field(default_factory=dict)
    inside: tuple[str, ...] = ()
    clean: pa.Table = field(default_factory=lambda: pa.table({}))
    clean_output: str = ""
    truth: list[dict[str, object]] = field(default_factory=list)
    planned: Planned = field(default_factory=Planned)

    def arguments(
        self, name: str, archive: str = "s3://bucket/archive", ledger: str = ""
    ) -> list[str]:
        """Return the arguments of a run; its ledger is named after it unless ``ledger``
        is given.
        """
        return [
            "--archive",
            archive,
            "--ledger",
            ledger or f"s3://bucket/{name}",
            "--model",
            str(self.folder / "model"),
            "--config",
            str(self.folder / "screening.toml"),
            "--run-date",
            DATE,
        ]

    def start(self, name: str, *more: str, **locations: str) -> Job:
        """Start a run."""
        arguments = self.arguments(name, **locations)
        return start_job(self.environment, "screen.py", *arguments, *more, inside=self.inside)

    def run(self, name: str, *more: str, expect: int = 0, **locations: str) -> str:
        """Run to the end, check the exit code and return the output."""
        job = self.start(name, *more, **locations)
        code = job.finish()
        assert code == expect, f"exit code {code}, expected {expect}:\n{job.output[-3000:]}"
        assert f"exit code {code}:" in job.lines[-1], "the last line does not tell the exit code"
        return job.output

    def plan(self, name: str) -> Planned:
        """Run with ``--plan`` and look at the ledger."""
        output = self.run(name, "--plan")
        manifests = (self.bucket / name).glob("_work/*/manifest.parquet")
        return Planned(
            output=output,
            has_manifest=any(manifests),
            num_rows=self.rows_done(name),
            is_committed=self.is_committed(name),
        )

    def rows_done(self, name: str) -> int:
        """Number of series that are finished in a run that goes on."""
        return sum(map(num_finished, map(str, (self.bucket / name).glob("_work/*"))))

    def finished(self, name: str) -> dict[str, dict[str, object]]:
        """Return the rows of a run that goes on, by series key."""
        chunks = (self.bucket / name).glob("_work/*/rows/[!.]*.parquet")
        rows = (row for path in chunks for row in pq.ParquetFile(path).read().to_pylist())
        return {str(row["series_key"]): row for row in rows}

    def is_committed(self, name: str) -> bool:
        """Whether the run's file is in the ledger."""
        return any((self.bucket / name).glob("date=*/*.parquet"))

    def table(self, name: str) -> pa.Table:
        """Rows of the committed run."""
        (path,) = (self.bucket / name).glob("date=*/*.parquet")
        return pq.ParquetFile(path).read()

    def check_equal(self, name: str, table: pa.Table | None = None) -> str:
        """Check that a run has the rows of the undisturbed run; return a summary."""
        table = self.table(name) if table is None else table
        changed = differences(self.clean, table)
        assert not changed, f"{len(changed)} differences, first {changed[0]}"
        return f"{table.num_rows} rows, equal to the clean run's"


def write_archive_and_model(screening: Screening) -> None:
    """Write the archive with damaged series, a model, and the configuration of all runs."""
    screening.bucket.mkdir(exist_ok=True)
    save_model(screening.folder / "model", small_model())
    (screening.folder / "screening.toml").write_text(CONFIG)
    phantoms = list(configs(NUM_SOUND, 21, size_px=128, num_slices=20))
    screening.truth = write_archive("s3://bucket/archive", "s3://bucket/truth", phantoms, 2)


def signal_one(
    environment: dict[str, str], text: str, sent: signal.Signals = signal.SIGKILL
) -> Callable[[], bool]:
    """Return a condition that signals such a process, and holds once it has."""
    return lambda: signal_first(environment, text, sent)


class DeadlySeries:
    """Kills the worker that decodes one certain series, at each of its attempts.

    A decoder is killed at work. The run's note of a second attempt names the series that it had,
    the deadly one from then on, and the process of each further attempt.
    """

    NOTE_TIMEOUT_S = 20.0

    def __init__(self, screening: Screening, name: str) -> None:
        self.screening = screening
        self.name = name
        self.key = ""
        rows = screening.clean.to_pylist()
        self._sound = {row["series_key"] for row in rows if row["status"] == "screened"}
        self.killed: set[int] = set()
        self._killed_at = -self.NOTE_TIMEOUT_S

    def screen(self) -> Job:
        """Start the run; return its job once the series has a row."""
        job = self.screening.start(self.name)
        job.wait_for(self._has_row)
        return job

    def _has_row(self) -> bool:
        if not self.key:
            self._choose()
            return False
        ledger = self.screening.bucket / self.name
        for path in ledger.glob(f"_work/*/attempts/*/{self.key}-decode.json"):
            with contextlib.suppress(OSError, ValueError):
                self._kill(json.loads(path.read_text())["workers"][-1]["pid"])
        is_committed = self.screening.is_committed(self.name)
        return is_committed or self.key in self.screening.finished(self.name)

    def _choose(self) -> None:
        """Take the first series with a second attempt; kill a decoder if there is none."""
        ledger = self.screening.bucket / self.name
        for path in ledger.glob("_work/*/attempts/*/*-decode.json"):
            key = path.name.removesuffix("-decode.json")
            if key in self._sound:  # a refused one would end before it can be killed again
                self.key = key
                return
        if time.monotonic() - self._killed_at < self.NOTE_TIMEOUT_S:
            return
        # A decoder has a child since its first series, whose attempt was counted before.
        for child in ray_processes(self.screening.environment, CHILD):
            with contextlib.suppress(psutil.Error):
                self._kill(child.ppid())
                self._killed_at = time.monotonic()
                return

    def _kill(self, pid: int) -> None:
        # This worker alone: the series of another worker would come to its third attempt as well.
        if pid not in self.killed:
            with contextlib.suppress(psutil.Error):
                psutil.Process(pid).kill()
                self.killed.add(pid)
