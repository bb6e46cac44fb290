"""Room air, fill values, tables and padding outside the scan, which are not lung."""

import numpy as np
import pytest
from cut_chests import FILLS, beyond, filled, found_in, share, turned, with_air_of, with_arms
from scipy import ndimage
from wide_chests import chest

from covtanet.ct import lung
from covtanet.ct.body import find_outside
from covtanet.ct.volume import canonical_volume


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("radius_mm", [174, 164])
def test_fill_value_around_a_circle_is_not_lung(fill: int, radius_mm: float) -> None:
    """The room air between body and circle is closed; at 164 mm the circle touches the skin."""
    lungs = found_in(filled(beyond(radius_mm), fill), chest())
    assert not lungs.is_partial
    assert share(lungs, chest().lung_mask) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("fill", [0, 3071])
@pytest.mark.parametrize("width_px", [1, 2, 4])
@pytest.mark.parametrize("size_px", [128, 256])
def test_room_air_within_a_frame_of_fill_value_is_not_lung(
    fill: int, width_px: int, size_px: int
) -> None:
    hu = np.pad(
        chest(size_px).hu[:, width_px:-width_px, width_px:-width_px],
        ((0, 0), (width_px, width_px), (width_px, width_px)), constant_values=fill,
    )  # fmt: skip
    lungs = found_in(hu, chest(size_px))
    assert not lungs.is_partial
    assert share(lungs, chest(size_px).lung_mask) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("air_hu", [-1000, -934])
def test_noisy_fill_value_around_a_circle_is_not_lung(air_hu: int) -> None:
    where = beyond(174)
    hu = filled(where, 0, with_air_of(air_hu, chest().hu))
    hu[:, where] += np.rint(np.random.default_rng(0).normal(0, 8, hu[:, where].shape)).astype(
        np.int16
    )
    lungs = found_in(hu, chest())
    assert share(lungs, chest().lung_mask) == pytest.approx(1, abs=0.1)


def test_room_air_between_arms_and_a_frame_is_not_lung() -> None:
    """The arms touch the frame: no air lies around the body, and air there is as dark as foam."""
    hu = with_air_of(-934, with_arms(has_pocket=False))[:, :, 8:-8]
    noise = np.rint(np.random.default_rng(0).normal(0, 40, hu.shape)).astype(np.int16)
    for edge in (np.s_[:, :1], np.s_[:, -1:], np.s_[:, :, :1], np.s_[:, :, -1:]):
        hu[edge] = noise[edge]
    outside, _ = find_outside(hu.astype(np.float32), hu, (9.0, 2.8, 2.8))
    front, back = outside[10:20, 4:12, 30:80], outside[10:20, -12:-4, 30:80]
    assert front.mean() > 0.9
    assert back.mean() > 0.9
    lungs = found_in(hu, chest())
    assert not lungs.is_partial
    assert share(lungs, chest().lung_mask) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("air_hu", [-1000, -934])
def test_room_air_of_any_value_is_outside(air_hu: int) -> None:
    """Not only no lung: the chest wall is measured from it."""
    hu = with_air_of(air_hu, chest().hu)
    is_air = (
        ndimage.binary_opening(chest().hu < -950, structure=np.ones((1, 5, 5), bool))
        & ~chest().lung_mask
    )
    is_air[:, 20:108, 20:108] = False
    hu, is_air, is_lung = (
        array[:, :, 8:-8] for array in (hu, is_air, chest().lung_mask)
    )  # no ring of air
    outside, unmeasured = find_outside(hu.astype(np.float32), hu, (9.0, 2.8, 2.8))
    assert is_air.any()
    assert np.count_nonzero(outside & is_air) > 0.99 * np.count_nonzero(is_air)
    assert not (outside & is_lung).any()
    assert unmeasured.mean() < 0.01


def test_tissue_without_noise_in_a_corner_is_not_a_fill_value() -> None:
    """A drawing: one value for each kind of tissue, cut from rib to rib."""
    hu = np.where(chest().lung_mask, -850, 40).astype(np.int16)[:, 20:108, 15:113]
    _, unmeasured = find_outside(hu.astype(np.float32), hu, (9.0, 2.8, 2.8))
    assert not unmeasured.any()
    assert not found_in(hu, chest()).is_partial


