"""JPEG Lossless streams: bit for bit, and refused if they are not whole."""

import imagecodecs
import numpy as np
import pytest
from numpy.typing import NDArray

from covtanet.ct import jpeg_lossless

EOI = b"\xff\xd9"


def picture(bits: int, shape: tuple[int, int] = (64, 48)) -> NDArray[np.uint16]:
    rng = np.random.default_rng(bits)
    return rng.integers(0, 2**bits, shape).astype(np.uint16)


def encode(pixels: NDArray[np.uint16], bits: int = 16) -> bytes:
    return bytes(imagecodecs.ljpeg_encode(pixels, bitspersample=bits))


@pytest.mark.parametrize("bits", [12, 16])
@pytest.mark.parametrize("shape", [(64, 48), (33, 17), (1, 8)])
def test_samples_are_those_that_were_encoded(bits: int, shape: tuple[int, int]) -> None:
    pixels = picture(bits, shape)
    np.testing.assert_array_equal(jpeg_lossless.decode(encode(pixels, bits)), pixels)


@pytest.mark.parametrize("predictor", [1, 2, 4, 6, 7])
@pytest.mark.parametrize("bits", [8, 10, 14])
def test_samples_of_any_predictor_are_those_that_were_encoded(bits: int, predictor: int) -> None:
    pixels = picture(bits).astype(np.uint8 if bits == 8 else np.uint16)
    stream = imagecodecs.jpeg8_encode(
        pixels, lossless=True, bitspersample=bits, predictor=predictor
    )
    decoded = jpeg_lossless.decode(bytes(stream))
    assert decoded.dtype == pixels.dtype
    np.testing.assert_array_equal(decoded, pixels)


def test_last_rows_of_the_starting_value_are_read() -> None:
    """They look like those of a stream that lacks rows."""
    pixels = picture(12)
    pixels[-3:] = 1 << 11
    np.testing.assert_array_equal(jpeg_lossless.decode(encode(pixels, 12)), pixels)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_stream_that_lacks_rows_before_its_end_marker_is_refused(share: float) -> None:
    stream = encode(picture(12), 12)
    with pytest.raises(ValueError, match="no data for its last rows"):
        jpeg_lossless.decode(stream[: int(share * len(stream))] + EOI)


def test_lossy_stream_is_refused() -> None:
    lossy = bytes(imagecodecs.jpeg8_encode(picture(8).astype(np.uint8), level=90))
    with pytest.raises(ValueError, match="another process than lossless"):
        jpeg_lossless.decode(lossy)


def test_padding_after_the_end_is_accepted() -> None:
    pixels = picture(16)
    np.testing.assert_array_equal(jpeg_lossless.decode(encode(pixels) + b"\0"), pixels)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9, 0.999])
def test_stream_that_ends_early_is_refused(share: float) -> None:
    stream = encode(picture(16))
    with pytest.raises(ValueError, match="no end marker"):
        jpeg_lossless.decode(stream[: int(share * len(stream))])


def test_stream_cut_before_its_end_marker_is_refused() -> None:
    stream = encode(picture(16))
    assert stream.endswith(EOI)
    with pytest.raises(ValueError, match="no end marker"):
        jpeg_lossless.decode(stream[:-2])


def test_marker_within_the_data_is_refused() -> None:
    stream = encode(picture(16))
    middle = len(stream) // 2
    with pytest.raises(ValueError, match="another marker"):
        jpeg_lossless.decode(stream[:middle] + b"\xff\xc4" + stream[middle + 2 :])


@pytest.mark.parametrize("stream", [b"", b"\xff", b"\xff\xd8", b"no jpeg", b"\xff\xd8\xff\xc4\xff"])
def test_bytes_that_are_no_stream_are_refused(stream: bytes) -> None:
    with pytest.raises(ValueError, match="a JPEG stream"):
        jpeg_lossless.decode(stream)


def test_segment_of_length_zero_ends_the_search() -> None:
    with pytest.raises(ValueError, match="wrong length"):
        jpeg_lossless.decode(b"\xff\xd8" + b"\xff\xfe\x00\x00" * 2000)
