"""Labelled volumes in their own grid: pictures of one slice with a line to HU."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from covtanet.data.datasets import read_volumes
from covtanet.data.labels import LabelledVolume
from covtanet.data.source import read_source
from covtanet.errors import StudyError

# Grey 20 is -1000 HU and grey 220 is 200 HU: 6 HU per grey value.
LINE = "grey8:-1120:410"


def png(grey: np.ndarray) -> bytes:
    buffer = BytesIO()
    Image.fromarray(grey).save(buffer, "png")
    return buffer.getvalue()


def chest() -> np.ndarray:
    """Return air around a body."""
    grey = np.full((64, 64), 20, np.uint8)
    grey[16:48, 16:48] = 220
    return grey


def test_picture_of_one_slice_is_read_by_its_line_with_its_mask() -> None:
    volume = LabelledVolume(
        volume_path="a.png", patient="a", lesion_mask_path="m.png", intensity=LINE
    )
    mask = np.zeros((64, 64), np.uint8)
    mask[20, 20:23] = 255
    source = read_source(volume, {"a.png": png(chest()), "m.png": png(mask)})
    assert source.intensity == "hu"
    assert source.ct.hu.shape == (1, 64, 64)
    assert sorted(np.unique(source.ct.hu)) == [-1000, 200]
    assert not source.ct.has_known_spacing
    assert source.lesion is not None
    assert np.count_nonzero(source.lesion) == 3


def test_picture_without_a_line_is_refused() -> None:
    volume = LabelledVolume(volume_path="a.png", patient="a", intensity="grey8")
    with pytest.raises(StudyError, match="a picture with intensity grey8, expected grey8:LOW:HIGH"):
        read_source(volume, {"a.png": png(chest())})


def test_mosmed_mid_has_the_line_of_each_slice_and_the_median_without_one(tmp_path: Path) -> None:
    (tmp_path / "lesion-masks").mkdir()
    (tmp_path / "index.csv").write_text(
        "file,class,study,hu_at_0,hu_per_grey\n"
        "CT-0/1.jpg,CT-0,s1,-2000,10\nCT-1/2.jpg,CT-1,s2,-1000,8\nCT-2/3.jpg,CT-2,s3,,\n"
    )
    volumes = read_volumes("mosmed-mid", str(tmp_path))
    assert [volume.intensity for volume in volumes] == [
        "grey8:-2000.00:550.00",
        "grey8:-1000.00:1040.00",
        "grey8:-1500.00:795.00",
    ]
