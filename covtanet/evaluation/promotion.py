"""Promotion: a challenger may replace the champion if no headline metric is worse by its margin.

A metric is no worse if the 95 % interval of its difference, paired over patients, ends above minus
the margin.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from covtanet.evaluation.paired import Interval


@dataclass(frozen=True, kw_only=True)
class Margins:
    """Differences by which a metric may be lower and still count as no worse. Choice: all."""

    dice: float = 0.01
    sensitivity: float = 0.02
    specificity: float = 0.02
    auc: float = 0.01

    def of(self, metric: str) -> float:
        """Return the margin of a headline metric, by the last part of its name."""
        return float(getattr(self, metric.rpartition("_")[2]))


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One metric of both models.

    A metric that the champion has and the challenger lacks is worse.
    """

    metric: str
    challenger: float | None
    champion: float | None
    margin: float
    interval: Interval | None = None
    """Of the difference; null if no resample gives both models the metric. Then the values
    themselves decide."""

    @property
    def is_worse(self) -> bool:
        """Whether the challenger's value is lower by more than the margin."""
        if self.champion is None:
            return False
        return self.challenger is None or self.challenger < self.champion - self.margin

    @property
    def is_no_worse(self) -> bool:
        """Whether the challenger is shown to hold this metric."""
        if self.is_worse:
            return False
        return self.interval is None or self.interval.low >= -self.margin

    def __str__(self) -> str:
        verdict = "worse" if self.is_worse else "not shown to be no worse"
        if self.is_no_worse:
            verdict = "no worse"
        values = f"{_text(self.challenger)} against {_text(self.champion)}"
        interval = f", {self.interval}" if self.interval else ""
        return f"{values}{interval}, margin {self.margin:g}: {verdict}"


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def compare(
    challenger: Mapping[str, float],
    champion: Mapping[str, float],
    margins: Margins,
    intervals: Mapping[str, Interval] | None = None,
) -> list[Comparison]:
    """Compare metric by metric, by the names of ``metrics.headline``.

    intervals: of the paired differences (``paired.intervals``); null compares the values alone.
    """
    names = list(dict.fromkeys([*champion, *challenger]))
    return [
        Comparison(
            metric=name,
            challenger=challenger.get(name),
            champion=champion.get(name),
            margin=margins.of(name),
            interval=(intervals or {}).get(name),
        )
        for name in names
    ]
