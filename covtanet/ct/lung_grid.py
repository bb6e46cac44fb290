"""The working grid of lung segmentation: a volume in blocks of about 2.5 mm, and back.

Lungs are found at this resolution, since most operations cost by the voxel; ``sharpen`` then
follows their outline in the volume itself.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from covtanet.ct.body import find_outside
from covtanet.ct.densities import AERATED_HU
from covtanet.ct.masks import IN_PLANE, Mask, Millimetres, dilate, erode, span
from covtanet.ct.volume import Volume
from covtanet.ct.window import pixel_aspect

Steps = tuple[int, int, int]

GRID_MM = 2.5
GRID_Z_MM = 2.5
# A series without a voxel size is measured as if its body and its lungs were an adult's.
ADULT_BODY_CM2 = 650.0
ADULT_LUNG_HEIGHT_MM = 220.0
ADULT_IMAGE_MM = 350.0
LUNG_SHARE_OF_BODY = 0.1
THINNEST_MM, THICKEST_MM = 0.5, 10.0
# Enough to guess the voxel size: slices, and pixels along the longer side.
GUESS_SLICES, GUESS_PX = 64, 128


@dataclass(frozen=True, kw_only=True)
class GridVolume:
    """A volume on the working grid.

    hu: block averages. outside: room air and unmeasured pixels; unmeasured: only the latter.
    steps: voxels of the source per voxel of this grid, (z, y, x).
    """

    hu: NDArray[np.float32]
    outside: Mask
    unmeasured: Mask
    steps: Steps
    grid_mm: Millimetres

    @property
    def pixel_cm2(self) -> float:
        """Area of a pixel."""
        return self.grid_mm[1] * self.grid_mm[2] / 100.0

    @property
    def body_cm2(self) -> float:
        """Area of the body in a slice that shows much of it; the largest may show a table, too."""
        areas = np.count_nonzero(~self.outside, axis=(1, 2))
        return float(np.percentile(areas, 90)) * self.pixel_cm2


def to_grid(hu: NDArray[Any], shown: NDArray[np.intp], spacing_mm: Millimetres) -> GridVolume:
    """Bring a volume to the working grid.

    shown: the slices that are not blank; a blank slice is replaced by the nearest of them.
    """
    step_z = max(1, round(GRID_Z_MM / spacing_mm[0]))
    step_y, step_x = (max(1, round(GRID_MM / mm)) for mm in spacing_mm[1:])
    if pixel_aspect(spacing_mm) == 1:
        step_x = step_y
    steps = (step_z, step_y, step_x)
    slices = np.arange(len(hu))
    if len(hu) > step_z:
        slices = np.arange(step_z // 2, len(hu), step_z)
    if len(shown) < len(hu):
        slices = _nearest(shown, slices)
    z, y, x = (mm * step for mm, step in zip(spacing_mm, steps, strict=True))
    averages = _block_averages(hu, slices, step_y, step_x)
    samples = _block_centres(hu, slices, averages.shape, step_y, step_x)
    outside, unmeasured = find_outside(averages, samples, (z, y, x))
    return GridVolume(
        hu=averages, outside=outside, unmeasured=unmeasured, steps=steps, grid_mm=(z, y, x)
    )


def guess_spacing(hu: NDArray[Any], shown: NDArray[np.intp]) -> Millimetres:
    """Guess the voxel size of a series without one, from the body and lungs of an adult."""
    slices = shown[np.unique(np.linspace(0, len(shown) - 1, GUESS_SLICES).astype(int))]
    step = max(1, max(hu.shape[1:]) // GUESS_PX)
    averages = _block_averages(hu, slices, step, step)
    samples = _block_centres(hu, slices, averages.shape, step, step)
    # Only limits of the outside depend on this first guess.
    first_mm = ADULT_IMAGE_MM / averages.shape[2]
    outside, _ = find_outside(averages, samples, (GRID_Z_MM, first_mm, first_mm))
    body_px = np.count_nonzero(~outside, axis=(1, 2))
    large_body_px = max(1.0, np.percentile(body_px, 90))
    pixel_mm = float(np.sqrt(100.0 * ADULT_BODY_CM2 / large_body_px)) / step
    aerated_px = np.count_nonzero((averages < AERATED_HU) & ~outside, axis=(1, 2))
    has_lung = aerated_px > LUNG_SHARE_OF_BODY * np.maximum(body_px, 1)
    num_lung = np.count_nonzero(has_lung) * len(shown) / len(slices)
    slice_mm = float(np.clip(ADULT_LUNG_HEIGHT_MM / max(1.0, num_lung), THINNEST_MM, THICKEST_MM))
    return slice_mm, pixel_mm, pixel_mm


def from_grid(mask: Mask, shape: tuple[int, ...], steps: Steps) -> Mask:
    """Repeat the voxels of a mask on the working grid on the volume's grid."""
    out = np.zeros(shape, bool)
    enlarge = _Enlargement(mask, shape, steps)
    for grid_z, slices in enlarge.slices:
        out[slices, enlarge.rows, enlarge.columns] = enlarge(mask[grid_z])
    return out


