"""Single slices as pictures: grey values to HU, and files that are no slices."""

import io

import numpy as np
import pytest
from PIL import Image

from covtanet.ct import picture
from covtanet.errors import Reason, StudyError

# 16 x 24 pixels, half air and half tissue by HU = -1024 + 4 grey: 6 is -1000 HU, 255 is -4 HU.
HALVES = np.repeat(np.array([[6, 255]], np.uint8), 16, axis=0).repeat(12, axis=1)


def encode(grey: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(grey).save(buffer, kind)
    return buffer.getvalue()


def test_picture_becomes_one_slice_in_hu_by_its_line() -> None:
    volume = picture.read(encode(HALVES), -1024.0, 4.0)
    assert volume.hu.shape == (1, 16, 24)
    assert volume.hu.dtype == np.int16
    assert set(np.unique(volume.hu)) == {-1000, -4}
    assert not volume.has_known_spacing
    # Rows and columns are not permuted: air stays on the patient's right.
    assert (volume.hu[0, :, :12] == -1000).all()


def test_jpeg_of_three_channels_is_read_as_grey() -> None:
    rgb = np.repeat(np.full((16, 16, 1), 100, np.uint8), 3, axis=2)
    assert picture.read_grey(encode(rgb, "JPEG")).tolist() == np.full((1, 16, 16), 100).tolist()


def test_picture_whose_line_gives_no_hu_is_refused() -> None:
    with pytest.raises(StudyError, match="tissue") as caught:
        picture.read(encode(HALVES), -2048.0, 1.0)
    assert caught.value.reason == Reason.NOT_HU


@pytest.mark.parametrize(
    ("data", "reason"),
    ids=("text", "truncated", "BMP"),
    argvalues=[
        (b"no picture", Reason.UNREADABLE),
        (encode(HALVES)[:45], Reason.UNDECODABLE),
        (encode(np.zeros((64, 64), np.uint8), "BMP"), Reason.UNREADABLE),
    ],
)
def test_damaged_picture_is_refused(data: bytes, reason: Reason) -> None:
    with pytest.raises(StudyError, match=r"JPEG|picture") as caught:
        picture.read_grey(data)
    assert caught.value.reason == reason


def test_picture_of_too_many_pixels_is_refused_before_it_is_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(picture, "MAX_PIXELS", 100)
    with pytest.raises(StudyError, match="24 x 16 pixels, expected at most 100") as caught:
        picture.read_grey(encode(HALVES))
    assert caught.value.reason == Reason.TOO_LARGE
