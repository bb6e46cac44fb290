"""Readers, geometry, windowing and lungs."""

import gzip
from io import BytesIO
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from encoded_ct import ENCODERS, as_nifti, encoded
from PIL import Image
from pydicom.uid import RLELossless

from covtanet.ct import dicom, dicom_headers, lung, nifti
from covtanet.ct.gzip_stream import compress
from covtanet.ct.hounsfield import check_hu
from covtanet.ct.volume import Volume, canonical_volume
from covtanet.ct.window import (
    WindowConfig,
    from_input,
    mask_to_input,
    pixel_aspect,
    spread_slices,
    thin_slices,
    to_input,
)
from covtanet.errors import REJECTION_REASONS, StudyError
from covtanet.phantoms.damage import DICOM_DAMAGE, OTHER_DAMAGE
from covtanet.phantoms.dicom_writer import write_series
from covtanet.phantoms.encodings import dicom_objects
from covtanet.phantoms.phantom import Phantom, PhantomConfig, make_phantom

WINDOW = WindowConfig(size_px=64)


@pytest.mark.parametrize("axes", ["LPS", "RAS", "SPL", "PSR", "AIR"])
def test_every_axis_order_gives_the_same_volume(mild: Phantom, axes: str) -> None:
    volume = nifti.read(as_nifti(mild, axes))
    np.testing.assert_array_equal(volume.hu, mild.hu)
    np.testing.assert_allclose(volume.affine, mild.affine, atol=1e-4)


def test_dicom_gives_the_same_volume_as_nifti(mild: Phantom) -> None:
    objects = dicom_objects(mild, 5)
    volume = dicom.read_series(
        [objects[k] for k in np.random.default_rng(0).permutation(len(objects))]
    )
    np.testing.assert_array_equal(volume.hu, mild.hu)
    np.testing.assert_allclose(volume.affine, mild.affine, atol=1e-3)
    assert volume.hu.dtype == np.int16


def test_dicom_affine_points_at_every_slice(mild: Phantom) -> None:
    """Independent of the reader: the first pixel of each slice lies at its ImagePositionPatient."""
    objects = dicom_objects(mild, 5)
    volume = dicom.read_series(objects)
    for index, data in enumerate(objects):
        position = pydicom.dcmread(BytesIO(data)).ImagePositionPatient
        np.testing.assert_allclose(volume.affine @ [index, 0, 0, 1], [*position, 1], atol=1e-3)


def test_prone_dicom_is_turned_to_the_canonical_axes(mild: Phantom) -> None:
    flipped = mild.affine.copy()
    flipped[:, 3] = mild.affine @ [0, mild.hu.shape[1] - 1, mild.hu.shape[2] - 1, 1]
    flipped[:3, 1] *= -1
    flipped[:3, 2] *= -1
    objects = write_series(mild.hu[:, ::-1, ::-1], flipped, study_uid="1.2", series_uid="1.2.3")
    np.testing.assert_array_equal(dicom.read_series(objects).hu, mild.hu)


def test_stack_with_normal_to_the_feet_is_turned(mild: Phantom) -> None:
    mirrored = mild.affine.copy()
    mirrored[:, 3] = mild.affine @ [0, 0, mild.hu.shape[2] - 1, 1]
    mirrored[:3, 2] *= -1
    objects = write_series(mild.hu[:, :, ::-1], mirrored, study_uid="1.2", series_uid="1.2.3")
    volume = dicom.read_series(objects)
    np.testing.assert_array_equal(volume.hu, mild.hu)
    np.testing.assert_allclose(volume.affine, mild.affine, atol=1e-3)


def test_rescale_is_applied_slice_by_slice(mild: Phantom) -> None:
    def change(index: int, dataset: pydicom.Dataset) -> None:
        stored = dataset.pixel_array.astype(np.int32)
        dataset.RescaleIntercept = str(-1024 - index)
        dataset.PixelData = (stored + index).astype("<i2").tobytes()

    objects = []
    for index, data in enumerate(dicom_objects(mild, 5)):
        dataset = pydicom.dcmread(BytesIO(data))
        change(index, dataset)
        buffer = BytesIO()
        dataset.save_as(buffer)
        objects.append(buffer.getvalue())
    np.testing.assert_array_equal(dicom.read_series(objects).hu, mild.hu)


