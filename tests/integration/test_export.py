"""Export parses only bytes that were screened, gives each series an outcome, and puts SEG where the
source lies.
"""

import logging
import os
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from hostile import deflated, enhanced, slices
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.uid import UID
from ray import cloudpickle
from scipy.spatial import KDTree
from stage_rows import CONFIG, WINDOW, manifest_rows

from covtanet import storage
from covtanet.commands.export import report_outcomes
from covtanet.ct import dicom, nifti
from covtanet.ct.volume import canonical_volume
from covtanet.errors import StudyError
from covtanet.phantoms.dicom_writer import write_series
from covtanet.phantoms.phantom import Phantom, PhantomConfig, make_phantom
from covtanet.report import dicom_results, export
from covtanet.report.export import parse_header, source_headers
from covtanet.screening import stages
from covtanet.storage import AccessError, ObjectChangedError

RUN_ID = "5e1ec7ed"
Edit = Callable[[list[Dataset]], None]


@pytest.fixture
def screened(tmp_path: Path) -> tuple[dict[str, Any], Path]:
    """A ledger row of a series two folders below its archive's root, and the folder."""
    folder = tmp_path / "patient" / "scan"
    write_objects(folder, list(slices()))
    record = screened_row(tmp_path)
    assert record["source_digest"] is not None
    return record, folder


def write_objects(folder: Path, objects: list[bytes]) -> None:
    folder.mkdir(parents=True)
    for index, data in enumerate(objects):
        (folder / f"{index:03d}.dcm").write_bytes(data)


def screened_row(archive: Path) -> dict[str, Any]:
    """The ledger row of the one series of an archive, as far as decoding fills it."""
    (row,) = manifest_rows(archive)
    decoder = stages.in_process(WINDOW, CONFIG)
    prepared = stages.prepare_series(
        row, archive=str(archive), window=WINDOW, config=CONFIG, decoder=decoder
    )
    record = prepared.record.to_columns()
    measured = {
        "lesion_volume_ml": 310.25,
        "lung_volume_ml": 4890.5,
        "involvement": 0.0634,
        "p_infected": 0.98,
    }
    model = {
        "model_name": "m",
        "model_version": "1",
        "model_digest": "0" * 64,
        "software_version": "0",
    }
    return {**record, **measured, **model, "run_id": RUN_ID}


@pytest.fixture(scope="module")
def chest() -> Phantom:
    """Sparse, but with plausible steps along all axes, so that its coronal and sagittal slices are
    a series too.
    """
    return make_phantom(
        PhantomConfig(seed=5, involvement=0.1, size_px=96, num_slices=34, pixel_mm=3.7, slice_mm=8)
    )


def turned(chest: Phantom, plane: str) -> tuple[NDArray[Any], NDArray[Any], NDArray[np.float64]]:
    """HU and mask of the left lung, (slices, rows, columns), in a plane, and the affine of their
    index -> LPS mm.
    """
    axes, flips, shear = {
        "axial": ((0, 1, 2), (), 1),
        "downwards": ((0, 1, 2), (0,), 1),
        "non-square": ((0, 1, 2), (), 2),
        "coronal": ((1, 0, 2), (1,), 1),
        "coronal-backwards": ((1, 0, 2), (0, 1), 1),
        "sagittal": ((2, 0, 1), (1,), 1),
        "sagittal-backwards": ((2, 0, 1), (0, 1), 1),
        "prone": ((0, 1, 2), (), 1),
        "oblique": ((0, 1, 2), (0,), 1),
    }[plane]
    half = chest.lung_mask.copy()
    half[:, :, : half.shape[2] // 2] = False  # one lung alone, so that a flip shows
    hu, mask = (np.flip(array.transpose(axes), flips)[:, ::shear] for array in (chest.hu, half))
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = chest.affine[:3, axes], chest.affine[:3, 3]
    for axis in flips:
        affine[:3, 3] += affine[:3, axis] * (chest.hu.shape[axes[axis]] - 1)
        affine[:3, axis] *= -1
    affine[:3, 1] *= shear
    cos, sin = np.cos(np.radians(8)), np.sin(np.radians(8))
    turn = {
        "prone": np.diag([-1.0, -1, 1]),
        "oblique": np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1.0]]),
    }
    affine[:3] = turn.get(plane, np.eye(3)) @ affine[:3]
    return hu, mask, affine