def test_spacing_that_differs_by_rounding_takes_the_same_grid() -> None:
    """2.5 mm over 1.0 mm rounds down to 2 pixels, over 0.9999999 mm up to 3."""
    masks = []
    for x_mm in (1.0, 0.9999999):
        affine = np.array([[0, 0, x_mm, 0], [0, 1.0, 0, 0], [9.0, 0, 0, 0], [0, 0, 0, 1]])
        masks.append(lung.find_lungs(canonical_volume(chest(256).hu, affine)).lung_mask)
    np.testing.assert_array_equal(masks[0], masks[1])


@pytest.mark.parametrize("fill", [0, -1024, 3071])
@pytest.mark.parametrize("order", [1, 3])
@pytest.mark.parametrize(
    ("degrees", "axes"), [(20, (1, 2)), (45, (1, 2)), (15, (0, 1)), (15, (0, 2))]
)
def test_corners_of_a_rotated_volume_are_not_lung(
    fill: int, order: int, degrees: float, axes: tuple[int, int]
) -> None:
    hu = turned(chest().hu, degrees, axes, fill, order).astype(np.int16)
    truth = turned(chest().lung_mask, degrees, axes, 0) > 0.5
    lungs = found_in(hu, chest())
    assert not lungs.is_partial
    assert not lungs.has_blank_slices
    assert share(lungs, truth) == pytest.approx(1, abs=0.1)


def test_padding_within_a_fill_value_is_not_lung_and_cuts_lungs() -> None:
    """A round field of view, padded by the scanner and rotated by resampling that fills with 0."""
    for radius_mm, is_partial in ((174, False), (109, True)):
        where = beyond(radius_mm)
        hu = turned(filled(where, -1024), 20, (1, 2), 0).astype(np.int16)
        truth = turned(chest().lung_mask & ~where, 20, (1, 2), 0) > 0.5
        lungs = found_in(hu, chest())
        assert lungs.is_partial is is_partial
        assert share(lungs, truth) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("foam_hu", [-1000, -950, -900])
def test_inside_of_a_table_is_not_lung(foam_hu: int) -> None:
    hu = chest().hu.astype(np.float32)
    y, x = (np.mgrid[:128, :128] - 63.5) * 2.8
    box = (np.abs(x) < 172) & (y > 122) & (y < 167)
    inside = (np.abs(x) < 164) & (y > 130) & (y < 159)
    hu[:, box] = np.random.default_rng(0).normal(60, 15, hu[:, box].shape)
    hu[:, inside] = foam_hu
    lungs = found_in(np.rint(hu).astype(np.int16), chest())
    assert not lungs.is_partial
    assert share(lungs, chest().lung_mask) == pytest.approx(1, abs=0.1)


def test_cushion_under_the_back_is_not_lung() -> None:
    """As dense as lung. The image cuts it at both sides, without air around it, and cuts a lung."""
    hu = chest().hu.copy()
    cushion = hu[:, 104:116]
    is_air = cushion < -900
    cushion[is_air] = np.random.default_rng(0).normal(-850, 20, int(is_air.sum()))
    hu[:, 116:] = -1000
    lungs = found_in(hu[:, :, 50:112], chest())
    assert lungs.is_partial
    assert not lungs.lung_mask[:, 108:].any()
    assert share(lungs, chest().lung_mask[:, :, 50:112]) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("air_hu", [-1024, -960, -934])
def test_room_air_off_minus_1000_is_not_lung(air_hu: int) -> None:
    """Room air of -934 was measured in a sound series."""
    hu = with_air_of(air_hu, chest().hu)
    for where in (beyond(1000), beyond(174)):
        assert share(found_in(filled(where, 0, hu), chest()), chest().lung_mask) == pytest.approx(
            1, abs=0.1
        )


def test_noise_of_a_sharp_kernel_does_not_change_partial_lungs() -> None:
    phantom = chest(256)
    noise = np.random.default_rng(0).normal(0, 100, phantom.hu.shape)
    hu = np.clip(np.rint(phantom.hu + noise), -1024, 3071).astype(np.int16)
    for radius_mm, is_partial in ((174, False), (109, True)):
        where = beyond(radius_mm, phantom=phantom)
        lungs = found_in(filled(where, 0, hu), phantom)
        assert lungs.is_partial is is_partial
        assert share(lungs, phantom.lung_mask & ~where) == pytest.approx(1, abs=0.1)
