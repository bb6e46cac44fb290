"""The stages of screening without a cluster: parity of formats, boundaries, measurements."""

import gzip
import json
import os
from dataclasses import replace
from datetime import date
from io import BytesIO
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from encoded_ct import as_nifti
from PIL import Image
from repository import REAL_DATA
from stage_rows import CONFIG, WINDOW, manifest_rows, prepare
from wide_chests import averaged, chest

from covtanet import drawing as overlay
from covtanet.ct import lung, nifti
from covtanet.ct.volume import Volume, canonical_volume
from covtanet.decoding import prepare as decode
from covtanet.decoding.stored_masks import StoredMasks
from covtanet.errors import SandboxClosedError, Status
from covtanet.inference.predictor import Prediction, Predictor
from covtanet.ledger.record import ScreeningRecord
from covtanet.ledger.run import Run
from covtanet.model.description import Capabilities
from covtanet.model.saved_model import load_model
from covtanet.phantoms.encodings import dicom_objects
from covtanet.phantoms.phantom import Phantom
from covtanet.screening import stages
from covtanet.screening.config import ScreeningConfig, config_values
from covtanet.screening.records import PredictedSeries, PreparedSeries
from covtanet.screening.workers import store_record
from covtanet.storage import walk


@pytest.fixture(scope="module")
def predictor(model_folder: Path) -> Predictor:
    return Predictor(load_model(model_folder), engine="eager", max_batch_slices=8)


def columns_of(series: PredictedSeries) -> dict[str, Any]:
    """The columns of a series behind the last stage."""
    return stages.measure_series(series, CONFIG).record.to_columns()


def new_record(**values: Any) -> ScreeningRecord:
    return ScreeningRecord(
        series_key="k", source_uri="/a", source_format="nifti", source_version="v",
        num_objects=1, num_bytes=7, started_at=0.0, **values,
    )  # fmt: skip


def screen(
    archive: Path, predictor: Predictor, config: ScreeningConfig = CONFIG
) -> list[dict[str, Any]]:
    records = []
    for row in manifest_rows(archive):
        prepared = prepare(row, archive, config)
        measured = stages.measure_series(stages.predict_series(prepared, predictor), config)
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
    assert tuple(stages.conclude(p_infected, p_severe, involvement, CONFIG).values()) == expected


def test_masks_survive_their_packing(mild_volume: Any) -> None:
    masks, _, _ = decode.prepare_volume(mild_volume, WINDOW, CONFIG.slice_step_mm)
    back = StoredMasks.unpack(masks.pack())
    np.testing.assert_array_equal(back.lungs.lung_mask, masks.lungs.lung_mask)
    np.testing.assert_array_equal(back.lungs.cavity_mask, masks.lungs.cavity_mask)
    np.testing.assert_array_equal(back.source.affine, masks.source.affine)
    assert len(masks.pack()) < mild_volume.hu.size / 8


def test_ledger_volumes_are_those_of_the_written_masks(
    mild_volume: Any, mild: Phantom, tmp_path: Path
) -> None:
    """A perfect network: the lesion of the chosen slices, repeated over what they stand for."""
    masks, chosen, slices = decode.prepare_volume(mild_volume, WINDOW, CONFIG.slice_step_mm)
    levels = (mild.lesion_mask[chosen] * 254).astype(np.uint8)
    row = PredictedSeries(
        record=new_record(p_infected=0.9, p_severe=0.2),
        slices=slices,
        lesion_levels=levels,
        chosen=chosen,
        masks=masks.pack(),
    )
    measured = stages.measure_series(row, CONFIG)
    assert measured.masks is not None
    assert measured.involvement is not None
    files = dict(overlay.result_files(slices, chosen, measured.masks, measured.involvement, WINDOW))
    assert set(files) == {
        "lesion_mask.nii.gz",
        "lung_mask.nii.gz",
        "preview.png",
        "viewer.png",
        "viewer.json",
    }
    (tmp_path / "lesion.nii.gz").write_bytes(files["lesion_mask.nii.gz"])
    voxels = int(np.asarray(nib.load(tmp_path / "lesion.nii.gz").dataobj).sum())
    assert measured.record.lesion_volume_ml == pytest.approx(voxels * mild_volume.voxel_ml)
    assert measured.record.involvement == pytest.approx(mild.involvement, abs=0.03)
    assert measured.record.severity_by_involvement == "mild"


class BrightnessPredictor:
    """A predictor without training: ground glass by its HU, infected if it covers enough of what it
    sees.
    """

    def predict(self, slices: np.ndarray) -> Prediction:
        hu = slices / 65535 * 1400.0 - 1000
        is_lesion = (hu > -680) & (hu < -300)
        share = float(is_lesion.mean())
        return Prediction(
            lesion_levels=(is_lesion * 254).astype(np.uint8),
            p_infected=min(1.0, 25 * share),
            p_severe=0.0,
        )


