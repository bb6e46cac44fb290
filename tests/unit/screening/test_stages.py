"""The stages of screening without a cluster: parity of formats, refusals, boundaries."""

import json
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encoded_ct import as_nifti
from screened_series import columns_of, new_record
from stage_rows import CONFIG, WINDOW, manifest_rows, prepare

from covtanet.decoding import prepare as decode
from covtanet.decoding.stored_masks import StoredMasks
from covtanet.errors import QcFlag, Reason, SandboxClosedError, Status
from covtanet.inference.predictor import Predictor
from covtanet.ledger.finished_rows import read_chunks, store_rows
from covtanet.ledger.run import Run
from covtanet.model.description import BurdenDiagnosis, Capabilities
from covtanet.model.saved_model import load_model
from covtanet.phantoms.encodings import dicom_objects
from covtanet.phantoms.phantom import Phantom
from covtanet.screening import stages
from covtanet.screening.conclusion import conclude
from covtanet.screening.config import ScreeningConfig, config_values
from covtanet.screening.records import PreparedSeries
from covtanet.screening.workers import checked_record


def screen(
    archive: Path, predictor: Predictor, config: ScreeningConfig = CONFIG
) -> list[dict[str, Any]]:
    records = []
    for row in manifest_rows(archive):
        prepared = prepare(row, archive, config)
        measured = stages.measure_series(stages.predict_series(prepared, predictor), WINDOW, config)
        records.append(measured.record.to_columns())
    return records


def test_nifti_dicom_and_other_axis_order_give_equal_predictions(
    tmp_path: Path, mild: Phantom, predictor: Predictor
) -> None:
    (tmp_path / "dicom").mkdir()
    for index, data in enumerate(dicom_objects(mild, 5)):
        (tmp_path / "dicom" / f"IM{index}").write_bytes(data)
    for axes in ("LPS", "RAS", "SPL"):
        (tmp_path / f"{axes}.nii").write_bytes(as_nifti(mild, axes))
    records = screen(tmp_path, predictor)
    assert len(records) == 4
    for record in records:
        assert record["status"] == "screened"
        for name in (
            "p_infected",
            "p_severe",
            "lesion_volume_ml",
            "lung_volume_ml",
            "involvement",
            "lesion_slices",
        ):
            if records[0][name] is None:
                assert record[name] is None
            else:
                assert record[name] == pytest.approx(records[0][name], rel=1e-3, abs=1e-4), name


def test_batches_bounded_by_slices_do_not_change_the_answer(
    mild: Phantom, model_folder: Path
) -> None:
    slices = np.random.default_rng(0).integers(0, 65535, (19, 128, 128), dtype=np.uint16)
    answers = [
        Predictor(load_model(model_folder), engine="eager", max_batch_slices=size).predict(slices)
        for size in (1, 4, 32)
    ]
    for answer in answers[1:]:
        assert answer.p_infected == pytest.approx(answers[0].p_infected, abs=1e-5)
        assert np.abs(answer.lesion_levels.astype(int) - answers[0].lesion_levels).max() <= 1


@pytest.mark.parametrize("engine", ["channels_last", "openvino"])
def test_engines_agree_within_their_tolerance(model_folder: Path, engine: str) -> None:
    slices = np.random.default_rng(0).integers(0, 65535, (5, 128, 128), dtype=np.uint16)
    one = Predictor(load_model(model_folder), engine="eager").predict(slices)
    other = Predictor(load_model(model_folder), engine=engine).predict(slices)
    assert np.abs(one.lesion_levels.astype(int) - other.lesion_levels).max() <= 1
    assert other.p_infected == pytest.approx(one.p_infected, abs=1e-4)
    assert other.p_severe == pytest.approx(one.p_severe, abs=1e-4)


def test_refused_series_has_a_reason_and_no_measurement(
    tmp_path: Path, predictor: Predictor
) -> None:
    (tmp_path / "bad.nii.gz").write_bytes(b"no")
    (record,) = screen(tmp_path, predictor)
    assert (record["status"], record["reason"]) == ("rejected", "unreadable")
    assert record["source_digest"] is not None
    for name in (
        "p_infected",
        "p_severe",
        "diagnosis",
        "involvement",
        "num_slices",
        "spacing_z_mm",
    ):
        assert record.get(name) is None


def test_object_that_vanished_is_failed_not_rejected(
    tmp_path: Path, predictor: Predictor, mild: Phantom
) -> None:
    path = tmp_path / "gone.nii"
    path.write_bytes(as_nifti(mild))
    (row,) = manifest_rows(tmp_path)
    path.unlink()
    prepared = prepare(row, tmp_path)
    record = columns_of(stages.predict_series(prepared, predictor))
    assert (record["status"], record["reason"], record["source_digest"]) == (
        "failed",
        "vanished",
        None,
    )


