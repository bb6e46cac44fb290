"""SEG and SR of a series, read back by highdicom: voxels, positions, values, identities."""

import logging
import warnings
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from typing import Any

import highdicom as hd
import numpy as np
import pydicom
import pytest
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.tag import Tag
from sound_input import phantom, slices

from covtanet.ct import dicom
from covtanet.errors import StudyError
from covtanet.phantoms.encodings import dicom_objects
from covtanet.phantoms.phantom import Phantom
from covtanet.report.dicom_results import (
    LESION,
    LUNG,
    Finding,
    segmentation,
    structured_report,
    to_bytes,
)
from covtanet.report.dicom_source import TYPE_2
from covtanet.report.mask_frames import frames_of

FINDING = Finding(
    run_id="run",
    series_key="series",
    software_version="0.1",
    model="covtanet 1",
    lesion_volume_ml=310.25,
    lung_volume_ml=4890.5,
    involvement=0.0634,
    p_infected=0.98,
)


@pytest.fixture(scope="module")
def source(mild: Phantom) -> list[bytes]:
    return list(dicom_objects(mild, 5))


@pytest.fixture(scope="module")
def headers(source: list[bytes]) -> list[pydicom.Dataset]:
    ordered = [pydicom.dcmread(BytesIO(data), stop_before_pixels=True) for data in source]
    shuffled = np.random.default_rng(0).permutation(len(ordered))
    return [ordered[index] for index in shuffled]


def written(
    source: list[bytes], headers: list[pydicom.Dataset], mild: Phantom
) -> tuple[bytes, bytes]:
    grid = dicom.read_series(source).source
    lesion, lung = (
        frames_of(headers, grid.from_canonical(mask), grid.affine)
        for mask in (mild.lesion_mask, mild.lung_mask)
    )
    seg = segmentation(headers, lesion, lung, FINDING)
    return to_bytes(seg), to_bytes(structured_report(headers, seg, FINDING))


def test_segments_have_the_voxels_of_the_masks_at_their_positions(
    source: list[bytes], headers: list[pydicom.Dataset], mild: Phantom
) -> None:
    seg = hd.seg.segread(BytesIO(written(source, headers, mild)[0]))
    volume = dicom.read_series(source)
    position_of = {str(header.SOPInstanceUID): header for header in headers}
    truth = {LESION: mild.lesion_mask, LUNG: mild.lung_mask}
    uids = [str(header.SOPInstanceUID) for header in headers]
    for number, mask in truth.items():
        frames = seg.get_pixels_by_source_instance(uids, segment_numbers=[number])[..., 0]
        assert int(frames.sum()) == int(mask.sum()) > 100
        for uid, frame in zip(uids, frames, strict=True):
            header = position_of[uid]
            z = np.linalg.inv(volume.affine) @ [*map(float, header.ImagePositionPatient), 1.0]
            # The first voxel of this slice in the patient, by the volume's own affine.
            y, x = np.argwhere(frame)[0] if frame.any() else (0, 0)
            across, down = np.array(header.ImageOrientationPatient, float).reshape(2, 3)
            position_mm = np.array(header.ImagePositionPatient, float) + across * x * float(
                header.PixelSpacing[1]
            )
            position_mm += down * y * float(header.PixelSpacing[0])
            index = np.linalg.inv(volume.affine) @ [*position_mm, 1.0]
            assert (
                np.abs((volume.affine @ [*np.rint(index[:3]), 1.0])[:3] - position_mm).max() < 0.1
            )
            assert bool(mask[tuple(np.rint(index[:3]).astype(int))]) == bool(frame[y, x])
            assert round(float(z[0])) == round(float(index[0]))
    for item in seg.PerFrameFunctionalGroupsSequence:
        referenced = item.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        expected = position_of[str(referenced)].ImagePositionPatient
        actual = item.PlanePositionSequence[0].ImagePositionPatient
        assert np.abs(np.array(actual, float) - np.array(expected, float)).max() < 0.1


def test_report_has_the_values_of_the_ledger_and_refers_to_the_segments(
    source: list[bytes], headers: list[pydicom.Dataset], mild: Phantom
) -> None:
    seg, report = (pydicom.dcmread(BytesIO(data)) for data in written(source, headers, mild))
    read = hd.sr.Comprehensive3DSR.from_dataset(report)
    groups = read.content.get_volumetric_roi_measurement_groups()
    values = {
        (group.tracking_identifier, str(each.name.meaning)): float(each.value)
        for group in groups
        for each in group.get_measurements()
    }
    assert values == {
        ("lesion", "Volume"): 310.25,
        ("lesion", "Share of the lung that is lesion"): 0.0634,
        ("lesion", "Probability of infection by the network"): 0.98,
        ("lung", "Volume"): 4890.5,
    }
    for group in groups:
        assert group.referenced_segment.referenced_sop_instance_uid == seg.SOPInstanceUID
    assert report.StudyInstanceUID == seg.StudyInstanceUID == headers[0].StudyInstanceUID
    assert written(source, headers, mild)[1] != b""


