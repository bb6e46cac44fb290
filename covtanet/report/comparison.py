"""Two ledgers of one archive side by side, as before a promotion: flips, shifts, agreement."""

from collections import Counter
from dataclasses import dataclass, field
from html import escape
from typing import Any

import numpy as np
import pyarrow as pa
from sklearn.metrics import cohen_kappa_score

from covtanet.report.summary import table

GRADES = ("normal", "mild", "severe")
MAX_LISTED = 200


@dataclass(kw_only=True)
class Comparison:
    """What changes from one ledger to the other.

    grades: how often (before, after), of series that both screened. flips: (series_key, before, after), the largest
    change of probability first. p_shift: differences of p_infected. involvement_shift: of involvement. failures: series
    that met a fault of this software, and are in no other count.
    """

    only_before: int = 0
    only_after: int = 0
    statuses: Counter[tuple[str, str]] = field(default_factory=Counter)
    grades: Counter[tuple[str, str]] = field(default_factory=Counter)
    flips: list[tuple[str, str, str]] = field(default_factory=list)
    p_shift: list[float] = field(default_factory=list)
    involvement_shift: list[float] = field(default_factory=list)
    failures: dict[str, Exception] = field(default_factory=dict)

    @property
    def num_compared(self) -> int:
        """Series that both screened."""
        return self.grades.total()

    @property
    def kappa(self) -> float | None:
        """Cohen's kappa of the grades, null where there is one grade only."""
        pairs = list(self.grades.elements())
        if len({grade for pair in pairs for grade in pair}) < 2:
            return None
        before, after = zip(*pairs, strict=True)
        return float(cohen_kappa_score(before, after, labels=GRADES))

    def rows(self) -> list[tuple[str, str]]:
        """Names and values, as a table has them."""
        agree = sum(count for (before, after), count in self.grades.items() if before == after)
        found = [
            ("series in one ledger only", f"{self.only_before} before, {self.only_after} after"),
            *([("not compared, see the log", str(len(self.failures)))] if self.failures else []),
            ("screened by both", str(self.num_compared)),
            *(
                (f"status {before} to {after}", str(count))
                for (before, after), count in sorted(self.statuses.items())
                if before != after
            ),
            ("same grade", f"{agree} / {self.num_compared}"),
            ("Cohen's kappa of the grades", "-" if self.kappa is None else f"{self.kappa:.3f}"),
            *(
                (f"{before} to {after}", str(count))
                for (before, after), count in sorted(self.grades.items())
                if before != after
            ),
        ]
        for name, values in (("p_infected", self.p_shift), ("involvement", self.involvement_shift)):
            if values:
                found.append(
                    (
                        f"{name} shifts, mean (largest)",
                        f"{np.mean(values):+.3f} ({_largest(values):+.3f})",
                    )
                )
        return found

    def as_table(self, title: str) -> str:
        """Plain text."""
        return table(title, self.rows())

    def as_html(self, title: str) -> str:
        """One page, with the series that change their grade."""
        lines = "".join(
            f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>"
            for name, value in self.rows()
        )
        flips = "".join(
            f"<tr><td><code>{escape(key)}</code></td><td>{escape(before)}</td><td>{escape(after)}</td></tr>"
            for key, before, after in self.flips[:MAX_LISTED]
        )
        return (
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
            "<style>:root{color-scheme:light dark}body{font:15px/1.45 system-ui,sans-serif;margin:1.5rem}"
            "th,td{text-align:left;padding:.2rem .8rem;border-bottom:1px solid #8886}</style>"
            f"<h1>{escape(title)}</h1><p><strong>Research use only. Not a medical device.</strong></p>"
            f"<table>{lines}</table><h2>Series that change their grade: {len(self.flips)}</h2>"
            f"<table><tr><th>series</th><th>before</th><th>after</th></tr>{flips}</table></html>"
        )


def _largest(values: list[float]) -> float:
    return max(values, key=abs)


def compare(before: pa.Table, after: pa.Table) -> Comparison:
    """Compare two ledgers by series key."""
    one, other = ({row["series_key"]: row for row in each.to_pylist()} for each in (before, after))
    found = Comparison(
        only_before=len(one.keys() - other.keys()), only_after=len(other.keys() - one.keys())
    )
    flips: list[tuple[float, str, str, str]] = []
    for key in sorted(one.keys() & other.keys()):
        try:
            pair = _Pair.of(one[key], other[key])
        except Exception as error:  # of one series; the others go on
            found.failures[key] = error
        else:
            _add(found, flips, key, pair)
    found.flips = [
        (key, left, right) for _, key, left, right in sorted(flips, key=lambda flip: -flip[0])
    ]
    return found


@dataclass(frozen=True)
class _Pair:
    """What one series' two rows say; null if either was not screened, or says nothing."""

    statuses: tuple[str, str]
    grades: tuple[str, str] | None = None
    p_shift: float | None = None
    involvement_shift: float | None = None

    @classmethod
    def of(cls, left: dict[str, Any], right: dict[str, Any]) -> "_Pair":
        statuses = (left["status"], right["status"])
        if set(statuses) != {"screened"}:
            return cls(statuses)
        before, after = _grade(left), _grade(right)
        grades = (before, after) if before is not None and after is not None else None
        return cls(
            statuses, grades, _shift(left, right, "p_infected"), _shift(left, right, "involvement")
        )


def _add(
    found: Comparison, flips: list[tuple[float, str, str, str]], key: str, pair: _Pair
) -> None:
    found.statuses[pair.statuses] += 1
    if pair.p_shift is not None:
        found.p_shift.append(pair.p_shift)
    if pair.involvement_shift is not None:
        found.involvement_shift.append(pair.involvement_shift)
    if pair.grades is not None:
        found.grades[pair.grades] += 1
        if pair.grades[0] != pair.grades[1]:
            flips.append((abs(pair.p_shift or 0.0), key, *pair.grades))


def _grade(row: dict[str, Any]) -> str | None:
    return "normal" if row["diagnosis"] == "normal" else row["severity"]


def _shift(left: dict[str, Any], right: dict[str, Any], name: str) -> float | None:
    if left[name] is None or right[name] is None:
        return None
    return float(right[name] - left[name])
