"""Pixels and slices of a CT that hold no measurement: fill values, padding, blank slices.

The edge of an image does not prove room air: it may run through a frame of any value that a scanner
or a resampling left outside the measured field. Not covered: a fill value that varies from pixel to
pixel and reaches the body.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from covtanet.ct.densities import AIR_HU, BODY_HU, TISSUE_HU
from covtanet.ct.masks import IN_PLANE, Mask, connected_to_corners, diamond, dilate

# No measured block average lies below: air is -1000, and noise averages out within a block.
UNMEASURED_HU = -1100
FLAT_ATOL_HU = 0.5
# Of the middle nine tenths of a slice: fat and muscle already lie 150 HU apart, noise adds to it.
BLANK_RANGE_HU = 20
BLANK_TAIL = 20
# Between slices of a chest, a slice without anything denser shows no body.
BLANK_AIR_HU = -800
BLANK_SAMPLES = 32
TWO_PIXELS = diamond([2, 2])[None]


def blank_slices(hu: NDArray[Any]) -> Mask:
    """Return which slices between others are blank: one value, or nearly, or air and its noise.

    hu: (z, y, x). The value of a slice's corner is left out, since it may pad a round field of
    view. Blank slices at an end count only if all slices are blank: there, the volume just ends.
    """
    step_y, step_x = (max(1, length // BLANK_SAMPLES) for length in hu.shape[1:])
    coarse = hu[:, ::step_y, ::step_x]
    is_blank = np.array([_is_blank(slice_hu) for slice_hu in coarse], bool)
    shown = np.flatnonzero(~is_blank)
    if len(shown):
        is_blank[: shown[0]] = False
        is_blank[shown[-1] + 1 :] = False
    return is_blank


def _is_blank(slice_hu: NDArray[Any]) -> bool:
    corner = float(slice_hu[0, 0])
    # A corner of the value of soft tissue may be the image itself, if it was made without noise.
    is_tissue = TISSUE_HU[0] <= corner <= TISSUE_HU[1]
    values = np.sort(slice_hu if is_tissue else slice_hu[slice_hu != corner], axis=None)
    if len(values) < slice_hu.size // BLANK_TAIL:
        return True
    tail = len(values) // BLANK_TAIL
    low, high = float(values[tail]), float(values[-1 - tail])
    return high - low < BLANK_RANGE_HU or high < BLANK_AIR_HU


def find_unmeasured(hu: NDArray[np.float32]) -> Mask:
    """Return the corners that hold one value throughout, and the padding next to them.

    hu: (z, y, x), averages of the blocks of a grid.
    """
    unmeasured = np.zeros(hu.shape, bool)
    hides_padding = False
    for index, slice_hu in enumerate(hu):
        for value in _fill_values(slice_hu):
            unmeasured[index] |= np.abs(slice_hu - value) <= FLAT_ATOL_HU
            hides_padding |= value > AIR_HU
            if value < UNMEASURED_HU:
                unmeasured[index] |= slice_hu < UNMEASURED_HU
    if not unmeasured.any():
        return unmeasured
    unmeasured = connected_to_corners(unmeasured)
    if not hides_padding:
        return unmeasured
    # Within the fill value of a resampling lies the padding that the scanner left.
    padding = (hu <= AIR_HU) & _is_flat(hu)
    near = dilate(unmeasured, TWO_PIXELS)
    return unmeasured | (connected_to_corners(near | padding) & padding)


def next_to_unmeasured(unmeasured: Mask, hu: NDArray[np.float32]) -> Mask:
    """Return the pixels next to unmeasured ones; two pixels deep if the border is hidden.

    It is if the fill value is as dense as the body: between air and a fill value of 0,
    interpolation leaves values that are neither.
    """
    near = dilate(unmeasured, IN_PLANE)
    visible = unmeasured & (hu >= BODY_HU)
    if visible.any():
        near |= dilate(visible, TWO_PIXELS)
    return near & ~unmeasured


def _fill_values(slice_hu: NDArray[np.float32]) -> set[float]:
    """Return the values of the corners that are flat, or that no scanner measures."""
    values = set()
    for y, x in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        value = float(slice_hu[y, x])
        inner_y, inner_x = (1 if index == 0 else -2 for index in (y, x))
        neighbours = (slice_hu[y, inner_x], slice_hu[inner_y, x])
        is_flat = all(abs(float(hu) - value) <= FLAT_ATOL_HU for hu in neighbours)
        if value < UNMEASURED_HU or (is_flat and not _may_be_tissue(value, slice_hu)):
            values.add(value)
    return values


def _may_be_tissue(value: float, slice_hu: NDArray[np.float32]) -> bool:
    """Return whether flat corners may be tissue, as in images without any noise.

    In such an image most of the other pixels are flat as well.
    """
    if not TISSUE_HU[0] <= value <= TISSUE_HU[1]:
        return False
    others = np.abs(slice_hu[:, :-1] - value) > FLAT_ATOL_HU
    is_flat = np.abs(np.diff(slice_hu, axis=1)) <= FLAT_ATOL_HU
    return bool(2 * np.count_nonzero(is_flat & others) >= np.count_nonzero(others))


def _is_flat(hu: NDArray[np.float32]) -> Mask:
    """Return the pixels that equal at least two of their four neighbours."""
    num_equal = np.zeros(hu.shape, np.uint8)
    same_y = np.abs(np.diff(hu, axis=1)) <= FLAT_ATOL_HU
    same_x = np.abs(np.diff(hu, axis=2)) <= FLAT_ATOL_HU
    num_equal[:, 1:] += same_y
    num_equal[:, :-1] += same_y
    num_equal[:, :, 1:] += same_x
    num_equal[:, :, :-1] += same_x
    return num_equal >= 2