def test_equal_results_have_equal_uids(
    source: list[bytes], headers: list[pydicom.Dataset], mild: Phantom
) -> None:
    first, second = (pydicom.dcmread(BytesIO(written(source, headers, mild)[0])) for _ in range(2))
    assert first.SOPInstanceUID == second.SOPInstanceUID
    assert replace(FINDING, run_id="other").uid("segmentation") != FINDING.uid("segmentation")


def test_mask_of_another_grid_is_refused(headers: list[pydicom.Dataset], mild: Phantom) -> None:
    affine = np.diag([1.0, 1.0, 1.0, 1.0])
    with pytest.raises(StudyError, match="grid of its mask"):
        frames_of(headers, mild.lesion_mask, affine)


Edit = Callable[[Dataset, int], None]


def raw(name: str, representation: str, value: bytes) -> Edit:
    """Return an edit that stores a value as it is, whatever the VR of the attribute."""

    def edit(dataset: Dataset, number: int) -> None:
        tag = Tag(name)
        dataset._dict[tag] = RawDataElement(tag, representation, len(value), value, 0, False, True)

    return edit


def values(**named: object) -> Edit:
    def edit(dataset: Dataset, number: int) -> None:
        for name, value in named.items():
            setattr(dataset, name, value)

    return edit


def without(*names: str, every: int = 1) -> Edit:
    def edit(dataset: Dataset, number: int) -> None:
        for name in names if number % every == 0 else ():
            if name in dataset:
                delattr(dataset, name)

    return edit


def tilt(dataset: Dataset, number: int) -> None:
    dataset.ImageOrientationPatient = [
        "1",
        f"{3e-4 * (number % 2):.8f}",
        "0",
        f"{-3e-4 * (number % 2):.8f}",
        "1",
        "0",
    ]


def renumber_frame_of_reference(dataset: Dataset, number: int) -> None:
    dataset.FrameOfReferenceUID = f"1.2.{number + 1}"


def results_of(*edits: Edit) -> tuple[Dataset, Dataset]:
    """Return SEG and SR, read back by highdicom, of a series with edited headers and box masks."""
    headers = []
    warnings.simplefilter("ignore")  # pydicom warns of what the edits store
    for number, data in enumerate(slices()):
        dataset = pydicom.dcmread(BytesIO(data))
        for edit in edits:
            edit(dataset, number)
        buffer = BytesIO()
        dataset.save_as(buffer, implicit_vr=False, little_endian=True, enforce_file_format=False)
        headers.append(
            pydicom.dcmread(BytesIO(buffer.getvalue()), stop_before_pixels=True, force=True)
        )
    lung = np.zeros((len(headers), headers[0].Rows, headers[0].Columns), bool)
    lung[2:-2, 20:40, 30:50] = True
    lesion = lung.copy()
    lesion[:, 30:] = False
    seg = segmentation(headers, lesion, lung, FINDING)
    report = structured_report(headers, seg, FINDING)
    return hd.seg.segread(BytesIO(to_bytes(seg))), hd.sr.srread(BytesIO(to_bytes(report)))


MADE_UP = ("StudyInstanceUID", "SOPInstanceUID", "SOPClassUID", "Modality", "FrameOfReferenceUID")


@pytest.mark.parametrize(
    "edit",
    [
        without(
            *TYPE_2, "SliceThickness", "Manufacturer", "SeriesNumber", "InstanceNumber", "ImageType"
        ),
        without(*TYPE_2, every=2),
        without(*MADE_UP),
        without("StudyInstanceUID", "FrameOfReferenceUID", every=2),
        values(
            **dict.fromkeys(
                (*TYPE_2, "PositionReferenceIndicator", "Manufacturer", "SliceThickness")
            )
        ),
        values(
            PatientBirthDate="1980", StudyDate="yesterday", StudyTime="25:61", PatientSex="male"
        ),
        values(PatientID="x" * 200, AccessionNumber="a" * 40, StudyID="s" * 40),
        values(
            SeriesInstanceUID="1.2.abc", StudyInstanceUID="hello world", FrameOfReferenceUID="x y"
        ),
        values(SeriesInstanceUID="1.02.003", SOPInstanceUID="1." * 50 + "2"),
        values(SOPInstanceUID="1.2.3"),
        values(SpecificCharacterSet=""),
        values(SpecificCharacterSet="ISO_IR 6"),
        values(SpecificCharacterSet="no set"),
        values(SliceThickness="0"),
        raw("SliceThickness", "DS", b"5mm "),
        raw("SpacingBetweenSlices", "DS", b"abc "),
        raw("PatientWeight", "DS", b"70kg"),
        raw("PatientAge", "AS", b"forty "),
        raw("PatientName", "OB", b"DOE^J "),
        raw("ReferringPhysicianName", "SQ", b""),
        values(LossyImageCompression=""),
        values(
            LossyImageCompression="01",
            LossyImageCompressionRatio="10",
            LossyImageCompressionMethod="ISO_10918_1",
        ),
        values(Manufacturer="M" * 200, SoftwareVersions=["a" * 100], AcquisitionDateTime="bad"),
        values(NumberOfFrames="1"),
        values(ProcedureCodeSequence=[Dataset()]),
        tilt,
        renumber_frame_of_reference,
    ],
)
def test_source_without_attributes_or_with_odd_values_gets_seg_and_report(edit: Edit) -> None:
    """Attributes that DICOM requires are present and empty; the results refer to each slice."""
    seg, report = results_of(edit)
    for result in (seg, report):
        assert all(name in result for name in TYPE_2)
        assert result.StudyInstanceUID
    assert len(seg.ReferencedSeriesSequence[0].ReferencedInstanceSequence) == 12
    assert seg.FrameOfReferenceUID
    measures = seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    assert float(measures.SliceThickness) == pytest.approx(np.linalg.norm(phantom().affine[:3, 0]))
    assert int(seg.pixel_array.sum()) == 8 * (20 + 10) * 20


