"""The stored pixels of a DICOM frame, by transfer syntax, and their HU.

``decode`` gives the stored values of a slice, ``slice_to_hu`` rescales them, and ``decode_stack``
does both for all slices of a series.

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

from covtanet.ct import jpeg_lossless, limits
from covtanet.ct.dicom_frames import PLAIN_SYNTAXES, Frame
from covtanet.ct.dicom_padding import AIR_PADDING_HU, find_padding
from covtanet.ct.dicom_values import value_of
from covtanet.ct.hounsfield import FLOAT32, INT16, rescale
from covtanet.errors import Reason, StudyError

DECODERS: dict[str, Callable[[bytes], NDArray[Any]]] = {
    JPEGLossless: jpeg_lossless.decode,
    JPEGLosslessSV1: jpeg_lossless.decode,
    JPEGLSLossless: imagecodecs.jpegls_decode,
    JPEGLSNearLossless: imagecodecs.jpegls_decode,
    JPEG2000: imagecodecs.jpeg2k_decode,
    JPEG2000Lossless: imagecodecs.jpeg2k_decode,
}
SYNTAXES = {*PLAIN_SYNTAXES, *DECODERS, RLELossless}
BITS_ALLOCATED = (8, 16, 32)
RLE_HEADER_BYTES, MAX_RLE_SEGMENTS = 64, 15
# Accessed at import, which loads the codec: later the sandbox can open no file.
_decode_rle = imagecodecs.dicomrle_decode


@dataclass(frozen=True)
class Pixels:
    """One slice.

    values: (rows, columns) as stored. padding: the pixels outside the image, None without any.
    """

    values: NDArray[Any]
    padding: NDArray[np.bool_] | None


def check_complete(frames: Sequence[Frame]) -> None:
    """Refuse a slice that lacks pixels, or has a header that contradicts them.

    Runs before anything is allocated for the pixels.

    Raises:
        StudyError: ``truncated`` or ``undecodable``.
    """
    for frame in frames:
        _check_present(frame)
    for frame in frames:
        _check_bits(frame)
        _check_surplus(frame)


def _check_present(frame: Frame) -> None:
    for name in ("Rows", "Columns", "BitsAllocated"):
        if not value_of(frame.dataset, name):
            raise StudyError(Reason.TRUNCATED, f"an object ends before its {name}")
    if not value_of(frame.source, "PixelData"):
        raise StudyError(Reason.TRUNCATED, "an object ends before its PixelData")
    expected, present = frame.num_bytes * frame.count, len(frame.source.PixelData)
    is_plain = frame.syntax in PLAIN_SYNTAXES and frame.dataset.BitsAllocated in BITS_ALLOCATED
    if is_plain and present < expected:
        raise StudyError(
            Reason.TRUNCATED, f"{present} bytes of pixels in an object, expected {expected}"
        )


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
    """Refuse bytes after the pixels if they may be pixels that the header leaves out.

    PS3.5 8.1.1 asks to accept others: less than a line of the image, or zeros.
    """
    if frame.syntax not in PLAIN_SYNTAXES or frame.index:
        return
    expected, present = frame.num_bytes * frame.count, len(frame.source.PixelData)
    line_px = min(int(frame.dataset.Rows), int(frame.dataset.Columns))
    line_bytes = line_px * int(frame.dataset.BitsAllocated) // 8
    if present - expected < max(2, line_bytes):
        return
    if memoryview(frame.source.PixelData)[expected:].tobytes().strip(b"\0"):
        raise StudyError(
            Reason.UNDECODABLE, f"{present} bytes of pixels in an object, expected {expected}"
        )


def _bits_stored(frame: Frame) -> int:
    return int(value_of(frame.dataset, "BitsStored") or frame.dataset.BitsAllocated)


def _num_bits_below(frame: Frame) -> int:
    """Return how many bits lie below a sample.

    A sample takes BitsStored bits from HighBit downwards; in old objects these are the upper bits.
    """
    high_bit = value_of(frame.dataset, "HighBit")
    if high_bit is None or high_bit == "" or not value_of(frame.dataset, "BitsStored"):
        return 0
    return int(high_bit) + 1 - _bits_stored(frame)


def decode(frame: Frame) -> Pixels:
    """Return one slice's stored values, signed if the header says so.

    Raises:
        StudyError: ``undecodable``.
    """
    dataset = frame.dataset
    bits = int(dataset.BitsAllocated)
    sign = "i" if value_of(dataset, "PixelRepresentation") else "u"
    stored = _stored_samples(frame, np.dtype(f"<{sign}{bits // 8}"))
    shift = _num_bits_below(frame)
    if shift:
        stored = _shift_down(stored, shift)
    values = stored
    num_unused = bits - _bits_stored(frame)
    if num_unused > 0:
        # The bits above BitsStored mean nothing: replace them by the sign.
        values = (stored << num_unused) >> num_unused
    return Pixels(values, find_padding(stored, values, dataset))


def _stored_samples(frame: Frame, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return all allocated bits of a slice's pixels, (rows, columns)."""
    shape = (int(frame.dataset.Rows), int(frame.dataset.Columns))
    if frame.syntax in PLAIN_SYNTAXES:
        is_big = frame.syntax == ExplicitVRBigEndian
        stored_dtype = dtype.newbyteorder(">") if is_big else dtype
        pixels = np.frombuffer(frame.stream(), stored_dtype, math.prod(shape)).reshape(shape)
    else:
        pixels = _decompress(frame, dtype, shape)
    if pixels.shape != shape:
        raise StudyError(
            Reason.UNDECODABLE, f"a slice decodes to {pixels.shape} pixels, expected {shape}"
        )
    # A codec returns the bits as they are, often unsigned; the header gives their type.
    if pixels.dtype.itemsize == dtype.itemsize and pixels.dtype.isnative:
        pixels = pixels.view(dtype)
    return pixels.astype(dtype, copy=False)


