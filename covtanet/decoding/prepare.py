"""One series' bytes to what the network reads: decode, find the lungs, choose and window the slices.

Pure, and without torch or storage: this is what runs in the sandbox, on bytes that nobody has looked at yet.
"""

import json
import math
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from covtanet.ct import dicom, lung, nifti
from covtanet.ct.body import Mask
from covtanet.ct.volume import SourceGrid, Volume
from covtanet.ct.window import WindowConfig, pixel_aspect, thin_slices, to_input
from covtanet.errors import QcFlag

PACKAGE = Path(__file__).parents[1]
MAX_MASK_HEADER_BYTES = 4096
CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class StoredMasks:
    """Lung and cavity of one volume with its grid, small enough to travel."""

    lungs: lung.Lungs
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
        bits = _packed_bits(self.lungs.lung_mask, self.lungs.cavity_mask)
        return json.dumps(header).encode() + b"\n" + zlib.compress(bits.data, 1)

    @classmethod
    def unpack(cls, data: bytes) -> "StoredMasks":
        """The inverse of ``pack``.

        Raises:
            ValueError: if it is anything else, or more than a volume may be; no more is inflated than its shape asks.
        """
        header, packed = _mask_header(data)
        shape = header["shape"]
        num_voxels = math.prod(shape)
        bits = np.empty(_num_packed(shape), np.uint8)
        done = 0
        for chunk in _inflated(packed, len(bits)):
            bits[done : done + len(chunk)] = np.frombuffer(chunk, np.uint8)
            done += len(chunk)
        masks = np.unpackbits(bits, count=2 * num_voxels).view(bool).reshape(2, *shape)
        return cls(
            lungs=lung.Lungs(
                lung_mask=masks[0], cavity_mask=masks[1], is_partial=header["is_partial"]
            ),
            source=SourceGrid(
                shape=tuple(header["source_shape"]), affine=np.array(header["source_affine"])
            ),
            spacing_mm=tuple(header["spacing_mm"]),
            has_known_spacing=header["has_known_spacing"],
        )


def check_masks(
    data: bytes, num_slices: int, spacing_mm: tuple[float, float, float], has_known_spacing: bool
) -> None:
    """Compare packed masks with their volume's slice count and spacing, without keeping the inflated bytes.

    Raises:
        ValueError: they cannot be unpacked, or belong to another volume.
    """
    header, packed = _mask_header(data)
    if header["shape"][0] != num_slices or tuple(header["spacing_mm"]) != spacing_mm:
        raise ValueError("the masks are of another volume")
    if header["has_known_spacing"] is not has_known_spacing:
        raise ValueError("the masks and the flags differ in whether the voxel size is known")
    for _ in _inflated(packed, _num_packed(header["shape"])):
        pass


def _mask_header(data: bytes) -> tuple[dict[str, Any], memoryview]:
    """The checked header of packed masks, and the compressed bits behind it."""
    end = data.find(b"\n", 0, MAX_MASK_HEADER_BYTES)
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
        raise ValueError("the masks' shape is not that of their source")
    for name, shape in (("source_affine", (4, 4)), ("spacing_mm", (3,))):
        _check_finite(header.get(name), shape)
    if min(header["spacing_mm"]) <= 0:
        raise ValueError("the masks' spacing is not above 0")
    return header, memoryview(data)[end + 1 :]


def _check_shape(value: object) -> None:
    if (
        not isinstance(value, list)
        or len(value) != 3
        or any(type(length) is not int for length in value)
    ):
        raise ValueError("the masks' shape is not three whole numbers")
    if min(value) < 1 or max(value) > nifti.MAX_VOXELS or math.prod(value) > nifti.MAX_VOXELS:
        raise ValueError(f"the masks' shape is {value}, expected at most {nifti.MAX_VOXELS} voxels")


def _check_finite(value: object, shape: tuple[int, ...]) -> None:
    """Plain nested lists of finite numbers."""
    try:
        numbers = np.array(value, np.float64)
    except (TypeError, OverflowError):
        raise ValueError("the masks' header holds something else than numbers") from None
    if numbers.shape != shape or not np.isfinite(numbers).all():
        raise ValueError(
            f"the masks' header has numbers of shape {numbers.shape}, expected {shape}, all finite"
        )


