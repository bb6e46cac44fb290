"""One night: the archive as it is that day, the nightly command until it commits, the checks."""

import json
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

from benchmarks.soak.archive import Identity, LivingArchive
from benchmarks.soak.check import Expected, Row, by_identity, check_night, check_view
from benchmarks.soak.disturbances import Disturbance, Machinery, Strike
from benchmarks.soak.faulty_store import HIDING_FAULTS
from covtanet import storage
from covtanet.errors import Status
from covtanet.ledger.read import committed_files, find_run_file, read_run
from covtanet.ledger.view import newest_rows
from infra.local.jobs import start_job

MAX_STARTS = 6
JOB_TIMEOUT_S = 900
NIGHTLY_MARK = "_nightly"
KEEP_RESULTS_DAYS = 7


@dataclass(frozen=True, kw_only=True)
class Night:
    """What came of a night. codes: exit codes of its starts. faults: empty if all is right."""

    date: date
    num_present: int
    disturbances: tuple[str, ...]
    codes: tuple[int, ...]
    num_rows: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    spent_s: float = 0.0
    faults: tuple[str, ...] = ()

    def cells(self) -> list[str]:
        """Return the columns of the night's line."""
        failed = ", ".join(f"{count} {reason}" for reason, count in sorted(self.failed.items()))
        return [
            self.date.isoformat(),
            str(self.num_present),
            " + ".join(self.disturbances) or "none",
            str(len(self.codes)),
            " ".join(map(str, self.codes)),
            str(self.num_rows),
            failed or "none",
            f"{self.spent_s:.0f}",
            f"MISMATCH: {len(self.faults)}" if self.faults else "ok",
        ]


@dataclass
class Soak:
    """Everything that lasts from night to night."""

    archive: LivingArchive
    ledger: str
    model: Path
    config: Path
    machinery: Machinery
    logs: Path
    expected: Expected = field(default_factory=Expected)
    num_nights: int = 0
    newest: dict[Identity, Row] = field(default_factory=dict)

    def run(self, night: date, disturbances: list[Disturbance]) -> Night:
        """Run one night to its commit and check it."""
        started = time.monotonic()
        codes, happened = self._run_until_committed(night, disturbances)
        self.num_nights += 1
        rows, faults = self._rows(night)
        spent_s = time.monotonic() - started
        if not faults:
            faults = self._check(rows, disturbances)
        return Night(
            date=night,
            num_present=len(self.archive.present),
            disturbances=tuple(happened),
            codes=tuple(codes),
            num_rows=len(rows),
            failed=Counter(
                str(row["reason"]) for row in rows.values() if row["status"] == Status.FAILED
            ),
            spent_s=spent_s,
            faults=tuple(faults),
        )

    def _run_until_committed(
        self, night: date, disturbances: list[Disturbance]
    ) -> tuple[list[int], list[str]]:
        """Start the same command until the night has its mark. Only the first start is
        disturbed.
        """
        codes: list[int] = []
        happened: list[str] = []
        while len(codes) < MAX_STARTS and not storage.exists(self._mark(night)):
            self.machinery.cluster.ensure_alive()
            environment = self.machinery.cluster.environment
            job = start_job(environment, "nightly.py", *self._arguments(night))
            due = disturbances if not codes else []
            strikes = [Strike(each, job, self.machinery) for each in due]
            try:
                codes.append(job.finish(JOB_TIMEOUT_S))
            finally:
                for strike in strikes:
                    strike.end()
            name = f"{night}-{len(codes)}.log"
            (self.logs / name).write_text(job.output)
            happened += [
                strike.disturbance.kind + ("" if strike.happened else " (missed)")
                for strike in strikes
            ]
        return codes, happened

    def _arguments(self, night: date) -> list[str]:
        return [
            "--archive", self.archive.uri, "--ledger", self.ledger, "--model", str(self.model),
            "--config", str(self.config), "--night", night.isoformat(),
            "--max-rejected", "1", "--max-failed", "1",
            "--keep-results-days", str(KEEP_RESULTS_DAYS),
        ]  # fmt: skip

    def _mark(self, night: date) -> str:
        return storage.join(self.ledger, NIGHTLY_MARK, f"{night.isoformat()}.json")

    def _rows(self, night: date) -> tuple[dict[Identity, Row], list[str]]:
        """Return the rows of the night's committed run, and what is wrong with their number."""
        if not storage.exists(self._mark(night)):
            return {}, [f"not committed after {MAX_STARTS} starts"]
        run_id = json.loads(storage.read_bytes(self._mark(night)))["run_id"]
        table = read_run(find_run_file(self.ledger, run_id))
        rows, faults = by_identity(table.to_pylist(), self.archive.uri)
        num_files = len(committed_files(self.ledger))
        if num_files != self.num_nights:
            faults.append(f"{num_files} committed files after {self.num_nights} nights")
        return rows, faults

    def _check(self, rows: dict[Identity, Row], disturbances: list[Disturbance]) -> list[str]:
        if not self.expected.numbers:
            self.expected.learn(rows, self.archive.present)
        present = self.archive.present
        faults = check_night(
            rows,
            self._due(rows),
            present,
            self.expected,
            may_fail=bool(disturbances),
            may_repeat=any(each.kind in HIDING_FAULTS for each in disturbances),
        )
        view = newest_rows(self.ledger).to_pylist()
        self.newest, twice = by_identity(view, self.archive.uri)
        faults += twice
        return faults + check_view(self.newest, present, self.archive.gone, self.expected)

    def _due(self, rows: dict[Identity, Row]) -> set[Identity]:
        """Return the series that a night has to screen: new, changed, or failed before.

        Those that another version of the software rejected are due as well.
        """
        versions = {row["software_version"] for row in rows.values()}
        due = set(self.archive.fresh)
        for identity in self.archive.present.keys() & self.newest.keys():
            row = self.newest[identity]
            is_rejected = row["status"] == Status.REJECTED
            is_of_other_version = is_rejected and row["software_version"] not in versions
            if row["status"] == Status.FAILED or is_of_other_version:
                due.add(identity)
        return due
