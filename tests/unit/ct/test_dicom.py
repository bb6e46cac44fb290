"""Geometry, pixels, identities and refusals of DICOM series."""

from io import BytesIO

import numpy as np
import pydicom
import pytest
from encoded_ct import ENCODERS, encoded
from pydicom.uid import RLELossless

from covtanet.ct import dicom, dicom_headers
from covtanet.errors import REJECTION_REASONS, StudyError
from covtanet.phantoms.damage import DICOM_DAMAGE
from covtanet.phantoms.dicom_writer import write_series
from covtanet.phantoms.encodings import dicom_objects
from covtanet.phantoms.phantom import Phantom


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
