"""True and false positives and negatives, and the metrics that follow from them."""

from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

Number = TypeVar("Number", int, float, NDArray[np.float64])


@dataclass(frozen=True)
class Counts(Generic[Number]):
    """Numbers of true positives, false positives, false negatives and true negatives.

    All are numbers, or arrays of one shape.
    """

    tp: Number
    fp: Number
    fn: Number
    tn: Number

    def fractions(self) -> dict[str, tuple[Number, Number]]:
        """Return numerator and denominator of every metric by its name.

        The caller decides what a metric without denominator is: NaN or null, never 0.
        """
        overlap = self.tp + self.fp + self.fn
        return {
            "dice": (2 * self.tp, self.tp + overlap),
            "iou": (self.tp, overlap),
            "sensitivity": (self.tp, self.tp + self.fn),
            "precision": (self.tp, self.tp + self.fp),
            "specificity": (self.tn, self.tn + self.fp),
            "accuracy": (self.tp + self.tn, overlap + self.tn),
        }
