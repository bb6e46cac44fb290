"""Dilation and erosion of masks, against scipy's."""

import numpy as np
import pytest
from scipy import ndimage

from covtanet.ct import masks
from covtanet.ct.masks import IN_PLANE, Mask, ball, diamond, dilate, erode

STRUCTURES = {
    "cross": IN_PLANE,
    "diamond": diamond([2, 2])[None],
    "flat diamond": diamond([1, 3])[None],
    "one row": diamond([0, 2])[None],
    "ball": ball(12.0, (2.5, 2.1, 4.0)),
    "along z": np.ones((5, 1, 1), bool),
}


def random_mask(shape: tuple[int, int, int], seed: int) -> Mask:
    """Clumps that touch the ends of the array."""
    noise = np.random.default_rng(seed).random(shape)
    return ndimage.uniform_filter(noise, 3, mode="nearest") > 0.55


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("shape", [(9, 24, 31), (1, 12, 12), (3, 2, 40), (4, 20, 2)])
def test_dilation_and_erosion_equal_those_of_scipy(name: str, shape: tuple[int, int, int]) -> None:
    structure = STRUCTURES[name]
    for seed in range(3):
        mask = random_mask(shape, seed)
        expected = ndimage.binary_dilation(mask, structure)
        np.testing.assert_array_equal(dilate(mask, structure), expected)
        for beyond in (False, True):
            expected = ndimage.binary_erosion(mask, structure, border_value=beyond)
            np.testing.assert_array_equal(erode(mask, structure, beyond=beyond), expected)


def test_ball_holds_the_voxels_within_its_radius() -> None:
    grid_mm = (2.5, 2.4, 2.4)
    mask = np.zeros((13, 13, 13), bool)
    mask[6, 6, 6] = True
    distance_mm = ndimage.distance_transform_edt(~mask, sampling=grid_mm)
    np.testing.assert_array_equal(dilate(mask, ball(12.0, grid_mm)), distance_mm <= 12.0)


def test_diamond_repeats_the_cross() -> None:
    mask = random_mask((4, 20, 20), 5)
    twice = ndimage.binary_dilation(mask, IN_PLANE, iterations=2)
    np.testing.assert_array_equal(masks.dilate_in_plane(mask, 2.0, (1.0, 1.0, 1.0)), twice)
