"""The public functions on real files, in a sandboxed child process."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from encoded_ct import as_nifti

import covtanet
from covtanet.errors import CheckpointError, NoSeriesError
from covtanet.ledger.schema import LEDGER_SCHEMA
from covtanet.model.description import Capabilities
from covtanet.phantoms.encodings import dicom_objects
from covtanet.phantoms.phantom import Phantom


@pytest.fixture
def study(tmp_path: Path, mild: Phantom) -> Path:
    (tmp_path / "dicom").mkdir()
    for index, data in enumerate(dicom_objects(mild, 5)):
        (tmp_path / "dicom" / f"IM{index}").write_bytes(data)
    (tmp_path / "a.nii").write_bytes(as_nifti(mild))
    return tmp_path


def test_nifti_file_and_dicom_folder_are_the_same_volume(study: Path) -> None:
    nifti = covtanet.read_volume(study / "a.nii")
    dicom = covtanet.read_volume(str(study / "dicom"))
    np.testing.assert_array_equal(nifti.hu, dicom.hu)
    np.testing.assert_allclose(nifti.affine, dicom.affine, atol=1e-3)


def test_study_gives_one_row_per_series_in_the_columns_of_the_ledger(
    study: Path, model_folder: Path
) -> None:
    rows = covtanet.screen_study(study, covtanet.load_model(str(model_folder)))
    assert sorted(row["source_format"] for row in rows) == ["dicom", "nifti"]
    for row in rows:
        assert list(row) == LEDGER_SCHEMA.names
        assert (row["status"], row["run_id"]) == ("screened", None)
        assert row["involvement"] == pytest.approx(rows[0]["involvement"], rel=1e-3)


def test_model_without_segmentation_is_refused(study: Path, model_folder: Path) -> None:
    model = covtanet.load_model(model_folder)
    blind = replace(model, capabilities=Capabilities(segments=False, diagnoses=True))
    with pytest.raises(CheckpointError, match="marks no lesions"):
        covtanet.screen_study(study, blind)


def test_folder_without_series_is_refused(tmp_path: Path, model_folder: Path) -> None:
    (tmp_path / "readme.txt").write_text("no CT")
    with pytest.raises(NoSeriesError, match="the input holds no series"):
        covtanet.screen_study(tmp_path, covtanet.load_model(model_folder))


def test_read_ledger_returns_the_columns_that_were_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "date=2026-11-23" / "0123456789abcdef.parquet"
    path.parent.mkdir()
    pq.write_table(LEDGER_SCHEMA.empty_table(), path)
    assert covtanet.read_ledger(tmp_path).column_names == LEDGER_SCHEMA.names
    table = covtanet.read_ledger(str(tmp_path), ["involvement", "status"])
    assert table.column_names == ["involvement", "status"]
