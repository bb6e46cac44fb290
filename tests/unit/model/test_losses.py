"""Focal Tversky, cross-entropy plus Dice and the joint loss (Eq. 8) against hand-worked values and
identities.
"""

import math

import pytest
import torch
from monai.losses import TverskyLoss

from covtanet.model.losses import (
    CrossEntropyDiceConfig,
    FocalTverskyConfig,
    JointLossConfig,
    cross_entropy_dice,
    cross_entropy_dice_sums,
    focal_tversky,
    focal_tversky_loss,
    joint_loss,
    joint_sums,
    loss_terms,
    overlap_sums,
)

NORMAL, INFECTED = 0.0, 1.0


def logits_of(*probabilities: float) -> torch.Tensor:
    return torch.logit(torch.tensor(probabilities))


def test_overlap_sums_by_hand() -> None:
    logits = logits_of(0.9, 0.2, 0.6, 0.1).view(1, 1, 2, 2)
    mask = torch.tensor([1.0, 1.0, 0.0, 0.0]).view(1, 1, 2, 2)
    assert overlap_sums(logits, mask).tolist() == pytest.approx([1.1, 0.9, 0.7])


def test_focal_tversky_by_hand() -> None:
    logits = logits_of(0.9, 0.2, 0.6, 0.1).view(1, 1, 2, 2)
    mask = torch.tensor([1.0, 1.0, 0.0, 0.0]).view(1, 1, 2, 2)
    index = (1.1 + 1) / (1.1 + 0.7 * 0.9 + 0.3 * 0.7 + 1)
    assert float(focal_tversky_loss(logits, mask)) == pytest.approx((1 - index) ** 0.75, rel=1e-5)


def test_exponent_one_is_tversky_of_an_independent_library() -> None:
    """MONAI names the weights the other way round: its alpha is that of false positives."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(4, 1, 16, 16, generator=generator)
    mask = (torch.rand(4, 1, 16, 16, generator=generator) > 0.7).float()
    theirs = TverskyLoss(
        sigmoid=True, alpha=0.3, beta=0.7, smooth_nr=1.0, smooth_dr=1.0, batch=True
    )(logits, mask)
    ours = focal_tversky_loss(logits, mask, FocalTverskyConfig(exponent=1.0))
    assert float(ours) == pytest.approx(float(theirs), abs=1e-6)


def test_missed_lesion_costs_more_than_false_alarm() -> None:
    mask = torch.tensor([1.0, 1.0, 0.0, 0.0]).view(1, 1, 2, 2)
    missed = logits_of(0.99, 0.01, 0.01, 0.01).view(1, 1, 2, 2)
    alarm = logits_of(0.99, 0.99, 0.99, 0.01).view(1, 1, 2, 2)
    assert float(focal_tversky_loss(missed, mask)) > float(focal_tversky_loss(alarm, mask))


@pytest.mark.parametrize("value", [-200.0, 0.0, 200.0])
def test_empty_mask_gives_finite_loss_and_gradient(value: float) -> None:
    """A perfect empty slice has 1 - TI = 0, where the power's own slope is infinite."""
    logits = torch.full((2, 1, 8, 8), value, requires_grad=True)
    loss = focal_tversky_loss(logits, torch.zeros(2, 1, 8, 8))
    loss.backward()
    assert logits.grad is not None
    assert math.isfinite(float(loss.detach()))
    assert torch.isfinite(logits.grad).all()


def test_joint_loss_by_hand() -> None:
    loss = joint_loss(
        logits_of(0.8, 0.3), logits_of(0.6, 0.9), torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0])
    )
    assert float(loss) == pytest.approx(
        -(math.log(0.8) + math.log(0.7)) / 2 - math.log(0.6), rel=1e-5
    )


def test_joint_loss_ignores_severity_of_normal_volumes() -> None:
    """Eq. 8 with y_d = 0."""
    infected = torch.tensor([INFECTED, NORMAL])
    losses = [
        float(
            joint_loss(logits_of(0.8, 0.3), logits_of(0.6, p), infected, torch.tensor([1.0, truth]))
        )
        for p, truth in ((0.1, 0.0), (0.9, 0.0), (0.9, 1.0))
    ]
    assert losses[0] == losses[1] == losses[2]


