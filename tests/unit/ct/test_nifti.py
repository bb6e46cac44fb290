"""NIfTI files of archives: offsets, quaternions, fill values, voxel sizes and label maps."""

import struct

import nibabel as nib
import numpy as np
import pytest
from hostile_nifti import (
    PIXDIM,
    QFORM_CODE,
    QUATERN,
    SFORM_CODE,
    SLOPE,
    SROW,
    UNITS,
    VOX_OFFSET,
    patched,
    stored,
    voxels,
)
from nibabel.quaternions import quat2mat
from sound_input import Objects, gz, phantom, plain_nifti

from covtanet.ct import nifti
from covtanet.ct.volume import Volume
from covtanet.errors import StudyError

HALF_TURN = (0.5**0.5, 0.5**0.5, 0.0)  # w = 0: any rounding error takes it over unit length


def read(objects: Objects) -> Volume:
    return nifti.read(objects["a.nii"])


def reason_of(objects: Objects) -> str:
    with pytest.raises(StudyError) as error:
        read(objects)
    return error.value.reason


def with_rescale(array: np.ndarray, slope: float, intercept: float) -> Objects:
    """Stored values with slope and intercept in the header."""
    return patched((SLOPE, "2f", (slope, intercept)), data=stored(array)["a.nii"])


def resized(spacing_mm: tuple[float, float, float], unit: int = 2) -> Objects:
    """The sound volume with another voxel size along x, y and z."""
    image = nib.Nifti1Image(voxels(), np.diag([*spacing_mm, 1.0]))
    return patched((UNITS, "B", unit), data=image.to_bytes())


def coarse() -> np.ndarray:
    """The sound volume in HU with few different values, as a quantised or a noiseless CT has."""
    return np.round(voxels().astype(float) / 64).astype(int) * 64


# ---- offset of the voxels


@pytest.mark.parametrize("offset", [352, 353, 354, 360, 1000])
@pytest.mark.parametrize("pack", [bytes, gz])
def test_voxels_at_any_offset_are_read(offset: int, pack: object) -> None:
    plain = patched((VOX_OFFSET, "f", float(offset)))["a.nii"]
    data = plain[:352] + bytes(offset - 352) + plain[352:]
    np.testing.assert_array_equal(nifti.read(pack(data)).hu, phantom().hu)  # type: ignore[operator]


def test_nifti_2_voxels_at_an_odd_offset_are_read() -> None:
    image = nib.Nifti1Image.from_bytes(plain_nifti())
    plain = bytearray(nib.Nifti2Image(voxels(), image.affine).to_bytes())
    start = struct.unpack_from("<q", plain, 168)[0]
    struct.pack_into("<q", plain, 168, start + 9)
    np.testing.assert_array_equal(
        nifti.read(bytes(plain[:start] + bytes(9) + plain[start:])).hu, phantom().hu
    )


@pytest.mark.parametrize("offset", [0.0, 8.0, 348.0, 351.0])
def test_voxels_within_the_header_are_unreadable(offset: float) -> None:
    assert reason_of(patched((VOX_OFFSET, "f", offset))) == "unreadable"


# ---- orientation


def turned(quaternion: tuple[float, float, float], sform: bool = False) -> Objects:
    """The sound volume turned by the qform, with a matching sform if asked."""
    image = nib.Nifti1Image(voxels(), None)
    image.header["pixdim"][1:4] = (5.625, 5.625, 20.0)
    image.header.set_xyzt_units("mm")
    data = patched((QFORM_CODE, "2h", (1, 0)), (QUATERN, "3f", quaternion), data=image.to_bytes())[
        "a.nii"
    ]
    if sform:
        affine = quat2mat([0, *HALF_TURN]) @ np.diag([5.625, 5.625, 20.0])
        rows = np.column_stack([affine, np.zeros(3)]).ravel()
        data = patched((SFORM_CODE, "h", 1), (SROW, "12f", tuple(rows)), data=data)["a.nii"]
    return {"a.nii": data}


