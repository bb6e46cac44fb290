"""Counts of the rows of a run."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from covtanet.errors import Status

ACCOUNTED_COLUMNS = ["status", "reason", "diagnosis", "severity", "severity_by_involvement"]


@dataclass(kw_only=True)
class Accounting:
    """Counts of rows by status, reason, diagnosis and severity."""

    series: int = 0
    screened: int = 0
    failed: int = 0
    diagnosed: int = 0
    infected: int = 0
    severe: int = 0
    severe_by_involvement: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    """Number of rejected rows by reason."""
    failures: Counter[str] = field(default_factory=Counter)
    """Number of failed rows by reason."""

    def add(self, row: dict[str, Any]) -> None:
        """Count one ledger row."""
        self.series += 1
        self.screened += row["status"] == Status.SCREENED
        self.failed += row["status"] == Status.FAILED
        self.diagnosed += row["diagnosis"] is not None
        self.infected += row["diagnosis"] == "infected"
        self.severe += row["severity"] == "severe"
        self.severe_by_involvement += row["severity_by_involvement"] == "severe"
        if row["status"] == Status.REJECTED:
            self.rejected[row["reason"]] += 1
        if row["status"] == Status.FAILED:
            self.failures[row["reason"]] += 1
