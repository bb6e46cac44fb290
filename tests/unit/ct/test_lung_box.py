"""The square box around the lungs, and slices and maps that are cropped by it."""

import numpy as np
import pytest

from covtanet.ct.lung_box import SliceBox, lung_box
from covtanet.ct.window import (
    INTENSITY_STEPS,
    WindowConfig,
    box_of,
    from_input,
    mask_to_input,
    to_input,
    with_neighbours,
)
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
    assert box == SliceBox(top=5, left=5, height=20, width=20)


def test_margin_is_shared_by_both_ends() -> None:
    """A margin of 0.2 of 20 pixels is 4, 2 at each end."""
    box = lung_box(lung_mask((10, 20), (5, 25)), margin=0.2)
    assert box == SliceBox(top=3, left=3, height=24, width=24)


def test_box_of_pixels_twice_as_high_as_wide_is_square_in_millimetres() -> None:
    """15 rows are as long as 30 columns, more than the lungs' 20 columns."""
    box = lung_box(lung_mask((10, 25), (5, 25)), aspect=2.0, margin=0.0)
    assert box == SliceBox(top=10, left=0, height=15, width=30)


def test_box_may_reach_beyond_the_slice() -> None:
    box = lung_box(lung_mask((0, 10), (5, 25)), margin=0.0)
    assert box == SliceBox(top=-5, left=5, height=20, width=20)


def test_empty_lung_mask_is_rejected_as_no_lung() -> None:
    with pytest.raises(StudyError, match="lung mask is empty") as error:
        lung_box(np.zeros((2, 8, 8), bool))
    assert error.value.reason == "no_lung"


def test_box_without_pixels_is_refused() -> None:
    with pytest.raises(ValueError, match="0 x 4 pixels"):
        SliceBox(top=0, left=0, height=0, width=4)


def test_pixels_beyond_the_slice_are_air() -> None:
    """A box of the network's size is cropped and windowed without interpolation."""
    window = WindowConfig(low_hu=-2000, high_hu=0, size_px=32)
    box = SliceBox(top=-1, left=1, height=32, width=32)
    levels = to_input(np.zeros((1, 32, 32)), window, box=box)[0]
    air = pytest.approx(INTENSITY_STEPS / 2, abs=1)
    assert (levels[1:, :-1] == INTENSITY_STEPS).all()
    assert levels[0, 5] == air
    assert levels[5, -1] == air


def test_box_outside_the_slice_has_only_air() -> None:
    box = SliceBox(top=40, left=40, height=32, width=32)
    assert not to_input(np.full((1, 32, 32), 400), WindowConfig(size_px=32), box=box).any()


def test_window_of_cropped_slices_maps_its_ends_to_zero_and_one() -> None:
    """A box of the network's size is cropped and windowed without interpolation."""
    slices = np.zeros((1, 32, 32))
    slices[0, :2, :2] = [[-2000, -1250], [-500, 250]]
    window = WindowConfig(low_hu=-1250, high_hu=250, size_px=32)
    levels = to_input(slices, window, box=SliceBox(top=0, left=0, height=32, width=32))
    assert levels.dtype == np.uint16
    expected = [0, 0, INTENSITY_STEPS / 2, INTENSITY_STEPS]
    assert levels[0, :2, :2].ravel().tolist() == pytest.approx(expected, abs=1)


def test_map_returns_to_the_box_and_is_zero_outside() -> None:
    box = SliceBox(top=-1, left=2, height=4, width=4)
    whole = from_input(np.ones((2, 2), np.float32), (6, 5), box=box)
    expected = np.zeros((6, 5))
    expected[:3, 2:] = 1
    assert whole.tolist() == expected.tolist()


@pytest.mark.parametrize("aspect", [1.0, 2.0, 0.5])
def test_mask_in_the_box_survives_the_way_to_the_network_and_back(aspect: float) -> None:
    """A disc in millimetres stays one at any aspect, and returns to its own pixels."""
    y, x = np.mgrid[:96, :96]
    disc = ((y - 30) * aspect) ** 2 + (x - 60) ** 2 < 15**2
    box = lung_box(disc[None], aspect)
    window = WindowConfig(size_px=128, crops_to_lungs=True)
    assert box_of(disc[None], window, aspect) == box
    there = mask_to_input(disc[None], window, aspect, box)[0]
    # The disc fills the box apart from its margin of 8 %.
    rows = np.count_nonzero(there.any(axis=1))
    columns = np.count_nonzero(there.any(axis=0))
    assert (rows, columns) == pytest.approx((128 / 1.08, 128 / 1.08), abs=6)
    back = from_input(there.astype(np.float32), disc.shape, aspect, box) >= 0.5
    assert np.count_nonzero(back != disc) <= 0.05 * np.count_nonzero(disc)


def test_window_that_takes_slices_whole_has_no_box() -> None:
    assert box_of(np.ones((1, 4, 4), bool), WindowConfig(), 1.0) is None


def test_box_of_long_narrow_voxels_takes_no_more_memory_than_the_network() -> None:
    """At an aspect of 1e-6 the box has a million times as many rows as columns."""
    slices = np.full((1, 40, 40), 400, np.int16)
    window = WindowConfig(size_px=64)
    box = lung_box(np.ones((1, 40, 40), bool), 1e-6)
    assert box.height > 10**7
    assert to_input(slices, window, 1e-6, box).max() == INTENSITY_STEPS


@pytest.mark.parametrize(
    ("num_neighbours", "expected"),
    [(0, [[0], [2]]), (1, [[0, 0, 1], [1, 2, 2]])],
)
def test_neighbours_repeat_the_outermost_slice(
    num_neighbours: int, expected: list[list[int]]
) -> None:
    slices = np.arange(3)[:, None, None]
    rows = with_neighbours(slices, np.array([0, 2]), num_neighbours)
    assert rows[:, :, 0, 0].tolist() == expected


def test_more_than_one_neighbour_is_refused() -> None:
    with pytest.raises(ValueError, match="num_neighbours is 2"):
        WindowConfig(num_neighbours=2)