@pytest.mark.parametrize("sform", [False, True])
@pytest.mark.parametrize("excess", [1e-6, 1e-5, 1e-4, 1e-3])
def test_quaternion_within_rounding_of_unit_length_is_read(excess: float, sform: bool) -> None:
    scale = (1 + excess) ** 0.5
    b, c, d = HALF_TURN
    volume = read(turned((b * scale, c * scale, d), sform))
    exact = read(turned(HALF_TURN, sform))
    np.testing.assert_array_equal(volume.hu, exact.hu)
    np.testing.assert_allclose(volume.affine, exact.affine, atol=1e-3)
    np.testing.assert_allclose(volume.spacing_mm, (20.0, 5.625, 5.625), rtol=1e-6)
    assert volume.qc_flags == exact.qc_flags == ()


@pytest.mark.parametrize(
    "quaternion", [(3.0, 3.0, 3.0), (0.8, 0.8, 0.0), (1.03, 0.0, 0.0), (float("nan"), 0, 0)]
)
@pytest.mark.parametrize(
    ("sform", "reason"), [(False, "missing_position"), (True, "orientation_conflict")]
)
def test_quaternion_far_from_unit_length_is_refused(
    quaternion: tuple[float, float, float], sform: bool, reason: str
) -> None:
    with pytest.raises(StudyError, match="not a unit quaternion") as error:
        read(turned(quaternion, sform))
    assert error.value.reason == reason


# ---- voxel size


@pytest.mark.parametrize(
    "spacing_mm",
    [
        (2800.0, 2800.0, 5000.0),
        (0.0028, 0.0028, 0.005),
        (0.7, 0.7, 25.0),
        (12.0, 12.0, 5.0),
        (0.05, 0.05, 1.0),
        (0.7, 0.7, 0.05),
    ],
)
@pytest.mark.parametrize("unit", [0, 2])
def test_impossible_voxel_size_is_implausible_spacing(
    spacing_mm: tuple[float, float, float], unit: int
) -> None:
    assert reason_of(resized(spacing_mm, unit)) == "implausible_spacing"


@pytest.mark.parametrize(
    "spacing_mm",
    [
        (0.15, 0.15, 0.2),
        (8.0, 8.0, 18.0),
        (0.7, 5.0, 0.7),
        (4.0, 0.9, 0.9),
        (0.1, 0.1, 0.1),
        (10.000001, 10.000001, 20.000002),
    ],
)
def test_plausible_voxel_size_is_read_in_every_plane(
    spacing_mm: tuple[float, float, float],
) -> None:
    x, y, z = spacing_mm
    volume = read(resized(spacing_mm))
    np.testing.assert_allclose(volume.spacing_mm, (z, y, x), rtol=1e-6)
    assert volume.has_known_spacing


def test_spacing_is_checked_along_the_axes_of_the_patient() -> None:
    """Stored sagittally: the file's third axis runs to the left, its first from front to back."""
    affine = np.zeros((4, 4))
    affine[1, 0], affine[2, 1], affine[0, 2], affine[3, 3] = 0.7, 15.0, 0.7, 1
    turned_voxels = np.ascontiguousarray(np.transpose(voxels(), (1, 2, 0)))
    assert read({"a.nii": nib.Nifti1Image(turned_voxels, affine).to_bytes()}).spacing_mm[
        0
    ] == pytest.approx(15.0)
    affine[2, 1], affine[0, 2] = 0.7, 15.0
    assert (
        reason_of({"a.nii": nib.Nifti1Image(turned_voxels, affine).to_bytes()})
        == "implausible_spacing"
    )


def test_implausible_spacing_goes_after_position_and_before_conflict_and_rescale() -> None:
    huge = resized((2800.0, 2800.0, 5000.0))["a.nii"]
    assert (
        reason_of(patched((PIXDIM + 4, "3f", (1.0, 1.0, 1.0)), data=huge)) == "implausible_spacing"
    )
    assert reason_of(patched((SLOPE, "f", float("inf")), data=huge)) == "implausible_spacing"
    assert reason_of(patched((UNITS, "B", 1), data=huge)) == "missing_position"
    assert reason_of(patched((UNITS, "B", 3), data=huge)) == "missing_position"
    mask = nib.Nifti1Image((voxels() > 0).astype("u1"), np.diag([99.0, 99.0, 99.0, 1.0]))
    assert reason_of({"a.nii": mask.to_bytes()}) == "label_map"


