"""SEG and SR of a series, read back by highdicom: the same voxels, at the same places, with the same numbers."""

import shutil
import subprocess
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import highdicom as hd
import numpy as np
import pydicom
import pytest

from covtanet.ct import dicom
from covtanet.data.phantom import Phantom
from covtanet.data.phantom_archive import dicom_objects
from covtanet.errors import StudyError
from covtanet.report.dicom_results import LESION, LUNG, Finding, frames_of, segmentation, structured_report, to_bytes

FINDING = Finding(
    run_id="run", series_key="series", software_version="0.1", model="covtanet 1", lesion_volume_ml=310.25,
    lung_volume_ml=4890.5, involvement=0.0634, p_infected=0.98,
)  # fmt: skip


@pytest.fixture(scope="module")
def source(mild: Phantom) -> list[bytes]:
    return list(dicom_objects(mild, 5))


@pytest.fixture(scope="module")
def headers(source: list[bytes]) -> list[pydicom.Dataset]:
    found = [pydicom.dcmread(BytesIO(data), stop_before_pixels=True) for data in source]
    return [found[k] for k in np.random.default_rng(0).permutation(len(found))]  # in any order


def written(source: list[bytes], headers: list[pydicom.Dataset], mild: Phantom) -> tuple[bytes, bytes]:
    grid = dicom.read_series(source).source
    lesion, lung = (
        frames_of(headers, grid.from_canonical(mask), grid.affine) for mask in (mild.lesion_mask, mild.lung_mask)
    )
    seg = segmentation(headers, lesion, lung, FINDING)
    return to_bytes(seg), to_bytes(structured_report(headers, seg, FINDING))


def test_segments_have_the_masks_voxels_at_their_places(
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
            place = np.array(header.ImagePositionPatient, float) + across * x * float(header.PixelSpacing[1])
            place += down * y * float(header.PixelSpacing[0])
            index = np.linalg.inv(volume.affine) @ [*place, 1.0]
            assert np.abs((volume.affine @ [*np.rint(index[:3]), 1.0])[:3] - place).max() < 0.1
            assert bool(mask[tuple(np.rint(index[:3]).astype(int))]) == bool(frame[y, x])
            assert round(float(z[0])) == round(float(index[0]))
    for item in seg.PerFrameFunctionalGroupsSequence:
        referenced = item.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        expected = position_of[str(referenced)].ImagePositionPatient
        found = item.PlanePositionSequence[0].ImagePositionPatient
        assert np.abs(np.array(found, float) - np.array(expected, float)).max() < 0.1


def test_the_report_has_the_ledgers_numbers_and_refers_to_the_segments(
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


def test_the_same_result_has_the_same_uids(source: list[bytes], headers: list[pydicom.Dataset], mild: Phantom) -> None:
    first, second = (pydicom.dcmread(BytesIO(written(source, headers, mild)[0])) for _ in range(2))
    assert first.SOPInstanceUID == second.SOPInstanceUID
    assert replace(FINDING, run_id="other").uid("segmentation") != FINDING.uid("segmentation")


def test_a_mask_of_another_grid_is_refused(headers: list[pydicom.Dataset], mild: Phantom) -> None:
    affine = np.diag([1.0, 1.0, 1.0, 1.0])
    with pytest.raises(StudyError, match="grid of its mask"):
        frames_of(headers, mild.lesion_mask, affine)


@pytest.mark.skipif(shutil.which("dcmdump") is None, reason="dcmtk is not installed")
def test_dcmtk_reads_both(source: list[bytes], headers: list[pydicom.Dataset], mild: Phantom, tmp_path: Path) -> None:
    for command, data in zip(("dcmdump", "dsrdump"), written(source, headers, mild), strict=True):
        path = tmp_path / command
        path.write_bytes(data)
        found = subprocess.run([command, path], capture_output=True, text=True, check=False)
        assert found.returncode == 0, found.stderr
        assert "E:" not in found.stderr
