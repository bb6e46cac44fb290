"""The square box around the lungs, and slices and maps that are cropped by it."""

import numpy as np
import pytest

from covtanet.ct.lung_box import (
    LungBox,
    box_from_input,
    box_to_input,
    crop_to_box,
    lung_box,
)
from covtanet.ct.window import INTENSITY_STEPS, WindowConfig
from covtanet.errors import StudyError


def lung_mask(rows: tuple[int, int], columns: tuple[int, int]) -> np.ndarray:
    """Return a volume of two slices with lungs at the opposite corners of a rectangle."""
    mask = np.zeros((2, 40, 50), bool)
    mask[0, rows[0], columns[0]] = True
    mask[1, rows[1] - 1, columns[1] - 1] = True
    return mask


def test_box_without_margin_is_the_square_around_all_slices() -> None:
    """Rows 10 to 20 and columns 5 to 25: 20 columns decide, and the rows get 5 more at each end."""
    box = lung_box(lung_mask((10, 20), (5, 25)), margin=0.0)
    assert box == LungBox(top=5, left=5, height=20, width=20)


def test_margin_is_shared_by_both_ends() -> None:
    """A margin of 0.2 of 20 pixels is 4, 2 at each end."""
    box = lung_box(lung_mask((10, 20), (5, 25)), margin=0.2)
    assert box == LungBox(top=3, left=3, height=24, width=24)


def test_box_of_pixels_twice_as_high_as_wide_is_square_in_millimetres() -> None:
    """15 rows are as long as 30 columns, more than the lungs' 20 columns."""
    box = lung_box(lung_mask((10, 25), (5, 25)), aspect=2.0, margin=0.0)
    assert box == LungBox(top=10, left=0, height=15, width=30)


def test_box_may_reach_beyond_the_slice() -> None:
    box = lung_box(lung_mask((0, 10), (5, 25)), margin=0.0)
    assert box == LungBox(top=-5, left=5, height=20, width=20)


def test_empty_lung_mask_is_rejected_as_no_lung() -> None:
    with pytest.raises(StudyError, match="lung mask is empty") as error:
        lung_box(np.zeros((2, 8, 8), bool))
    assert error.value.reason == "no_lung"


def test_box_without_pixels_is_refused() -> None:
    with pytest.raises(ValueError, match="0 x 4 pixels"):
        LungBox(top=0, left=0, height=0, width=4)


def test_crop_fills_pixels_beyond_the_slice() -> None:
    slices = np.arange(9).reshape(1, 3, 3)
    cropped = crop_to_box(slices, LungBox(top=-1, left=1, height=3, width=3), -7)
    assert cropped.tolist() == [[[-7, -7, -7], [1, 2, -7], [4, 5, -7]]]


def test_box_outside_the_slice_has_only_fill() -> None:
    cropped = crop_to_box(np.ones((1, 3, 3)), LungBox(top=5, left=5, height=2, width=2), 0)
    assert not cropped.any()


def test_window_of_cropped_slices_maps_its_ends_to_zero_and_one() -> None:
    """A box of the network's size is cropped and windowed without interpolation."""
    slices = np.zeros((1, 32, 32))
    slices[0, :2, :2] = [[-2000, -1250], [-500, 250]]
    window = WindowConfig(low_hu=-1250, high_hu=250, size_px=32)
    levels = box_to_input(slices, LungBox(top=0, left=0, height=32, width=32), window)
    assert levels.dtype == np.uint16
    expected = [0, 0, INTENSITY_STEPS / 2, INTENSITY_STEPS]
    assert levels[0, :2, :2].ravel().tolist() == pytest.approx(expected, abs=1)


def test_map_returns_to_the_box_and_is_zero_outside() -> None:
    box = LungBox(top=-1, left=2, height=4, width=4)
    whole = box_from_input(np.ones((2, 2), np.float32), box, (6, 5))
    expected = np.zeros((6, 5))
    expected[:3, 2:] = 1
    assert whole.tolist() == expected.tolist()