def keep_masks(
    row: dict[str, Any], results: Path, lung: NDArray[Any], objects: list[bytes]
) -> Path:
    """Masks as a run keeps them; lung and its front half as lesion, in the frame of a Volume."""
    folder = results / str(row["run_id"]) / str(row["series_key"])
    folder.mkdir(parents=True)
    lesion = lung.copy()
    lesion[:, lung.shape[1] // 2 :] = False
    grid = dicom.read_series(objects).source
    for name, mask in (("lesion", lesion), ("lung", lung)):
        (folder / f"{name}_mask.nii.gz").write_bytes(nifti.write(mask, grid))
    return folder


def points_mm(seg: Dataset, segment: int) -> NDArray[np.float64]:
    """Centres of a segment's voxels in the patient, from the attributes of the SEG alone."""
    shared = seg.SharedFunctionalGroupsSequence[0]
    across, down = np.array(
        shared.PlaneOrientationSequence[0].ImageOrientationPatient, float
    ).reshape(2, 3)
    down_mm, across_mm = (float(mm) for mm in shared.PixelMeasuresSequence[0].PixelSpacing)
    found = []
    for pixels, frame in zip(seg.pixel_array, seg.PerFrameFunctionalGroupsSequence, strict=True):
        if frame.SegmentIdentificationSequence[0].ReferencedSegmentNumber == segment:
            corner = np.array(frame.PlanePositionSequence[0].ImagePositionPatient, float)
            rows, columns = np.nonzero(pixels)
            found.append(
                corner + rows[:, None] * down * down_mm + columns[:, None] * across * across_mm
            )
    return np.concatenate(found)


@pytest.mark.parametrize(
    "plane",
    [
        "axial",
        "downwards",
        "non-square",
        "coronal",
        "coronal-backwards",
        "sagittal",
        "sagittal-backwards",
        "prone",
        "oblique",
    ],
)
def test_segment_has_the_patient_positions_of_its_mask(
    plane: str, chest: Phantom, tmp_path: Path
) -> None:
    hu, mask, affine = turned(chest, plane)
    objects = write_series(hu, affine, study_uid="1.2.3", series_uid="1.2.3.4")
    shuffled = [objects[k] for k in np.random.default_rng(0).permutation(len(objects))]
    write_objects(tmp_path / "archive" / "scan", shuffled)
    row = screened_row(tmp_path / "archive")
    canonical = canonical_volume(mask.astype(np.int16), affine).hu > 0
    folder = keep_masks(row, tmp_path / "results", canonical, objects)
    assert export.export_series(row, str(tmp_path / "results"))["outcome"] == "written"
    found = points_mm(pydicom.dcmread(folder / export.SEG), dicom_results.LUNG)
    truth = np.argwhere(mask) @ affine[:3, :3].T + affine[:3, 3]
    distances_mm, nearest = map(np.asarray, KDTree(truth).query(found))
    assert len(set(nearest.tolist())) == len(found) == len(truth) > 1000
    assert distances_mm.max() < 0.05


def exported(
    row: dict[str, Any], objects: list[bytes], results: Path
) -> tuple[dict[str, Any], Path]:
    """The outcome of a series whose masks are a box, and the folder of its results."""
    volume = dicom.read_series(objects)
    box = np.zeros(volume.hu.shape, bool)
    box[2:-2, 20:60, 30:70] = True
    folder = keep_masks(row, results, box, objects)
    return export.export_series(row, str(results)), folder


def edited(edit: Edit) -> list[bytes]:
    """The objects of a sound series after an edit of their datasets."""
    datasets: list[Dataset] = [pydicom.dcmread(BytesIO(data)) for data in slices()]
    edit(datasets)
    found = []
    for dataset in datasets:
        buffer = BytesIO()
        dataset.save_as(buffer)
        found.append(buffer.getvalue())
    return found


def repeat_one(datasets: list[Dataset]) -> None:
    datasets.insert(0, datasets[3])


def add_localizer(datasets: list[Dataset]) -> None:
    scout = pydicom.dcmread(BytesIO(slices()[0]))
    scout.ImageType, scout.SOPInstanceUID = ["ORIGINAL", "PRIMARY", "LOCALIZER"], "1.2.3.9"
    scout.file_meta.MediaStorageSOPInstanceUID = UID("1.2.3.9")
    scout.ImageOrientationPatient = ["1", "0", "0", "0", "0", "-1"]
    datasets.insert(0, scout)


def waver(datasets: list[Dataset]) -> None:
    """A table that is half a millimetre off now and then, in all directions."""
    for number, dataset in enumerate(datasets):
        x, y, z = (float(mm) for mm in dataset.ImagePositionPatient)
        dataset.ImagePositionPatient = [
            f"{x + 0.2 * (number % 2):.1f}",
            f"{y:.1f}",
            f"{z + 0.5 * (number % 3 - 1):.1f}",
        ]


def round_cosines(datasets: list[Dataset]) -> None:
    """3 decimals of a small rotation, about which the positions turn exactly."""
    turn = np.radians(3.5)
    across, down = (
        np.array([np.cos(turn), np.sin(turn), 0]),
        np.array([-np.sin(turn), np.cos(turn), 0]),
    )
    for dataset in datasets:
        x, y, z = (float(mm) for mm in dataset.ImagePositionPatient)
        dataset.ImagePositionPatient = [f"{mm:.3f}" for mm in (across * x + down * y + [0, 0, z])]
        dataset.ImageOrientationPatient = [f"{cosine:.3f}" for cosine in (*across, *down)]


def test_export_has_the_slices_that_were_screened(
    tmp_path: Path,
) -> None:
    edits: dict[str, Edit] = {
        "as it is": lambda _: None,
        "repeated object": repeat_one,
        "localizer": add_localizer,
        "wavering table": waver,
        "rounded cosines": round_cosines,
    }
    for name, edit in edits.items():
        objects = edited(edit)
        write_objects(tmp_path / name / "archive" / "scan", objects)
        row = screened_row(tmp_path / name / "archive")
        assert row.get("reason") is None, name
        found, folder = exported(row, objects, tmp_path / name / "results")
        assert found["outcome"] == "written", name
        seg = pydicom.dcmread(folder / export.SEG)
        referenced = {each.ReferencedSOPInstanceUID for each in seg.SourceImageSequence}
        assert referenced == {pydicom.dcmread(BytesIO(data)).SOPInstanceUID for data in slices()}, (
            name
        )
        assert len(seg.SourceImageSequence) == 12, name


@pytest.mark.parametrize("start", [132, 128])
def test_object_without_preamble_is_exported(start: int, tmp_path: Path) -> None:
    """Without the 128 bytes, and without the magic too."""
    objects = [data[start:] for data in slices()]
    write_objects(tmp_path / "archive" / "scan", objects)
    row = screened_row(tmp_path / "archive")
    found, _ = exported(row, objects, tmp_path / "results")
    assert found["outcome"] == "written"


def test_series_without_attributes_is_exported(tmp_path: Path) -> None:
    """One source lacks what de-identification removes; one has lost a slice since. All have an
    outcome.
    """
    outcomes, results = [], tmp_path / "results"
    for number, edit in enumerate((lambda _: None, remove_identity, lambda datasets: datasets[4:])):
        archive = tmp_path / f"archive{number}"
        write_objects(archive / "scan", edited(edit))
        row = screened_row(archive)
        if number == 2:
            (archive / "scan" / "004.dcm").unlink()
        outcomes.append(exported(row, edited(edit), results / str(number))[0])
    assert [each["outcome"] for each in outcomes] == ["written", "written", "changed"]
    assert report_outcomes(outcomes) == 4
    assert report_outcomes(outcomes[:2]) == 0


def remove_identity(datasets: list[Dataset]) -> None:
    for dataset in datasets:
        for name in (
            "PatientBirthDate",
            "PatientSex",
            "StudyTime",
            "AccessionNumber",
            "StudyID",
            "SliceThickness",
        ):
            delattr(dataset, name)


def test_enhanced_series_is_not_exported(tmp_path: Path) -> None:
    write_objects(tmp_path / "archive" / "scan", list(enhanced().values()))
    row = screened_row(tmp_path / "archive")
    found, _ = exported(row, list(enhanced().values()), tmp_path / "results")
    assert found["outcome"] == "enhanced_multi_frame"


def test_missing_hidden_or_unmasked_series_has_an_outcome(
    screened: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    row, folder = screened
    assert export.export_series(row, str(tmp_path / "results"))["outcome"] == "no_masks"
    found, _ = exported({**row, "source_uri": "a" * 32}, list(slices()), tmp_path / "hidden")
    assert found["outcome"] == "hidden"
    found, _ = exported({**row, "series_uid": "1.2.3"}, list(slices()), tmp_path / "other")
    assert found["outcome"] == "vanished"
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    assert exported(row, list(slices()), tmp_path / "gone")[0]["outcome"] == "vanished"


def test_unknown_error_is_internal_error_without_its_text(
    screened: tuple[dict[str, Any], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    row = {**screened[0], "lesion_volume_ml": "Doe^Jane"}
    found, _ = exported(row, list(slices()), tmp_path / "results")
    assert found["outcome"] == "internal_error"
    assert found["detail"].startswith("TypeError at report/dicom_results.py:")
    with caplog.at_level(logging.INFO):
        assert report_outcomes([found]) == 4
    assert f"series {row['series_key']}: internal_error, TypeError" in caplog.text
    assert "Doe" not in caplog.text


def test_internal_error_of_export_names_its_location(
    screened: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    row = dict(screened[0])
    del row["model_name"]
    found, _ = exported(row, list(slices()), tmp_path / "results")
    assert found["detail"].startswith("KeyError at report/export.py:")


def test_export_is_pickled_by_value_for_workers() -> None:
    """As a job's own function does, whose module a worker cannot import."""
    cloudpickle.register_pickle_by_value(export)
    try:
        assert (
            cloudpickle.loads(cloudpickle.dumps(export.export_series)).__name__ == "export_series"
        )
    finally:
        cloudpickle.unregister_pickle_by_value(export)


def test_access_error_ends_the_export(
    screened: tuple[dict[str, Any], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(uri: str) -> bool:
        raise AccessError("denied")

    monkeypatch.setattr(storage, "exists", refuse)
    with pytest.raises(AccessError, match="denied"):
        export.export_series(screened[0], "results")


def test_storage_fault_is_the_outcome_of_its_series(
    screened: tuple[dict[str, Any], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(uri: str) -> bool:
        raise OSError("s3://bucket/Doe^Jane")

    monkeypatch.setattr(storage, "exists", fail)
    found = export.export_series(screened[0], "results")
    assert (found["outcome"], found["detail"]) == ("storage", "OSError")


@pytest.fixture
def bomb() -> bytes:
    return next(iter(deflated(bomb=8).values()))


@pytest.fixture
def no_parser(screened: object, bomb: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on: what comes before it has been parsed."""

    def parse(*arguments: object, **named: object) -> None:
        raise AssertionError("bytes that were not screened reached the parser")

    monkeypatch.setattr(pydicom, "dcmread", parse)


def test_series_as_it_was_screened_is_parsed(screened: tuple[dict[str, Any], Path]) -> None:
    headers = source_headers(screened[0])
    assert len(headers) == 12
    assert all("PixelData" not in header for header in headers)


@pytest.mark.usefixtures("no_parser")
def test_replaced_series_is_refused_by_its_content(
    screened: tuple[dict[str, Any], Path],
) -> None:
    """Same name, size and time, as a copying tool can leave them."""
    row, folder = screened
    path = folder / "003.dcm"
    times = path.stat()
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(ObjectChangedError, match="by its content"):
        source_headers(row)


@pytest.mark.usefixtures("no_parser")
def test_deflated_object_is_refused_before_it_is_parsed(bomb: bytes) -> None:
    with pytest.raises(StudyError, match="a deflated object") as error:
        parse_header(bomb)
    assert error.value.reason == "unsupported_syntax"
    with pytest.raises(StudyError, match="no end of its file meta"):
        parse_header(slices()[0][:132] + b"\x02\x00\x03\x00UI\0\0" * 5000)