def _packed_bits(first: Mask, second: Mask) -> NDArray[np.uint8]:
    """Return the bits of two masks, one behind the other, without a copy of both: they may be 1 GiB."""
    plain, num_whole = first.ravel(), first.size - first.size % 8
    rest = second.ravel()
    if num_whole < first.size:  # a byte that holds bits of both
        rest = np.concatenate([plain[num_whole:], rest])
    return np.concatenate([np.packbits(plain[:num_whole]), np.packbits(rest)])


def _num_packed(shape: list[int]) -> int:
    """Bytes of both masks, 8 voxels each."""
    return (2 * math.prod(shape) + 7) // 8


def _inflated(packed: memoryview, num_bytes: int) -> Iterator[bytes]:
    """The inflated bytes in chunks, which must be as many as asked, and nothing behind them."""
    stream, done = zlib.decompressobj(), 0
    try:
        for start in range(
            0, len(packed), CHUNK_BYTES
        ):  # in pieces: what is not consumed of one is copied each time
            waiting: bytes | memoryview = packed[start : start + CHUNK_BYTES]
            while chunk := stream.decompress(waiting, CHUNK_BYTES):
                done += len(chunk)
                if done > num_bytes:
                    raise ValueError(f"the masks inflate to more than {num_bytes} bytes")
                yield chunk
                waiting = stream.unconsumed_tail
    except zlib.error:
        raise ValueError("the masks are not compressed") from None
    if done != num_bytes or not stream.eof or stream.unused_data:
        raise ValueError(f"the masks inflate to {done} bytes, expected {num_bytes}")


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A series as the network reads it.

    slices: (S, size, size) uint16 on the z indices ``chosen``. masks: ``StoredMasks``, packed.
    """

    num_slices: int
    spacing_mm: tuple[float, float, float]
    qc_flags: tuple[str, ...]
    chosen: NDArray[np.int64]
    slices: NDArray[np.uint16]
    masks: bytes


def prepare(
    source_format: str, contents: Iterable[bytes], window: WindowConfig, slice_step_mm: float
) -> Prepared:
    """Decode and prepare one series.

    source_format: ``nifti`` or ``dicom``. contents: the bytes of its objects, which may come one by one.

    Raises:
        StudyError: where the series cannot be read as a chest CT in HU.
    """
    volume = (
        nifti.read(next(iter(contents)))
        if source_format == "nifti"
        else dicom.read_series(contents)
    )
    masks, chosen, slices = prepare_volume(volume, window, slice_step_mm)
    return Prepared(
        num_slices=len(volume.hu),
        spacing_mm=volume.spacing_mm,
        qc_flags=tuple(dict.fromkeys((*volume.qc_flags, *_lung_flags(masks)))),
        chosen=chosen.astype(np.int64),
        slices=slices,
        masks=masks.pack(),
    )


def _lung_flags(masks: StoredMasks) -> Iterator[str]:
    """Yield the flags that follow from the lungs and the voxel size."""
    num_voxels = int(np.count_nonzero(masks.lungs.lung_mask))
    if masks.lungs.is_partial:
        yield QcFlag.PARTIAL_LUNGS
    if not masks.has_known_spacing:
        yield QcFlag.UNKNOWN_SPACING
    if lung.is_implausible_volume(masks.lungs, num_voxels, masks.voxel_ml):
        yield QcFlag.IMPLAUSIBLE_LUNGS
    if masks.lungs.has_blank_slices:
        yield QcFlag.BLANK_SLICES


def prepare_volume(
    volume: Volume, window: WindowConfig, slice_step_mm: float
) -> tuple[StoredMasks, NDArray[np.intp], NDArray[np.uint16]]:
    """Find the lungs, choose the slices to segment and make the network's input. Raises StudyError.

    Of a series without a voxel size every slice with lung is chosen, as training does.
    """
    lungs = lung.find_lungs(volume)
    lung_slices = np.flatnonzero(lungs.lung_mask.any(axis=(1, 2)))
    step_mm = slice_step_mm if volume.has_known_spacing else 0.0
    chosen, _ = thin_slices(lung_slices, volume.spacing_mm[0], step_mm)
    masks = StoredMasks(
        lungs=lungs,
        source=volume.source,
        spacing_mm=volume.spacing_mm,
        has_known_spacing=volume.has_known_spacing,
    )
    return masks, chosen, to_input(volume.hu[chosen], window, pixel_aspect(volume.spacing_mm))
