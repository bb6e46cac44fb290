"""Key images show the right slices the right way round, and all objects are sound DICOM."""

import shutil
import subprocess
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import highdicom as hd
import numpy as np
import pydicom
import pytest
from export_rows import RUN_ID, keep_masks, screened_row, write_objects
from numpy.typing import NDArray
from repository import REAL_DATA
from sound_input import slices

from covtanet import drawing
from covtanet.ct import dicom
from covtanet.decoding.child_process import DECODER, Child
from covtanet.decoding.slices import GreyWindow, read_grey_slices
from covtanet.errors import StudyError
from covtanet.report import export
from covtanet.report.series_results import LUNG_WINDOW, SEG, SR
from covtanet.report.source_series import READER_LIMITS

DCIODVFY = shutil.which("dciodvfy")
REAL_SERIES = sorted(REAL_DATA.glob("dicom/*")) if REAL_DATA.is_dir() else []
# Attributes that may hold text about a patient, beyond those that are always there.
PATIENT_TEXT = ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "AccessionNumber")


def exported(archive: Path, objects: list[bytes], results: Path, depth: int = 2) -> Path:
    """Export a series whose lung is a box, with a lesion at its front; return the folder."""
    row = screened_row(archive)
    volume = dicom.read_series(objects)
    box = np.zeros(volume.hu.shape, bool)
    rows, columns = volume.hu.shape[1:]
    box[depth:-depth, rows // 3 : rows // 3 * 2, columns // 2 : columns // 4 * 3] = True
    folder = keep_masks(row, results, box, objects)
    outcome = export.export_series(row, str(results))
    assert outcome["outcome"] == "written", outcome
    return folder


@pytest.fixture(scope="module")
def phantom_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantom")
    write_objects(folder / "archive" / "scan", list(slices()))
    return exported(folder / "archive", list(slices()), folder / "results")


@pytest.fixture(scope="module")
def images(phantom_folder: Path) -> list[hd.sc.SCImage]:
    return [pydicom.dcmread(path) for path in sorted(phantom_folder.glob("key-*.sc.dcm"))]


@pytest.fixture
def child() -> Iterator[Child]:
    child = Child(DECODER, READER_LIMITS)
    yield child
    child.kill()


def orange(picture: NDArray[Any]) -> NDArray[np.bool_]:
    """The outline of the lesion."""
    found: NDArray[np.bool_] = (picture == drawing.LESION_RGB).all(axis=-1)
    return found


def test_key_images_show_each_slice_with_lesion_at_its_place(images: list[Any]) -> None:
    """The box is in the patient's left half, its front half is lesion: right and above."""
    by_uid = {str(header.SOPInstanceUID): header for header in map(header_of, slices())}
    assert len(images) == 8
    for number, image in enumerate(images, 1):
        header = by_uid[image.SourceImageSequence[0].ReferencedSOPInstanceUID]
        assert header.ImageOrientationPatient == [1, 0, 0, 0, 1, 0]
        assert list(image.PatientOrientation) == ["L", "P"]
        assert (image.InstanceNumber, image.pixel_array.shape) == (number, (64, 64, 3))
        rows, columns = np.nonzero(orange(image.pixel_array))
        assert (rows.min(), rows.max()) == (21, 31)
        assert (columns.min(), columns.max()) == (32, 47)
    heights = [
        by_uid[image.SourceImageSequence[0].ReferencedSOPInstanceUID].ImagePositionPatient[2]
        for image in images
    ]
    assert heights == sorted(heights)


def header_of(data: bytes) -> pydicom.Dataset:
    return pydicom.dcmread(BytesIO(data))


def test_key_image_is_marked_as_derived_and_for_research_only(
    images: list[Any], phantom_folder: Path
) -> None:
    seg = pydicom.dcmread(phantom_folder / SEG)
    for image in images:
        assert list(image.ImageType) == ["DERIVED", "SECONDARY"]
        assert (image.Modality, image.BurnedInAnnotation) == ("OT", "NO")
        assert image.SeriesDescription.startswith("Research use only")
        assert image.DerivationDescription.startswith("Research use only")
        assert image.StudyInstanceUID == seg.StudyInstanceUID
        # Words in the corner, where the phantom is air and not brighter than 83.
        assert (image.pixel_array[:12, :20] > 180).all(axis=-1).sum() > 5
    assert len({image.SeriesInstanceUID for image in images}) == 1
    assert len({image.SOPInstanceUID for image in images}) == len(images)


def test_equal_exports_have_equal_key_images(
    images: list[Any], tmp_path: Path, phantom_folder: Path
) -> None:
    archive = phantom_folder.parents[2] / "archive"
    again = exported(archive, list(slices()), tmp_path)
    found = [pydicom.dcmread(path) for path in sorted(again.glob("key-*.sc.dcm"))]
    assert [image.SOPInstanceUID for image in found] == [image.SOPInstanceUID for image in images]
    assert all(
        image.PixelData == other.PixelData for image, other in zip(images, found, strict=True)
    )


def test_export_without_key_images_writes_them(phantom_folder: Path, tmp_path: Path) -> None:
    """A run that was exported before there were any."""
    results = tmp_path / "results"
    shutil.copytree(phantom_folder.parents[1], results)
    row = screened_row(phantom_folder.parents[2] / "archive")
    assert export.export_series(row, str(results))["outcome"] == "there already"
    copied = results / RUN_ID / phantom_folder.name
    for path in copied.glob("key-*"):
        path.unlink()
    assert export.export_series(row, str(results))["outcome"] == "written"
    assert len(list(copied.glob("key-*"))) == 8


def test_results_hold_no_patient_text_that_the_source_lacks(
    phantom_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = header_of(slices()[0])
    allowed = {str(source.get(name, "")) for name in PATIENT_TEXT} | {""}
    for path in phantom_folder.glob("*.dcm"):
        found = pydicom.dcmread(path)
        assert {str(found.get(name, "")) for name in PATIENT_TEXT} <= allowed, path.name
    assert capfd.readouterr() == ("", "")


def test_slice_of_another_size_or_without_pixels_is_refused(child: Child) -> None:
    window = GreyWindow(low_hu=0, high_hu=1)
    with pytest.raises(StudyError, match="64, 65"):
        read_grey_slices(child, [slices()[0]], (64, 65), window)
    with pytest.raises(StudyError, match="bytes of pixels"):
        read_grey_slices(child, [slices()[0][:-100]], (64, 64), window)
    assert read_grey_slices(child, list(slices()), (64, 64), window).shape == (12, 64, 64)


def test_grey_values_follow_the_window(child: Child) -> None:
    volume = dicom.read_series(slices())
    grey = read_grey_slices(child, list(slices()), (64, 64), LUNG_WINDOW)
    expected = np.clip((volume.hu + 1350.0) * 255 / 1500, 0, 255)
    by_height = sorted(range(12), key=lambda i: header_of(slices()[i]).ImagePositionPatient[2])
    assert np.abs(grey[by_height] - expected).max() <= 0.5


def test_phantom_results_pass_dciodvfy(phantom_folder: Path) -> None:
    assert verify(phantom_folder) == {}


@pytest.mark.parametrize("source", REAL_SERIES, ids=lambda path: path.name)
def test_real_results_pass_dciodvfy(source: Path, tmp_path: Path) -> None:
    objects = [path.read_bytes() for path in sorted(source.rglob("*.dcm"))]
    write_objects(tmp_path / "archive" / "scan", objects)
    assert verify(exported(tmp_path / "archive", objects, tmp_path / "results")) == {}


def verify(folder: Path) -> dict[str, list[str]]:
    """Return the errors that dciodvfy finds, by the name of a file."""
    if DCIODVFY is None:
        pytest.skip("dciodvfy is not installed: apt-get install dicom3tools")
    names = sorted(path.name for path in folder.glob("*.dcm"))
    assert {SEG, SR, "key-01.sc.dcm"} <= set(names)
    found = {}
    for name in names:
        done = subprocess.run(
            [DCIODVFY, str(folder / name)], capture_output=True, text=True, check=False
        )
        lines = (done.stdout + done.stderr).splitlines()
        assert any(line.strip() in IODS for line in lines), lines
        errors = [line for line in lines if line.startswith(("Error", "Abort"))]
        if errors:
            found[name] = errors
    return found


# As dciodvfy names them once it has read an object.
IODS = ("Segmentation", "Comprehensive3DSR", "SCImage")