def test_unit_voxels_without_unit_have_unknown_spacing() -> None:
    volume = read(resized((1.0, 1.0, 1.0), unit=0))
    assert not volume.has_known_spacing
    assert not nifti.has_spacing(resized((1.0, 1.0, 1.0), unit=0)["a.nii"])
    assert not nifti.has_spacing(
        gz(resized((1.0, 1.0, 1.0), unit=8)["a.nii"])
    )  # seconds are not a unit of length


@pytest.mark.parametrize(
    ("spacing_mm", "unit"),
    [((1.0, 1.0, 1.0), 2), ((0.7, 0.7, 1.0), 0), ((1.0, 1.0, 2.5), 0), ((1.0, 1.0, 1.001), 0)],
)
def test_voxels_with_a_unit_or_another_size_have_known_spacing(
    spacing_mm: tuple[float, float, float], unit: int
) -> None:
    objects = resized(spacing_mm, unit)
    assert read(objects).has_known_spacing
    assert nifti.has_spacing(objects["a.nii"])


def test_grey_values_of_nominal_voxels_have_unknown_spacing() -> None:
    grey = np.clip((voxels().astype(float) + 1000) / 1400 * 255, 0, 255).astype(np.uint8)
    image = nib.Nifti1Image(grey, np.eye(4))
    assert not nifti.read_grey8(
        patched((UNITS, "B", 0), data=image.to_bytes())["a.nii"]
    ).has_known_spacing
    assert nifti.read_grey8(
        patched((UNITS, "B", 2), data=image.to_bytes())["a.nii"]
    ).has_known_spacing


# ---- label maps are told by their HU


@pytest.mark.parametrize(
    ("dtype", "slope", "intercept"),
    [
        ("u2", 1.0, -1024.0),
        ("u2", 2.0, -1024.0),
        ("u4", 1.0, -1024.0),
        ("f4", 1.0, -1024.0),
        ("i2", 1.0, -1024.0),
    ],
)
def test_ct_of_few_values_stored_above_0_is_not_a_label_map(
    dtype: str, slope: float, intercept: float
) -> None:
    array = ((coarse() - intercept) / slope).astype(dtype)
    assert len(np.unique(array)) <= nifti.MAX_LABELS
    assert array.min() >= 0
    expected = read(stored(coarse().astype("i2"))).hu
    np.testing.assert_array_equal(read(with_rescale(array, slope, intercept)).hu, expected)


@pytest.mark.parametrize("dtype", ["u1", "i2", "u2", "i4", "i8", "f4", "f8"])
@pytest.mark.parametrize(
    ("slope", "intercept"),
    [(1.0, 0.0), (0.0, 0.0), (float("nan"), 0.0), (1 / 255, 0.0), (2.0, 1.0)],
)
def test_few_whole_numbers_from_0_hu_on_are_a_label_map(
    dtype: str, slope: float, intercept: float
) -> None:
    array = (voxels() > 0).astype(dtype) + (voxels() > 40).astype(dtype)
    assert reason_of(with_rescale(array, slope, intercept)) == "label_map"


@pytest.mark.parametrize(
    ("slope", "intercept"), [(float("inf"), 0.0), (1.0, float("inf")), (1.0, float("nan"))]
)
def test_label_map_goes_before_missing_rescale(slope: float, intercept: float) -> None:
    assert reason_of(with_rescale((voxels() > 0).astype("u1"), slope, intercept)) == "label_map"
    assert reason_of(with_rescale(voxels(), slope, intercept)) == "missing_rescale"


@pytest.mark.parametrize("fill", [-32768.0, float("nan")])
def test_label_map_with_a_fill_value_is_a_label_map(fill: float) -> None:
    labels = (voxels() > 0).astype("f4")
    labels[:3] = fill
    assert reason_of(stored(labels)) == "label_map"


# ---- fill values outside the scan


def ring() -> np.ndarray:
    """Outside the circle of reconstruction, in the file's axis order."""
    x, y = np.mgrid[:64, :64]
    return np.broadcast_to(((x - 31.5) ** 2 + (y - 31.5) ** 2 > 32**2)[..., None], voxels().shape)


def corner() -> np.ndarray:
    """A wedge that a turned box leaves, whole slices among it."""
    x, y, z = np.indices(voxels().shape)
    return np.asarray(x + y + 4 * z < 20)


def frame() -> np.ndarray:
    """One voxel round every slice, as resampling leaves it."""
    out = np.ones(voxels().shape, bool)
    out[1:-1, 1:-1] = False
    return out


