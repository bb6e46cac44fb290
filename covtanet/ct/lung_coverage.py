"""Coverage of the lungs by a volume: whole, or cut by the field of view."""

import numpy as np

from covtanet.ct.densities import BODY_HU
from covtanet.ct.lung_grid import GridVolume
from covtanet.ct.masks import IN_PLANE, Mask, erode, image_edges, span
from covtanet.ct.unmeasured import next_to_unmeasured

PARTIAL_CM2 = 15.0
CONTACT_CM2 = 2.0
# Distance from a lone lung to the end of the image or of the body, in widths of that lung.
ROOM_FOR_A_LUNG, ROOM_FOR_LUNG_AND_WALL = 0.6, 1.0
CUT_TISSUE_SHARE = 0.3


def is_cut(closed: Mask, grid: GridVolume) -> bool:
    """Return whether the field of view cuts the lungs.

    It does if more than 15 cm2 of lung lie in the first or last slice or next to an unmeasured
    slice, if lung reaches an edge of the image, or if it touches unmeasured pixels on 2 cm2.
    """
    ends_px = max(np.count_nonzero(closed[0]), np.count_nonzero(closed[-1]))
    if ends_px * grid.pixel_cm2 > PARTIAL_CM2:
        return True
    if any(edge.any() for edge in image_edges(closed)):
        return True
    # A slice without a body, of air with noise at the end of a volume, counts as unmeasured.
    empty = grid.unmeasured | grid.outside.all(axis=(1, 2), keepdims=True)
    above = np.count_nonzero(closed[:-1] & empty[1:], axis=(1, 2)).max(initial=0)
    below = np.count_nonzero(closed[1:] & empty[:-1], axis=(1, 2)).max(initial=0)
    if max(above, below) * grid.pixel_cm2 > PARTIAL_CM2:
        return True
    if not grid.unmeasured.any():
        return False
    contact = np.count_nonzero(closed & next_to_unmeasured(grid.unmeasured, grid.hu))
    contact_cm2 = float(contact) * grid.grid_mm[0] * max(grid.grid_mm[1:]) / 100.0
    return contact_cm2 > CONTACT_CM2


def lacks_a_lung(lone: Mask, grid: GridVolume) -> bool:
    """Return whether the other lung must lie beyond the image, as in a reconstruction of one lung.

    It does if the image ends in tissue at a side of the lone lung, and the body has no room for
    another lung on either side.
    """
    rows = span(np.asarray(lone.any(axis=(0, 2))))
    columns = span(np.asarray(lone.any(axis=(0, 1))))
    width, depth = columns.stop - columns.start, rows.stop - rows.start
    if width * grid.grid_mm[2] >= depth * grid.grid_mm[1]:
        return False  # wider than deep: both lungs in one piece
    shown = np.asarray(lone.any(axis=(1, 2)))
    measured = ~grid.unmeasured[shown]
    end = measured & ~erode(measured, IN_PLANE)
    body = np.asarray((~grid.outside[shown, rows]).any(axis=1))
    is_any_cut = False
    for side in (slice(0, columns.start), slice(columns.stop, None)):
        end_hu = grid.hu[shown][:, :, side][end[:, :, side]]
        is_side_cut = bool(len(end_hu)) and bool((end_hu >= BODY_HU).mean() >= CUT_TISSUE_SHARE)
        is_any_cut |= is_side_cut
        room_px = np.median(np.count_nonzero(body[:, side], axis=1))
        if room_px >= width * (ROOM_FOR_A_LUNG if is_side_cut else ROOM_FOR_LUNG_AND_WALL):
            return False
    return is_any_cut
