"""The stored pixels of a DICOM frame, by transfer syntax, and their HU.

Not covered: lossy JPEG, packed bits, pixels of floating point.
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.uid import (
    JPEG2000,
    UID,
    ExplicitVRBigEndian,
    JPEG2000Lossless,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from covtanet.ct import nifti
from covtanet.ct.frames import PLAIN_SYNTAXES, Frame
from covtanet.ct.padding import AIR_PADDING_HU, find_padding
from covtanet.errors import Reason, StudyError

DECODERS: dict[str, Callable[[bytes], NDArray[Any]]] = {
    JPEGLossless: imagecodecs.jpegsof3_decode,
    JPEGLosslessSV1: imagecodecs.jpegsof3_decode,
    JPEGLSLossless: imagecodecs.jpegls_decode,
    JPEGLSNearLossless: imagecodecs.jpegls_decode,
    JPEG2000: imagecodecs.jpeg2k_decode,
    JPEG2000Lossless: imagecodecs.jpeg2k_decode,
}
SYNTAXES = {*PLAIN_SYNTAXES, *DECODERS, RLELossless}
BITS_ALLOCATED = (8, 16, 32)
RLE_HEADER_BYTES, MAX_RLE_SEGMENTS = 64, 15
_decode_rle = imagecodecs.dicomrle_decode  # loaded now: the sandbox opens no file later


@dataclass(frozen=True)
class Pixels:
    """One slice. values: (rows, columns) as stored; padding: where they are no part of the image, None if nowhere."""

    values: NDArray[Any]
    padding: NDArray[np.bool_] | None


def check_complete(frames: Sequence[Frame]) -> None:
    """Refuse a slice that lacks pixels, or whose header contradicts them, before anything is allocated for them.

    Raises:
        StudyError: ``truncated`` or ``undecodable``.
    """
    for frame in frames:
        for name in ("Rows", "Columns", "BitsAllocated"):
            if not frame.dataset.get(name):
                raise StudyError(Reason.TRUNCATED, f"an object ends before its {name}")
        if not frame.source.get("PixelData"):
            raise StudyError(Reason.TRUNCATED, "an object ends before its PixelData")
        expected, present = frame.num_bytes * frame.count, len(frame.source.PixelData)
        is_plain = frame.syntax in PLAIN_SYNTAXES and frame.dataset.BitsAllocated in BITS_ALLOCATED
        if is_plain and present < expected:
            raise StudyError(
                Reason.TRUNCATED, f"{present} bytes of pixels in an object, expected {expected}"
            )
    for frame in frames:
        _check_bits(frame)
        _check_surplus(frame)


def _check_bits(frame: Frame) -> None:
    allocated = int(frame.dataset.BitsAllocated)
    if allocated not in BITS_ALLOCATED:
        raise StudyError(Reason.UNDECODABLE, f"{allocated} bits per pixel, expected 8, 16 or 32")
    stored = _bits_stored(frame)
    if not 0 < stored <= allocated:
        raise StudyError(Reason.UNDECODABLE, f"{stored} of {allocated} bits are stored")
    shift = _num_bits_below(frame)
    if shift and not 0 < shift <= allocated - stored:
        raise StudyError(
            Reason.UNDECODABLE,
            f"{stored} of {allocated} bits, the highest of them {stored + shift - 1}",
        )


def _check_surplus(frame: Frame) -> None:
    """Accept bytes behind the pixels, as PS3.5 8.1.1 asks, unless they may be pixels that the header leaves out."""
    if frame.syntax not in PLAIN_SYNTAXES or frame.index:
        return
    expected, present = frame.num_bytes * frame.count, len(frame.source.PixelData)
    line_bytes = (
        min(int(frame.dataset.Rows), int(frame.dataset.Columns))
        * int(frame.dataset.BitsAllocated)
        // 8
    )
    if present - expected < max(2, line_bytes):  # less than a line of the image
        return
    if memoryview(frame.source.PixelData)[expected:].tobytes().strip(b"\0"):
        raise StudyError(
            Reason.UNDECODABLE, f"{present} bytes of pixels in an object, expected {expected}"
        )


def _bits_stored(frame: Frame) -> int:
    return int(frame.dataset.get("BitsStored") or frame.dataset.BitsAllocated)


def _num_bits_below(frame: Frame) -> int:
    """How many bits lie below a sample: it takes BitsStored bits from HighBit downwards, in old objects the upper."""
    high_bit = frame.dataset.get("HighBit")
    if high_bit is None or high_bit == "" or not frame.dataset.get("BitsStored"):
        return 0
    return int(high_bit) + 1 - _bits_stored(frame)


def decode(frame: Frame) -> Pixels:
    """Return one slice's stored values, signed if the header says so.

    Raises:
        StudyError: ``undecodable``.
    """
    dataset = frame.dataset
    bits = int(dataset.BitsAllocated)
    dtype = np.dtype(f"<{'i' if dataset.get('PixelRepresentation') else 'u'}{bits // 8}")
    stored = _samples(frame, dtype)
    shift = _num_bits_below(frame)
    if shift:
        stored = _shift_down(stored, shift)
    values, unused = stored, bits - _bits_stored(frame)
    if (
        unused > 0
    ):  # the bits above BitsStored mean nothing: drop them, and carry the sign over them
        values = (stored << unused) >> unused
    return Pixels(values, find_padding(stored, values, dataset))


def _samples(frame: Frame, dtype: np.dtype[Any]) -> NDArray[Any]:
    """All allocated bits of a slice's pixels, (rows, columns)."""
    syntax, rows, columns = frame.syntax, int(frame.dataset.Rows), int(frame.dataset.Columns)
    if syntax in PLAIN_SYNTAXES:
        stored = dtype.newbyteorder(">") if syntax == ExplicitVRBigEndian else dtype
        pixels = np.frombuffer(frame.stream(), stored, rows * columns).reshape(rows, columns)
    else:
        try:
            if syntax == RLELossless:
                plain = decode_rle(bytes(frame.stream()), dtype)
                pixels = np.frombuffer(plain, dtype, rows * columns).reshape(rows, columns)
            else:
                pixels = DECODERS[syntax](bytes(frame.stream()))
        except MemoryError:
            raise
        except Exception as error:  # each codec has its own errors
            raise StudyError(
                Reason.UNDECODABLE, f"a slice's {UID(syntax).name} stream is damaged"
            ) from error
    if pixels.shape != (rows, columns):
        raise StudyError(
            Reason.UNDECODABLE,
            f"a slice decodes to {pixels.shape} pixels, expected {(rows, columns)}",
        )
    # A codec gives the bits as it finds them, often unsigned: the header says what they mean.
    pixels = (
        pixels.view(dtype)
        if pixels.dtype.itemsize == dtype.itemsize and pixels.dtype.isnative
        else pixels
    )
    return pixels.astype(dtype, copy=False)