OUTSIDE = {"ring": ring, "corner": corner, "frame": frame}


def filled(kind: str, fill: float, dtype: str = "i2") -> Objects:
    return stored(np.where(OUTSIDE[kind](), fill, voxels()).astype(dtype))


def check_padded(volume: Volume, kind: str) -> None:
    air = read(filled(kind, -1024)).hu
    assert volume.qc_flags == ("padding",)
    np.testing.assert_array_equal(volume.hu, air)


@pytest.mark.parametrize("kind", OUTSIDE)
@pytest.mark.parametrize("fill", [-32768, -32767, -10000, -9999, -3024, -2048, -2000])
def test_fill_value_far_below_air_becomes_air(kind: str, fill: int) -> None:
    check_padded(read(filled(kind, fill)), kind)


@pytest.mark.parametrize(
    "fill", [-32768.0, -1e6, -3e38, float("nan"), float("inf"), float("-inf"), 62512.0]
)
@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_fill_value_of_floats_becomes_air(fill: float, dtype: str) -> None:
    check_padded(read(filled("ring", fill, dtype)), "ring")


def test_lowest_double_as_fill_value_becomes_air() -> None:
    check_padded(read(filled("ring", float(np.finfo("f8").min), "f8")), "ring")


@pytest.mark.parametrize(("dtype", "fill"), [("i2", -32768), ("u2", 63536), ("i4", -32768)])
def test_fill_value_before_the_rescale_becomes_air(dtype: str, fill: int) -> None:
    """As stored -32768 with an intercept of -1024, or -2000 that was taken for unsigned."""
    array = np.where(ring(), fill, voxels().astype(int) + 1024).astype(dtype)
    check_padded(read(with_rescale(array, 1.0, -1024.0)), "ring")


def test_values_between_fill_and_air_are_air_too() -> None:
    """Interpolation mixes the fill value with the scan at its edge."""
    hu = np.where(ring(), -32768.0, voxels())
    hu[1:-1, 1:-1] = (hu[:-2, 1:-1] + hu[1:-1, 1:-1] + hu[2:, 1:-1]) / 3
    volume = read(stored(hu.astype("f4")))
    assert volume.qc_flags == ("padding",)
    assert volume.hu.min() >= -1500
    np.testing.assert_array_equal(volume.hu[:, 0, 0], -1024)


def test_padded_volume_of_whole_numbers_stays_int16() -> None:
    assert read(filled("ring", -32768)).hu.dtype == np.int16
    shifted = with_rescale(
        np.where(ring(), -32768, voxels().astype(int) + 1024).astype("i2"), 1.0, -1024.0
    )
    np.testing.assert_array_equal(read(shifted).hu, read(filled("ring", -1024)).hu)


def test_dark_noise_inside_is_kept_next_to_padding() -> None:
    """A streak of metal is not padding."""
    array = np.where(ring(), -3024, voxels()).astype("i2")
    array[30, 30:33, 6] = -1700
    volume = read(stored(array))
    assert volume.qc_flags == ("padding",)
    assert (volume.hu == -1700).sum() == 3
    assert volume.hu[volume.hu != -1700].min() == -1024


def test_volume_without_fill_keeps_its_bits_and_has_no_flag() -> None:
    array = voxels().copy()
    array[0, ::7] = -1400  # noise of air at the edge
    volume = read(stored(array))
    assert volume.qc_flags == ()
    assert (volume.hu == -1400).sum() == 10 * 12


@pytest.mark.parametrize("fill", [-32768.0, float("nan"), float("inf"), 1e6])
def test_values_off_the_scale_inside_the_body_are_not_hu(fill: float) -> None:
    assert reason_of(stored(np.where(voxels() > 0, fill, voxels()).astype("f4"))) == "not_hu"
    hole = voxels().astype("f4")
    hole[28:36, 28:36] = fill
    assert reason_of(stored(hole)) == "not_hu"


@pytest.mark.parametrize("slope", [10.0, 100.0])
def test_wrong_slope_is_not_padding(slope: float) -> None:
    """Air outside is then as dark as a fill value; so is the lung, which is inside."""
    assert reason_of(with_rescale(np.maximum(voxels(), -1024), slope, 0.0)) == "not_hu"
