"""Windowing, and slices resized to the network and back."""

import numpy as np
import pytest
from PIL import Image

from covtanet.ct.window import WindowConfig, from_input, mask_to_input, pixel_aspect, to_input
from covtanet.phantoms.phantom import Phantom

WINDOW = WindowConfig(size_px=64)


def test_window_maps_its_ends_to_zero_and_one() -> None:
    slices_hu = np.full((1, 64, 64), -1000, np.int16)
    slices_hu[0, :32] = 400
    levels = to_input(slices_hu, WINDOW)
    assert sorted({*levels.ravel().tolist()}) == [0, 65535]
    assert to_input(slices_hu - 300, WINDOW).min() == 0


def test_masks_survive_resizing_to_the_network_and_back(mild: Phantom) -> None:
    z = int(mild.lesion_mask.sum(axis=(1, 2)).argmax())
    there = mask_to_input(mild.lesion_mask[z : z + 1], WindowConfig(size_px=128))[0]
    back = from_input(there.astype(np.float32), mild.lesion_mask.shape[1:]) >= 0.5
    np.testing.assert_array_equal(back, mild.lesion_mask[z])


def test_slices_that_are_not_square_keep_their_proportions() -> None:
    slices_hu = np.full((1, 96, 128), 400, np.int16)
    levels = to_input(slices_hu, WINDOW)[0]
    assert levels[:7].max() == 0
    assert levels[9:55].min() == 65535
    assert from_input(levels.astype(np.float32), (96, 128)).min() > 30000


@pytest.mark.parametrize(
    ("spacing_mm", "aspect"),
    [
        ((5.0, 0.703125, 0.703125), 1.0),
        ((5.0, 0.703, 0.7031), 1.0),
        ((5.0, 0.7031, 0.703), 1.0),
        ((5.0, 1.4, 0.7), 2.0),
        ((0.7, 0.7, 2.8), 0.25),
        ((5.0, 0.7, 0.71), 0.7 / 0.71),
    ],
)
def test_pixel_aspect_within_rounding_of_a_square_is_one(
    spacing_mm: tuple[float, float, float], aspect: float
) -> None:
    assert pixel_aspect(spacing_mm) == aspect


def test_square_pixels_give_the_input_of_a_padded_and_resized_slice(mild: Phantom) -> None:
    """Computed again here: the padding is air, the filter is Pillow's bilinear one."""
    slices_hu = mild.hu[9:11, :100]
    square = np.pad(slices_hu, ((0, 0), (14, 14), (0, 0)), constant_values=-1000).astype(np.float32)
    level = (np.clip(square, -1000, 400) + np.float32(1000)) * np.float32(65535 / 1400)
    resized = [
        np.asarray(Image.fromarray(each).resize((64, 64), Image.Resampling.BILINEAR))
        for each in level
    ]
    np.testing.assert_array_equal(
        to_input(slices_hu, WINDOW), np.clip(np.rint(resized), 0, 65535).astype(np.uint16)
    )
    np.testing.assert_array_equal(to_input(slices_hu, WINDOW, 1.0), to_input(slices_hu, WINDOW))


@pytest.mark.parametrize(("factor_y", "factor_x"), [(1, 2), (2, 1), (1, 4), (4, 1)])
def test_network_sees_a_circle_as_a_circle(factor_y: int, factor_x: int) -> None:
    y, x = np.mgrid[:128, :128] - 63.5
    disc = y**2 + x**2 < 40**2
    hu = np.where(disc, 400, -1000)[None, ::factor_y, ::factor_x].astype(np.int16)
    aspect = factor_y / factor_x
    level = to_input(hu, WINDOW, aspect)[0] > 32767
    rows, columns = (int(np.count_nonzero(level.any(axis=axis))) for axis in (1, 0))
    assert (rows, columns) == pytest.approx((40, 40), abs=2)
    mask = mask_to_input(hu > 0, WINDOW, aspect)[0]
    assert np.count_nonzero(mask != level) <= 12
    back = from_input(mask.astype(np.float32), hu.shape[1:], aspect) >= 0.5
    assert back.shape == hu.shape[1:]
    assert np.count_nonzero(back != (hu[0] > 0)) <= 0.06 * np.count_nonzero(hu > 0)


@pytest.mark.parametrize(
    ("shape", "aspect"), [((60, 512), 7.0), ((512, 60), 0.14), ((8, 500), 0.01), ((500, 8), 100.0)]
)
def test_slices_of_any_shape_and_aspect_come_back_in_their_shape(
    shape: tuple[int, int], aspect: float
) -> None:
    slices_hu = np.full((1, *shape), 400, np.int16)
    level = to_input(slices_hu, WINDOW, aspect)
    assert level.shape == (1, 64, 64)
    assert level.max() == 65535
    back = from_input(level[0].astype(np.float32), shape, aspect)
    assert back.shape == shape
    assert back.min() == 65535