def sharpen(closed: Mask, volume: Volume, steps: Steps) -> Mask:
    """Follow the aerated outline at full resolution within one voxel of the working grid.

    closed: the lungs on the working grid.
    """
    core = erode(closed, IN_PLANE)
    reach = dilate(closed, IN_PLANE)
    out = np.zeros(volume.hu.shape, bool)
    enlarge = _Enlargement(reach, out.shape, steps)
    rows, columns = enlarge.rows, enlarge.columns
    for grid_z, slices in enlarge.slices:
        if not reach[grid_z].any():
            continue
        slice_core, slice_reach = enlarge(core[grid_z]), enlarge(reach[grid_z])
        for z in range(slices.start, slices.stop):
            inner = volume.hu[z, rows, columns] < AERATED_HU
            inner |= slice_core
            np.logical_and(inner, slice_reach, out=out[z, rows, columns])
    return out


def _nearest(shown: NDArray[np.intp], slices: NDArray[np.intp]) -> NDArray[np.intp]:
    return np.asarray(shown[np.abs(slices[:, None] - shown[None, :]).argmin(axis=1)])


def _block_averages(
    hu: NDArray[Any], slices: NDArray[np.intp], step_y: int, step_x: int
) -> NDArray[np.float32]:
    """Average blocks of some slices; the margin that does not fill a block repeats the edge."""
    height, width = hu.shape[1:]
    rows, columns = -(-height // step_y), -(-width // step_x)
    out = np.empty((len(slices), rows, columns), np.float32)
    pad = ((0, rows * step_y - height), (0, columns * step_x - width))
    is_whole = hu.dtype.kind == "i"
    for index, z in enumerate(slices):
        slice_hu = hu[z] if pad == ((0, 0), (0, 0)) else np.pad(hu[z], pad, mode="edge")
        if is_whole:
            # Sums of whole numbers are exact in any order: row by row, then column by column, takes
            # a fifth of the time of ``sum``.
            sums = _added(slice_hu.reshape(rows, step_y, -1), axis=1)
            sums = _added(sums.reshape(rows, columns, step_x), axis=2)
            out[index] = sums.astype(np.float32) / np.float32(step_y * step_x)
        else:
            blocks = slice_hu.astype(np.float32).reshape(rows, step_y, columns, step_x)
            out[index] = blocks.mean(axis=(1, 3))
    return out


def _added(values: NDArray[Any], axis: int) -> NDArray[np.int32]:
    """Return the sum along a short axis."""
    parts = np.moveaxis(values, axis, 0)
    total: NDArray[np.int32] = parts[0].astype(np.int32)
    for part in parts[1:]:
        total += part
    return total


def _block_centres(
    hu: NDArray[Any], slices: NDArray[np.intp], shape: tuple[int, ...], step_y: int, step_x: int
) -> NDArray[Any]:
    """Return the middle pixel of each block of ``_block_averages``."""
    out = np.empty(shape, hu.dtype)
    rows = np.minimum(np.arange(shape[1]) * step_y + step_y // 2, hu.shape[1] - 1)
    columns = np.minimum(np.arange(shape[2]) * step_x + step_x // 2, hu.shape[2] - 1)
    for index, z in enumerate(slices):
        out[index] = hu[z].take(rows, axis=0).take(columns, axis=1)
    return out


class _Enlargement:
    """Slices of the working grid at the source's resolution, within the box of a mask.

    rows, columns: the box in the source. slices: each z index of the grid with the slices of the
    source that it stands for.
    """

    def __init__(self, mask: Mask, shape: tuple[int, ...], steps: Steps) -> None:
        index_z, index_y, index_x = _grid_indices(mask.shape, shape, steps)
        self.rows = span(np.asarray(mask.any(axis=(0, 2)))[index_y])
        self.columns = span(np.asarray(mask.any(axis=(0, 1)))[index_x])
        self._index_y, self._index_x = index_y[self.rows], index_x[self.columns]
        starts = np.searchsorted(index_z, np.arange(len(mask) + 1))
        self.slices = [
            (z, slice(int(start), int(stop))) for z, (start, stop) in enumerate(pairwise(starts))
        ]

    def __call__(self, slice_mask: Mask) -> Mask:
        """Repeat the pixels of one slice (y, x) of the grid, within the box."""
        # Columns first: whole rows are copied fast, and few rows have their columns repeated.
        return slice_mask.take(self._index_x, axis=1).take(self._index_y, axis=0)


def _grid_indices(
    grid: tuple[int, ...], shape: tuple[int, ...], steps: Steps
) -> list[NDArray[np.intp]]:
    """Return the index on the working grid of each index of the source, by axis."""
    return [
        np.minimum(np.arange(num_source) // step, num_grid - 1)
        for num_source, step, num_grid in zip(shape, steps, grid, strict=True)
    ]
