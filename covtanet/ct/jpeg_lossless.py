"""JPEG Lossless (ITU-T T.81, SOF3): a check that a stream is whole and lossless, and its decoder.

libjpeg-turbo decodes in 0.4 of the time of the codec before it, bit for bit alike. Either fills a
slice that ends early without a word, and libjpeg-turbo reads lossy streams as well. So the segments
and their ends are checked first, and the last row afterwards.

Not covered: entropy-coded data that lacks less than a row, or has another predictor than the pixel
to the left, and is closed by a marker all the same.
"""

import re
from typing import Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray

START, END, SCAN, LOSSLESS = 0xD8, 0xD9, 0xDA, 0xC3
# SOF0 to SOF15 without SOF3; between them lie the tables DHT and DAC, and JPG.
OTHER_PROCESSES = frozenset(range(0xC0, 0xD0)) - {LOSSLESS, 0xC4, 0xC8, 0xCC}
# In entropy-coded data a byte FF is followed by 00, by a restart marker, or by another FF.
MARKER_IN_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
MAX_SEGMENTS = 1000
# Accessed at import, which loads the codecs: later the sandbox can open no file.
_decode_jpeg = imagecodecs.jpeg8_decode
_decode_otherwise = imagecodecs.jpegsof3_decode


def decode(stream: bytes) -> NDArray[Any]:
    """Return the samples of a stream, (rows, columns) for one component.

    Raises:
        ValueError: the stream is not whole, or not lossless.
        RuntimeError: the codec refuses it.
    """
    precision = check_whole(stream)
    samples: NDArray[Any] = _decode_jpeg(stream)
    # Rows that the data lack get the value from which prediction starts. An image may have such a
    # row too; then the codecs, which fill in different ways, agree.
    may_lack_rows = bool((samples[-1] == 1 << (precision - 1)).all())
    if may_lack_rows and not np.array_equal(samples, _decode_otherwise(stream)):
        raise ValueError("a JPEG stream has no data for its last rows")
    return samples


def check_whole(stream: bytes) -> int:
    """Refuse a stream whose entropy-coded data does not run up to an end marker.

    Returns the bits of a sample.

    Raises:
        ValueError: with what is missing, or if the stream is not lossless.
    """
    precision, at = _find_scan(stream)
    marker = MARKER_IN_SCAN.search(stream, at)
    if marker is None:
        raise ValueError("a JPEG stream has no end marker")
    if marker[0][1] != END:
        raise ValueError("a JPEG stream has another marker within its data")
    return precision


def _find_scan(stream: bytes) -> tuple[int, int]:
    """Return the bits of a sample, and the byte at which the entropy-coded data begins."""
    if stream[:2] != bytes((0xFF, START)):
        raise ValueError("a JPEG stream has no start marker")
    at, precision = 2, 0
    for _ in range(MAX_SEGMENTS):
        while stream[at : at + 2] == b"\xff\xff":  # fill bytes
            at += 1
        if len(stream) < at + 5 or stream[at] != 0xFF:
            break
        marker, length = stream[at + 1], int.from_bytes(stream[at + 2 : at + 4], "big")
        if marker == LOSSLESS:
            precision = stream[at + 4]
        if marker in OTHER_PROCESSES or (marker == SCAN and not 2 <= precision <= 16):
            raise ValueError("a JPEG stream is of another process than lossless")
        at += 2 + length
        if marker == SCAN:
            return precision, at
    raise ValueError("a JPEG stream ends before its data, or a segment has a wrong length")
