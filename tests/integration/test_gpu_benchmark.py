"""The benchmark of one GPU as a toy on the CPU: the same parts, one after the other."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from repository import ROOT

# A machine with a GPU that is lent for minutes has torch and timm and little else.
MISSING = """
import sys
REFUSED = {
    "ray", "mlflow", "pyarrow", "openvino", "nncf", "nibabel", "pydicom", "highdicom", "boto3",
    "monai", "SimpleITK", "fastapi", "psutil",
}
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in REFUSED:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
"""


def run_toy(folder: Path, *options: str) -> tuple[int, dict[str, Any], str]:
    """Run the benchmark without the libraries above; return code, results and table."""
    (folder / "sitecustomize.py").write_text(MISSING)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--toy", "--out", str(folder / "out"), *options],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{folder}:{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (folder / "out" / "gpu.json").exists(), done.stderr
    results = json.loads((folder / "out" / "gpu.json").read_text())
    return done.returncode, results, (folder / "out" / "gpu.md").read_text()


@pytest.mark.slow
def test_toy_measures_every_part_with_torch_and_timm_alone(tmp_path: Path) -> None:
    code, results, table = run_toy(tmp_path)
    parts = results["parts"]
    assert code == 0, parts
    assert list(parts) == [
        "GEMM",
        "V7, toy: float32",
        "V7, toy: bf16 eager",
        "V7, toy: bf16 graph",
        "V7, toy: training",
    ]
    engines = [parts[f"V7, toy: {name}"] for name in ("float32", "bf16 eager", "bf16 graph")]
    assert {values["flops_per_slice"] for values in engines} == {engines[0]["flops_per_slice"]}
    # Rounding to whole levels alone is a quarter in the mean.
    assert engines[0]["max_levels_apart"] < 0.6
    # Measured: 5.5, of random weights with the contrast of the benchmark, on noise.
    assert max(values["mean_levels_apart"] for values in engines) < 10
    # Forward and backward take about three times the products of the forward pass.
    ratio = parts["V7, toy: training"]["flops_per_slice"] / engines[0]["flops_per_slice"]
    assert 2.5 < ratio < 3.5
    assert "no figure of a GPU" in table
    assert table.count("| V7, toy") == 4


def test_parts_without_time_are_written_down_and_end_nothing(tmp_path: Path) -> None:
    code, results, table = run_toy(tmp_path, "--budget-s", "0")
    assert code == 1
    assert {values["error"] for values in results["parts"].values()} == {"left out, 0 s left"}
    assert "- GEMM: left out" in table


@pytest.mark.parametrize("part", ["V7, toy: training"])
def test_part_that_fails_leaves_its_error(tmp_path: Path, part: str) -> None:
    """Asked for on a GPU that is not there."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path), "--part", part]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "cuda" in done.stderr.splitlines()[-1].lower()