@pytest.mark.parametrize("syntax", [*ENCODERS, RLELossless])
def test_lossless_syntaxes_decode_to_equal_pixels(mild: Phantom, syntax: str) -> None:
    objects = encoded(dicom_objects(mild, 5)[:10], syntax)
    np.testing.assert_array_equal(dicom.read_series(objects).hu, mild.hu[:10])


def test_bits_above_bits_stored_are_dropped(mild: Phantom) -> None:
    """Twelve signed bits in sixteen, with overlay bits above them."""
    objects = []
    for data in dicom_objects(mild, 5):
        dataset = pydicom.dcmread(BytesIO(data))
        hu = np.clip(dataset.pixel_array.astype(np.int32) - 1024, -1024, 1000)
        dataset.BitsStored, dataset.HighBit, dataset.RescaleIntercept = 12, 11, "0"
        dataset.PixelData = ((hu & 0x0FFF) | 0x5000).astype("<u2").tobytes()
        buffer = BytesIO()
        dataset.save_as(buffer)
        objects.append(buffer.getvalue())
    np.testing.assert_array_equal(dicom.read_series(objects).hu, np.clip(mild.hu, -1024, 1000))


@pytest.mark.parametrize("reason", DICOM_DAMAGE)
def test_damaged_dicom_is_refused_for_its_reason(mild: Phantom, reason: str) -> None:
    with pytest.raises(StudyError) as error:
        dicom.read_series(DICOM_DAMAGE[reason](dicom_objects(mild, 5)))
    assert error.value.reason == reason
    assert reason in REJECTION_REASONS


@pytest.mark.parametrize(
    ("name", "value"), [("RescaleSlope", "abc"), ("RescaleSlope", "1\\2"), ("PixelSpacing", "0.7")]
)
def test_header_value_that_is_not_a_number_is_unreadable(
    mild: Phantom, name: str, value: str
) -> None:
    objects = []
    for data in dicom_objects(mild, 5):
        original = pydicom.dcmread(BytesIO(data))
        held = (
            str(original[name].value)
            if name == "RescaleSlope"
            else "\\".join(map(str, original[name].value))
        )
        tag = original[name].tag
        raw = bytes([tag.group & 255, tag.group >> 8, tag.element & 255, tag.element >> 8]) + b"DS"
        place = data.index(raw)
        length = int.from_bytes(data[place + 6 : place + 8], "little")
        assert held.encode() in data[place + 8 : place + 8 + length]
        text = value.encode() + b" " * (len(value) % 2)
        objects.append(
            data[: place + 6] + len(text).to_bytes(2, "little") + text + data[place + 8 + length :]
        )
    with pytest.raises(StudyError, match=name) as error:
        dicom.read_series(objects)
    assert error.value.reason == "unreadable"


def test_label_map_and_chest_without_lung_are_refused(mild: Phantom) -> None:
    with pytest.raises(StudyError, match="a label map") as error:
        nifti.read(OTHER_DAMAGE["label_map"](mild)[1])
    assert error.value.reason == "label_map"
    with pytest.raises(StudyError, match="cm2 of lung") as error:
        lung.find_lungs(nifti.read(OTHER_DAMAGE["no_lung"](mild)[1]))
    assert error.value.reason == "no_lung"