def screened(
    volume: Volume, predictor: Any = None, config: ScreeningConfig = CONFIG
) -> tuple[dict[str, Any], Any]:
    """The record of a volume that was read, and what was measured."""
    masks, chosen, slices = decode.prepare_volume(volume, WINDOW, config.slice_step_mm)
    row = PreparedSeries(
        record=new_record(num_slices_segmented=len(chosen)),
        slices=slices,
        chosen=chosen,
        masks=masks.pack(),
    )
    measured = stages.measure_series(
        stages.predict_series(row, predictor or BrightnessPredictor()), config
    )
    return measured.record.to_columns(), measured


def test_axial_coronal_and_sagittal_series_of_one_chest_agree() -> None:
    """Reformats of one volume, 2.8 and 5.6 mm thick; turned to axial, their voxels are long along y
    or x.
    """
    phantom = chest(256, 90, involvement=0.25)
    records = {}
    for name, factors, axes in (
        ("axial", (2, 1, 1), (0, 1, 2)),
        ("coronal", (1, 2, 1), (1, 0, 2)),
        ("sagittal", (1, 1, 4), (2, 0, 1)),
    ):
        hu = np.rint(averaged(phantom.hu, factors)).astype(np.int16)
        affine = (phantom.affine @ np.diag([*factors, 1]))[:, [*axes, 3]]
        volume = canonical_volume(hu.transpose(axes), affine)
        np.testing.assert_array_equal(volume.hu, hu)
        records[name], _ = screened(volume)
    for name, record in records.items():
        for column in ("lesion_volume_ml", "lung_volume_ml", "involvement"):
            assert record[column] == pytest.approx(records["axial"][column], rel=0.15), (
                name,
                column,
            )
        assert record["diagnosis"] == records["axial"]["diagnosis"] == "infected"
        assert record["severity_by_involvement"] == records["axial"]["severity_by_involvement"]
    voxel_ml = 1.4 * 1.4 * 3 / 1000
    assert records["axial"]["lesion_volume_ml"] == pytest.approx(
        phantom.lesion_mask.sum() * voxel_ml, rel=0.15
    )


def test_pictures_of_anisotropic_slices_show_masks_where_the_network_sees_the_lungs() -> None:
    """In the viewer, red is the level and green the mask: aerated lung is dark."""
    phantom = chest(256, 30)
    hu = np.rint(averaged(phantom.hu, (1, 4, 1))).astype(np.int16)
    volume = canonical_volume(hu, phantom.affine @ np.diag([1, 4, 1, 1]))
    masks, chosen, slices = decode.prepare_volume(volume, WINDOW, CONFIG.slice_step_mm)
    _, measured = screened(volume)
    files = dict(overlay.result_files(slices, chosen, masks, measured.involvement, WINDOW))
    tiles = np.asarray(Image.open(BytesIO(files["viewer.png"])))
    is_lung, is_dark = tiles[:, :, 1] > 0, (tiles[:, :, 0] > 5) & (tiles[:, :, 0] < 90)
    assert np.count_nonzero(is_lung & is_dark) > 0.7 * np.count_nonzero(is_lung)
    side_mm, tile_px = 358.4, 128
    shown_mm2 = np.count_nonzero(is_lung) * (side_mm / tile_px) ** 2
    assert shown_mm2 == pytest.approx(
        np.count_nonzero(measured.involvement.lung_mask[chosen]) * 1.4 * 5.6, rel=0.05
    )
    lesion = np.asarray(
        nib.Nifti1Image.from_bytes(gzip.decompress(files["lesion_mask.nii.gz"])).dataobj
    )
    assert lesion.shape == volume.source.shape == (30, 64, 256)


def test_unknown_spacing_keeps_involvement_and_gives_no_volume(mild_volume: Volume) -> None:
    """Every slice with lung is segmented: nominal millimetres are none to thin slices by."""
    known, _ = screened(mild_volume)
    tiny = mild_volume.affine @ np.diag([0.1, 0.1, 0.1, 1])
    unknown, measured = screened(replace(mild_volume, affine=tiny, has_known_spacing=False))
    assert (unknown["lesion_volume_ml"], unknown["lung_volume_ml"]) == (None, None)
    assert unknown["involvement"] == pytest.approx(known["involvement"], rel=0.05)
    assert unknown["severity_by_involvement"] == known["severity_by_involvement"]
    assert measured.masks.voxel_ml is None
    thinned, _ = screened(
        replace(mild_volume, affine=tiny), config=replace(CONFIG, slice_step_mm=2.5)
    )
    assert (
        unknown["num_slices_segmented"]
        == known["num_slices_segmented"]
        > thinned["num_slices_segmented"]
    )


