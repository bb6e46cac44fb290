"""One series' bytes to what the network reads: decode, find the lungs, choose and window the slices.

Pure, and without torch or storage: this is what runs in the sandbox, on bytes that nobody has looked at yet.
"""

import json
import traceback
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from covtanet.ct import dicom, lung, nifti
from covtanet.ct.volume import SourceGrid, Volume
from covtanet.ct.window import WindowConfig, thin_slices, to_input

PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True, kw_only=True)
class StoredMasks:
    """Lung and cavity of one volume with its grid, small enough to travel."""

    lungs: lung.Lungs
    source: SourceGrid
    spacing_mm: tuple[float, float, float]

    def pack(self) -> bytes:
        """Compress to a few bytes per slice."""
        header = {
            "shape": self.lungs.lung_mask.shape,
            "is_partial": self.lungs.is_partial,
            "source_shape": self.source.shape,
            "source_affine": self.source.affine.tolist(),
            "spacing_mm": self.spacing_mm,
        }
        bits = np.packbits(np.stack([self.lungs.lung_mask, self.lungs.cavity_mask]))
        return json.dumps(header).encode() + b"\n" + zlib.compress(bits.tobytes(), 1)

    @classmethod
    def unpack(cls, data: bytes) -> "StoredMasks":
        """The inverse of ``pack``."""
        line, _, packed = data.partition(b"\n")
        header = json.loads(line)
        shape = tuple(header["shape"])
        bits = np.frombuffer(zlib.decompress(packed), np.uint8)
        masks = np.unpackbits(bits, count=2 * int(np.prod(shape))).view(bool).reshape(2, *shape)
        return cls(
            lungs=lung.Lungs(lung_mask=masks[0], cavity_mask=masks[1], is_partial=header["is_partial"]),
            source=SourceGrid(shape=tuple(header["source_shape"]), affine=np.array(header["source_affine"])),
            spacing_mm=tuple(header["spacing_mm"]),
        )


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


def prepare(source_format: str, contents: Iterable[bytes], window: WindowConfig, slice_step_mm: float) -> Prepared:
    """Decode and prepare one series.

    source_format: ``nifti`` or ``dicom``. contents: the bytes of its objects, which may come one by one.

    Raises:
        StudyError: where the series cannot be read as a chest CT in HU.
    """
    volume = nifti.read(next(iter(contents))) if source_format == "nifti" else dicom.read_series(contents)
    masks, chosen, slices = prepare_volume(volume, window, slice_step_mm)
    return Prepared(
        num_slices=len(volume.hu),
        spacing_mm=volume.spacing_mm,
        qc_flags=(*volume.qc_flags, *(("partial_lungs",) if masks.lungs.is_partial else ())),
        chosen=chosen.astype(np.int64),
        slices=slices,
        masks=masks.pack(),
    )


def prepare_volume(
    volume: Volume, window: WindowConfig, slice_step_mm: float
) -> tuple[StoredMasks, NDArray[np.intp], NDArray[np.uint16]]:
    """Find the lungs, choose the slices to segment and make the network's input. Raises StudyError."""
    lungs = lung.find_lungs(volume)
    lung_slices = np.flatnonzero(lungs.lung_mask.any(axis=(1, 2)))
    chosen, _ = thin_slices(lung_slices, volume.spacing_mm[0], slice_step_mm)
    masks = StoredMasks(lungs=lungs, source=volume.source, spacing_mm=volume.spacing_mm)
    return masks, chosen, to_input(volume.hu[chosen], window)


def place_of(error: Exception) -> str:
    """Type of an error and the line of ours that it came through; not its text, which may quote the input."""
    ours = [frame for frame in traceback.extract_tb(error.__traceback__) if PACKAGE in Path(frame.filename).parents]
    place = f"{Path(ours[-1].filename).relative_to(PACKAGE)}:{ours[-1].lineno}" if ours else "no line of ours"
    return f"{type(error).__name__} at {place}"
