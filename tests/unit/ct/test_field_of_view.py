"""Lungs that the image cuts, images that do not end in air, blank slices, bodies of any size."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage
from wide_chests import averaged, chest

from covtanet.ct import lung
from covtanet.ct.body import find_outside
from covtanet.ct.unmeasured import blank_slices
from covtanet.ct.volume import canonical_volume
from covtanet.errors import StudyError
from covtanet.phantoms.phantom import Phantom

Array = np.ndarray


def found_in(
    hu: Array, phantom: Phantom, *, scale: float = 1.0, is_known: bool = True
) -> lung.Lungs:
    """Find the lungs in an edited phantom."""
    affine = phantom.affine @ np.diag([scale, scale, scale, 1])
    return lung.find_lungs(replace(canonical_volume(hu, affine), has_known_spacing=is_known))


def share(lungs: lung.Lungs, truth: Array) -> float:
    """Lung volume found, over the true one."""
    return float(np.count_nonzero(lungs.lung_mask) / np.count_nonzero(truth))


def beyond(
    radius_mm: float, centre_mm: tuple[float, float] = (0, 0), phantom: Phantom | None = None
) -> Array:
    """Pixels outside a round field of view, (y, x)."""
    phantom = phantom or chest()
    size = phantom.hu.shape[1]
    y, x = (np.mgrid[:size, :size] - (size - 1) / 2) * phantom.affine[1, 1]
    return np.asarray((y - centre_mm[0]) ** 2 + (x - centre_mm[1]) ** 2 > radius_mm**2)


def filled(where: Array, value: int, hu: Array | None = None) -> Array:
    hu = (chest().hu if hu is None else hu).copy()
    hu[:, where] = value
    return hu


def lung_box(phantom: Phantom) -> tuple[Array, Array]:
    """First and last row and column with lung."""
    rows, columns = (
        np.flatnonzero(phantom.lung_mask.any(axis=axes))[[0, -1]] for axes in ((0, 2), (0, 1))
    )
    return rows, columns


FILLS = (0, -1000, -1024, -2000, -3024, 100, 3071)


# The image edge cuts a lung.

CROPS: dict[str, Callable[[Array, Array], tuple[slice, slice]]] = {
    "a strip of 5 mm on the right": lambda rows, columns: (
        slice(None),
        slice(columns[0] + 2, None),
    ),
    "half of the right lung": lambda rows, columns: (slice(None), slice(columns[0] + 18, None)),
    "half of the left lung": lambda rows, columns: (slice(None), slice(None, columns[1] - 18)),
    "the front": lambda rows, columns: (slice(rows[0] + 8, None), slice(None)),
    "the back": lambda rows, columns: (slice(None, rows[1] - 8), slice(None)),
    "all but a quarter": lambda rows, columns: (
        slice(rows[0] + 25, None),
        slice(columns[0] + 25, None),
    ),
    "all but the middle of one lung": lambda rows, columns: (slice(44, 88), slice(30, 58)),
}


@pytest.mark.parametrize("name", CROPS)
def test_lung_cut_by_the_image_edge_is_partial_and_lung(name: str) -> None:
    rows, columns = CROPS[name](*lung_box(chest()))
    lungs = found_in(chest().hu[:, rows, columns], chest())
    assert lungs.is_partial
    assert share(lungs, chest().lung_mask[:, rows, columns]) == pytest.approx(1, abs=0.25)


@pytest.mark.parametrize("columns", [slice(59, None), slice(None, 69)])
def test_image_of_one_lung_is_partial(columns: slice) -> None:
    """The image ends in the mediastinum; the lung that it shows is whole."""
    assert chest().lung_mask[:, :, columns].sum() < 0.6 * chest().lung_mask.sum()
    assert found_in(chest().hu[:, :, columns], chest()).is_partial


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize(
    ("radius_mm", "centre_mm"), [(109, (0, 0)), (90, (0, 75)), (100, (-40, -30))]
)
def test_lung_cut_by_a_round_field_of_view_is_partial(
    fill: int, radius_mm: float, centre_mm: tuple[float, float]
) -> None:
    where = beyond(radius_mm, centre_mm)
    lungs = found_in(filled(where, fill), chest())
    assert lungs.is_partial
    assert share(lungs, chest().lung_mask & ~where) == pytest.approx(1, abs=0.1)


def test_lung_cut_in_a_few_slices_is_partial() -> None:
    """A table that moves sideways: three slices are shifted by 7 cm, and padded with air."""
    hu = chest().hu.copy()
    hu[14:17] = np.pad(hu[14:17], ((0, 0), (0, 0), (0, 25)), constant_values=-1024)[:, :, 25:]
    assert found_in(hu, chest()).is_partial


def test_emphysema_cut_by_the_image_edge_is_partial() -> None:
    """As dark as foam; only that it lies between tissue tells."""
    hu = chest().hu.copy()
    hu[chest().lung_mask & (hu < -700)] -= 80
    lungs = found_in(hu[:, :, 30:], chest())
    assert lungs.is_partial
    assert share(lungs, chest().lung_mask[:, :, 30:]) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("margin_px", [3, 6])
def test_whole_lungs_in_a_field_of_view_from_rib_to_rib_are_not_partial(margin_px: int) -> None:
    rows, columns = lung_box(chest())
    inner = (
        slice(rows[0] - margin_px, rows[1] + margin_px + 1),
        slice(columns[0] - margin_px, columns[1] + margin_px + 1),
    )
    lungs = found_in(chest().hu[:, *inner], chest())
    assert not lungs.is_partial
    assert share(lungs, chest().lung_mask[:, *inner]) == pytest.approx(1, abs=0.1)


def with_arms(*, has_pocket: bool) -> Array:
    """Arms next to the chest; between arm and chest may be a closed pocket of air."""
    hu = chest().hu.copy()
    size = hu.shape[1]
    y, x = (np.mgrid[:size, :size] - (size - 1) / 2) * 2.8
    noise = np.random.default_rng(0).normal(40, 15, hu.shape)
    for side in (-168, 168):
        arm = ((x - side) / 22) ** 2 + (y / 70) ** 2 < 1
        if has_pocket:
            arm &= ((x - side) / 12) ** 2 + (y / 50) ** 2 >= 1
        is_air = arm & (hu[4:-5] < -950)
        hu[4:-5][is_air] = noise[4:-5][is_air]
    return hu


@pytest.mark.parametrize("has_pocket", [False, True])
@pytest.mark.parametrize("cut_px", [0, 8])
def test_arms_at_the_image_edge_do_not_make_lungs_partial(has_pocket: bool, cut_px: int) -> None:
    shown = slice(cut_px, 128 - cut_px)
    lungs = found_in(with_arms(has_pocket=has_pocket)[:, :, shown], chest())
    assert not lungs.is_partial
    assert share(lungs, chest().lung_mask) == pytest.approx(1, abs=0.1)


# What lies outside the scan is something else than air.


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


def with_air_of(air_hu: int, hu: Array) -> Array:
    """Move room air, and voxels as dark, to another value."""
    return np.where(hu < -940, np.clip(hu + (air_hu + 1000), -1024, None), hu).astype(np.int16)


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


def turned(hu: Array, degrees: float, axes: tuple[int, int], fill: float, order: int = 1) -> Array:
    """Rotate in millimetres and resample on the same grid."""
    spacing = np.array([9.0, 2.8, 2.8])
    angle = np.radians(degrees)
    matrix = np.eye(3)
    one, other = axes
    matrix[one, one] = matrix[other, other] = np.cos(angle)
    matrix[one, other], matrix[other, one] = -np.sin(angle), np.sin(angle)
    matrix = matrix * spacing / spacing[:, None]
    centre = (np.array(hu.shape) - 1) / 2
    out = ndimage.affine_transform(  # type: ignore[call-overload]
        hu.astype(np.float32),
        matrix,
        centre - matrix @ centre,
        order=order,
        mode="constant",
        cval=fill,
    )
    return np.asarray(np.rint(out))


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


# Slices without content.


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


# Bodies of any size, and of unknown size.


def test_newborn_is_measured_at_its_own_scale() -> None:
    """The phantom at 0.29 of its size: 10 cm wide, lungs of 90 ml, 18 cm2 in the largest slice."""
    lungs = found_in(chest().hu, chest(), scale=0.29)
    assert not lungs.is_partial
    assert share(lungs, chest().lung_mask) == pytest.approx(1, abs=0.1)


def test_newborn_without_lung_is_refused() -> None:
    hu = chest().hu.copy()
    hu[chest().lung_mask] = 40
    with pytest.raises(StudyError, match="cm2 of lung, expected 4") as error:
        found_in(hu, chest(), scale=0.29)
    assert error.value.reason == "no_lung"


@pytest.mark.parametrize(("size_px", "num_slices"), [(128, 30), (128, 108), (256, 30)])
def test_unknown_spacing_is_guessed_from_the_size_of_the_body(
    size_px: int, num_slices: int
) -> None:
    phantom = chest(size_px, num_slices)
    affine = np.array([[0, 0, 1, 0], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1.0]])
    lungs = lung.find_lungs(replace(canonical_volume(phantom.hu, affine), has_known_spacing=False))
    assert not lungs.is_partial
    assert share(lungs, phantom.lung_mask) == pytest.approx(1, abs=0.05)


def test_unknown_spacing_ignores_lengths_of_the_header() -> None:
    """The same voxels with any nominal size give the same masks."""
    one, other = (
        found_in(chest().hu, chest(), scale=scale, is_known=False) for scale in (0.01, 100)
    )
    np.testing.assert_array_equal(one.lung_mask, other.lung_mask)
    assert not one.is_partial


def test_unknown_spacing_without_lung_or_with_cut_lungs_is_reported() -> None:
    hu = chest().hu.copy()
    hu[chest().lung_mask] = 40
    with pytest.raises(StudyError, match="% of the body, expected 3 %") as error:
        found_in(hu, chest(), scale=0.1, is_known=False)
    assert error.value.reason == "no_lung"
    assert found_in(chest().hu[10:20], chest(), scale=0.1, is_known=False).is_partial
    assert found_in(chest().hu[:, :, 30:], chest(), scale=0.1, is_known=False).is_partial


@pytest.mark.parametrize(
    ("scale", "is_known", "is_implausible"),
    [
        (1.0, True, False),
        (0.29, True, False),
        (0.2, True, True),
        (1.6, True, True),
        (0.2, False, False),
    ],
)
def test_implausible_lung_volume_gives_null_involvement(
    scale: float, is_known: bool, is_implausible: bool
) -> None:
    """The lungs hold 3.6 litres at full size: 29 ml at a fifth of it, 15 litres at 1.6 times."""
    lungs = found_in(chest().hu, chest(), scale=scale, is_known=is_known)
    voxel_ml = 2.8 * 2.8 * 9 * scale**3 / 1000 if is_known else None
    measured = lung.measure_involvement(lungs, chest().lesion_mask, voxel_ml)
    assert measured.is_implausible is is_implausible
    assert (measured.involvement is None) is is_implausible
    assert (measured.lung_volume_ml is None) is not is_known
    assert (measured.lesion_volume_ml is None) is not is_known
    cut = replace(lungs, is_partial=True)
    assert not lung.measure_involvement(cut, chest().lesion_mask, voxel_ml).is_implausible


@pytest.mark.parametrize("factors", [(1, 1, 2), (1, 2, 1), (1, 4, 1), (1, 1, 4), (1, 6, 1)])
def test_lungs_of_anisotropic_pixels_equal_those_of_square_pixels(
    factors: tuple[int, int, int],
) -> None:
    """Reformats: up to 8.4 mm along one axis of the slice, 1.4 mm along the other."""
    phantom = chest(256, 60)
    hu, truth = (averaged(array, factors) for array in (phantom.hu, phantom.lung_mask))
    scaled = replace(phantom, affine=phantom.affine @ np.diag([*factors, 1]))
    lungs = found_in(np.rint(hu).astype(np.int16), scaled)
    assert not lungs.is_partial
    assert share(lungs, truth > 0.5) == pytest.approx(1, abs=0.1)
