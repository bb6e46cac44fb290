"""Eight seconds of ``make fuzz`` for each reader: its corpus is replayed, then searched from."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT


@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is not installed")
@pytest.mark.parametrize("reader", ["nifti", "dicom"])
def test_fuzzing_finds_only_bytes_that_are_read_or_refused(reader: str, tmp_path: Path) -> None:
    fuzzing = subprocess.run(
        [
            sys.executable,
            ROOT / "tests" / "fuzz.py",
            reader,
            "--minutes",
            str(8 / 60),
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
