"""Neighbours in z of slices in memory, which the network reads as further channels. numpy only."""

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from covtanet.training.feed import series_of

# Largest distance of a neighbour in training, in slices that were read. Screening's are adjacent,
# but as far apart as the scanner's slices are thick.
FARTHEST_NEIGHBOUR = 3
# Share of training samples whose neighbours are copies of the slice itself, since screening repeats
# a slice that has no neighbours.
REPEAT_SHARE = 0.15


class Neighbours:
    """Slice below, slice itself and slice above, as indices of rows that are sorted by name.

    names: SERIES:SLICE. single: series whose slices have no neighbours; such a slice is repeated,
    as are the outermost slices of the others.
    """

    def __init__(self, names: Sequence[str], single: Collection[str] = ()) -> None:
        series = np.array([series_of(name) for name in names])
        _, starts, inverse, counts = np.unique(
            series, return_index=True, return_inverse=True, return_counts=True
        )
        is_single = np.isin(series, list(single))
        rows = np.arange(len(series))
        # (N,), the outermost slices of each slice's series.
        self.first = np.where(is_single, rows, starts[inverse])
        self.last = np.where(is_single, rows, (starts + counts - 1)[inverse])

    def adjacent(self, middle: NDArray[np.intp]) -> NDArray[np.intp]:
        """Return the rows of adjacent slices, (B, 3), as in screening."""
        return self._at(middle, np.ones(len(middle), np.intp))

    def draw(self, middle: NDArray[np.intp], generator: np.random.Generator) -> NDArray[np.intp]:
        """Draw the rows of neighbours at one distance on both sides, (B, 3)."""
        count = len(middle)
        distance = generator.integers(1, FARTHEST_NEIGHBOUR, count, endpoint=True)
        distance[generator.random(count) < REPEAT_SHARE] = 0
        # A volume may be read from either end.
        distance[generator.random(count) < 0.5] *= -1
        return self._at(middle, distance)

    def _at(self, middle: NDArray[np.intp], distance: NDArray[np.intp]) -> NDArray[np.intp]:
        rows = np.stack([middle - distance, middle, middle + distance], 1)
        inside: NDArray[np.intp] = rows.clip(self.first[middle, None], self.last[middle, None])
        return inside
