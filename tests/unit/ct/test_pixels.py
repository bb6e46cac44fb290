"""Stored bits and bytes: HighBit, surplus bytes, objects without preamble, repeated objects."""

import numpy as np
import pydicom
import pytest
from odd_dicom import (
    bare,
    changed,
    datasets,
    item,
    pixels,
    put,
    read,
    reason_of,
    sets,
    to_bytes,
    with_groups,
    with_values,
)
from pydicom.dataset import FileDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
)
from sound_input import phantom

from covtanet.ct import dicom


def upper_bits(shift: int, is_signed: bool, bits: int = 12) -> list[FileDataset]:
    """Samples in the upper bits, as ACR-NEMA allowed."""

    def change(index: int, dataset: FileDataset) -> None:
        values = (
            np.clip(phantom().hu[index].astype(int) + (0 if is_signed else 1024), -2048, 4095)
            << shift
        )
        dataset.BitsStored, dataset.HighBit = bits, bits + shift - 1
        dataset.PixelRepresentation, dataset.RescaleIntercept = (
            int(is_signed),
            "0" if is_signed else "-1024",
        )
        put(dataset, values)

    return changed(change)


@pytest.mark.parametrize("is_signed", [True, False])
@pytest.mark.parametrize("shift", [0, 1, 3, 4])
def test_samples_in_the_upper_bits_are_read_right(shift: int, is_signed: bool) -> None:
    np.testing.assert_array_equal(read(upper_bits(shift, is_signed)).hu, phantom().hu)


@pytest.mark.parametrize(
    ("bits_stored", "high_bit"),
    [(12, 15), (12, 14), (16, 11), (12, 16), (12, 3), (16, 17), (10, 12)],
)
def test_high_bit_that_contradicts_the_pixels_is_undecodable(
    bits_stored: int, high_bit: int
) -> None:
    def change(index: int, dataset: FileDataset) -> None:
        put(dataset, pixels(dataset) | 1)
        dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = bits_stored, high_bit, 0

    assert reason_of(changed(change)) == "undecodable"


def test_high_bit_of_compressed_pixels_must_fit_their_bits() -> None:
    import imagecodecs

    def change(index: int, dataset: FileDataset) -> None:
        stream = imagecodecs.jpeg2k_encode(
            pixels(dataset).view(np.uint16), level=0, reversible=True, codecformat="j2k"
        )
        dataset.PixelData = encapsulate([bytes(stream)])
        dataset["PixelData"].is_undefined_length = True
        dataset.file_meta.TransferSyntaxUID = JPEG2000Lossless
        dataset.PixelRepresentation, dataset.BitsStored = 0, 12

    series = changed(change)
    assert reason_of(series) == "undecodable"  # HighBit is still 15
    assert reason_of(changed(sets(HighBit=11), series)) == ""


def test_missing_high_bit_is_read() -> None:
    series = datasets()
    for dataset in series:
        del dataset.HighBit
    np.testing.assert_array_equal(read(series).hu, phantom().hu)


LINE = bytes(range(1, 129))  # 64 pixels


@pytest.mark.parametrize(
    ("surplus", "is_read"),
    [
        (bytes(2), True),
        (bytes(22), True),
        (b"\xff" * 22, True),
        (LINE[:126], True),
        (bytes(4096), True),
        (bytes(64 * 64 * 2), True),
        (LINE, False),
        (bytes(4096) + b"\x01\0", False),
    ],
)
def test_surplus_bytes_are_ignored_unless_they_may_be_pixels(surplus: bytes, is_read: bool) -> None:
    def change(index: int, dataset: FileDataset) -> None:
        dataset.PixelData = dataset.PixelData + surplus

    series = changed(change)
    if not is_read:
        assert reason_of(series) == "undecodable"
        return
    np.testing.assert_array_equal(read(series).hu, phantom().hu)


def test_surplus_bytes_after_the_frames_are_ignored() -> None:
    dataset = with_groups(lambda index, frame: None)
    dataset.PixelData = dataset.PixelData + bytes(300)
    np.testing.assert_array_equal(read([dataset]).hu, phantom().hu)


def test_repeated_object_is_read_once() -> None:
    objects = to_bytes(datasets())
    volume = dicom.read_series([*objects, objects[3], objects[4], objects[3]])
    np.testing.assert_array_equal(volume.hu, phantom().hu)
    assert volume.qc_flags == ("duplicate_objects",)


def test_same_instance_uid_with_other_bytes_is_a_duplicate_slice() -> None:
    twins = datasets()[3:6]
    twins[0].SeriesDescription = "another header"
    twins[1].InstanceNumber = 9  # as long as it was
    put(twins[2], pixels(twins[2]) + 1)
    for twin in twins:
        assert reason_of([*datasets(), twin]) == "duplicate_slice"


