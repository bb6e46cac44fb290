"""The bytes of one series to the network's input: decode, find the lungs, choose slices, window.

Pure functions without torch or storage: they run in the sandbox, on bytes that have not been
checked before.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from covtanet.ct import dicom, lung, nifti
from covtanet.ct.volume import Volume
from covtanet.ct.window import WindowConfig, box_of, pixel_aspect, thin_slices, to_input
from covtanet.decoding.stored_masks import StoredMasks
from covtanet.errors import QcFlag


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A series as the network reads it.

    slices: (S, size, size) uint16 of the z indices ``chosen``. masks: ``StoredMasks``, packed.
    """

    num_slices: int
    spacing_mm: tuple[float, float, float]
    qc_flags: tuple[QcFlag, ...]
    chosen: NDArray[np.int64]
    slices: NDArray[np.uint16]
    masks: bytes


def prepare(
    source_format: str, contents: Iterable[bytes], window: WindowConfig, slice_step_mm: float
) -> Prepared:
    """Decode and prepare one series.

    source_format: ``nifti`` or ``dicom``. contents: the bytes of its objects, which may come one by
    one.

    Raises:
        StudyError: the series cannot be read as a chest CT in HU.
    """
    if source_format == "nifti":
        volume = nifti.read(next(iter(contents)))
    else:
        volume = dicom.read_series(contents)
    masks, chosen, slices = prepare_volume(volume, window, slice_step_mm)
    flags = (*volume.qc_flags, *_lung_flags(masks))
    return Prepared(
        num_slices=len(volume.hu),
        spacing_mm=volume.spacing_mm,
        qc_flags=tuple(dict.fromkeys(flags)),
        chosen=chosen.astype(np.int64),
        slices=slices,
        masks=masks.pack(),
    )


def _lung_flags(masks: StoredMasks) -> Iterator[QcFlag]:
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
    """Find the lungs, choose the slices to segment and make the network's input.

    Returns (masks, chosen, slices). If the voxel size is unknown, every slice with lung is chosen,
    as in training.

    Raises:
        StudyError: ``no_lung``.
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
    aspect = pixel_aspect(volume.spacing_mm)
    box = box_of(lungs.lung_mask, window, aspect)
    return masks, chosen, to_input(volume.hu[chosen], window, aspect, box)
