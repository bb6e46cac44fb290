"""Export parses only bytes that were screened, and gives each series an outcome."""

import logging
import os
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from export_rows import keep_masks, screened_row, write_objects
from hostile_dicom import deflated, enhanced
from pydicom.dataset import Dataset
from pydicom.uid import UID
from ray import cloudpickle
from sound_input import slices

from covtanet import storage
from covtanet.commands.export import report_outcomes
from covtanet.ct import dicom
from covtanet.errors import StudyError
from covtanet.report import export, series_results
from covtanet.report.source_series import SourceSlice, find_series, parse_header, read_source
from covtanet.storage import AccessError, ObjectChangedError

Edit = Callable[[list[Dataset]], None]


@pytest.fixture
def screened(tmp_path: Path) -> tuple[dict[str, Any], Path]:
    """A ledger row of a series two folders below its archive's root, and the folder."""
    folder = tmp_path / "patient" / "scan"
    write_objects(folder, list(slices()))
    record = screened_row(tmp_path)
    assert record["source_digest"] is not None
    return record, folder


def exported(
    row: dict[str, Any], objects: list[bytes], results: Path
) -> tuple[dict[str, Any], Path]:
    """The outcome of a series whose masks are a box, and the folder of its results."""
    volume = dicom.read_series(objects)
    box = np.zeros(volume.hu.shape, bool)
    box[2:-2, 20:60, 30:70] = True
    folder = keep_masks(row, results, box, objects)
    return export.export_series(row, str(results)), folder


def source_of(row: dict[str, Any]) -> list[SourceSlice]:
    """The slices of a row's series as export reads them."""
    return read_source(*find_series(row), row["source_digest"])


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
        seg = pydicom.dcmread(folder / series_results.SEG)
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
    assert found["detail"].startswith("KeyError at report/series_results.py:")


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
    found = source_of(screened[0])
    assert len(found) == 12
    assert all("PixelData" not in item.header and item.data is None for item in found)


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
        source_of(row)


@pytest.mark.usefixtures("no_parser")
def test_deflated_object_is_refused_before_it_is_parsed(bomb: bytes) -> None:
    with pytest.raises(StudyError, match="a deflated object") as error:
        parse_header(bomb)
    assert error.value.reason == "unsupported_syntax"
    with pytest.raises(StudyError, match="no end of its file meta"):
        parse_header(slices()[0][:132] + b"\x02\x00\x03\x00UI\0\0" * 5000)
