"""The losses of both phases: focal Tversky (Section II-E) and the joint loss (Eq. 8).

Both are ratios of sums. A ratio does not average over micro-batches or data-parallel ranks, so each comes in two
functions: the sums of one micro-batch, and the loss of sums that were added up over all of them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class FocalTverskyConfig:
    """Choice: weight 0.7 on false negatives and 0.3 on false positives, exponent 3/4, smoothing 1 (as the paper's
    reference has them).
    """

    false_negative_weight: float = 0.7
    false_positive_weight: float = 0.3
    exponent: float = 0.75
    smooth: float = 1.0


@dataclass(frozen=True, kw_only=True)
class JointLossConfig:
    """Weights of the positive class in Eq. 8. Choice: 1, since the paper names no balance of classes."""

    infected_weight: float = 1.0
    severe_weight: float = 1.0


def overlap_sums(logits: Tensor, lesion_mask: Tensor) -> Tensor:
    """(TP, FN, FP) as sums of probabilities over the batch, shape (3,). logits, lesion_mask: (B, 1, H, W)."""
    p, truth = torch.sigmoid(logits.float()), lesion_mask.float()
    tp = (p * truth).sum()
    return torch.stack([tp, truth.sum() - tp, p.sum() - tp])


def focal_tversky(sums: Tensor, config: FocalTverskyConfig | None = None) -> Tensor:
    """(1 - TI)^exponent with the Tversky index TI, a scalar. sums: (TP, FN, FP) over the whole batch.

    Choice: summed over the batch, since a slice without lesion would read 0.996 at p = 0.0025. 1 - TI is held above
    1e-6: with an exponent below 1 a perfect slice would give a NaN gradient.
    """
    config = config or FocalTverskyConfig()
    tp, fn, fp = sums.unbind()
    weighted = config.false_negative_weight * fn + config.false_positive_weight * fp
    index = (tp + config.smooth) / (tp + weighted + config.smooth)
    return (1 - index).clamp(min=1e-6) ** config.exponent


def focal_tversky_loss(
    logits: Tensor, lesion_mask: Tensor, config: FocalTverskyConfig | None = None
) -> Tensor:
    """Focal Tversky loss of one batch, a scalar. logits, lesion_mask: (B, 1, H, W)."""
    return focal_tversky(overlap_sums(logits, lesion_mask), config)


def joint_sums(
    infected_logits: Tensor,
    severe_logits: Tensor,
    is_infected: Tensor,
    is_severe: Tensor,
    config: JointLossConfig | None = None,
) -> Tensor:
    """(diagnosis loss, M, severity loss of the infected, M_I) summed over the batch, shape (4,). All inputs: (B,)."""
    config = config or JointLossConfig()
    infected, severe = is_infected.float(), is_severe.float()
    diagnosis = _cross_entropy(infected_logits, infected, config.infected_weight)
    severity = _cross_entropy(severe_logits, severe, config.severe_weight)
    return torch.stack(
        [
            diagnosis.sum(),
            torch.ones_like(diagnosis).sum(),
            (infected * severity).sum(),
            infected.sum(),
        ]
    )


def joint(sums: Tensor) -> Tensor:
    """Mean diagnosis loss over all volumes plus mean severity loss over the infected ones (Eq. 8), a scalar.

    A batch without infected volumes contributes 0 to the severity term and keeps it in the graph.
    """
    diagnosis_sum, num_volumes, severity_sum, num_infected = sums.unbind()
    return diagnosis_sum / num_volumes + severity_sum / num_infected.clamp(min=1)


def joint_loss(
    infected_logits: Tensor, severe_logits: Tensor, is_infected: Tensor, is_severe: Tensor
) -> Tensor:
    """The joint loss of one batch, a scalar. All inputs: (B,)."""
    return joint(joint_sums(infected_logits, severe_logits, is_infected, is_severe))


def _cross_entropy(logits: Tensor, truth: Tensor, positive_weight: float) -> Tensor:
    weight = torch.full_like(truth, positive_weight)
    return F.binary_cross_entropy_with_logits(
        logits.float(), truth, reduction="none", pos_weight=weight
    )