@pytest.mark.parametrize(
    ("change", "flags", "is_null"),
    [
        ({}, [], False),
        ({"has_known_spacing": False}, ["unknown_spacing"], False),
        ({"affine": np.diag([2.0, 2.0, 2.0, 1.0])}, ["implausible_lungs"], True),
        ({"affine": np.diag([0.2, 0.2, 0.2, 1.0])}, ["implausible_lungs"], True),
        (
            {"affine": np.diag([0.2, 0.2, 0.2, 1.0]), "has_known_spacing": False},
            ["unknown_spacing"],
            False,
        ),
        ({"blank": [11, 12]}, ["blank_slices"], False),
        ({"shown": slice(8, 18)}, ["partial_lungs"], True),
        ({"shown": slice(8, 18), "affine": np.diag([2.0, 2.0, 2.0, 1.0])}, ["partial_lungs"], True),
    ],
)
def test_flags_of_lungs_and_spacing_stand_in_the_row(
    mild_volume: Volume,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    flags: list[str],
    is_null: bool,
) -> None:
    """Whatever reader gives such a volume."""
    hu = mild_volume.hu.copy()
    hu[change.get("blank", [])] = -1024
    affine = mild_volume.affine @ change.get("affine", np.eye(4))
    volume = canonical_volume(hu[change.get("shown", slice(None))], affine)
    volume = replace(volume, has_known_spacing=change.get("has_known_spacing", True))
    monkeypatch.setattr(nifti, "read", lambda data: volume)
    prepared = decode.prepare("nifti", [b""], WINDOW, CONFIG.slice_step_mm)
    assert list(prepared.qc_flags) == flags
    assert not set(prepared.chosen) & set(change.get("blank", []))
    record, _ = screened(volume)
    assert (record["involvement"] is None) is is_null
    assert (record["severity_by_involvement"] is None) is is_null


def test_blank_slices_are_not_segmented_and_hold_no_lesion(mild_volume: Volume) -> None:
    hu = mild_volume.hu.copy()
    hu[[11, 12]] = 0
    record, measured = screened(replace(mild_volume, hu=hu))
    whole, _ = screened(mild_volume)
    assert record["num_slices_segmented"] == whole["num_slices_segmented"] - 2
    assert not measured.involvement.lesion_mask[[11, 12]].any()
    assert not measured.involvement.lung_mask[[11, 12]].any()
    assert record["involvement"] == pytest.approx(whole["involvement"], abs=0.03)


def test_lesion_that_makes_lungs_implausible_is_flagged(mild_volume: Volume) -> None:
    """The lung mask alone holds less than 12 litres, with the lesion in the cavity it
    holds more.
    """

    class Everywhere:
        def predict(self, slices: np.ndarray) -> Prediction:
            return Prediction(
                lesion_levels=np.full(slices.shape, 254, np.uint8), p_infected=None, p_severe=None
            )

    larger = replace(mild_volume, affine=mild_volume.affine @ np.diag([1.39, 1.39, 1.39, 1]))
    masks, _, _ = decode.prepare_volume(larger, WINDOW, CONFIG.slice_step_mm)
    assert np.count_nonzero(masks.lungs.lung_mask) * larger.voxel_ml < 12000
    record, _ = screened(larger, Everywhere())
    assert record["lung_volume_ml"] > 12000
    assert "implausible_lungs" in record["qc_flags"]
    assert record["involvement"] is None


@pytest.mark.parametrize("aspect", [1, 2])
def test_viewer_carries_the_window_of_the_model(mild_volume: Any, aspect: int) -> None:
    """Also of pixels that are not square, whose masks are drawn in the network's own grid."""
    volume = canonical_volume(
        mild_volume.hu[:, ::aspect], mild_volume.affine @ np.diag([1.0, aspect, 1.0, 1.0])
    )
    window = replace(WINDOW, low_hu=-1350.0, high_hu=150.0)
    masks, chosen, slices = decode.prepare_volume(volume, window, CONFIG.slice_step_mm)
    nothing = np.zeros(volume.hu.shape, bool)
    found = lung.measure_involvement(masks.lungs, nothing, volume.voxel_ml)
    files = dict(overlay.result_files(slices, chosen, masks, found, window))
    layout = json.loads(files["viewer.json"])
    assert (layout["low_hu"], layout["high_hu"]) == (-1350.0, 150.0)


