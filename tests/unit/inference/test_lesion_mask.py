"""Lesion in the source's grid and involvement, against the same formulas on whole volumes."""

import numpy as np
import pytest

from covtanet.ct.lung import Lungs, measure_involvement
from covtanet.ct.masks import Mask
from covtanet.ct.window import WindowConfig, box_of, from_input, pixel_aspect
from covtanet.inference.lesion_mask import lesion_in_source
from covtanet.inference.quantization import PROBABILITY_STEPS

SIZE_PX = 32
Levels = np.ndarray


def make_lungs(shape: tuple[int, int, int], at_border: bool) -> Lungs:
    """Two boxes as lungs, and a cavity around them."""
    depth, height, width = shape
    lung, cavity = np.zeros(shape, bool), np.zeros(shape, bool)
    first = 0 if at_border else height // 4
    slices = slice(0, depth) if depth < 3 else slice(1, depth - 1)
    lung[slices, first : height // 2, width // 8 : width // 3] = True
    lung[slices, first : height // 2, width // 2 : width if at_border else width - 3] = True
    cavity[slices, first : height // 2 + 2, width // 8 : width - 3] = True
    return Lungs(lung_mask=lung, cavity_mask=cavity, is_partial=False)


def make_levels(num_slices: int, highest: int) -> Levels:
    """Noise, and a square of the highest level in the middle."""
    rng = np.random.default_rng(highest)
    levels = rng.integers(0, highest + 1, (num_slices, SIZE_PX, SIZE_PX)).astype(np.uint8)
    levels[:, 4:28, 4:28] = highest
    return levels


def whole_volume_lesion(
    levels: Levels, chosen: Levels, lungs: Lungs, spacing_mm: tuple[float, float, float],
    window: WindowConfig, threshold: float,
) -> tuple[Mask, int]:  # fmt: skip
    """Every slice at full size, each with the map of the nearest chosen slice."""
    shape = lungs.lung_mask.shape
    aspect = pixel_aspect(spacing_mm)
    box = box_of(lungs.lung_mask, window, aspect)
    maps = [from_input(m.astype(np.float32), shape[1:], aspect, box) for m in levels]
    by_slice = np.stack(maps) >= np.float32(threshold * PROBABILITY_STEPS)
    inside = lungs.lung_mask | lungs.cavity_mask
    lesion = np.zeros(shape, bool)
    for z in np.flatnonzero(lungs.lung_mask.any(axis=(1, 2))):
        lesion[z] = by_slice[np.abs(chosen - z).argmin()]
    return lesion, int((by_slice & inside[chosen]).any(axis=(1, 2)).sum())


@pytest.mark.parametrize("crops_to_lungs", [False, True])
@pytest.mark.parametrize("at_border", [False, True])
@pytest.mark.parametrize("highest", [0, 76, 77, 254])
@pytest.mark.parametrize(
    ("shape", "spacing_mm"),
    [
        ((9, 40, 48), (2.5, 0.8, 0.8)),
        ((9, 30, 48), (1.0, 1.6, 0.8)),
        ((1, 40, 48), (5.0, 0.8, 0.8)),
    ],
)
def test_lesion_and_involvement_equal_those_counted_on_the_whole_volume(
    shape: tuple[int, int, int],
    spacing_mm: tuple[float, float, float],
    highest: int,
    at_border: bool,
    crops_to_lungs: bool,
) -> None:
    window = WindowConfig(size_px=SIZE_PX, crops_to_lungs=crops_to_lungs)
    lungs = make_lungs(shape, at_border)
    chosen = np.arange(shape[0] // 3, shape[0], 3)[:2]
    levels = make_levels(len(chosen), highest)
    args = (levels, chosen, lungs, spacing_mm, window, 0.3)
    lesion, num_slices = lesion_in_source(*args)
    expected, num_expected = whole_volume_lesion(*args)
    np.testing.assert_array_equal(lesion, expected)
    assert num_slices == num_expected
    measured = measure_involvement(lungs, lesion, None)
    in_lungs = expected & (lungs.lung_mask | lungs.cavity_mask)
    with_lesion = lungs.lung_mask | in_lungs
    np.testing.assert_array_equal(measured.lesion_mask, in_lungs)
    np.testing.assert_array_equal(measured.lung_mask, with_lesion)
    assert measured.involvement == in_lungs.sum() / with_lesion.sum()
    assert bool(in_lungs.any()) == (highest > 76)
