"""Counts of the rows of a run."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

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

    def add(self, table: pa.Table) -> None:
        """Count ledger rows. table: at least ``ACCOUNTED_COLUMNS``."""
        counted = table.select(ACCOUNTED_COLUMNS).group_by(ACCOUNTED_COLUMNS, use_threads=False)
        # A few dozen groups, however many rows there are.
        for group in counted.aggregate([([], "count_all")]).to_pylist():
            self._add_group(group, group["count_all"])

    def _add_group(self, row: dict[str, Any], num_rows: int) -> None:
        """Count rows that are alike in ``ACCOUNTED_COLUMNS``."""
        self.series += num_rows
        self.screened += num_rows * (row["status"] == Status.SCREENED)
        self.failed += num_rows * (row["status"] == Status.FAILED)
        self.diagnosed += num_rows * (row["diagnosis"] is not None)
        self.infected += num_rows * (row["diagnosis"] == "infected")
        self.severe += num_rows * (row["severity"] == "severe")
        self.severe_by_involvement += num_rows * (row["severity_by_involvement"] == "severe")
        if row["status"] == Status.REJECTED:
            self.rejected[row["reason"]] += num_rows
        if row["status"] == Status.FAILED:
            self.failures[row["reason"]] += num_rows
