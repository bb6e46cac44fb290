"""Patient, room air and unmeasured pixels of a CT, told apart on a coarse grid.

The edge of an image is no proof of room air: it may cut a lung, or run through a frame of any value
that a scanner or a resampling left where nothing was measured. Not covered: a fill value that varies
from pixel to pixel and reaches the body.
"""

from collections.abc import Iterator
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
# Nothing that is measured lies below: air is -1000, and noise averages out within a block.
UNMEASURED_HU = -1100
# No fill value lies between these, the HU of soft tissue and contrast.
TISSUE_HU = (1, 300)
# Half the voxels of severe emphysema lie below -950, half of room air below about -1000.
ROOM_AIR_HU = -970
# Foam of tables and cushions is -980 to -920. What is denser is lung wherever it lies.
FOAM_HU = -900
FLAT_TOL_HU = 0.5
# In a slice of a chest, lung or air and soft tissue lie 800 HU apart.
BLANK_RANGE_HU = 200
BLANK_SAMPLES = 32
CUT_LUNG_CM2 = 2.0
ROOM_AIR_CM2 = 10.0
# Of all tissue in a slice: a ring of room air lies around the whole body, no airway does.
RING_SHARE = 0.3
# Shells of tables are thinner, chest walls thicker.
SHELL_MM = 10.0
# Of the largest piece of tissue; arms are smaller.
TRUNK_SHARE = 0.3
INSIDE_SHARE = 0.7

IN_PLANE = np.zeros((3, 3, 3), bool)
IN_PLANE[1] = [[0, 1, 0], [1, 1, 1], [0, 1, 0]]
CROSS = IN_PLANE[1]


