"""``make pacs`` as a user calls it."""

import subprocess
import sys

import pytest
from repository import ROOT

from infra.pacs.orthanc import INSTALL, is_installed

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not is_installed(), reason=f"Orthanc is not installed: {INSTALL}"),
]


def test_make_pacs_screens_two_nights_and_stores_valid_results() -> None:
    command = [sys.executable, "-m", "infra.pacs.night", "--port", "0"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    assert ", 0 differ from those of the folder" in ended.stdout
    assert "second night: 1 series" in ended.stdout
