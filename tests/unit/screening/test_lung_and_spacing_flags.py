"""Lungs, spacing and pixel aspect in the measurements and flags of a series."""

import gzip
import json
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from PIL import Image
from screened_series import new_record, screened
from stage_rows import CONFIG, WINDOW
from wide_chests import averaged, chest

from covtanet import drawing as overlay
from covtanet.ct import lung, nifti
from covtanet.ct.volume import Volume, canonical_volume
from covtanet.decoding import prepare as decode
from covtanet.inference.predictor import Prediction
from covtanet.phantoms.phantom import Phantom
from covtanet.screening import stages
from covtanet.screening.records import PredictedSeries, PreparedSeries


def test_ledger_volumes_are_those_of_the_written_masks(
    mild_volume: Any, mild: Phantom, tmp_path: Path
) -> None:
    """A perfect network: the lesion of the chosen slices, repeated over what they stand for."""
    masks, chosen, slices = decode.prepare_volume(mild_volume, WINDOW, CONFIG.slice_step_mm)
    levels = (mild.lesion_mask[chosen] * 254).astype(np.uint8)
    prepared = PreparedSeries(
        record=new_record(p_infected=0.9, p_severe=0.2),
        slices=slices,
        chosen=chosen,
        masks=masks.pack(),
    )
    row = PredictedSeries(prepared=prepared, lesion_levels=levels)
    measured = stages.measure_series(row, WINDOW, CONFIG)
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
