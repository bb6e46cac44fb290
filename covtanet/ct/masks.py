"""Operations on masks that work slice by slice.

Masks are (z, y, x) bool unless stated otherwise; two voxels of different slices are never
connected here.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage
from scipy.spatial import ConvexHull, QhullError

Mask = NDArray[np.bool_]
Millimetres = tuple[float, float, float]

# The four neighbours within a slice.
IN_PLANE = np.zeros((3, 3, 3), bool)
IN_PLANE[1] = [[0, 1, 0], [1, 1, 1], [0, 1, 0]]


def label_in_plane(mask: Mask) -> tuple[NDArray[Any], int]:
    """Label the connected parts of each slice; return the labels and their number."""
    labels, count = ndimage.label(mask, structure=IN_PLANE)
    return labels, count


def label_sizes(labels: NDArray[Any], count: int) -> NDArray[np.intp]:
    """Return the number of voxels of each label; index 0 is the background."""
    return np.bincount(labels.ravel(), minlength=count + 1)


def connected_to_border(mask: Mask) -> Mask:
    """Return the part of a mask that is connected, within its slice, to the edge of the image."""
    labels, count = label_in_plane(mask)
    return np.asarray(labels_at_border(labels, count)[labels])


def labels_at_border(labels: NDArray[Any], count: int) -> Mask:
    """Return, for each label, whether it touches the edge of the image."""
    touches = np.zeros(count + 1, bool)
    for edge in image_edges(labels):
        touches[edge] = True
    touches[0] = False
    return touches


def image_edges(labels: NDArray[Any]) -> tuple[NDArray[Any], ...]:
    """Return the first and last rows and columns of all slices."""
    return labels[:, 0], labels[:, -1], labels[:, :, 0], labels[:, :, -1]


def connected_to_corners(mask: Mask) -> Mask:
    """Return the parts of a mask that are connected, within their slice, to a corner."""
    labels, count = label_in_plane(mask)
    has_corner = np.zeros(count + 1, bool)
    has_corner[labels[:, [0, 0, -1, -1], [0, -1, 0, -1]]] = True
    has_corner[0] = False
    return np.asarray(has_corner[labels])


def diamond(reach_px: list[int]) -> Mask:
    """Return a structuring element (y, x): the pixels within so many steps along y and x."""
    y, x = (np.abs(np.arange(-reach, reach + 1)) / max(1, reach) for reach in reach_px)
    return np.asarray(y[:, None] + x[None, :] <= 1 + 1e-9)


def rim(grid_mm: Millimetres) -> Mask:
    """Return a structuring element that reaches two pixels along the finer axis of a slice."""
    finer_mm = min(grid_mm[1:])
    return diamond([max(1, round(2 * finer_mm / mm)) for mm in grid_mm[1:]])[None]


def dilate_in_plane(mask: Mask, reach_mm: float, grid_mm: Millimetres) -> Mask:
    """Dilate within slices by a length in millimetres, at least one pixel along each axis."""
    reach_y, reach_x = (max(1, round(reach_mm / mm)) for mm in grid_mm[1:])
    if reach_y == reach_x:  # a small element many times is faster
        return np.asarray(ndimage.binary_dilation(mask, structure=IN_PLANE, iterations=reach_y))
    return np.asarray(ndimage.binary_dilation(mask, structure=diamond([reach_y, reach_x])[None]))


def convex_hull(slice_mask: Mask) -> Mask:
    """Return the filled convex hull of the mask of one slice, (y, x)."""
    rows = np.flatnonzero(slice_mask.any(axis=1))
    left = slice_mask[rows].argmax(axis=1)
    right = slice_mask.shape[1] - 1 - slice_mask[rows, ::-1].argmax(axis=1)
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


def span(is_inside: Mask) -> slice:
    """Return the slice from the first to the last True of a 1-D mask; empty without any."""
    inside = np.flatnonzero(is_inside)
    return slice(int(inside[0]), int(inside[-1]) + 1) if len(inside) else slice(0, 0)