def _decompress(frame: Frame, dtype: np.dtype[Any], shape: tuple[int, int]) -> NDArray[Any]:
    syntax = frame.syntax
    try:
        if syntax == RLELossless:
            plain = decode_rle(bytes(frame.stream()), dtype)
            return np.frombuffer(plain, dtype, math.prod(shape)).reshape(shape)
        return DECODERS[syntax](bytes(frame.stream()))
    except MemoryError:  # a limit of the sandbox, and not the stream's fault
        raise
    except Exception as error:  # each codec raises errors of other kinds
        raise StudyError(
            Reason.UNDECODABLE, f"a slice's {UID(syntax).name} stream is damaged"
        ) from error


def _shift_down(stored: NDArray[Any], shift: int) -> NDArray[Any]:
    """Move samples from the upper bits down; if lower bits are set, the header may be wrong."""
    bits = stored.view(f"u{stored.dtype.itemsize}")
    if (bits & ((1 << shift) - 1)).any():
        raise StudyError(
            Reason.UNDECODABLE,
            f"bits below the lowest of the sample, {shift}, are set: HighBit is wrong",
        )
    return (bits >> shift).view(stored.dtype)


def decode_rle(frame: bytes, dtype: np.dtype[Any]) -> bytes:
    """Return the bytes of an RLE frame (PS3.5 annex G).

    The codec trusts the header and crashes on a wrong one, so the header is checked first.

    Raises:
        ValueError: expected one segment per byte of a pixel, one after the other within the frame.
    """
    header = np.frombuffer(frame, "<u4", RLE_HEADER_BYTES // 4)
    num_segments = int(header[0])
    offsets = header[1:].astype(np.int64)[: min(num_segments, MAX_RLE_SEGMENTS)]
    is_sound = num_segments == dtype.itemsize and offsets[0] == RLE_HEADER_BYTES
    if not is_sound or (np.diff([*offsets, len(frame)]) <= 0).any():
        raise ValueError("the RLE header contradicts itself")
    return bytes(_decode_rle(frame, dtype))


def decode_stack(
    frames: Sequence[Frame], order: Sequence[int] | None, *, num_threads: int = 1
) -> tuple[NDArray[Any] | None, bool]:
    """Decode all slices into one volume in HU; return it and whether padding was replaced by air.

    order: the index of the frame for each slice of the volume.

    The volume is int16 if every slice holds whole numbers that fit, else float32. It is None if
    there is no order, or if it is larger as float32 than a volume may be; the slices are decoded
    all the same, since a damaged one is the reason that goes first. Each slice is released once it
    is rescaled: all of them at once would double the memory that a series takes.

    Raises:
        StudyError: ``undecodable``.
    """
    volume = None if order is None else _allocate(frames, INT16)
    is_padded = False
    slice_of_frame = {frame: index for index, frame in enumerate(order or ())}
    with ThreadPoolExecutor(num_threads) as pool:
        decoded = map(decode, frames) if num_threads == 1 else pool.map(decode, frames)
        for frame_index, pixels in enumerate(decoded):
            is_padded |= pixels.padding is not None
            if volume is None:
                continue
            slice_hu = slice_to_hu(pixels, frames[frame_index].dataset)
            if slice_hu.dtype != np.int16 and volume.dtype == np.int16:
                volume = _widened(volume, frames)
            if volume is not None:
                volume[slice_of_frame[frame_index]] = slice_hu
    return volume, is_padded


def _widened(volume: NDArray[Any], frames: Sequence[Frame]) -> NDArray[Any] | None:
    """Return a volume as float32, None if it would be larger than a volume may be."""
    wide = _allocate(frames, FLOAT32)
    if wide is not None:
        wide[:] = volume
    return wide


def _allocate(frames: Sequence[Frame], dtype: np.dtype[Any]) -> NDArray[Any] | None:
    """Allocate a volume for all slices; None if it would be larger than a volume may be."""
    first = frames[0].dataset
    shape = (len(frames), int(first.Rows), int(first.Columns))
    if math.prod(shape) * dtype.itemsize > limits.MAX_BYTES:
        return None
    return np.zeros(shape, dtype)


def slice_to_hu(pixels: Pixels, header: Dataset) -> NDArray[Any]:
    """Return one slice in HU by its own RescaleSlope and RescaleIntercept, padding as air."""
    slope, intercept = float(header.RescaleSlope), float(header.RescaleIntercept)
    if pixels.padding is None:
        return rescale(pixels.values, slope, intercept)
    # The HU of the padding may not fit in the type that the image needs.
    image = np.where(pixels.padding, pixels.values.dtype.type(0), pixels.values)
    slice_hu = rescale(image, slope, intercept)
    return np.where(pixels.padding, slice_hu.dtype.type(AIR_PADDING_HU), slice_hu)
