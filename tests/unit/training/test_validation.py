"""Validation of phase 1: pooled metrics, and the mean Dice per volume that chooses the epoch."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from covtanet.model.losses import FocalTverskyConfig
from covtanet.training.feed import Sampling
from covtanet.training.phase1 import phase1
from covtanet.training.phase_config import PhaseConfig
from covtanet.training.pool import SamplePool
from covtanet.training.ranks import Ranks


class BrightIsLesion(nn.Module):
    """Marks pixels above one half."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.tensor(-0.5))

    def forward(self, slices: Tensor) -> Tensor:
        return slices + self.bias


def validate(levels: dict[str, list[int]], lesion: dict[str, list[int]]) -> dict[str, float]:
    """Validate rows of pixels 0 or 1, by name."""
    shape = (len(levels), 1, -1)
    rows = {
        "name": np.array(list(levels)),
        "has_lesion": np.ones(len(levels), bool),
        "levels": np.array(list(levels.values()), np.uint16).reshape(shape) * np.uint16(65535),
        "lesion": np.array(list(lesion.values()), np.uint8).reshape(shape),
    }
    lane = SamplePool(rows, Sampling(batch_size=2)).lane()
    module = BrightIsLesion()
    phase = phase1(module, module, PhaseConfig(), FocalTverskyConfig(), [lane], Ranks())
    metrics = phase.validate()
    assert phase.score(metrics) == pytest.approx(metrics["val_volume_dice"], nan_ok=True)
    return metrics


def test_score_is_the_mean_dice_of_volumes_whose_slices_lie_in_several_batches() -> None:
    """a: TP 1, FP 1, FN 0 over three slices, 2/3. b: TP 6, FP 0, FN 2, 12/14. c: no lesion."""
    empty = [0, 0, 0, 0]
    predicted = {
        "a:00000": [1, 0, 0, 0],
        "a:00001": [0, 1, 0, 0],
        "a:00002": empty,
        "b:00000": [1, 1, 1, 0],
        "b:00001": [1, 1, 1, 0],
        "c:00000": empty,
    }
    truth = {
        "a:00000": [1, 0, 0, 0],
        "a:00001": empty,
        "a:00002": empty,
        "b:00000": [1, 1, 1, 1],
        "b:00001": [1, 1, 1, 1],
        "c:00000": empty,
    }
    metrics = validate(predicted, truth)
    assert metrics["val_volume_dice"] == pytest.approx((2 / 3 + 12 / 14) / 2)
    # Pooled: TP 7, FP 1, FN 2.
    assert metrics["val_dice"] == pytest.approx(14 / 17)


def test_score_without_any_lesion_is_nan() -> None:
    metrics = validate({"a:00000": [0, 0]}, {"a:00000": [0, 0]})
    assert math.isnan(metrics["val_volume_dice"])
