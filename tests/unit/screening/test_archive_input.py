"""Archives of real and damaged series, with links and pipes among them."""

import os
from pathlib import Path

import pytest
from repository import REAL_DATA
from stage_rows import manifest_rows, prepare

from covtanet.storage import walk

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
