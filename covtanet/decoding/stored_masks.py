"""Lung and cavity masks of a volume as a few bytes per slice, and the checks before they unpack.

Format: a line of JSON, then the bits of both masks, compressed by zlib. They come from the sandbox,
so that every value is checked, and inflating stops at the size that the shape asks for.
"""

import json
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from covtanet.ct import limits
from covtanet.ct.lung import Lungs
from covtanet.ct.masks import Mask
from covtanet.ct.volume import SourceGrid

MAX_HEADER_BYTES = 4096
CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class StoredMasks:
    """Lung and cavity of one volume with its grid, small enough to travel between processes."""

    lungs: Lungs
    source: SourceGrid
    spacing_mm: tuple[float, float, float]
    has_known_spacing: bool = True

    @property
    def voxel_ml(self) -> float | None:
        """Volume of one voxel in millilitres; null if the voxel size is nominal."""
        return math.prod(self.spacing_mm) / 1000.0 if self.has_known_spacing else None

    def pack(self) -> bytes:
        """Compress to a few bytes per slice."""
        header = {
            "shape": self.lungs.lung_mask.shape,
            "is_partial": self.lungs.is_partial,
            "source_shape": self.source.shape,
            "source_affine": self.source.affine.tolist(),
            "spacing_mm": self.spacing_mm,
            "has_known_spacing": self.has_known_spacing,
        }
        bits = _pack_bits(self.lungs.lung_mask, self.lungs.cavity_mask)
        # Level 1: masks are long runs, which higher levels hardly shorten.
        return json.dumps(header).encode() + b"\n" + zlib.compress(bits.data, 1)

    @classmethod
    def unpack(cls, data: bytes) -> "StoredMasks":
        """Reverse ``pack``.

        Raises:
            ValueError: the bytes are not packed masks, or of more voxels than a volume may have.
        """
        header, packed = _parse_header(data)
        shape = header["shape"]
        bits = np.empty(_num_packed_bytes(shape), np.uint8)
        position = 0
        for chunk in _inflate(packed, len(bits)):
            bits[position : position + len(chunk)] = np.frombuffer(chunk, np.uint8)
            position += len(chunk)
        masks = np.unpackbits(bits, count=2 * math.prod(shape)).view(bool).reshape(2, *shape)
        return cls(
            lungs=Lungs(lung_mask=masks[0], cavity_mask=masks[1], is_partial=header["is_partial"]),
            source=SourceGrid(
                shape=tuple(header["source_shape"]), affine=np.array(header["source_affine"])
            ),
            spacing_mm=tuple(header["spacing_mm"]),
            has_known_spacing=header["has_known_spacing"],
        )


def check_masks(
    data: bytes, num_slices: int, spacing_mm: tuple[float, float, float], has_known_spacing: bool
) -> None:
    """Compare packed masks with the slice count and spacing of their volume.

    The inflated bytes are counted and dropped.

    Raises:
        ValueError: the masks cannot be unpacked, or belong to another volume.
    """
    header, packed = _parse_header(data)
    if header["shape"][0] != num_slices or tuple(header["spacing_mm"]) != spacing_mm:
        raise ValueError("the masks are of another volume")
    if header["has_known_spacing"] is not has_known_spacing:
        raise ValueError("masks and flags mismatch in whether the voxel size is known")
    for _ in _inflate(packed, _num_packed_bytes(header["shape"])):
        pass


def _parse_header(data: bytes) -> tuple[dict[str, Any], memoryview]:
    """Return the checked header of packed masks, and the compressed bits after it."""
    end = data.find(b"\n", 0, MAX_HEADER_BYTES)
    try:
        header = json.loads(data[: max(0, end)])
    except RecursionError:
        raise ValueError("the masks' header is nested too deeply") from None
    if not isinstance(header, dict):
        raise ValueError("the masks' header is not an object")
    for name in ("is_partial", "has_known_spacing"):
        if not isinstance(header.get(name), bool):
            raise ValueError(f"{name} of the masks' header is missing or not true or false")
    for name in ("shape", "source_shape"):
        _check_shape(header.get(name))
    if sorted(header["shape"]) != sorted(header["source_shape"]):
        raise ValueError("the shapes of the masks and of their source mismatch")
    _check_finite(header.get("source_affine"), (4, 4))
    _check_finite(header.get("spacing_mm"), (3,))
    if min(header["spacing_mm"]) <= 0:
        raise ValueError("the masks' spacing is not above 0")
    return header, memoryview(data)[end + 1 :]


def _check_shape(value: object) -> None:
    """Refuse anything but three lengths, with a product that a volume may have."""
    is_list = isinstance(value, list) and len(value) == 3
    # type() rather than isinstance(): True is an int.
    if not is_list or any(type(length) is not int for length in value):  # type: ignore[attr-defined]
        raise ValueError("the masks' shape is not three whole numbers")
    lengths: list[int] = value  # type: ignore[assignment]
    largest = max(*lengths, math.prod(lengths))
    if min(lengths) < 1 or largest > limits.MAX_VOXELS:
        raise ValueError(
            f"the masks' shape is {lengths}, expected at most {limits.MAX_VOXELS} voxels"
        )


def _check_finite(value: object, shape: tuple[int, ...]) -> None:
    """Refuse anything but plain nested lists of finite numbers."""
    try:
        numbers = np.array(value, np.float64)
    except (TypeError, OverflowError):
        raise ValueError("the masks' header holds values that are not numbers") from None
    if numbers.shape != shape or not np.isfinite(numbers).all():
        raise ValueError(
            f"the masks' header has numbers of shape {numbers.shape}, expected {shape}, all finite"
        )


def _pack_bits(first: Mask, second: Mask) -> NDArray[np.uint8]:
    """Return the bits of two masks, one after the other.

    Without joining the masks first: they may be 1 GiB.
    """
    plain = first.ravel()
    num_whole = first.size - first.size % 8
    rest = second.ravel()
    if num_whole < first.size:  # a byte that holds bits of both
        rest = np.concatenate([plain[num_whole:], rest])
    return np.concatenate([np.packbits(plain[:num_whole]), np.packbits(rest)])


def _num_packed_bytes(shape: list[int]) -> int:
    """Return the size of the bits of both masks, 8 voxels to a byte."""
    return (2 * math.prod(shape) + 7) // 8


def _inflate(packed: memoryview, num_bytes: int) -> Iterator[bytes]:
    """Yield the inflated bytes in chunks.

    Raises:
        ValueError: there are more or fewer than ``num_bytes``, or bytes after the stream.
    """
    stream = zlib.decompressobj()
    num_inflated = 0
    try:
        # In chunks: zlib copies the bytes that it did not consume at each call.
        for start in range(0, len(packed), CHUNK_BYTES):
            waiting: bytes | memoryview = packed[start : start + CHUNK_BYTES]
            while chunk := stream.decompress(waiting, CHUNK_BYTES):
                num_inflated += len(chunk)
                if num_inflated > num_bytes:
                    raise ValueError(f"the masks inflate to more than {num_bytes} bytes")
                yield chunk
                waiting = stream.unconsumed_tail
    except zlib.error:
        raise ValueError("the masks are not compressed") from None
    if num_inflated != num_bytes or not stream.eof or stream.unused_data:
        raise ValueError(f"the masks inflate to {num_inflated} bytes, expected {num_bytes}")