def test_batch_without_infected_volumes_is_finite_and_keeps_severity_in_the_graph() -> None:
    severe = torch.zeros(3, requires_grad=True)
    loss = joint_loss(torch.zeros(3), severe, torch.zeros(3), torch.zeros(3))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(math.log(2))
    assert severe.grad is not None
    assert severe.grad.tolist() == [0.0, 0.0, 0.0]


def test_loss_of_added_sums_is_that_of_the_joined_batch() -> None:
    """What micro-batches and ranks rely on."""
    generator = torch.Generator().manual_seed(1)
    logits, mask = (
        torch.randn(4, 1, 8, 8, generator=generator),
        torch.rand(4, 1, 8, 8, generator=generator) > 0.5,
    )
    added = overlap_sums(logits[:2], mask[:2]) + overlap_sums(logits[2:], mask[2:])
    assert float(focal_tversky(added)) == pytest.approx(float(focal_tversky_loss(logits, mask)))


def test_weight_of_the_positive_class_counts_for_positives_alone() -> None:
    weighted = JointLossConfig(infected_weight=3.0)
    logits, zeros = logits_of(0.8, 0.3), torch.zeros(2)
    truth = torch.tensor([INFECTED, NORMAL])
    found = joint_sums(logits, zeros, truth, zeros, weighted)
    assert found[:2].tolist() == pytest.approx([-3 * math.log(0.8) - math.log(0.7), 2.0], rel=1e-5)


# Two slices of two pixels: lesion on the first pixel of the first slice only.
TWO_SLICES = torch.tensor([1.0, 0.0, 0.0, 0.0]).view(2, 1, 1, 2)
# Cross-entropy -log(0.8), -log(0.6), -log(0.9) and -log(0.5).
CROSS_ENTROPY = -math.log(0.8 * 0.6 * 0.9 * 0.5)


def test_cross_entropy_dice_sums_by_hand() -> None:
    """Dice of the slices with a smoothing of 1: (1.6 + 1) / (1 + 1.2 + 1) and 1 / (0.6 + 1)."""
    logits = logits_of(0.8, 0.4, 0.1, 0.5).view(2, 1, 1, 2)
    sums = cross_entropy_dice_sums(logits, TWO_SLICES, 1.0)
    slice_dice = 2.6 / 3.2 + 1 / 1.6
    expected = [CROSS_ENTROPY, 4, slice_dice, 2, 0.8, 1, 1.8]
    assert sums.tolist() == pytest.approx(expected, rel=1e-5)


def test_cross_entropy_dice_by_hand() -> None:
    """Dice of the step: (1.6 + 1) / (1 + 1.8 + 1)."""
    config = CrossEntropyDiceConfig(
        cross_entropy_weight=2, slice_dice_weight=3, step_dice_weight=5, smooth=1
    )
    sums = torch.tensor([CROSS_ENTROPY, 4, 2.6 / 3.2 + 1 / 1.6, 2, 0.8, 1, 1.8])
    mean_slice_dice = (2.6 / 3.2 + 1 / 1.6) / 2
    expected = 2 * CROSS_ENTROPY / 4 + 3 * (1 - mean_slice_dice) + 5 * (1 - 2.6 / 3.8)
    assert float(cross_entropy_dice(sums, config)) == pytest.approx(expected, rel=1e-5)


def test_cross_entropy_dice_of_a_perfect_map_is_zero() -> None:
    logits = (TWO_SLICES * 2 - 1) * 100
    terms = loss_terms(CrossEntropyDiceConfig())
    assert float(terms.loss(terms.sums(logits, TWO_SLICES))) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("config", [FocalTverskyConfig(), CrossEntropyDiceConfig()])
def test_sums_of_micro_batches_add_up_to_those_of_the_batch(
    config: FocalTverskyConfig | CrossEntropyDiceConfig,
) -> None:
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(4, 1, 8, 8, generator=generator)
    mask = (torch.rand(4, 1, 8, 8, generator=generator) > 0.7).float()
    terms = loss_terms(config)
    parts = terms.sums(logits[:1], mask[:1]) + terms.sums(logits[1:], mask[1:])
    whole = terms.sums(logits, mask)
    assert whole.shape == (terms.num_sums,)
    assert torch.allclose(parts, whole, rtol=1e-5)
