"""Every case of ``archive_cases`` ends as its expected row."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from archive_cases import CASES, LARGE, check
from chests import body_aspect
from numpy.typing import NDArray
from right_rows import Right, faults
from stage_rows import CONFIG, WINDOW

from covtanet.archive import manifest
from covtanet.ct import dicom, dicom_headers, nifti
from covtanet.decoding.sandbox import Sandbox
from covtanet.inference.predictor import Prediction
from covtanet.screening import stages
from covtanet.screening.config import ScreeningConfig
from covtanet.screening.records import PreparedSeries
from covtanet.storage import read_bytes, walk


class NoLesion:
    """Return no lesion, so that the lung volume of a row is that of the lung mask."""

    def predict(self, slices: NDArray[np.uint16]) -> Prediction:
        return Prediction(
            lesion_levels=np.zeros(slices.shape, np.uint8),
            p_infected=0.1,
            p_severe=0.1,
        )


def listed(archive: Path) -> tuple[list[dict[str, Any]], int]:
    """The manifest rows of an archive, and how many objects are ignored."""
    rows, num_ignored = [], 0
    for folder, objects in walk(str(archive)):
        scanned, ignored = manifest.scan_folder(
            folder,
            objects,
            lambda path, size: read_bytes(f"{archive}/{path}", size),
            dicom_headers.read_identities,
        )
        rows += [series.to_row() for series in scanned]
        num_ignored += len(ignored)
    return rows, num_ignored


def check_values(row: dict[str, Any], archive: Path, right: Right) -> list[str]:
    """Compare the HU of a series with the HU that were written."""
    if right.hu is None:
        return []
    data = [read_bytes(f"{archive}/{item['path']}") for item in row["objects"]]
    hu = nifti.read(data[0]).hu if row["source_format"] == "nifti" else dicom.read_series(data).hu
    return [] if np.array_equal(hu, right.hu) else ["the HU are not those that were written"]


def check_input(prepared: PreparedSeries, right: Right) -> list[str]:
    """Compare the network's input with the expected one."""
    problems = []
    seen = [z for z in right.unsegmented if z in prepared.chosen.tolist()]
    if seen:
        problems.append(f"blank slices {seen} were segmented")
    if right.aspect is not None:
        levels = prepared.slices[len(prepared.slices) // 2].astype(np.float32)
        # Half of the window is -300 HU.
        aspect = body_aspect(levels / 65535 * 1400 - 1000)
        if abs(aspect / right.aspect - 1) > 0.12:
            problems.append(
                f"the network sees a body of {aspect:.2f} : 1, true is {right.aspect:.2f} : 1",
            )
    return problems


@pytest.mark.parametrize("name", CASES)
def test_archive_case_gives_the_expected_row(name: str, tmp_path: Path) -> None:
    right = CASES[name](tmp_path / name, name)
    rows, num_ignored = listed(tmp_path)
    wrong = []
    if len(rows) != right.num_rows:
        wrong.append(f"{len(rows)} rows, right are {right.num_rows}")
    if num_ignored != right.num_ignored:
        wrong.append(f"{num_ignored} objects ignored, right are {right.num_ignored}")
    decode = partial(stages.prepare_series, archive=str(tmp_path), window=WINDOW, config=CONFIG)
    for row in rows:
        prepared = decode(row, decoder=stages.in_process(WINDOW, CONFIG))
        record = stages.measure_series(
            stages.predict_series(prepared, NoLesion()), WINDOW, CONFIG
        ).record.to_columns()
        wrong += faults(record, right)
        if record["status"] == "screened":
            wrong += check_values(row, tmp_path, right) + check_input(prepared, right)
    assert not wrong, "; ".join(dict.fromkeys(wrong))


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_large_case_is_screened_or_too_large(
    name: str,
    tmp_path: Path,
) -> None:
    """In the sandbox, with its limits of memory and time."""
    right = LARGE[name](tmp_path / name, name)
    (row,), _ = listed(tmp_path)
    config = ScreeningConfig()
    sandbox = Sandbox(WINDOW, config.slice_step_mm, config.decode_limits)
    try:
        prepared = stages.prepare_series(
            row,
            archive=str(tmp_path),
            window=WINDOW,
            config=config,
            decoder=sandbox,
        )
    finally:
        sandbox.close()
    record = stages.measure_series(
        stages.predict_series(prepared, NoLesion()), WINDOW, config
    ).record.to_columns()
    allowed = {(each.status, *each.reasons) for each in right.rows}
    verdict = (record["status"], record["reason"]) if record.get("reason") else (record["status"],)
    assert verdict in allowed, json.dumps(record)


SOUND: dict[str, Any] = {
    "status": "screened",
    "reason": None,
    "qc_flags": [],
    "involvement": 0.0,
    "lung_volume_ml": 3500.0,
    "lesion_volume_ml": 0.0,
    "spacing_z_mm": 11.0,
    "spacing_y_mm": 3.75,
    "spacing_x_mm": 3.75,
}


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({}, []),
        ({"qc_flags": ["no_diagnosis"]}, []),
        ({"lung_volume_ml": 4800.0}, ["lung of 4800 ml, true are 3557 ml"]),
        ({"qc_flags": ["padding"]}, ["flag padding is wrong"]),
        ({"involvement": None}, ["involvement is None with flags []"]),
        ({"spacing_z_mm": 10.0}, ["spacing (10.0, 3.75, 3.75), true is (11.0, 3.75, 3.75)"]),
        (
            {"status": "rejected", "reason": "not_hu"},
            ["rejected (not_hu), right is screened"],
        ),
    ],
)
def test_ledger_of_the_archive_cases_has_the_expected_rows(
    changes: dict[str, Any],
    wrong: list[str],
) -> None:
    """Of a plain series; the row of another case is none of it."""
    uri = "s3://bucket/archive/00_dicom/"
    cases = {"00_dicom": CASES["00_dicom"]}
    other = {**SOUND, "source_uri": "s3://bucket/archive/01_coronal/"}
    assert check([{**SOUND, "source_uri": uri, **changes}, other], cases) == {"00_dicom": wrong}
    assert check([other], cases) == {"00_dicom": ["0 rows, right are 1"]}


@pytest.mark.parametrize(
    ("name", "row", "wrong"),
    [
        ("36_cut_left_0.3", SOUND, ["flag partial_lungs is missing"]),
        (
            "36_cut_left_0.3",
            {**SOUND, "qc_flags": ["partial_lungs"]},
            ["involvement is 0.0 with flags ['partial_lungs']"],
        ),
        (
            "49_voxels_of_1_without_unit",
            {**SOUND, "qc_flags": ["unknown_spacing"]},
            ["3500.0 and 0.0 ml from nominal voxels"],
        ),
        ("09_MIP", SOUND, ["screened (), right is rejected projection"]),
        (
            "09_MIP",
            {"status": "rejected", "reason": "not_ct"},
            ["reason not_ct, right is projection"],
        ),
        ("19_high_bit_11_of_16", SOUND, []),
        ("19_high_bit_11_of_16", {"status": "rejected", "reason": "undecodable"}, []),
    ],
)
def test_unexpected_row_is_reported(
    name: str,
    row: dict[str, Any],
    wrong: list[str],
    tmp_path: Path,
) -> None:
    assert faults(row, CASES[name](tmp_path / name, name)) == wrong
