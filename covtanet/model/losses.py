"""The losses of both phases: focal Tversky (Section II-E), cross-entropy plus Dice, the joint loss (Eq. 8).

All are ratios of sums. A ratio does not average over micro-batches or data-parallel ranks, so each comes in two
functions: the sums of one micro-batch, and the loss of sums that were added up over all of them.
"""

from collections.abc import Callable
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
class CrossEntropyDiceConfig:
    """Weights of cross-entropy, Dice per slice and Dice per step.

    Choice: 2, 0.5 and 0.5. The paper has focal Tversky alone, which pools the batch: a slice with 40
    lesion pixels beside one with 3,000 has no say in it, and small lesions are then missed.
    """

    cross_entropy_weight: float = 2.0
    slice_dice_weight: float = 0.5
    step_dice_weight: float = 0.5
    smooth: float = 10.0
    """Added to both sides of each Dice, in pixels: an empty slice found empty is 1, not 0 / 0."""


@dataclass(frozen=True, kw_only=True)
class LossTerms:
    """A segmentation loss in two steps: ``sums`` of a micro-batch, ``loss`` of the added-up sums."""

    num_sums: int
    sums: Callable[[Tensor, Tensor], Tensor]
    loss: Callable[[Tensor], Tensor]


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


def cross_entropy_dice_sums(logits: Tensor, lesion_mask: Tensor, smooth: float) -> Tensor:
    """Sums of a micro-batch, shape (7,). logits, lesion_mask: (B, 1, H, W).

    Cross-entropy, pixels, Dice of the slices, slices, TP, lesion pixels, sum of probabilities.
    """
    logits, truth = logits.float(), lesion_mask.float()
    cross_entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="sum")
    p = torch.sigmoid(logits)
    tp, lesion, predicted = (part.sum((1, 2, 3)) for part in (p * truth, truth, p))
    slice_dice = (2 * tp + smooth) / (lesion + predicted + smooth)
    num_pixels = torch.full_like(cross_entropy, float(logits.numel()))
    num_slices = torch.full_like(cross_entropy, float(len(logits)))
    return torch.stack([
        cross_entropy, num_pixels, slice_dice.sum(), num_slices, tp.sum(), lesion.sum(), predicted.sum()
    ])  # fmt: skip


def cross_entropy_dice(sums: Tensor, config: CrossEntropyDiceConfig) -> Tensor:
    """Weighted sum of mean cross-entropy, 1 - mean Dice of the slices and 1 - Dice of the step, a scalar.

    sums: of ``cross_entropy_dice_sums``, over the whole batch.
    """
    cross_entropy, num_pixels, slice_dice, num_slices, tp, lesion, predicted = sums.unbind()
    step_dice = (2 * tp + config.smooth) / (lesion + predicted + config.smooth)
    return (
        config.cross_entropy_weight * cross_entropy / num_pixels
        + config.slice_dice_weight * (1 - slice_dice / num_slices)
        + config.step_dice_weight * (1 - step_dice)
    )


def loss_terms(config: FocalTverskyConfig | CrossEntropyDiceConfig) -> LossTerms:
    """Return the two steps of the loss that a configuration describes."""
    if isinstance(config, FocalTverskyConfig):
        return LossTerms(num_sums=3, sums=overlap_sums, loss=lambda sums: focal_tversky(sums, config))
    return LossTerms(
        num_sums=7,
        sums=lambda logits, mask: cross_entropy_dice_sums(logits, mask, config.smooth),
        loss=lambda sums: cross_entropy_dice(sums, config),
    )


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
