"""Comparison of two runs of one archive, as of champion and challenger: flips, shifts, agreement.

``ledger.diff`` lists every value that differs; this module counts how the grades changed.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import numpy as np
import pyarrow as pa
from sklearn.metrics import cohen_kappa_score

from covtanet.data.labels import grade_of
from covtanet.errors import Status
from covtanet.report.summary import table

GRADES = ("normal", "mild", "severe")
MAX_LISTED = 200
STYLE = (
    ":root{color-scheme:light dark}"
    "body{font:15px/1.45 system-ui,sans-serif;margin:1.5rem}"
    "th,td{text-align:left;padding:.2rem .8rem;border-bottom:1px solid #8886}"
)


@dataclass(kw_only=True)
class Comparison:
    """Changes from one ledger to another."""

    only_before: int = 0
    """Series of the first ledger alone."""
    only_after: int = 0
    """Series of the second ledger alone."""
    statuses: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Counts of (status before, status after)."""
    grades: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Counts of (grade before, grade after), of series that both screened."""
    flips: list[tuple[str, str, str]] = field(default_factory=list)
    """(series_key, grade before, grade after), the largest change of probability first."""
    p_shift: list[float] = field(default_factory=list)
    """Differences of p_infected."""
    involvement_shift: list[float] = field(default_factory=list)
    """Differences of involvement."""
    failures: dict[str, Exception] = field(default_factory=dict)
    """Errors of this software by series key; these series are in no count of both ledgers."""

    @property
    def num_compared(self) -> int:
        """Return the number of series that both screened."""
        return self.grades.total()

    @property
    def kappa(self) -> float | None:
        """Return Cohen's kappa of the grades; None if there are fewer than two grades."""
        pairs = list(self.grades.elements())
        if len({grade for pair in pairs for grade in pair}) < 2:
            return None
        before, after = zip(*pairs, strict=True)
        return float(cohen_kappa_score(before, after, labels=GRADES))

    def rows(self) -> list[tuple[str, str]]:
        """Return names and values for a table."""
        num_same = sum(count for pair, count in self.grades.items() if pair[0] == pair[1])
        kappa = "-" if self.kappa is None else f"{self.kappa:.3f}"
        sides = f"{self.only_before} before, {self.only_after} after"
        rows = [("series in one ledger only", sides)]
        if self.failures:
            rows.append(("not compared, see the log", str(len(self.failures))))
        rows.append(("screened by both", str(self.num_compared)))
        rows += _changes(self.statuses, "status ")
        rows.append(("same grade", f"{num_same} / {self.num_compared}"))
        rows.append(("Cohen's kappa of the grades", kappa))
        rows += _changes(self.grades, "")
        rows += _shifts("p_infected", self.p_shift)
        rows += _shifts("involvement", self.involvement_shift)
        return rows

    def as_table(self, title: str) -> str:
        """Return the comparison as plain text."""
        return table(title, self.rows())

    def as_html(self, title: str) -> str:
        """Return the comparison as a page, with the series that change their grade."""
        lines = [
            f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>"
            for name, value in self.rows()
        ]
        flips = [_flip_row(flip) for flip in self.flips[:MAX_LISTED]]
        return (
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
            f"<style>{STYLE}</style><h1>{escape(title)}</h1>"
            "<p><strong>Research use only. Not a medical device.</strong></p>"
            f"<table>{''.join(lines)}</table>"
            f"<h2>Series that change their grade: {len(self.flips)}</h2>"
            "<table><tr><th>series</th><th>before</th><th>after</th></tr>"
            f"{''.join(flips)}</table></html>"
        )


def _changes(counts: Counter[tuple[str, str]], prefix: str) -> list[tuple[str, str]]:
    """Return a row for every change from one value to another."""
    return [
        (f"{prefix}{before} to {after}", str(count))
        for (before, after), count in sorted(counts.items())
        if before != after
    ]


def _shifts(name: str, values: Sequence[float]) -> list[tuple[str, str]]:
    if not values:
        return []
    largest = max(values, key=abs)
    return [(f"{name} shifts, mean (largest)", f"{np.mean(values):+.3f} ({largest:+.3f})")]


def _flip_row(flip: tuple[str, str, str]) -> str:
    key, before, after = (escape(text) for text in flip)
    return f"<tr><td><code>{key}</code></td><td>{before}</td><td>{after}</td></tr>"


def compare(before: pa.Table, after: pa.Table) -> Comparison:
    """Compare two ledgers by series key."""
    rows_before = {row["series_key"]: row for row in before.to_pylist()}
    rows_after = {row["series_key"]: row for row in after.to_pylist()}
    comparison = Comparison(
        only_before=len(rows_before.keys() - rows_after.keys()),
        only_after=len(rows_after.keys() - rows_before.keys()),
    )
    pairs: dict[str, _Pair] = {}
    for key in sorted(rows_before.keys() & rows_after.keys()):
        try:
            pairs[key] = _Pair.of(rows_before[key], rows_after[key])
        except Exception as error:  # a fault with one series must not hide the other series
            comparison.failures[key] = error
    for pair in pairs.values():
        _count(comparison, pair)
    flips = [(key, pair) for key, pair in pairs.items() if pair.is_flip]
    flips.sort(key=lambda flip: -abs(flip[1].p_shift or 0.0))
    comparison.flips = [(key, *pair.grades) for key, pair in flips if pair.grades]
    return comparison


@dataclass(frozen=True)
class _Pair:
    """The two rows of a series; grades and shifts are None unless both rows have the value."""

    statuses: tuple[str, str]
    grades: tuple[str, str] | None = None
    p_shift: float | None = None
    involvement_shift: float | None = None

    @classmethod
    def of(cls, before: dict[str, Any], after: dict[str, Any]) -> "_Pair":
        statuses = (before["status"], after["status"])
        if set(statuses) != {Status.SCREENED}:
            return cls(statuses)
        grade_before = grade_of(before["diagnosis"], before["severity"])
        grade_after = grade_of(after["diagnosis"], after["severity"])
        grades = None
        if grade_before is not None and grade_after is not None:
            grades = (grade_before, grade_after)
        return cls(
            statuses,
            grades,
            _shift(before["p_infected"], after["p_infected"]),
            _shift(before["involvement"], after["involvement"]),
        )

    @property
    def is_flip(self) -> bool:
        return self.grades is not None and self.grades[0] != self.grades[1]


def _shift(before: float | None, after: float | None) -> float | None:
    if before is None or after is None:
        return None
    return float(after - before)


def _count(comparison: Comparison, pair: _Pair) -> None:
    comparison.statuses[pair.statuses] += 1
    if pair.grades is not None:
        comparison.grades[pair.grades] += 1
    if pair.p_shift is not None:
        comparison.p_shift.append(pair.p_shift)
    if pair.involvement_shift is not None:
        comparison.involvement_shift.append(pair.involvement_shift)
