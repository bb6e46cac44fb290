"""The losses of both phases: focal Tversky (II-E), cross-entropy plus Dice, joint loss (Eq. 8).

All are ratios of sums. A ratio does not average over micro-batches or data-parallel ranks, so each
loss has two functions: the sums of one micro-batch, and the loss of sums added up over all of them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class FocalTverskyConfig:
    """Parameters of the focal Tversky loss.

    Choice: all values, which are those of the paper's reference for this loss.
    """

    false_negative_weight: float = 0.7
    """Weight of lesion pixels that are missed."""
    false_positive_weight: float = 0.3
    """Weight of pixels that are marked without lesion."""
    exponent: float = 0.75
    """Exponent of 1 minus the Tversky index; below 1 it keeps the slope of easy lesions."""
    smooth: float = 1.0
    """Added to both sides of the ratio, in pixels."""


@dataclass(frozen=True, kw_only=True)
class CrossEntropyDiceConfig:
    """Weights of cross-entropy, Dice per slice and Dice per step.

    Choice: 2, 0.5 and 0.5. The paper's focal Tversky loss pools the batch: a slice with 40 lesion
    pixels hardly counts against one with 3,000, and small lesions are missed.
    """

    cross_entropy_weight: float = 2.0
    """Weight of the mean cross-entropy of all pixels."""
    slice_dice_weight: float = 0.5
    """Weight of 1 - mean Dice of the slices."""
    step_dice_weight: float = 0.5
    """Weight of 1 - Dice of all pixels of a step."""
    smooth: float = 10.0
    """Added to both sides of each Dice, in pixels: an empty slice without prediction gives 1."""


@dataclass(frozen=True, kw_only=True)
class LossTerms:
    """A segmentation loss in two steps."""

    num_sums: int
    sums: Callable[[Tensor, Tensor], Tensor]
    """Map logits and lesion masks of a micro-batch to sums, (num_sums,)."""
    loss: Callable[[Tensor], Tensor]
    """Map the sums of all micro-batches, added up, to a scalar."""


@dataclass(frozen=True, kw_only=True)
class JointLossConfig:
    """Weights of the positive class in Eq. 8.

    Choice: 1, since the paper names no balance of classes.
    """

    infected_weight: float = 1.0
    """Weight of infected volumes in the diagnosis loss."""
    severe_weight: float = 1.0
    """Weight of severe volumes in the severity loss."""


def overlap_sums(logits: Tensor, lesion_mask: Tensor) -> Tensor:
    """Return TP, FN and FP as sums of probabilities over the batch, (3,).

    logits, lesion_mask: (B, 1, H, W).
    """
    p = torch.sigmoid(logits.float())
    truth = lesion_mask.float()
    tp = (p * truth).sum()
    # FN = lesion pixels - TP, FP = sum of probabilities - TP.
    return torch.stack([tp, truth.sum() - tp, p.sum() - tp])


def focal_tversky(sums: Tensor, config: FocalTverskyConfig | None = None) -> Tensor:
    """Return (1 - TI)^exponent with the Tversky index TI, a scalar.

    sums: TP, FN, FP over the whole batch. Choice: summed over the batch, since a slice without
    lesion would read 0.996 at p = 0.0025. 1 - TI is held above 1e-6: with an exponent below 1 a
    perfect slice would give a NaN gradient.
    """
    config = config or FocalTverskyConfig()
    tp, fn, fp = sums.unbind()
    # TI = TP / (TP + 0.7 FN + 0.3 FP) with the default weights.
    weighted = config.false_negative_weight * fn + config.false_positive_weight * fp
    index = (tp + config.smooth) / (tp + weighted + config.smooth)
    return (1 - index).clamp(min=1e-6) ** config.exponent


def focal_tversky_loss(
    logits: Tensor, lesion_mask: Tensor, config: FocalTverskyConfig | None = None
) -> Tensor:
    """Return the focal Tversky loss of one batch, a scalar. logits, lesion_mask: (B, 1, H, W)."""
    return focal_tversky(overlap_sums(logits, lesion_mask), config)


def cross_entropy_dice_sums(logits: Tensor, lesion_mask: Tensor, smooth: float) -> Tensor:
    """Return the sums of a micro-batch, (7,). logits, lesion_mask: (B, 1, H, W).

    The sums are cross-entropy, pixels, Dice of the slices, slices, TP, lesion pixels and sum of
    probabilities.
    """
    logits = logits.float()
    truth = lesion_mask.float()
    # A sum, not a mean: it is divided by the pixels of all micro-batches later.
    cross_entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="sum")
    p = torch.sigmoid(logits)
    # One number per slice, (B,), for the Dice of the slices.
    tp = (p * truth).sum((1, 2, 3))
    lesion = truth.sum((1, 2, 3))
    predicted = p.sum((1, 2, 3))
    slice_dice = (2 * tp + smooth) / (lesion + predicted + smooth)
    # Counts travel with the sums, so that ranks with other numbers of slices can be added up.
    num_pixels = torch.full_like(cross_entropy, float(logits.numel()))
    num_slices = torch.full_like(cross_entropy, float(len(logits)))
    pixel_sums = [tp.sum(), lesion.sum(), predicted.sum()]
    return torch.stack([cross_entropy, num_pixels, slice_dice.sum(), num_slices, *pixel_sums])


def cross_entropy_dice(sums: Tensor, config: CrossEntropyDiceConfig) -> Tensor:
    """Return the weighted sum of three terms, a scalar.

    The terms are the mean cross-entropy, 1 - mean Dice of the slices, and 1 - Dice of the step.
    sums: of ``cross_entropy_dice_sums``, over the whole batch.
    """
    cross_entropy, num_pixels, slice_dice, num_slices, tp, lesion, predicted = sums.unbind()
    # Dice of the step pools the pixels of all slices.
    step_dice = (2 * tp + config.smooth) / (lesion + predicted + config.smooth)
    return (
        config.cross_entropy_weight * cross_entropy / num_pixels
        + config.slice_dice_weight * (1 - slice_dice / num_slices)
        + config.step_dice_weight * (1 - step_dice)
    )


def loss_terms(config: FocalTverskyConfig | CrossEntropyDiceConfig) -> LossTerms:
    """Return the two steps of the loss that a configuration describes."""
    if isinstance(config, FocalTverskyConfig):
        return LossTerms(
            num_sums=3, sums=overlap_sums, loss=lambda sums: focal_tversky(sums, config)
        )
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
    """Return diagnosis loss, M, severity loss of the infected and M_I of the batch, (4,).

    M is the number of volumes, M_I of the infected ones. All inputs: (B,).
    """
    config = config or JointLossConfig()
    infected = is_infected.float()
    severe = is_severe.float()
    # (B,), a loss for each volume.
    diagnosis = _cross_entropy(infected_logits, infected, config.infected_weight)
    severity = _cross_entropy(severe_logits, severe, config.severe_weight)
    return torch.stack(
        [
            diagnosis.sum(),
            torch.ones_like(diagnosis).sum(),
            # Severity is learned from infected volumes only.
            (infected * severity).sum(),
            infected.sum(),
        ]
    )


def joint(sums: Tensor) -> Tensor:
    """Return the mean diagnosis loss plus the mean severity loss of the infected (Eq. 8), a scalar.

    A batch without infected volumes contributes 0 to the severity term and keeps it in the graph.
    """
    diagnosis_sum, num_volumes, severity_sum, num_infected = sums.unbind()
    # The clamp divides by 1 if no volume is infected; the numerator is 0 then.
    return diagnosis_sum / num_volumes + severity_sum / num_infected.clamp(min=1)


def joint_loss(
    infected_logits: Tensor, severe_logits: Tensor, is_infected: Tensor, is_severe: Tensor
) -> Tensor:
    """Return the joint loss of one batch, a scalar. All inputs: (B,)."""
    return joint(joint_sums(infected_logits, severe_logits, is_infected, is_severe))


def _cross_entropy(logits: Tensor, truth: Tensor, positive_weight: float) -> Tensor:
    weight = torch.full_like(truth, positive_weight)
    return F.binary_cross_entropy_with_logits(
        logits.float(), truth, reduction="none", pos_weight=weight
    )
