"""Patient, room air and unmeasured pixels of a CT, told apart on a coarse grid.

The edge of an image is no proof of room air: it may cut a lung, or run through a frame of any value
that a scanner or a resampling left where nothing was measured. Not covered: a fill value that varies
from pixel to pixel and reaches the body.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage
from scipy.spatial import ConvexHull, QhullError

Mask = NDArray[np.bool_]
Millimetres = tuple[float, float, float]

BODY_HU = -300
AIR_HU = -1000
AERATED_HU = -400
# Nothing that is measured lies below: air is -1000, and noise averages out within a block.
UNMEASURED_HU = -1100
# Soft tissue, which is flat where an image was made without noise.
TISSUE_HU = (1, 300)
# Half the voxels of severe emphysema lie below -950. Room air was measured at -1000 to -930, foam of
# tables and cushions is alike: between the limits only the place tells air from lung.
SURELY_AIR_HU, SURELY_DENSE_HU = -970, -880
FLAT_TOL_HU = 0.5
# The middle nine tenths of a slice; fat and muscle alone lie 150 HU apart, noise adds to that.
BLANK_RANGE_HU = 20
# Between slices of a chest, a slice with nothing denser shows none.
BLANK_AIR_HU = -800
BLANK_SAMPLES = 32
CUT_LUNG_CM2 = 2.0
FRAME_PX = 2
BEHIND_FRAME_CM2 = 10.0
LEAK_CM2 = 4.0
# Of all tissue in a slice: a ring of room air lies around the body, joined lungs around the heart.
RING_SHARE = 0.4
# Cables and clothes are thinner than chest walls, and so are most shells of tables.
THIN_MM, SHELL_MM = 7.0, 12.0
TISSUE_CM2 = 3.0
INSIDE_SHARE = 0.7

IN_PLANE = np.zeros((3, 3, 3), bool)
IN_PLANE[1] = [[0, 1, 0], [1, 1, 1], [0, 1, 0]]


def blank_slices(hu: NDArray[Any]) -> Mask:
    """Tell which slices between others show nothing: one value, or nearly, or air and its noise.

    hu: (z, y, x). The value of a slice's corner is left out: it may pad a round field of view.
    Blank slices at an end are only told if there are no others: there, the volume just ends.
    """
    step_y, step_x = (max(1, length // BLANK_SAMPLES) for length in hu.shape[1:])
    is_blank = np.zeros(len(hu), bool)
    for index, slice_hu in enumerate(hu[:, ::step_y, ::step_x]):
        corner = float(slice_hu[0, 0])
        is_drawing = TISSUE_HU[0] <= corner <= TISSUE_HU[1]
        values = (
            np.sort(slice_hu, axis=None) if is_drawing else np.sort(slice_hu[slice_hu != corner])
        )
        if len(values) < slice_hu.size // 20:
            is_blank[index] = True
            continue
        low, high = (float(values[at]) for at in (len(values) // 20, -1 - len(values) // 20))
        is_blank[index] = high - low < BLANK_RANGE_HU or high < BLANK_AIR_HU
    sound = np.flatnonzero(~is_blank)
    if len(sound):
        is_blank[: sound[0]] = False
        is_blank[sound[-1] + 1 :] = False
    return is_blank


def find_outside(
    hu: NDArray[np.float32], samples: NDArray[Any], grid_mm: Millimetres
) -> tuple[Mask, Mask]:
    """Return room air with all that is unmeasured, and the unmeasured alone, as (z, y, x) masks.

    hu: averages of the blocks of a grid. samples: one pixel of each block, since noise that is
    clipped at -1024 moves an average, but no median.

    Air that touches the edge of the image or something unmeasured is room air, unless it is as dense
    as lung; if its density may as well be that of air or foam, lung must lie within the body. Air
    that lies around the body is room air as well.
    """
    unmeasured = _unmeasured(hu)
    labels, count = ndimage.label((hu < BODY_HU) & ~unmeasured, structure=IN_PLANE)
    pixel_cm2 = grid_mm[1] * grid_mm[2] / 100.0
    is_large = np.bincount(labels.ravel(), minlength=count + 1) * pixel_cm2 >= BEHIND_FRAME_CM2
    is_outside = _touching(labels, count)
    if unmeasured.any():
        is_outside[labels[beside_unmeasured(unmeasured, hu)]] = True
    is_behind_frame = np.zeros_like(is_outside)
    for edge in _edges(labels[:, FRAME_PX:-FRAME_PX, FRAME_PX:-FRAME_PX]):
        is_behind_frame[edge] = is_large[edge] & ~is_outside[edge]
    candidates = is_outside | is_behind_frame
    inside = cache(lambda: inside_body(hu, unmeasured, grid_mm))  # few series need it
    is_lung, is_thick = _cut_lung(labels, candidates, samples, unmeasured, inside, grid_mm)
    is_outside = (is_outside | (is_behind_frame & is_thick)) & ~is_lung
    is_outside |= _rings(labels, is_large & ~is_outside, hu, unmeasured)
    is_outside[0] = False
    room_air = is_outside[labels]
    _remove_leaks(room_air, hu, inside, grid_mm)
    return room_air | unmeasured, unmeasured


def touching_border(mask: Mask) -> Mask:
    """Return the part of a mask that is connected, within its slice, to the edge of the image."""
    labels, count = ndimage.label(mask, structure=IN_PLANE)
    return np.asarray(_touching(labels, count)[labels])


def inside_body(
    hu: NDArray[np.float32],
    unmeasured: Mask,
    grid_mm: Millimetres,
    thicker_than_mm: float = THIN_MM,
) -> Mask:
    """Return the pixels of slices that have thick tissue on both sides, along x or along y."""
    tissue = (hu >= BODY_HU) & ~unmeasured
    reach = [int(thicker_than_mm / 2 / mm) for mm in grid_mm[1:]]
    thick = ndimage.binary_erosion(
        tissue | unmeasured, structure=diamond(reach)[None], border_value=1
    )
    labels, count = ndimage.label(thick & tissue, structure=IN_PLANE)
    is_large = (
        np.bincount(labels.ravel(), minlength=count + 1) * grid_mm[1] * grid_mm[2] / 100.0
        >= TISSUE_CM2
    )
    is_large[0] = False
    body = is_large[labels]
    inside = np.zeros_like(body)
    for axis in (1, 2):
        before = np.maximum.accumulate(body, axis=axis)
        behind = np.flip(np.maximum.accumulate(np.flip(body, axis), axis=axis), axis)
        inside |= before & behind
    return inside


def convex_hull(slice_mask: Mask) -> Mask:
    """Fill the convex hull of a mask in one slice."""
    rows = np.flatnonzero(slice_mask.any(axis=1))
    left, right = (
        slice_mask[rows].argmax(axis=1),
        slice_mask.shape[1] - 1 - slice_mask[rows, ::-1].argmax(axis=1),
    )
    points = np.unique(np.column_stack([np.tile(rows, 2), np.concatenate([left, right])]), axis=0)
    if len(points) < 3:
        return slice_mask
    try:
        corners = points[ConvexHull(points).vertices]
    except QhullError:  # all points on one line
        return slice_mask
    image = Image.new("1", (slice_mask.shape[1], slice_mask.shape[0]))
    ImageDraw.Draw(image).polygon([(int(x), int(y)) for y, x in corners], fill=1, outline=1)
    return np.asarray(image)


def diamond(reach_px: list[int]) -> Mask:
    """Return the pixels that as many steps along y and x reach, as a structuring element."""
    y, x = (np.abs(np.arange(-reach, reach + 1)) / max(1, reach) for reach in reach_px)
    return np.asarray(y[:, None] + x[None, :] <= 1 + 1e-9)


def rim(grid_mm: Millimetres) -> Mask:
    """Return a structuring element that reaches two pixels along the finer axis of a slice."""
    finer = min(grid_mm[1:])
    return diamond([max(1, round(2 * finer / mm)) for mm in grid_mm[1:]])[None]


def beside_unmeasured(unmeasured: Mask, hu: NDArray[np.float32]) -> Mask:
    """Return what lies beside unmeasured pixels; two pixels if their value hides the border."""
    near = ndimage.binary_dilation(unmeasured, structure=IN_PLANE)
    # Between air and a fill value of 0, interpolation leaves values that are neither.
    visible = unmeasured & (hu >= BODY_HU)
    if visible.any():
        near |= ndimage.binary_dilation(visible, structure=IN_PLANE, iterations=2)
    return near & ~unmeasured


def _unmeasured(hu: NDArray[np.float32]) -> Mask:
    """Return the corners that hold one value throughout, and the padding that lies beside them."""
    found = np.zeros(hu.shape, bool)
    hides_padding = False
    for index, slice_hu in enumerate(hu):
        for value in _fill_values(slice_hu):
            found[index] |= np.abs(slice_hu - value) <= FLAT_TOL_HU
            hides_padding |= value > AIR_HU
            if value < UNMEASURED_HU:
                found[index] |= slice_hu < UNMEASURED_HU
    if not found.any():
        return found
    found = _with_corners(found)
    if not hides_padding:
        return found
    # Within the fill value of a resampling lies the padding that the scanner left.
    floor = (hu <= AIR_HU) & _is_flat(hu)
    joined = ndimage.binary_dilation(found, structure=IN_PLANE, iterations=2) | floor
    return found | (_with_corners(joined) & floor)


def _fill_values(slice_hu: NDArray[np.float32]) -> set[float]:
    """Return the values of the corners whose neighbours hold the same, or that nobody measured."""
    values = set()
    for y, x in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        value = float(slice_hu[y, x])
        beside = (slice_hu[y, 1 if x == 0 else -2], slice_hu[1 if y == 0 else -2, x])
        is_flat = all(abs(float(other) - value) <= FLAT_TOL_HU for other in beside)
        if value < UNMEASURED_HU or (is_flat and not _may_be_tissue(value, slice_hu)):
            values.add(value)
    return values


def _may_be_tissue(value: float, slice_hu: NDArray[np.float32]) -> bool:
    """Tell whether flat corners may be tissue, as in images without any noise."""
    if not TISSUE_HU[0] <= value <= TISSUE_HU[1]:
        return False
    others = np.abs(slice_hu[:, :-1] - value) > FLAT_TOL_HU
    is_flat = np.abs(np.diff(slice_hu, axis=1)) <= FLAT_TOL_HU
    return bool(2 * np.count_nonzero(is_flat & others) >= np.count_nonzero(others))


def _is_flat(hu: NDArray[np.float32]) -> Mask:
    """Tell which pixels equal at least two of their four neighbours."""
    num_equal = np.zeros(hu.shape, np.uint8)
    same_y = np.abs(np.diff(hu, axis=1)) <= FLAT_TOL_HU
    same_x = np.abs(np.diff(hu, axis=2)) <= FLAT_TOL_HU
    num_equal[:, 1:] += same_y
    num_equal[:, :-1] += same_y
    num_equal[:, :, 1:] += same_x
    num_equal[:, :, :-1] += same_x
    return num_equal >= 2


def _with_corners(mask: Mask) -> Mask:
    """Return the parts of a mask that are connected, within their slice, to a corner."""
    labels, count = ndimage.label(mask, structure=IN_PLANE)
    has_corner = np.zeros(count + 1, bool)
    has_corner[labels[:, [0, 0, -1, -1], [0, -1, 0, -1]]] = True
    has_corner[0] = False
    return np.asarray(has_corner[labels])


def _edges(labels: NDArray[Any]) -> tuple[NDArray[Any], ...]:
    return labels[:, 0], labels[:, -1], labels[:, :, 0], labels[:, :, -1]


def _touching(labels: NDArray[Any], count: int) -> Mask:
    """Tell which labels touch the edge of the image."""
    touches = np.zeros(count + 1, bool)
    for edge in _edges(labels):
        touches[edge] = True
    touches[0] = False
    return touches


def _cut_lung(
    labels: NDArray[Any],
    candidates: Mask,
    samples: NDArray[Any],
    unmeasured: Mask,
    inside: Callable[[], Mask],
    grid_mm: Millimetres,
) -> tuple[Mask, Mask]:
    """Tell which candidates are lung that the edge cuts, and which are thick enough to be judged.

    candidates: of the labels, each a piece within one slice. inside: ``inside_body``, if needed.
    """
    # The rim is partly something else. The edge that cuts a piece is no rim of it.
    solid = ndimage.binary_erosion(
        candidates[labels] | unmeasured, structure=rim(grid_mm), border_value=1
    )
    solid &= candidates[labels]
    inner, values = labels[solid], samples[solid]

    def count(is_wanted: Mask) -> NDArray[Any]:
        return np.bincount(inner[is_wanted], minlength=len(candidates))

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
    """Take from the room air, in place, lung that a thin chest wall or a fill value joined to it."""
    pixel_cm2 = grid_mm[1] * grid_mm[2] / 100.0
    dense = room_air & (hu > SURELY_DENSE_HU) & (hu < AERATED_HU)
    # The blurred rim of the body has no pixel with eight such neighbours.
    rows = dense[:, :-2] & dense[:, 1:-1] & dense[:, 2:]
    core = np.zeros_like(dense)
    core[:, 1:-1, 1:-1] = rows[:, :, :-2] & rows[:, :, 1:-1] & rows[:, :, 2:]
    shown = np.flatnonzero(np.count_nonzero(core, axis=(1, 2)) * pixel_cm2 >= LEAK_CM2)
    if not len(shown):
        return
    labels, count = ndimage.label(core[shown], structure=IN_PLANE)
    is_large = np.bincount(labels.ravel(), minlength=count + 1) * pixel_cm2 >= LEAK_CM2
    is_large[0] = False
    large = is_large[labels]
    is_shown = large.any(axis=(1, 2))
    shown, large = shown[is_shown], large[is_shown]
    if not len(shown):
        return
    large &= inside()[shown]
    if large.any():
        grown = ndimage.binary_dilation(large, structure=rim(grid_mm), iterations=2)
        room_air[shown] &= ~(inside()[shown] & grown)


def _rings(
    labels: NDArray[Any], candidates: Mask, hu: NDArray[np.float32], unmeasured: Mask
) -> Mask:
    """Tell which candidates lie around the body in their slice."""
    found = np.zeros_like(candidates)
    boxes = ndimage.find_objects(labels)
    tissue = (hu >= BODY_HU) & ~unmeasured
    num_tissue = np.count_nonzero(tissue, axis=(1, 2))
    for label in np.flatnonzero(candidates[1:]) + 1:
        box = boxes[label - 1]
        wanted = RING_SHARE * num_tissue[box[0].start]
        if np.count_nonzero(tissue[box]) < wanted:
            continue
        enclosed = ndimage.binary_fill_holes(labels[box][0] == label)
        found[label] = np.count_nonzero(enclosed & tissue[box][0]) >= wanted
    return found