EXPECTED_REAL = {
    "dicom/ricord-1a-001012/": ["prepared"],
    "dicom/lungfcp-01-0001/": ["prepared"],
    "nifti/cip-ct64.nii.gz": ["prepared"],
    "broken/missing-slices/": ["missing_slices"],
    "broken/missing-rescale/": ["missing_rescale"],
    "broken/missing-position/": ["missing_position"],
    "broken/duplicate-slice/": ["duplicate_slice"],
    "broken/mixed-series/": ["too_few_slices", "too_few_slices"],
    "broken/truncated/": ["truncated"],
    "broken/truncated/1-136.dcm": ["unreadable"],
    "broken/not-dicom/empty.dcm": ["unreadable"],
    "broken/not-dicom/text.dcm": ["unreadable"],
    "broken/gantry-tilt-head-phantom/": ["gantry_tilt"],
    "broken/transfer-syntaxes/": ["duplicate_slice", "too_few_slices"],
    "broken/enhanced-multiframe/": ["too_few_slices"],
    "broken/odd-headers/": ["too_few_slices", "too_few_slices"],
    "broken/odd-headers/no_meta.dcm": ["unreadable"],
    "broken/seg-objects/": ["not_ct"],
}


def test_real_and_damaged_input_gives_its_64_rows() -> None:
    """44 NIfTI objects and 20 DICOM series, each with its verdict."""
    if not REAL_DATA.exists():
        pytest.skip("the real CT is not on this machine")
    found: dict[str, list[str]] = {}
    flags: dict[str, list[str]] = {}
    for row in manifest_rows(REAL_DATA):
        prepared = prepare(row, REAL_DATA)
        record = prepared.record.to_columns()
        found.setdefault(row["source_path"], []).append(record["reason"] or "prepared")
        flags[row["source_path"]] = record["qc_flags"]
    for path in (REAL_DATA / "nifti").glob("covidseg-*"):
        assert found.pop(f"nifti/{path.name}") == ["not_hu"]
    masks = [path for path in found if path.startswith("nifti-masks/")]
    assert len(masks) == 35
    assert all(found.pop(path) == ["label_map"] for path in masks)
    assert {path: sorted(verdicts) for path, verdicts in found.items()} == EXPECTED_REAL
    assert flags["dicom/lungfcp-01-0001/"] == ["partial_lungs"]
    assert flags["dicom/ricord-1a-001012/"] == ["padding"]


def test_archive_with_links_to_nowhere_and_pipes_is_listed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.nii").write_bytes(b"x")
    (tmp_path / "linked").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "loop").symlink_to(tmp_path)
    (tmp_path / "gone.dcm").symlink_to(tmp_path / "nothing")
    os.mkfifo(tmp_path / "pipe.dcm")
    rows = {row["source_path"]: row for row in manifest_rows(tmp_path)}
    assert set(rows) == {"gone.dcm", "linked/a.nii"}
    prepared = prepare(rows["gone.dcm"], tmp_path)
    record = prepared.record.to_columns()
    assert (record["status"], record["reason"]) == ("failed", "vanished")


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


def test_link_out_of_the_archive_is_a_row_and_never_read(tmp_path: Path) -> None:
    archive, outside = tmp_path / "archive", tmp_path / "outside"
    for folder in (archive, outside):
        folder.mkdir()
    (outside / "a.nii").write_bytes(b"secret")
    for name, target in (
        ("linked.nii", outside / "a.nii"),
        ("folder", outside),
        ("noted.txt", outside / "a.nii"),
    ):
        (archive / name).symlink_to(target)
    rows = {row["source_path"]: row for row in manifest_rows(archive)}
    assert set(rows) == {"linked.nii", "folder", "noted.txt"}
    for row in rows.values():
        record = prepare(row, archive).record.to_columns()
        assert (record["status"], record["reason"], record["source_digest"]) == (
            "rejected",
            "unreadable",
            None,
        )
    assert [folder for folder, _ in walk(str(archive), leaves_root=True)] == ["", "folder/"]


def test_weak_sandbox_is_no_part_of_a_runs_identity() -> None:
    weak = replace(CONFIG, allow_weak_sandbox=True)
    assert config_values(WINDOW, weak) == config_values(WINDOW, CONFIG)
    other = replace(CONFIG, decode_timeout_s=1.0)
    assert config_values(WINDOW, other) != config_values(WINDOW, CONFIG)


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
    sound = store_record(run, replace(record, status=Status.SCREENED))
    assert sound["status"] == "screened"
    for lie in (
        {"num_slices": 10**12},
        {"qc_flags": [1]},
        {"reason_detail": "\ud800"},
        {"p_infected": "x"},
    ):
        stored = store_record(run, replace(record, **lie))
        assert (stored["status"], stored["reason"], stored["num_slices"]) == (
            "failed",
            "internal_error",
            None,
        )
        assert (stored["series_key"], stored["source_uri"]) == (
            row["series_key"],
            f"{tmp_path}/a.nii",
        )
        assert (
            pq.read_table(run.row_uri(row["series_key"])).to_pylist()[0]["reason"]
            == "internal_error"
        )
