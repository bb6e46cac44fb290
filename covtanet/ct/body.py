"""Segmentation of the patient's body from room air, on a coarse grid.

The edge of an image does not prove room air: it may cut a lung.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from covtanet.ct.densities import AERATED_HU, BODY_HU, SURELY_AIR_HU, SURELY_DENSE_HU
from covtanet.ct.masks import (
    Mask,
    Millimetres,
    diamond,
    dilate,
    erode,
    image_edges,
    label_in_plane,
    label_sizes,
    labels_at_border,
    rim,
)
from covtanet.ct.unmeasured import find_unmeasured, next_to_unmeasured

CUT_LUNG_CM2 = 2.0
FRAME_PX = 2
BEHIND_FRAME_CM2 = 10.0
LEAK_CM2 = 4.0
# Share of a slice's tissue within a ring of room air, which lies around the body; joined lungs lie
# only around the heart.
RING_SHARE = 0.4
# Cables and clothes are thinner than chest walls, and so are most shells of tables.
THIN_MM, SHELL_MM = 7.0, 12.0
TISSUE_CM2 = 3.0
INSIDE_SHARE = 0.7


def find_outside(
    hu: NDArray[np.float32], samples: NDArray[Any], grid_mm: Millimetres
) -> tuple[Mask, Mask]:
    """Return everything outside the body, and the unmeasured part of it, as (z, y, x) masks.

    hu: averages of the blocks of a grid. samples: one pixel of each block, since noise that is
    clipped at -1024 moves an average, but not a median.

    Air that touches the edge of the image or unmeasured pixels is room air, unless it is as dense
    as lung. If its density could also be that of air or foam, it counts as lung only within the
    body. Air around the body is room air as well.
    """
    unmeasured = find_unmeasured(hu)
    labels, count = label_in_plane((hu < BODY_HU) & ~unmeasured)
    pixel_cm2 = grid_mm[1] * grid_mm[2] / 100.0
    is_large = label_sizes(labels, count) * pixel_cm2 >= BEHIND_FRAME_CM2
    is_outside = labels_at_border(labels, count)
    if unmeasured.any():
        is_outside[labels[next_to_unmeasured(unmeasured, hu)]] = True
    is_behind_frame = np.zeros_like(is_outside)
    for edge in image_edges(labels[:, FRAME_PX:-FRAME_PX, FRAME_PX:-FRAME_PX]):
        is_behind_frame[edge] = is_large[edge] & ~is_outside[edge]
    candidates = is_outside | is_behind_frame
    # Computed at the first call only: few series need it.
    inside = cache(lambda: inside_body(hu, unmeasured, grid_mm))
    is_lung, is_thick = _find_cut_lung(labels, candidates, samples, unmeasured, inside, grid_mm)
    is_outside = (is_outside | (is_behind_frame & is_thick)) & ~is_lung
    is_outside |= _find_rings(labels, is_large & ~is_outside, hu, unmeasured)
    is_outside[0] = False
    room_air = is_outside[labels]
    _remove_leaks(room_air, hu, inside, grid_mm)
    return room_air | unmeasured, unmeasured


def inside_body(
    hu: NDArray[np.float32],
    unmeasured: Mask,
    grid_mm: Millimetres,
    thicker_than_mm: float = THIN_MM,
) -> Mask:
    """Return the pixels of slices that have thick tissue on both sides, along x or along y."""
    tissue = (hu >= BODY_HU) & ~unmeasured
    reach_px = [int(thicker_than_mm / 2 / mm) for mm in grid_mm[1:]]
    thick = erode(tissue | unmeasured, diamond(reach_px)[None], beyond=True)
    labels, count = label_in_plane(thick & tissue)
    is_large = label_sizes(labels, count) * grid_mm[1] * grid_mm[2] / 100.0 >= TISSUE_CM2
    is_large[0] = False
    body = is_large[labels]
    inside: Mask = np.zeros_like(body)
    for axis in (1, 2):
        before = np.maximum.accumulate(body, axis=axis)
        after = np.flip(np.maximum.accumulate(np.flip(body, axis), axis=axis), axis)
        inside |= before & after
    return inside


def _find_cut_lung(
    labels: NDArray[Any],
    candidates: Mask,
    samples: NDArray[Any],
    unmeasured: Mask,
    inside: Callable[[], Mask],
    grid_mm: Millimetres,
) -> tuple[Mask, Mask]:
    """Return which candidates are lung that the edge cuts, and which are thick enough to judge.

    candidates: of the labels, pieces within one slice. inside: ``inside_body``, if needed.
    """
    # The rim of a piece is partly tissue and says little. An edge that cuts a piece is not its rim.
    is_candidate = candidates.take(labels)
    solid = erode(is_candidate | unmeasured, rim(grid_mm), beyond=True) & is_candidate
    inner, values = labels[solid], samples[solid]

    def count(is_counted: Mask) -> NDArray[Any]:
        return np.bincount(inner[is_counted], minlength=len(candidates))

    # The median is above a limit if more than half of the samples are.
    num_all = np.bincount(inner, minlength=len(candidates))
    is_thick = num_all * grid_mm[1] * grid_mm[2] / 100.0 >= CUT_LUNG_CM2
    is_lung = is_thick & (2 * count(values > SURELY_AIR_HU) > num_all)
    is_lung &= 2 * count(values > AERATED_HU) < num_all
    is_unsure = is_lung & (2 * count(values > SURELY_DENSE_HU) <= num_all)
    if not is_unsure.any():
        return is_lung, is_thick
    num_inside = np.bincount(labels[inside() & solid], minlength=len(candidates))
    return is_lung & ~(is_unsure & (num_inside < INSIDE_SHARE * num_all)), is_thick


def _remove_leaks(
    room_air: Mask, hu: NDArray[np.float32], inside: Callable[[], Mask], grid_mm: Millimetres
) -> None:
    """Take lung from the room air, in place, if a thin wall or a fill value joined them."""
    pixel_cm2 = grid_mm[1] * grid_mm[2] / 100.0
    core = _with_all_neighbours(room_air & (hu > SURELY_DENSE_HU) & (hu < AERATED_HU))
    shown = np.flatnonzero(np.count_nonzero(core, axis=(1, 2)) * pixel_cm2 >= LEAK_CM2)
    if not len(shown):
        return
    labels, count = label_in_plane(core[shown])
    is_large = label_sizes(labels, count) * pixel_cm2 >= LEAK_CM2
    is_large[0] = False
    large = is_large[labels]
    has_leak = large.any(axis=(1, 2))
    shown, large = shown[has_leak], large[has_leak]
    if not len(shown):
        return
    large &= inside()[shown]
    if large.any():
        grown = dilate(dilate(large, rim(grid_mm)), rim(grid_mm))
        room_air[shown] &= ~(inside()[shown] & grown)


def _with_all_neighbours(mask: Mask) -> Mask:
    """Return the pixels with all eight neighbours in the mask.

    The blurred rim of the body, which is as dense as lung, has no such pixel.
    """
    rows = mask[:, :-2] & mask[:, 1:-1] & mask[:, 2:]
    core = np.zeros_like(mask)
    core[:, 1:-1, 1:-1] = rows[:, :, :-2] & rows[:, :, 1:-1] & rows[:, :, 2:]
    return core


def _find_rings(
    labels: NDArray[Any], candidates: Mask, hu: NDArray[np.float32], unmeasured: Mask
) -> Mask:
    """Return which candidates lie around the body in their slice."""
    is_ring = np.zeros_like(candidates)
    boxes = ndimage.find_objects(labels)
    tissue = (hu >= BODY_HU) & ~unmeasured
    num_tissue = np.count_nonzero(tissue, axis=(1, 2))
    for label in np.flatnonzero(candidates[1:]) + 1:
        box = boxes[label - 1]
        limit = RING_SHARE * num_tissue[box[0].start]
        if np.count_nonzero(tissue[box]) < limit:
            continue
        enclosed = ndimage.binary_fill_holes(labels[box][0] == label)
        is_ring[label] = np.count_nonzero(enclosed & tissue[box][0]) >= limit
    return is_ring
