"""SEG and SR of a series, read by dcmtk."""

import shutil
import subprocess
from io import BytesIO
from pathlib import Path

import pydicom
import pytest

from covtanet.ct import dicom
from covtanet.phantoms.encodings import dicom_objects
from covtanet.phantoms.phantom import Phantom
from covtanet.report.dicom_results import (
    Finding,
    segmentation,
    structured_report,
    to_bytes,
)
from covtanet.report.mask_frames import frames_of

FINDING = Finding(
    run_id="run", series_key="series", software_version="0.1", model="covtanet 1",
    lesion_volume_ml=310.25, lung_volume_ml=4890.5, involvement=0.0634, p_infected=0.98,
)  # fmt: skip


@pytest.mark.skipif(shutil.which("dcmdump") is None, reason="dcmtk is not installed")
def test_dcmtk_reads_seg_and_sr(mild: Phantom, tmp_path: Path) -> None:
    objects = list(dicom_objects(mild, 5))
    headers = [pydicom.dcmread(BytesIO(data), stop_before_pixels=True) for data in objects]
    grid = dicom.read_series(objects).source
    lesion = frames_of(headers, grid.from_canonical(mild.lesion_mask), grid.affine)
    lung = frames_of(headers, grid.from_canonical(mild.lung_mask), grid.affine)
    seg = segmentation(headers, lesion, lung, FINDING)
    sr = structured_report(headers, seg, FINDING)
    for command, data in (("dcmdump", to_bytes(seg)), ("dsrdump", to_bytes(sr))):
        path = tmp_path / command
        path.write_bytes(data)
        read = subprocess.run([command, path], capture_output=True, text=True, check=False)
        assert read.returncode == 0, read.stderr
        assert "E:" not in read.stderr
