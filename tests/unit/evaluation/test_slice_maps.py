"""Lesion maps of a series at the source's resolution."""

import numpy as np
import torch
from torch import Tensor, nn

from covtanet.ct.lung_box import SliceBox
from covtanet.data.slice_file import GREY_STEPS, SliceFile
from covtanet.evaluation.slice_maps import (
    lung_slices_with_neighbours,
    predict_maps,
    slice_counts,
)

SIZE = 32
BOX = SliceBox(top=4, left=4, height=SIZE, width=SIZE)


def ramp(*, is_continuous: bool = True) -> SliceFile:
    """Return four slices of constant intensity 0, 1/5, 2/5 and 3/5, lungs on all but the first."""
    grey = np.zeros((4, 40, 40), np.uint8)
    grey += (np.arange(4) * GREY_STEPS // 5).astype(np.uint8)[:, None, None]
    return SliceFile(
        grey=grey,
        lesion=np.zeros(grey.shape, bool),
        inside=np.ones(grey.shape, bool),
        has_lung=np.array([False, True, True, True]),
        box=BOX,
        is_continuous=is_continuous,
    )


class LeftHalf(nn.Module):
    """Marks the left half of every slice with a probability of nearly 1."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, slices: Tensor) -> Tensor:
        logits = torch.full_like(slices[:, :1], -30.0)
        logits[..., : slices.shape[3] // 2] = 30.0
        return logits + self.weight


def channel_fifths(slices: SliceFile, channels: int) -> list[list[int]]:
    levels = lung_slices_with_neighbours(slices, SIZE, channels, 0)
    fifths: list[list[int]] = np.rint(levels[:, :, 0, 0] / 65535 * 5).astype(int).tolist()
    return fifths


def test_neighbours_are_the_adjacent_slices_and_the_last_is_repeated() -> None:
    assert channel_fifths(ramp(), 3) == [[0, 1, 2], [1, 2, 3], [2, 3, 3]]


def test_slices_that_are_not_neighbours_repeat_themselves() -> None:
    assert channel_fifths(ramp(is_continuous=False), 3) == [[1, 1, 1], [2, 2, 2], [3, 3, 3]]


def test_single_channel_has_no_neighbours() -> None:
    assert channel_fifths(ramp(), 1) == [[1], [2], [3]]


def test_flipped_maps_are_the_mean_of_four_views() -> None:
    """Half of the four views mark the left half, the others the right half."""
    maps = predict_maps(LeftHalf(), ramp(), SIZE, 1, 0)
    assert maps.single.shape == (3, 40, 40)
    assert np.allclose(maps.single[:, 4:36, 4:20], 1)
    assert np.allclose(maps.single[:, 4:36, 20:36], 0)
    assert np.allclose(maps.flipped[:, 4:36, 4:36], 0.5)


def test_maps_are_zero_outside_the_box() -> None:
    maps = predict_maps(LeftHalf(), ramp(), SIZE, 1, 0)
    outside = np.ones((40, 40), bool)
    outside[4:36, 4:36] = False
    assert not maps.flipped[:, outside].any()


def test_counts_at_two_thresholds_by_hand() -> None:
    """At 0.3 three pixels are marked, two of them lesion; at 0.7 one, which is lesion."""
    probabilities = torch.tensor([[[0.8, 0.3], [0.5, 0.1]]])
    truth = torch.tensor([[[True, True], [False, True]]])
    counts = slice_counts(probabilities, truth, (0.3, 0.7))
    assert counts.tolist() == [[[2, 1, 1]], [[1, 0, 2]]]