@pytest.mark.parametrize("has_meta", [True, False])
@pytest.mark.parametrize(
    "syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian]
)
def test_objects_without_preamble_are_read(syntax: str, has_meta: bool) -> None:
    volume = dicom.read_series(bare(datasets(), syntax, has_meta))
    np.testing.assert_array_equal(volume.hu, phantom().hu)
    assert volume.qc_flags == ()


def test_preamble_without_file_meta_is_read() -> None:
    objects = [bytes(128) + b"DICM" + data for data in bare(datasets(), has_meta=False)]
    np.testing.assert_array_equal(dicom.read_series(objects).hu, phantom().hu)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no DICOM",
        b"\x08\0",
        b"\x08\0no DICOM at all, " * 40,
        bytes(4000),
        b"\x02\0\0\0UL\x04\0" * 50,
    ],
)
def test_bytes_that_are_not_dicom_stay_unreadable(data: bytes) -> None:
    assert reason_of([*to_bytes(datasets()), data]) == "unreadable"


def test_bare_object_that_is_deflated_is_not_inflated() -> None:
    (data,) = bare(datasets()[:1])
    syntax = b"1.2.840.10008.1.2.1\0"
    assert syntax in data
    at = data.index(syntax) - 2
    deflated = (
        data[:at]
        + (22).to_bytes(2, "little")
        + b"1.2.840.10008.1.2.1.99"
        + data[at + 2 + len(syntax) :]
    )
    assert reason_of([deflated]) == "unsupported_syntax"


def test_bare_object_with_encapsulated_pixels_has_unsupported_syntax() -> None:
    series = datasets()
    for dataset in series:
        dataset.file_meta.TransferSyntaxUID = JPEG2000Lossless
        dataset.PixelData = encapsulate([b"stream"])
        dataset["PixelData"].is_undefined_length = True
    objects = to_bytes(series)
    without = [data[132 + 12 + int.from_bytes(data[140:144], "little") :] for data in objects]
    assert reason_of(without) == "unsupported_syntax"


@pytest.mark.parametrize("name", ["AcquisitionNumber", "KVP", "TemporalPositionIdentifier"])
def test_optional_attribute_that_is_not_a_number_is_ignored(name: str) -> None:
    objects = []
    for data in to_bytes(with_values(**{name: 7})):
        tag = pydicom.tag.Tag(name)
        raw = tag.group.to_bytes(2, "little") + tag.element.to_bytes(2, "little")
        at = data.index(raw, 132)
        assert data[at + 8 : at + 9] == b"7"
        objects.append(data[: at + 8] + b"x " + data[at + 10 :])
    volume = dicom.read_series(objects)
    np.testing.assert_array_equal(volume.hu, phantom().hu)


def replaced(data: bytes, name: str, old: bytes, new: bytes) -> bytes:
    """The value of an element of the same length, past every check of the writer."""
    tag = pydicom.tag.Tag(name)
    raw = tag.group.to_bytes(2, "little") + tag.element.to_bytes(2, "little")
    at = data.index(raw, 132) + 8
    assert data[at : at + len(old)] == old
    return data[:at] + new + data[at + len(old) :]


def test_senseless_optional_attribute_of_a_frame_is_ignored() -> None:
    groups = with_groups(
        lambda index, frame: setattr(frame, "CTXRayDetailsSequence", item(KVP="120"))
    )
    (data,) = to_bytes([groups])
    volume = dicom.read_series([replaced(data, "KVP", b"120", b"x20")])
    np.testing.assert_array_equal(volume.hu, phantom().hu)


def test_senseless_number_of_a_contrast_agent_is_ignored() -> None:
    (agent,) = item(
        CodeValue="1",
        CodingSchemeDesignator="99X",
        CodeMeaning="Iohexol",
        ContrastBolusAgentNumber=7,
    )
    objects = to_bytes(with_values(ContrastBolusAgentSequence=pydicom.Sequence([agent])))
    number = b"\x18\x00\x37\x93US\x02\x00\x07\x00"
    damaged = [data.replace(number, number[:4] + b"IS\x02\x00x ") for data in objects]
    assert damaged != objects
    assert dicom.read_series(damaged).qc_flags == ("contrast",)


def test_truncated_goes_before_mixed_patients() -> None:
    series = to_bytes(changed(lambda index, one: setattr(one, "PatientID", f"P{index % 2}")))
    series[3] = series[3][:-500]
    assert reason_of(series) == "truncated"


def test_truncated_goes_before_undecodable() -> None:
    series = to_bytes(
        changed(lambda index, one: setattr(one, "BitsStored", 40 if index == 1 else 16))
    )
    series[3] = series[3][:-500]
    assert reason_of(series) == "truncated"