def damaged_nifti(mild: Phantom, kind: str) -> bytes:
    plain = as_nifti(mild)
    gz = compress(plain)
    wrong_checksum = bytearray(gz)
    wrong_checksum[-6] ^= 0xFF
    header = bytearray(plain)
    header[252:256] = bytes(4)  # qform_code, sform_code
    small = Phantom(
        hu=mild.hu[:6],
        affine=mild.affine,
        lesion_mask=mild.lesion_mask[:6],
        lung_mask=mild.lung_mask[:6],
    )
    shown = np.clip((mild.hu.astype(float) + 1000) / 1400 * 255, 0, 255)
    huge = bytearray(plain)
    huge[42:48] = np.array([32767, 32767, 32767], "<i2").tobytes()
    return {
        "unreadable": b"not a NIfTI file" * 50,
        "truncated": gz[: len(gz) // 2],
        "undecodable": bytes(wrong_checksum),
        "missing_position": bytes(header),
        "too_few_slices": as_nifti(small),
        "not_hu": as_nifti(
            Phantom(
                hu=shown.astype(np.int16),
                affine=mild.affine,
                lesion_mask=mild.hu > 0,
                lung_mask=mild.hu > 0,
            ),
            dtype=np.uint8,
        ),
        "too_large": bytes(huge),
    }[kind]


@pytest.mark.parametrize(
    "reason",
    [
        "unreadable",
        "truncated",
        "undecodable",
        "missing_position",
        "too_few_slices",
        "not_hu",
        "too_large",
    ],
)
def test_damaged_nifti_is_refused_for_its_reason(mild: Phantom, reason: str) -> None:
    with pytest.raises(StudyError) as error:
        nifti.read(damaged_nifti(mild, reason))
    assert error.value.reason == reason


def test_slope_and_intercept_are_applied(mild: Phantom) -> None:
    image = nib.Nifti1Image.from_bytes(as_nifti(mild))
    stored = nib.Nifti1Image((np.asarray(image.dataobj) + 1024) // 2, image.affine)
    stored.header.set_slope_inter(2.0, -1024.0)
    volume = nifti.read(stored.to_bytes())
    assert np.abs(volume.hu.astype(int) - mild.hu).max() <= 1


def test_masks_go_back_to_the_axis_order_of_their_source(mild: Phantom) -> None:
    source = as_nifti(mild, "PSR")
    volume = nifti.read(source)
    written = nib.Nifti1Image.from_bytes(gzip.decompress(nifti.write(volume.hu, volume.source)))
    original = nib.Nifti1Image.from_bytes(source)
    np.testing.assert_array_equal(np.asarray(written.dataobj), np.asarray(original.dataobj))
    np.testing.assert_allclose(written.affine, original.affine, atol=1e-4)


def test_sheared_affine_is_gantry_tilt(mild: Phantom) -> None:
    affine = mild.affine.copy()
    affine[1, 0] = 0.3 * affine[2, 0]
    with pytest.raises(StudyError, match="degrees off their normal") as error:
        canonical_volume(mild.hu, affine)
    assert error.value.reason == "gantry_tilt"


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


def test_thinned_slices_stand_for_all_lung_slices() -> None:
    chosen, extent_mm = thin_slices(np.arange(10, 110), 1.0, 2.5)
    assert (np.diff(chosen) == 3).all()
    assert extent_mm.sum() == 100


def test_thick_slices_are_all_segmented() -> None:
    chosen, extent_mm = thin_slices(np.arange(4, 30), 8.0, 2.5)
    assert chosen.tolist() == list(range(4, 30))
    assert set(extent_mm.tolist()) == {8.0}


def test_slices_spread_from_end_to_end() -> None:
    assert spread_slices(5, 5).tolist() == [0, 1, 2, 3, 4]
    assert spread_slices(101, 3).tolist() == [0, 50, 100]
    assert spread_slices(1, 3).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("involvement", "consolidation"), [(0.0, 0.3), (0.1, 0.3), (0.3, 0.5), (0.6, 0.3), (0.6, 0.6)]
)
@pytest.mark.parametrize("seed", [1, 2])
def test_involvement_is_within_three_hundredths_of_the_truth(
    involvement: float, consolidation: float, seed: int
) -> None:
    phantom = make_phantom(
        PhantomConfig(seed=seed, involvement=involvement, consolidation=consolidation)
    )
    volume = canonical_volume(phantom.hu, phantom.affine)
    lungs = lung.find_lungs(volume)
    measured = lung.measure_involvement(lungs, phantom.lesion_mask, volume.voxel_ml)
    assert not lungs.is_partial
    assert measured.involvement == pytest.approx(phantom.involvement, abs=0.03)


def test_lungs_cut_by_the_field_of_view_are_partial_and_have_null_involvement(
    mild: Phantom,
) -> None:
    volume = canonical_volume(mild.hu[8:18], mild.affine)
    lungs = lung.find_lungs(volume)
    assert lungs.is_partial
    assert (
        lung.measure_involvement(lungs, mild.lesion_mask[8:18], volume.voxel_ml).involvement is None
    )


def test_airways_are_not_lung(mild_volume: Volume, mild: Phantom) -> None:
    lungs = lung.find_lungs(mild_volume)
    trachea = (mild.hu < -950) & ~mild.lung_mask
    inside = trachea[:, 40:90, 55:75]
    assert inside.sum() > 50
    assert lungs.lung_mask[:, 40:90, 55:75][inside].mean() < 0.25


def test_phantoms_follow_from_their_seed() -> None:
    config = PhantomConfig(
        seed=3, involvement=0.2, size_px=64, num_slices=12, pixel_mm=5.6, slice_mm=18
    )
    one, same, other = (
        make_phantom(config),
        make_phantom(config),
        make_phantom(PhantomConfig(**{**vars(config), "seed": 4})),
    )
    np.testing.assert_array_equal(one.hu, same.hu)
    assert (one.hu != other.hu).any()
    assert one.involvement == pytest.approx(0.2, abs=0.01)


@pytest.mark.filterwarnings("ignore")
def test_error_message_of_a_reader_does_not_quote_the_input(
    mild: Phantom, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """pydicom quotes a value that it cannot convert, in its error, its log and its warnings."""
    objects = []
    for data in dicom_objects(mild, 5):
        place = data.index(b"\x28\x00\x52\x10DS")
        objects.append(
            data[: place + 6] + b"\x08\x00CANARYXX" + data[place + 8 + data[place + 6] :]
        )
    with pytest.raises(StudyError, match="RescaleIntercept of an object is not a number") as error:
        dicom.read_series(objects)
    output = capfd.readouterr()
    assert "CANARY" not in str(error.value) + caplog.text + output.out + output.err


def test_uid_that_names_a_patient_is_replaced(mild: Phantom) -> None:
    dataset = pydicom.dcmread(BytesIO(dicom_objects(mild, 5)[0]))
    buffer = BytesIO()
    dataset.save_as(buffer)
    data = buffer.getvalue().replace(str(dataset.SeriesInstanceUID).encode()[:8], b"DOE^JOHN")
    identity = dicom_headers.read_identity(data, is_whole=True)
    assert identity is not None
    assert identity.series_uid.startswith("invalid-")
    assert "DOE" not in repr(identity)


def test_uid_cut_by_the_end_of_the_header_gives_no_identity(mild: Phantom) -> None:
    data = dicom_objects(mild, 5)[0]
    whole = dicom_headers.read_identity(data)
    assert whole is not None
    place = data.rindex(whole.series_uid.encode())
    for cut in range(place, place + len(whole.series_uid) + 1):
        assert dicom_headers.read_identity(data[:cut]) is None


@pytest.mark.parametrize(("degrees", "is_refused"), [(0.3, False), (1.0, True), (16.5, True)])
def test_tilt_is_refused_above_half_a_degree(
    mild: Phantom, degrees: float, is_refused: bool
) -> None:
    affine = mild.affine.copy()
    affine[1, 0] = np.tan(np.radians(degrees)) * affine[2, 0]
    objects = write_series(mild.hu, affine, study_uid="1.2", series_uid="1.2.3")
    if not is_refused:
        assert dicom.read_series(objects).hu.shape == mild.hu.shape
        return
    with pytest.raises(StudyError, match="off their normal") as error:
        dicom.read_series(objects)
    assert error.value.reason == "gantry_tilt"


def test_gzip_of_several_members_is_read_and_nan_is_not_hu(mild: Phantom) -> None:
    plain = as_nifti(mild)
    half = len(plain) // 2
    both = compress(plain[:half]) + compress(plain[half:])
    np.testing.assert_array_equal(nifti.read(both).hu, mild.hu)
    hu = mild.hu.astype(np.float32)
    hu[13, 5, 5] = np.nan
    with pytest.raises(StudyError, match="NaN or infinite") as error:
        check_hu(hu)
    assert error.value.reason == "not_hu"


def test_real_series_are_read_if_they_exist() -> None:
    from repository import REAL_DATA

    if not (REAL_DATA / "dicom").exists():
        pytest.skip("the real CT is not on this machine")
    folder: Path = REAL_DATA / "dicom" / "lungfcp-01-0001"
    volume = dicom.read_series([path.read_bytes() for path in folder.iterdir()])
    assert volume.hu.shape == (10, 512, 512)
    assert volume.spacing_mm == pytest.approx((1.0, 0.759765625, 0.759765625))
    assert lung.find_lungs(volume).is_partial
