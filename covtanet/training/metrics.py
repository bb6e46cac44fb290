"""Metrics of a validation: counts first, then the ratios. A metric without denominator is NaN."""

import math

import torch
from torch import Tensor

from covtanet.data.counts import Counts


def count(predicted: Tensor, truth: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return (TP, FP, FN, TN) as float64, shape (4,).

    predicted, truth: bool of one shape. mask: elements that count; all of them by default.
    """
    mask = torch.ones_like(predicted) if mask is None else mask
    pairs = (predicted & truth, predicted & ~truth, ~predicted & truth, ~predicted & ~truth)
    return torch.stack([(pair & mask).sum() for pair in pairs]).double()


def count_samples(predicted: Tensor, truth: Tensor) -> Tensor:
    """Return (TP, FP, FN, TN) of every sample of a batch as float64, shape (B, 4).

    predicted, truth: bool (B, ...) of one shape.
    """
    pairs = (predicted & truth, predicted & ~truth, ~predicted & truth, ~predicted & ~truth)
    return torch.stack([pair.flatten(1).sum(1) for pair in pairs], 1).double()


def metrics_of(sums: Tensor) -> dict[str, float]:
    """Return every metric of summed ``count`` results (4,)."""
    tp, fp, fn, tn = sums.tolist()
    fractions = Counts(tp, fp, fn, tn).fractions()
    return {name: _ratio(part, whole) for name, (part, whole) in fractions.items()}


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