def blank_slices(hu: NDArray[Any]) -> Mask:
    """Tell which slices show nothing: one value, or nearly, wherever they were measured.

    hu: (z, y, x). The value of a slice's corner is left out: it may pad a round field of view.
    """
    step_y, step_x = (max(1, length // BLANK_SAMPLES) for length in hu.shape[1:])
    is_blank = np.zeros(len(hu), bool)
    for index, slice_hu in enumerate(hu[:, ::step_y, ::step_x]):
        values = np.sort(slice_hu[slice_hu != slice_hu[0, 0]])
        margin = len(values) // 20
        is_blank[index] = (
            len(values) < slice_hu.size // 20
            or float(values[-1 - margin]) - float(values[margin]) < BLANK_RANGE_HU
        )
    return is_blank


def find_outside(
    hu: NDArray[np.float32], samples: NDArray[Any], grid_mm: Millimetres
) -> tuple[Mask, Mask]:
    """Return room air with all that is unmeasured, and the unmeasured alone, as (z, y, x) masks.

    hu: averages of the blocks of a grid. samples: one pixel of each block, since noise that is
    clipped at -1024 moves an average, but no median.

    Air that touches the edge of the image or something unmeasured is room air, unless it is as dense
    as lung; if it may as well be foam, lung must lie within the convex hull of the body.
    """
    unmeasured = _unmeasured(hu)
    labels, count = ndimage.label((hu < BODY_HU) & ~unmeasured, structure=IN_PLANE)
    sizes_cm2 = np.bincount(labels.ravel(), minlength=count + 1) * (grid_mm[1] * grid_mm[2] / 100.0)
    # The share of dense samples is below a half if the median is below the limit.
    dense_cm2 = np.bincount(labels[samples > ROOM_AIR_HU], minlength=count + 1)
    is_air = dense_cm2 * (grid_mm[1] * grid_mm[2] / 100.0) < sizes_cm2 / 2
    is_room_sized = is_air & (sizes_cm2 >= ROOM_AIR_CM2)
    is_outside = np.zeros(count + 1, bool)
    for edge in _edges(labels):
        is_outside[edge] = True
    if unmeasured.any():
        is_outside[labels[beside_unmeasured(unmeasured, hu)]] = True
    for edge in _edges(labels[:, 2:-2, 2:-2]):  # behind a frame of one or two pixels of any value
        is_outside[edge] |= is_room_sized[edge]
    candidates = is_outside & ~is_air & (sizes_cm2 >= CUT_LUNG_CM2)
    for label, z in _slices_of(candidates, labels):
        piece = labels[z] == label
        is_outside[label] = not _is_cut_lung(piece, samples[z], hu[z], unmeasured[z], grid_mm)
    for label, z in _slices_of(is_room_sized & ~is_outside, labels):
        tissue = (hu[z] >= BODY_HU) & ~unmeasured[z]
        is_outside[label] = _lies_around(labels[z] == label, tissue)
    is_outside[0] = False
    return is_outside[labels] | unmeasured, unmeasured


def touching_border(mask: Mask) -> Mask:
    """Return the part of a mask that is connected, within its slice, to the edge of the image."""
    labels, count = ndimage.label(mask, structure=IN_PLANE)
    touches = np.zeros(count + 1, bool)
    for edge in _edges(labels):
        touches[edge] = True
    touches[0] = False
    return np.asarray(touches[labels])


def body_hull(hu: NDArray[np.float32], unmeasured: Mask, grid_mm: Millimetres) -> Mask:
    """Return the convex hull of the trunk in one slice; arms and shells of tables are left out."""
    thick = [max(1, round(SHELL_MM / 2 / mm)) for mm in grid_mm[1:]]
    tissue = (hu >= BODY_HU) & ~unmeasured
    core = ndimage.binary_erosion(tissue | unmeasured, structure=diamond(thick), border_value=1)
    labels, count = ndimage.label(core & tissue, structure=CROSS)
    if not count:
        return np.zeros_like(tissue)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    trunk = (sizes >= TRUNK_SHARE * sizes.max())[labels] & (labels > 0)
    return ndimage.binary_dilation(convex_hull(trunk), structure=diamond(thick))


def convex_hull(slice_mask: Mask) -> Mask:
    """Fill the convex hull of a mask in one slice."""
    rows = np.flatnonzero(slice_mask.any(axis=1))
    left, right = slice_mask[rows].argmax(axis=1), slice_mask.shape[1] - 1 - slice_mask[rows, ::-1].argmax(axis=1)
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
    y, x = (np.abs(np.arange(-reach, reach + 1)) / reach for reach in reach_px)
    return np.asarray(y[:, None] + x[None, :] <= 1 + 1e-9)


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
        if value < UNMEASURED_HU or (is_flat and not TISSUE_HU[0] <= value <= TISSUE_HU[1]):
            values.add(value)
    return values


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


def _slices_of(is_wanted: Mask, labels: NDArray[Any]) -> Iterator[tuple[int, int]]:
    """Yield wanted labels, each with its z index; a label lies in one slice."""
    if not is_wanted[1:].any():
        return
    wanted = is_wanted[labels] & (labels > 0)
    for z in np.flatnonzero(wanted.any(axis=(1, 2))):
        for label in np.unique(labels[z][wanted[z]]):
            yield int(label), int(z)


def _is_cut_lung(
    piece: Mask,
    samples: NDArray[Any],
    hu: NDArray[np.float32],
    unmeasured: Mask,
    grid_mm: Millimetres,
) -> bool:
    """Tell lung that the edge cuts from room air, foam and the blurred rims of both, in one slice."""
    # Two pixels of rim are partly something else; the image does not end where the edge cuts it.
    solid = ndimage.binary_erosion(piece | unmeasured, structure=CROSS, iterations=2, border_value=1)
    solid &= piece
    if np.count_nonzero(solid) * grid_mm[1] * grid_mm[2] / 100.0 < CUT_LUNG_CM2:
        return False
    median_hu = float(np.median(samples[solid]))
    if median_hu > FOAM_HU:
        return True
    if median_hu <= ROOM_AIR_HU:
        return False
    num_inside = np.count_nonzero(body_hull(hu, unmeasured, grid_mm) & solid)
    return bool(num_inside >= INSIDE_SHARE * np.count_nonzero(solid))


def _lies_around(ring: Mask, tissue: Mask) -> bool:
    enclosed = ndimage.binary_fill_holes(ring) & ~ring
    return bool(np.count_nonzero(enclosed & tissue) >= RING_SHARE * np.count_nonzero(tissue))