def _shift_down(stored: NDArray[Any], shift: int) -> NDArray[Any]:
    """Samples from the upper bits. With something below them it is the header that may be wrong."""
    bits = stored.view(f"u{stored.dtype.itemsize}")
    if (bits & ((1 << shift) - 1)).any():
        raise StudyError(
            Reason.UNDECODABLE,
            f"bits below the lowest of the sample, {shift}, are set: HighBit is wrong",
        )
    return (bits >> shift).view(stored.dtype)


def decode_rle(frame: bytes, dtype: np.dtype[Any]) -> bytes:
    """The bytes of an RLE frame (PS3.5 annex G), its header checked: the codec believes what it says.

    Raises:
        ValueError: as many segments as bytes in a pixel are expected, one behind the other within the frame.
    """
    header = np.frombuffer(frame, "<u4", RLE_HEADER_BYTES // 4)
    count, offsets = int(header[0]), header[1:].astype(np.int64)
    used = offsets[: min(count, MAX_RLE_SEGMENTS)]
    if (
        count != dtype.itemsize
        or used[0] != RLE_HEADER_BYTES
        or (np.diff([*used, len(frame)]) <= 0).any()
    ):
        raise ValueError("the RLE header contradicts itself")
    return bytes(_decode_rle(frame, dtype))


def decode_stack(
    frames: Sequence[Frame], order: Sequence[int] | None, *, num_threads: int = 1
) -> tuple[NDArray[Any] | None, bool]:
    """Decode all slices into one volume in HU, in a given order, and say whether any of it was padding, now air.

    int16 if every slice stays in whole numbers that fit, else float32. Each slice is let go once it
    is rescaled: all of them beside the volume would double the memory that a series takes. None
    instead of the volume if there is no order, or if it is larger as float32 than volumes may be;
    the slices are decoded all the same, to find the damaged ones.

    Raises:
        StudyError: ``undecodable``.
    """
    out, is_padded = None if order is None else _allocate(frames, np.dtype(np.int16)), False
    place = {source: index for index, source in enumerate(order or ())}
    with ThreadPoolExecutor(num_threads) as pool:
        decoded = map(decode, frames) if num_threads == 1 else pool.map(decode, frames)
        for source, pixels in enumerate(decoded):
            is_padded |= pixels.padding is not None
            if out is None:
                continue
            slice_hu = _to_hu(pixels, frames[source].dataset)
            if slice_hu.dtype != np.int16 and out.dtype == np.int16:
                wide = _allocate(frames, np.dtype(np.float32))
                if wide is not None:
                    wide[:] = out
                out = wide
            if out is not None:
                out[place[source]] = slice_hu
    return out, is_padded


def _allocate(frames: Sequence[Frame], dtype: np.dtype[Any]) -> NDArray[Any] | None:
    """A volume of the slices' size, None if it would be larger than volumes may be."""
    first = frames[0].dataset
    shape = (len(frames), int(first.Rows), int(first.Columns))
    return np.zeros(shape, dtype) if math.prod(shape) * dtype.itemsize <= nifti.MAX_BYTES else None


def _to_hu(pixels: Pixels, header: Dataset) -> NDArray[Any]:
    """One slice in HU, padding as air."""
    values = pixels.values
    if pixels.padding is not None:  # its HU may not fit
        values = np.where(pixels.padding, values.dtype.type(0), values)
    slice_hu = nifti.rescale(values, float(header.RescaleSlope), float(header.RescaleIntercept))
    if pixels.padding is None:
        return slice_hu
    return np.where(pixels.padding, slice_hu.dtype.type(AIR_PADDING_HU), slice_hu)
