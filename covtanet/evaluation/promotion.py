"""Promotion: a challenger may replace the champion if no headline metric is worse by its margin."""

from collections.abc import Mapping
from dataclasses import dataclass


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

    @property
    def is_no_worse(self) -> bool:
        """Whether the challenger holds this metric."""
        if self.champion is None:
            return True
        return self.challenger is not None and self.challenger >= self.champion - self.margin

    def __str__(self) -> str:
        verdict = "no worse" if self.is_no_worse else "worse"
        values = f"{_text(self.challenger)} against {_text(self.champion)}"
        return f"{values}, margin {self.margin:g}: {verdict}"


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def compare(
    challenger: Mapping[str, float], champion: Mapping[str, float], margins: Margins
) -> list[Comparison]:
    """Compare metric by metric, by the names of ``metrics.headline``."""
    names = list(dict.fromkeys([*champion, *challenger]))
    return [
        Comparison(
            metric=name,
            challenger=challenger.get(name),
            champion=champion.get(name),
            margin=margins.of(name),
        )
        for name in names
    ]
