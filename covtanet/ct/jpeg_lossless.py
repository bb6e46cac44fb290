"""JPEG Lossless (ITU-T T.81, SOF3): a check that a stream is whole, and its decoder.

libjpeg-turbo decodes in 0.4 of the time of the codec before it, bit for bit alike. Either fills a
slice that ends early without a word, so the ends of its segments are checked first.

Not covered: entropy-coded data that is too short and is closed by a marker all the same, which no
codec here reports.
"""

import re
from typing import Any

import imagecodecs
from numpy.typing import NDArray

START, END, SCAN = 0xD8, 0xD9, 0xDA
# In entropy-coded data a byte FF is followed by 00, by a restart marker, or by another FF.
MARKER_IN_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
MAX_SEGMENTS = 1000
# Accessed at import, which loads the codec: later the sandbox can open no file.
_decode_jpeg = imagecodecs.jpeg8_decode


def decode(stream: bytes) -> NDArray[Any]:
    """Return the samples of a stream, (rows, columns) for one component.

    Raises:
        ValueError: the stream is not whole.
        RuntimeError: the codec refuses it.
    """
    check_whole(stream)
    samples: NDArray[Any] = _decode_jpeg(stream)
    return samples


def check_whole(stream: bytes) -> None:
    """Refuse a stream whose entropy-coded data does not run up to an end marker.

    Raises:
        ValueError: with what is missing.
    """
    at = _scan_start(stream)
    marker = MARKER_IN_SCAN.search(stream, at)
    if marker is None:
        raise ValueError("a JPEG stream has no end marker")
    if marker[0][1] != END:
        raise ValueError("a JPEG stream has another marker within its data")


def _scan_start(stream: bytes) -> int:
    """Return the byte at which the entropy-coded data begins."""
    if stream[:2] != bytes((0xFF, START)):
        raise ValueError("a JPEG stream has no start marker")
    at = 2
    for _ in range(MAX_SEGMENTS):
        while stream[at : at + 2] == b"\xff\xff":  # fill bytes
            at += 1
        if len(stream) < at + 4 or stream[at] != 0xFF:
            break
        length = int.from_bytes(stream[at + 2 : at + 4], "big")
        is_scan = stream[at + 1] == SCAN
        at += 2 + length
        if is_scan:
            return at
    raise ValueError("a JPEG stream ends before its data, or a segment has a wrong length")
