"""Gzip streams of files: inflating within limits, and compressing reproducibly."""

from isal import isal_zlib
from isal.igzip_lib import IsalError

from covtanet.errors import Reason, StudyError

GZIP_MAGIC = b"\x1f\x8b"
GZIP_WBITS = 31
STEP_BYTES = 1 << 20
# Deflate cannot compress better than this: if a header promises more bytes than the size of its
# gzipped file times this, the file is truncated, which is known before anything is allocated.
MAX_INFLATION = 1032


def inflate(data: bytes, num_bytes: int, *, to_end: bool) -> bytearray:
    """Inflate a gzip file and return its first ``num_bytes``.

    to_end: go on to the end of the stream, member after member, so that its checksum counts; the
    bytes after ``num_bytes`` are dropped.

    Works in steps, so that memory holds only the stream and the bytes to return.

    Raises:
        StudyError: ``truncated``, ``undecodable`` or ``too_large``.
    """
    stream = isal_zlib.decompressobj(wbits=GZIP_WBITS)
    view = memoryview(data)
    position = 0
    inflated = bytearray()
    num_surplus = 0
    try:
        while to_end or len(inflated) < num_bytes:
            if stream.eof:  # the next member, if the file has one
                position -= len(stream.unused_data)
                if view[position : position + 2] != GZIP_MAGIC:
                    break
                stream = isal_zlib.decompressobj(wbits=GZIP_WBITS)
            pending: bytes | memoryview = stream.unconsumed_tail
            if not pending:
                pending = view[position : position + STEP_BYTES]
                position += len(pending)
            step = stream.decompress(pending, STEP_BYTES)
            room = num_bytes - len(inflated)
            inflated += step[:room]
            num_surplus += max(0, len(step) - room)
            if to_end and num_surplus > num_bytes:
                raise StudyError(
                    Reason.TOO_LARGE,
                    "the gzip stream goes on after the volume for more than its size again",
                )
            if not step and not pending and not stream.eof:
                if not to_end:
                    break
                raise StudyError(Reason.TRUNCATED, "the gzip stream ends before its checksum")
    except IsalError as error:  # type: ignore[misc]
        raise StudyError(
            Reason.UNDECODABLE, "the gzip stream is damaged: bad data or checksum"
        ) from error
    return inflated


def compress(data: bytes) -> bytes:
    """Compress into one gzip member without a time stamp: equal arrays give equal bytes."""
    compressor = isal_zlib.compressobj(level=1, wbits=GZIP_WBITS)
    return bytes(compressor.compress(data) + compressor.flush())
