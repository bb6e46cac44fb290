"""Counts first, then the figures that follow from them. A figure without its denominator is nan, never 0."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Counts:
    """True and false positives and negatives."""

    tp: float
    fp: float
    fn: float
    tn: float

    @property
    def dice(self) -> float:
        """2 TP / (2 TP + FP + FN)."""
        return _ratio(2 * self.tp, 2 * self.tp + self.fp + self.fn)

    @property
    def iou(self) -> float:
        """TP / (TP + FP + FN)."""
        return _ratio(self.tp, self.tp + self.fp + self.fn)

    @property
    def sensitivity(self) -> float:
        """TP / (TP + FN)."""
        return _ratio(self.tp, self.tp + self.fn)

    @property
    def specificity(self) -> float:
        """TN / (TN + FP)."""
        return _ratio(self.tn, self.tn + self.fp)

    @property
    def accuracy(self) -> float:
        """(TP + TN) / all."""
        return _ratio(self.tp + self.tn, self.tp + self.fp + self.fn + self.tn)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")


def count(predicted: Tensor, truth: Tensor, where: Tensor | None = None) -> Tensor:
    """(TP, FP, FN, TN) as float64, shape (4,), over the elements ``where`` holds. All inputs: bool, one shape."""
    where = torch.ones_like(predicted) if where is None else where
    pairs = ((predicted & truth), (predicted & ~truth), (~predicted & truth), (~predicted & ~truth))
    return torch.stack([(pair & where).sum() for pair in pairs]).double()


def counts_of(sums: Tensor) -> Counts:
    """The inverse view of ``count``."""
    return Counts(*sums.tolist())