def test_source_without_identity_gives_results_without_identity() -> None:
    for result in results_of(without(*TYPE_2)):
        assert not any(result[name].value for name in TYPE_2)


def test_identity_missing_in_one_slice_is_taken_from_another() -> None:
    for result in results_of(without("PatientID", "PatientName", every=2)):
        assert (result.PatientID, str(result.PatientName)) == ("PHANTOM", "PHANTOM")


@pytest.mark.parametrize(
    ("character_set", "name"),
    [
        ("ISO 2022 IR 13\\ISO 2022 IR 87", "ﾔﾏﾀﾞ^ﾀﾛｳ=山田^太郎=やまだ^たろう"),
        ("\\ISO 2022 IR 87", "Yamada^Tarou=山田^太郎=やまだ^たろう"),
        ("\\ISO 2022 IR 149", "Hong^Gildong=洪^吉洞=홍^길동"),
        ("GB18030", "Wang^XiaoDong=王^小东"),
        ("ISO_IR 192", "Müller^Łukasz=김^희중"),
        ("ISO_IR 144", "Люкceмбypг"),
        ("ISO_IR 100", "Buc^Jérôme"),
        ("ISO 2022 IR 100", "Buc^Jérôme"),
        ("ISO IR 100", "Buc^Jérôme"),
        ("", "Doe^Jane"),
    ],
)
def test_name_in_any_character_set_is_the_same_in_seg_and_report(
    character_set: str, name: str
) -> None:
    """Also in sets that highdicom refuses: empty first value, code extensions alone, a
    misspelling."""
    for result in results_of(
        values(SpecificCharacterSet=character_set.split("\\"), PatientName=name)
    ):
        assert str(result.PatientName).rstrip("=") == name


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (raw("PatientName", "LO", b"DOE^J "), "DOE^J"),
        (raw("PatientName", "UN", b"DOE^J "), "DOE^J"),
        (raw("PatientName", "ST", b"DOE^J "), "DOE^J"),
        (raw("PatientName", "PN", b"DOE^J\\DOE^K"), "DOE^J"),
        (raw("PatientName", "SQ", b""), ""),
        (values(PatientName=""), ""),
        (values(PatientName="ANONYMOUS"), "ANONYMOUS"),
    ],
)
def test_name_with_another_vr_becomes_a_person_name(edit: Edit, expected: str) -> None:
    for result in results_of(edit):
        assert result["PatientName"].VR == "PN"
        assert str(result.PatientName) == expected


def test_headers_of_the_source_are_not_changed(
    headers: list[pydicom.Dataset], mild: Phantom
) -> None:
    before = [header.to_json() for header in headers]
    masks = (np.ones((len(headers), 128, 128), bool),) * 2
    structured_report(headers, segmentation(headers, *masks, FINDING), FINDING)
    assert [header.to_json() for header in headers] == before


def test_null_in_the_ledger_is_no_measurement() -> None:
    nulls: dict[str, Any] = dict.fromkeys(
        ("lesion_volume_ml", "lung_volume_ml", "involvement", "p_infected")
    )
    headers = [pydicom.dcmread(BytesIO(data), stop_before_pixels=True) for data in slices()]
    box = np.ones((len(headers), headers[0].Rows, headers[0].Columns), bool)
    for finding, expected in (
        (replace(FINDING, **nulls), []),
        (replace(FINDING, lung_volume_ml=None), ["lesion"] * 3),
    ):
        seg = segmentation(headers, box, box, finding)
        read = hd.sr.srread(BytesIO(to_bytes(structured_report(headers, seg, finding))))
        groups = read.content.get_volumetric_roi_measurement_groups()
        assert [group.tracking_identifier for group in groups] == ["lesion", "lung"]
        assert [
            group.tracking_identifier for group in groups for _ in group.get_measurements()
        ] == expected


def test_no_value_of_the_source_is_logged(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.DEBUG):
        results_of(
            values(PatientName="CANARY", StudyInstanceUID="CANARY", PatientBirthDate="CANARY")
        )
    assert "CANARY" not in caplog.text + capfd.readouterr().err
