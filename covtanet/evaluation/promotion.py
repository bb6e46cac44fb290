"""Whether a challenger may replace the champion: no worse in any headline figure, by stated margins."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Margins:
    """By how much a figure may be lower and still count as no worse. Choice: all of them."""

    dice: float = 0.01
    sensitivity: float = 0.02
    specificity: float = 0.02
    auc: float = 0.01

    def of(self, figure: str) -> float:
        """The margin of a headline figure, by the last part of its name."""
        return float(getattr(self, figure.rpartition("_")[2]))


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One figure of both. A figure that the champion has and the challenger lacks is worse."""

    figure: str
    challenger: float | None
    champion: float | None
    margin: float

    @property
    def is_no_worse(self) -> bool:
        """Whether the challenger holds this figure."""
        if self.champion is None:
            return True
        return self.challenger is not None and self.challenger >= self.champion - self.margin


def compare(
    challenger: Mapping[str, float], champion: Mapping[str, float], margins: Margins
) -> list[Comparison]:
    """Figure by figure, in the names of ``figures.headline``."""
    names = list(dict.fromkeys([*champion, *challenger]))
    return [
        Comparison(
            figure=name,
            challenger=challenger.get(name),
            champion=champion.get(name),
            margin=margins.of(name),
        )
        for name in names
    ]
