"""Regions of a chest on the working grid: airways and gas, the lungs, the chest cavity."""

import numpy as np
from scipy import ndimage

from covtanet.ct.body import SHELL_MM, inside_body
from covtanet.ct.densities import AIR_HU, SURELY_AIR_HU, SURELY_DENSE_HU
from covtanet.ct.lung_grid import GridVolume
from covtanet.ct.masks import (
    IN_PLANE,
    Mask,
    Millimetres,
    ball,
    connected_to_border,
    convex_hull,
    dilate,
    dilate_in_plane,
    erode,
    label_in_plane,
    label_sizes,
    rim,
)

PURE_AIR_HU = -920
PURE_AIR_CM2 = 0.6
CLOSING_MM = 12.0
CAVITY_MARGIN_MM = 3.0
CHEST_WALL_MM = 10.0
SECOND_LUNG_SHARE = 0.05
MAX_PIECES = 8
BODY_CHECK_SLICES = 9
# ``inside_body`` leaves out chest walls that are as thin as shells: much of a lung may then have no
# tissue on one side.
IN_BODY_SHARE = 0.3


def find_gas(aerated: Mask, grid: GridVolume) -> Mask:
    """Return trachea, main bronchi and gas in the bowel, with their rim.

    They are solid spots nearer to air than to this patient's lung. A bulla is such a spot too;
    within a lung, closing restores it.
    """
    if not aerated.any():
        return aerated
    median_hu = float(np.median(grid.hu[aerated]))
    is_dense = aerated & (grid.hu > SURELY_AIR_HU)
    # A median this low means that more room air than lung is left in the mask.
    if median_hu < SURELY_AIR_HU and is_dense.any():
        median_hu = float(np.median(grid.hu[is_dense]))
    threshold_hu = min((median_hu + AIR_HU) / 2, PURE_AIR_HU)
    core = dilate(erode(aerated & (grid.hu < threshold_hu), IN_PLANE), IN_PLANE)
    labels, count = label_in_plane(core)
    is_large = label_sizes(labels, count) * grid.pixel_cm2 >= PURE_AIR_CM2
    is_large[0] = False
    return aerated & dilate(is_large.take(labels), rim(grid.grid_mm))


def find_lung_pieces(aerated: Mask, grid: GridVolume) -> list[Mask]:
    """Return the two largest pieces within the body, or one if the second is far smaller.

    An image that lies within a lung may show no body; then the largest piece counts if it is as
    dense as lung.
    """
    labels, count = ndimage.label(aerated)
    sizes = label_sizes(labels, count)
    sizes[0] = 0
    pieces: list[Mask] = []
    min_size = 1.0
    by_size = np.argsort(sizes)[::-1][:MAX_PIECES]
    for label in by_size:
        if len(pieces) == 2 or sizes[label] < min_size:
            break
        piece = labels == label
        if _is_in_body(piece, grid):
            pieces.append(piece)
            min_size = max(min_size, SECOND_LUNG_SHARE * float(sizes[label]))
    if not pieces and sizes[by_size[0]]:
        largest = labels == by_size[0]
        if float(np.median(grid.hu[largest])) > SURELY_DENSE_HU:
            pieces.append(largest)
    return pieces


def _is_in_body(piece: Mask, grid: GridVolume) -> bool:
    """Tell lung from closed air outside the body, as in a table, by a few of its slices."""
    shown = np.flatnonzero(piece.any(axis=(1, 2)))
    checked = shown[np.unique(np.linspace(0, len(shown) - 1, BODY_CHECK_SLICES).astype(int))]
    inside = inside_body(grid.hu[checked], grid.unmeasured[checked], grid.grid_mm, SHELL_MM)
    num_inside = np.count_nonzero(piece[checked] & inside)
    return bool(num_inside >= IN_BODY_SHARE * np.count_nonzero(piece[checked]))


def halve(both: Mask) -> list[Mask]:
    """Cut a piece that holds both lungs at its middle column."""
    columns = np.flatnonzero(both.any(axis=(0, 1)))
    middle = (columns[0] + columns[-1] + 1) // 2
    is_right = np.arange(both.shape[2]) < middle
    return [both & is_right, both & ~is_right]


def close_lung(lung: Mask, grid_mm: Millimetres) -> Mask:
    """Close one lung with a ball of 12 mm and fill the holes of its slices.

    Works within the lung's bounding box.
    """
    boxes = ndimage.find_objects(lung.view(np.uint8))
    if not boxes or boxes[0] is None:
        return lung
    box = boxes[0]
    pad = [int(np.ceil(CLOSING_MM / mm)) + 1 for mm in grid_mm]
    inner = np.pad(lung[box], [(n, n) for n in pad])
    # The padding is wider than the ball, so that the dilated lung reaches no end of the array.
    near = ball(CLOSING_MM, grid_mm)
    filled = erode(dilate(inner, near), near, beyond=True) | inner
    filled |= ~filled & ~connected_to_border(~filled)
    out = np.zeros_like(lung)
    out[box] = filled[tuple(slice(n, -n) for n in pad)]
    return out


def find_cavity(closed: Mask, grid: GridVolume) -> Mask:
    """Return the chest cavity: the hull of the lungs and their mirror image, less the chest wall.

    Slice by slice. The mirror image stands in for a lung that is opaque throughout a slice.
    """
    reach = max(1, round(CAVITY_MARGIN_MM * 2 / grid.grid_mm[0]))
    both_sides = closed | _mirrored(closed)
    spread = dilate(both_sides, np.ones((2 * reach + 1, 1, 1), bool))
    hull = np.stack([convex_hull(mask) for mask in spread])
    hull = dilate_in_plane(hull, CAVITY_MARGIN_MM, grid.grid_mm)
    hull &= ~dilate_in_plane(grid.outside, CHEST_WALL_MM, grid.grid_mm)
    return hull | closed


def _mirrored(closed: Mask) -> Mask:
    """Mirror the lungs at the middle of their columns."""
    columns = np.flatnonzero(closed.any(axis=(0, 1)))
    source = columns[0] + columns[-1] - np.arange(closed.shape[2])
    is_inside = (source >= 0) & (source < closed.shape[2])
    mirrored = np.zeros_like(closed)
    mirrored[:, :, np.flatnonzero(is_inside)] = closed[:, :, source[is_inside]]
    return mirrored
