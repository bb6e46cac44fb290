"""A short ``make fuzz`` for each reader: its corpus is replayed, then searched from."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from repository import SUPPORT

# The corpus has up to 60 inputs; a number, since a time is too short on a machine under load.
NUM_RUNS = 90


@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is not installed")
@pytest.mark.parametrize("reader", ["nifti", "dicom"])
def test_fuzzing_finds_no_unhandled_bytes(reader: str, tmp_path: Path) -> None:
    fuzzing = subprocess.run(
        [
            sys.executable,
            SUPPORT / "fuzz.py",
            reader,
            "--runs",
            str(NUM_RUNS),
            "--corpus",
            tmp_path,
            "--seed",
            "1",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert fuzzing.returncode == 0, fuzzing.stderr[-3000:]
    assert not list(tmp_path.glob("crash-*"))
    (tried,) = re.findall(r"stat::number_of_executed_units: (\d+)", fuzzing.stderr)
    assert int(tried) > len(list((tmp_path / reader).iterdir())) > 5
