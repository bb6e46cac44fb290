"""The losses of both phases: focal Tversky (Section II-E) and the joint loss (Eq. 8).

Both are ratios of sums. A ratio does not average over data-parallel ranks, so the sums come first, as functions of
their own, and ``reduce`` (identity by default) adds them up over ranks before the division.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

Reduce = Callable[[Tensor], Tensor]


def _identity(sums: Tensor) -> Tensor:
    return sums


@dataclass(frozen=True, kw_only=True)
class FocalTverskyConfig:
    """Choice: weight 0.7 on false negatives and 0.3 on false positives, exponent 3/4, smoothing 1 (as the paper's
    reference has them).
    """

    false_negative_weight: float = 0.7
    false_positive_weight: float = 0.3
    exponent: float = 0.75
    smooth: float = 1.0


def overlap_sums(logits: Tensor, lesion_mask: Tensor) -> Tensor:
    """(TP, FN, FP) as sums of probabilities over the batch, shape (3,). logits, lesion_mask: (B, 1, H, W)."""
    p, truth = torch.sigmoid(logits.float()), lesion_mask.float()
    tp = (p * truth).sum()
    return torch.stack([tp, truth.sum() - tp, p.sum() - tp])


def focal_tversky_loss(
    logits: Tensor,
    lesion_mask: Tensor,
    config: FocalTverskyConfig | None = None,
    reduce: Reduce = _identity,
) -> Tensor:
    """(1 - TI)^exponent with the Tversky index TI over the whole batch, a scalar.

    Choice: summed over the batch, since a slice without lesion would read 0.996 at p = 0.0025. 1 - TI is held above
    1e-6: with an exponent below 1 a perfect slice would give a NaN gradient.
    """
    config = config or FocalTverskyConfig()
    tp, fn, fp = reduce(overlap_sums(logits, lesion_mask)).unbind()
    weighted = config.false_negative_weight * fn + config.false_positive_weight * fp
    index = (tp + config.smooth) / (tp + weighted + config.smooth)
    return (1 - index).clamp(min=1e-6) ** config.exponent


def joint_loss(
    infected_logits: Tensor,
    severe_logits: Tensor,
    is_infected: Tensor,
    is_severe: Tensor,
    reduce: Reduce = _identity,
) -> Tensor:
    """Diagnosis loss over all volumes plus severity loss over the infected ones (Eq. 8), a scalar. All inputs: (B,).

    A batch without infected volumes contributes 0 to the severity term and keeps it in the graph.
    """
    infected, severe = is_infected.float(), is_severe.float()
    diagnosis = F.binary_cross_entropy_with_logits(infected_logits.float(), infected, reduction="none")
    severity = F.binary_cross_entropy_with_logits(severe_logits.float(), severe, reduction="none")
    sums = torch.stack([diagnosis.sum(), torch.ones_like(diagnosis).sum(), (infected * severity).sum(), infected.sum()])
    diagnosis_sum, num_volumes, severity_sum, num_infected = reduce(sums).unbind()
    return diagnosis_sum / num_volumes + severity_sum / num_infected.clamp(min=1)