@pytest.mark.parametrize("reason", ["vanished", "storage"])
def test_object_that_was_not_read_for_the_manifest_fails_though_it_can_be_read_now(
    tmp_path: Path, predictor: Predictor, mild: Phantom, reason: str
) -> None:
    """It may be a slice: a verdict on it alone would settle it for later nights."""
    (tmp_path / "a.nii").write_bytes(as_nifti(mild))
    (row,) = manifest_rows(tmp_path)
    prepared = prepare({**row, "reason": reason}, tmp_path)
    record = columns_of(stages.predict_series(prepared, predictor))
    assert (record["status"], record["reason"]) == ("failed", reason)


def test_our_own_error_is_failed_and_its_text_is_kept_out_of_log_and_record(
    tmp_path: Path, mild: Phantom, predictor: Predictor, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.nii").write_bytes(as_nifti(mild))
    (row,) = manifest_rows(tmp_path)
    prepared = prepare(row, tmp_path)

    class Broken:
        def predict(self, slices: object) -> None:
            raise RuntimeError("CANARY")

    record = columns_of(stages.predict_series(prepared, Broken()))  # type: ignore[arg-type]
    assert (record["status"], record["reason"]) == ("failed", "internal_error")
    assert record["reason_detail"].startswith("RuntimeError at screening/stages.py:")
    assert record["series_key"] in caplog.text
    assert "CANARY" not in caplog.text + json.dumps(record)


@pytest.mark.parametrize(
    ("p_infected", "p_severe", "involvement", "expected"),
    [
        (0.4, 0.9, 0.1, ("normal", None, None, "mild")),
        (0.5, 0.4, 0.26, ("infected", 0.4, "mild", "severe")),
        (0.9, 0.5, 0.25, ("infected", 0.5, "severe", "mild")),
        (0.9, 0.5, None, ("infected", 0.5, "severe", None)),
    ],
)
def test_conclusions(
    p_infected: float, p_severe: float, involvement: float | None, expected: tuple[Any, ...]
) -> None:
    record = conclude(
        new_record(p_infected=p_infected, p_severe=p_severe, involvement=involvement), CONFIG
    )
    conclusion = (
        record.diagnosis, record.p_severe, record.severity, record.severity_by_involvement
    )  # fmt: skip
    assert conclusion == expected


@pytest.mark.parametrize(
    ("involvement", "flags", "expected"),
    [
        (0.002, (), ("normal", None, "mild", True)),
        (0.09, (), ("infected", "mild", "mild", True)),
        (0.3, (), ("infected", "severe", "severe", True)),
        (None, (QcFlag.PARTIAL_LUNGS,), (None, None, None, False)),
        (None, (QcFlag.IMPLAUSIBLE_LUNGS,), (None, None, None, False)),
    ],
)
def test_diagnosis_by_burden_is_that_of_whole_lungs(
    involvement: float | None, flags: tuple[QcFlag, ...], expected: tuple[Any, ...]
) -> None:
    """Odds of one at an involvement of 2 %."""
    config = replace(CONFIG, burden=BurdenDiagnosis(intercept=-2.0, slope=100.0))
    measured = new_record(involvement=involvement, qc_flags=(*flags, QcFlag.NO_DIAGNOSIS))
    record = conclude(measured, config)
    is_by_burden = QcFlag.DIAGNOSIS_BY_BURDEN in record.qc_flags
    conclusion = (
        record.diagnosis, record.severity, record.severity_by_involvement, is_by_burden
    )  # fmt: skip
    assert conclusion == expected
    # Exactly one of the two flags stands.
    assert (QcFlag.NO_DIAGNOSIS in record.qc_flags) is not is_by_burden
    assert (record.p_infected is not None) is is_by_burden


def test_network_with_a_diagnosis_is_not_overruled_by_the_burden() -> None:
    config = replace(CONFIG, burden=BurdenDiagnosis(intercept=-2.0, slope=100.0))
    record = conclude(new_record(p_infected=0.1, involvement=0.5), config)
    assert (record.p_infected, record.diagnosis, record.qc_flags) == (0.1, "normal", ())


def test_masks_survive_their_packing(mild_volume: Any) -> None:
    masks, _, _ = decode.prepare_volume(mild_volume, WINDOW, CONFIG.slice_step_mm)
    back = StoredMasks.unpack(masks.pack())
    np.testing.assert_array_equal(back.lungs.lung_mask, masks.lungs.lung_mask)
    np.testing.assert_array_equal(back.lungs.cavity_mask, masks.lungs.cavity_mask)
    np.testing.assert_array_equal(back.source.affine, masks.source.affine)
    assert len(masks.pack()) < mild_volume.hu.size / 8


def test_an_answer_that_is_no_number_is_no_diagnosis(model_folder: Path) -> None:
    predictor = Predictor(load_model(model_folder), engine="eager")
    with torch.no_grad():
        next(predictor.network.classifier.parameters()).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        predictor.predict(np.zeros((3, 128, 128), np.uint16))


def test_a_network_without_a_trained_diagnosis_says_nothing_of_it(
    model_folder: Path, mild: Phantom, tmp_path: Path
) -> None:
    """Null and a flag; the rule of the paper still gives a severity, and the involvement its
    number.
    """
    model = load_model(model_folder)
    untrained = Predictor(
        replace(model, capabilities=Capabilities(segments=True, diagnoses=False)),
        engine="eager",
        max_batch_slices=8,
    )
    (tmp_path / "a.nii.gz").write_bytes(as_nifti(mild))
    (row,) = manifest_rows(tmp_path)
    measured = columns_of(stages.predict_series(prepare(row, tmp_path), untrained))
    for name in ("p_infected", "p_severe", "diagnosis", "severity"):
        assert measured[name] is None, name
    assert measured["status"] == "screened"
    assert measured["qc_flags"] == ["no_diagnosis"]
    assert measured["severity_by_involvement"] in ("mild", "severe")
    assert measured["involvement"] is not None


def test_weak_sandbox_is_no_part_of_a_runs_identity() -> None:
    weak = replace(CONFIG, allow_weak_sandbox=True)
    assert config_values(WINDOW, weak) == config_values(WINDOW, CONFIG)
    other = replace(CONFIG, decode_timeout_s=1.0)
    assert config_values(WINDOW, other) != config_values(WINDOW, CONFIG)


def test_max_nodes_is_no_part_of_a_runs_identity() -> None:
    assert config_values(WINDOW, replace(CONFIG, max_nodes=9)) == config_values(WINDOW, CONFIG)
    with pytest.raises(ValueError, match="max_nodes is 0, expected at least 1"):
        replace(CONFIG, max_nodes=0)


def test_closed_sandbox_ends_the_request_without_reading_the_rest(
    tmp_path: Path, mild: Phantom
) -> None:
    """Nobody waits for the digest of what was not read yet."""
    read = []
    (tmp_path / "dicom").mkdir()
    for index, data in enumerate(dicom_objects(mild, 5)):
        (tmp_path / "dicom" / f"IM{index:02d}").write_bytes(data)
    (row,) = manifest_rows(tmp_path)

    def decoder(source_format: str, objects: Any) -> Any:
        for chunks in objects:
            read.extend(chunks)
            raise SandboxClosedError("no more")

    with pytest.raises(SandboxClosedError, match="no more"):
        stages.prepare_series(
            row, archive=str(tmp_path), window=WINDOW, config=CONFIG, decoder=decoder
        )
    assert len(read) == 1


def test_row_that_cannot_be_stored_is_an_internal_error_and_the_run_goes_on(
    tmp_path: Path, mild: Phantom
) -> None:
    (tmp_path / "a.nii").write_bytes(as_nifti(mild))
    (row,) = manifest_rows(tmp_path)
    record = prepare(row, tmp_path).record
    run = Run(
        archive=str(tmp_path),
        ledger=str(tmp_path / "ledger"),
        run_date=date(2026, 11, 26),
        model_name="m",
        model_version="1",
        model_digest="d",
        config_digest="c",
        software_version="0",
    )
    sound = replace(record, status=Status.SCREENED)
    assert checked_record(run, sound) is sound
    for lie in (
        {"num_slices": 10**12},
        {"qc_flags": [1]},
        {"reason_detail": "\ud800"},
        {"p_infected": "x"},
    ):
        checked = checked_record(run, replace(record, **lie))
        outcome = (checked.status, checked.reason, checked.num_slices)
        assert outcome == (Status.FAILED, Reason.INTERNAL_ERROR, None)
        identity = (checked.series_key, checked.source_uri)
        assert identity == (row["series_key"], f"{tmp_path}/a.nii")
        store_rows(run, [checked])
    assert [table.num_rows for table in read_chunks(run)] == [1, 1, 1, 1]


def test_predicted_series_names_its_engine_and_unpredicted_one_is_null(model_folder: Path) -> None:
    predictor = Predictor(load_model(model_folder), engine="eager")
    slices = np.zeros((2, 128, 128), np.uint16)
    series = PreparedSeries(record=new_record(), slices=slices, chosen=np.arange(2), masks=b"")
    assert stages.predict_series(series, predictor).record.engine == "eager"
    ended = stages.ended_before_prediction(new_record(), WINDOW)
    assert stages.predict_series(ended, predictor).record.engine is None
