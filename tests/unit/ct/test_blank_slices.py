"""Slices without content."""

import numpy as np
import pytest
from cut_chests import beyond, filled, found_in, share
from scipy import ndimage
from wide_chests import chest

from covtanet.ct.unmeasured import blank_slices
from covtanet.errors import StudyError


@pytest.mark.parametrize("value", [0, -1000, -1024, -2000, 3071])
@pytest.mark.parametrize("num_slices", [30, 108])
def test_blank_slices_within_the_lungs_hold_no_lung(value: int, num_slices: int) -> None:
    phantom = chest(num_slices=num_slices)
    blank = [num_slices // 2, num_slices // 2 + 1, num_slices // 2 + 6]
    hu, truth = phantom.hu.copy(), phantom.lung_mask.copy()
    hu[blank], truth[blank] = value, False
    lungs = found_in(hu, phantom)
    assert lungs.has_blank_slices
    assert not lungs.is_partial
    assert not lungs.lung_mask[blank].any()
    assert not lungs.cavity_mask[blank].any()
    assert share(lungs, truth) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(("value", "noise_hu"), [(0, 0), (0, 3), (-1000, 22), (-1000, 60)])
def test_slice_that_is_nearly_constant_within_its_circle_is_blank(
    value: int, noise_hu: float
) -> None:
    where = beyond(174)
    hu = filled(where, -2000)
    noise = np.random.default_rng(0).normal(value, noise_hu, hu[15][~where].shape)
    hu[15][~where] = np.rint(noise)
    lungs = found_in(hu, chest())
    assert lungs.has_blank_slices
    assert not lungs.lung_mask[15].any()


def test_slices_of_a_drawing_without_lung_are_not_replaced() -> None:
    """One value for air, body and lung each: below the lungs a slice has no structure."""
    hu = np.where(chest().hu > -300, 40, -1000)
    hu[ndimage.binary_fill_holes(hu > 0, structure=np.ones((1, 3, 3), bool)) & (hu < 0)] = 40
    hu[chest().lung_mask] = -850
    lungs = found_in(hu.astype(np.int16), chest())
    assert not lungs.has_blank_slices
    assert not lungs.is_partial
    assert share(lungs, chest().lung_mask) == pytest.approx(1, abs=0.1)


def test_blank_slices_beyond_the_lungs_are_not_flagged() -> None:
    hu = chest().hu.copy()
    hu[[0, -1]] = 0
    lungs = found_in(hu, chest())
    assert not lungs.has_blank_slices
    assert not lungs.is_partial


@pytest.mark.parametrize("noise_hu", [0, 22])
@pytest.mark.parametrize("value", [0, -1000, -1024])
def test_blank_slices_at_the_end_of_the_lungs_cut_them(value: int, noise_hu: float) -> None:
    if value == 0 and noise_hu:
        pytest.skip("tissue without structure may be the liver")
    hu = chest().hu.copy()
    hu[:12] = np.rint(np.random.default_rng(0).normal(value, noise_hu, hu[:12].shape))
    assert found_in(hu, chest()).is_partial


def test_slices_of_tissue_within_constant_background_are_not_blank() -> None:
    """Background taken out, as in prepared data: of the belly only fat and muscle are left."""
    hu = chest().hu.copy()
    hu[
        ndimage.binary_opening(hu < -900, structure=np.ones((1, 3, 3), bool)) & ~chest().lung_mask
    ] = -1024
    assert not blank_slices(hu).any()
    belly = hu[1]
    belly[(belly > -1024) & (belly < -900)] = -1024
    assert not blank_slices(np.stack([hu[15], belly, hu[16]])).any()
    assert not blank_slices(np.stack([belly[45:85, 35:93]] * 3)).any()


def test_volume_of_blank_slices_has_no_lung() -> None:
    with pytest.raises(StudyError, match="one value throughout") as error:
        found_in(np.full((10, 64, 64), -1000, np.int16), chest())
    assert error.value.reason == "no_lung"
