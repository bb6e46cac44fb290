"""Agreement of two readers: slices are matched by their images, masks are compared."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import second_reader
from covtanet.ct import nifti
from covtanet.ct.volume import SourceGrid
from covtanet.errors import ConfigError
from covtanet.evaluation import rows

GRID = SourceGrid(shape=(64, 64, 12), affine=np.diag([-1.0, -1.0, 1.0, 1.0]))


def images() -> np.ndarray:
    """Return twelve slices of coarse noise, (12, 64, 64), each of other structure."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 200, (12, 16, 16), dtype=np.uint8)
    return blocks.repeat(4, axis=1).repeat(4, axis=2)


def equalised(slices: np.ndarray) -> np.ndarray:
    """Return slices with another contrast, as the second reader's source has them."""
    return np.rint(255 * (slices / 255.0) ** 0.7).astype(np.uint8)


def test_flipped_subset_with_another_contrast_is_matched() -> None:
    first = images()
    second = equalised(first)[[2, 3, 7, 9]][:, ::-1]
    match = second_reader.match_slices(first, second)
    assert match.axes == (-2,)
    assert match.first.tolist() == [2, 3, 7, 9]
    assert match.second.tolist() == [0, 1, 2, 3]


def test_slice_of_another_scan_is_not_matched() -> None:
    first = images()
    second = np.concatenate([first[4:5], 200 - first[5:6]])
    match = second_reader.match_slices(first, second)
    assert match.first.tolist() == [4]
    assert match.second.tolist() == [0]


def test_slices_of_another_size_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"slices of \(32, 32\) pixels, expected \(64, 64\)"):
        second_reader.match_slices(images(), images()[:, :32, :32])


def write(folder: Path, name: str, slices: np.ndarray, lesion: np.ndarray) -> list[str]:
    """Write a stack with its mask; return its two folders."""
    grid = SourceGrid(shape=(64, 64, len(slices)), affine=GRID.affine)
    for part, suffix, values in (("nifti", "", slices), ("masks", "_mask", lesion)):
        (folder / part).mkdir(parents=True, exist_ok=True)
        (folder / part / f"{name}{suffix}.nii").write_bytes(nifti.write(values, grid))
    return [str(folder / "nifti"), str(folder / "masks")]


def test_agreement_of_shared_slices_by_hand(tmp_path: Path, capsys: Any) -> None:
    """Of four pixels of either reader two are shared: Dice 0.5; the first marks a slice more."""
    first = images()
    lesion = np.zeros(first.shape, np.uint8)
    lesion[[2, 5], 10, 10:14] = 1
    second = equalised(first)[[2, 3]]
    second_lesion = np.zeros(second.shape, np.uint8)
    second_lesion[0, 10, 12:16] = 1
    ours = write(tmp_path / "a", "scan", first, lesion)
    theirs = write(tmp_path / "b", "copy", second, second_lesion)
    # The model finds one pixel of four on slice 2, and has not read slice 3.
    row = {
        **dict.fromkeys(rows.EVALUATION_SCHEMA.names),
        "volume": "k", "patient": "scan", "network": "V8",
        "slice": [2], "tp": [1], "fp": [1], "fn": [3], "tn": [4091],
    }  # fmt: skip
    (tmp_path / "rows.parquet").write_bytes(rows.to_parquet([row]))
    code = second_reader.main([
        "--images", ours[0], "--masks", ours[1],
        "--second-images", theirs[0], "--second-masks", theirs[1], "--stack", "scan", "copy",
        "--rows", str(tmp_path / "rows.parquet"),
    ])  # fmt: skip
    assert code == 0
    result = json.loads(capsys.readouterr().out)
    assert result["second_reader"]["per_slice"]["dice"] == 0.5
    assert result["second_reader"]["num_slices"] == 2
    assert result["model"]["per_slice"]["dice"] == pytest.approx(2 / 6, abs=1e-4)
    assert result["model"]["num_slices"] == 2
    assert result["stacks"]["scan"]["num_matched"] == 2
    assert result["stacks"]["scan"]["num_lesion_slices_unmatched"] == 1


def test_unknown_stack_is_refused(tmp_path: Path) -> None:
    ours = write(tmp_path / "a", "scan", images(), images() > 100)
    with pytest.raises(ConfigError, match="no stack other with a mask, expected one of scan"):
        second_reader.read(second_reader.read_stacks(*ours), "other")
