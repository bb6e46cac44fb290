"""Pixels of a CT slice that the scanner padded, outside the image (PS3.3 C.7.5.1.1.2).

A declared padding value is not believed blindly: many objects declare one that is also a HU, such
as 0 for water. Off the scale of HU it is padding anywhere; on the scale only if it is connected to
the edge of the image, so that nothing is cut out of a body.

Not covered: padding on the scale of HU that the header does not declare.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from covtanet.ct.dicom_values import value_of
from covtanet.ct.fill import connected_to_edge
from covtanet.ct.masks import Mask

AIR_PADDING_HU = -1024
# The end of the extended scale of 16 bits with a slope of 10; metal is on the scale.
HIGHEST_HU = 30_710.0
# Values below it are not HU in any volume.
LOWEST_HU = -10_000.0
# A padding value up to here is read as air anyway.
AIR_HU = -900.0
# The corners outside a round field of view have 5 % of the image each; a clump of noise of one
# value has a few pixels.
MIN_SHARE = 0.001


def find_padding(stored: NDArray[Any], pixels: NDArray[Any], header: Dataset) -> Mask | None:
    """Return the padded pixels of a slice, None without any; padding that is air does not count.

    stored: the values with all their allocated bits, in which padding is written even if the header
    declares fewer bits. pixels: the values that BitsStored leaves.
    """
    rescaling = _slope_and_intercept(header)
    if rescaling is None:
        return None
    declared = _find_declared(stored, pixels, header, *rescaling)
    if declared is not None:
        return declared
    return _find_undeclared(stored, pixels, header, *rescaling)


def _find_declared(
    stored: NDArray[Any], pixels: NDArray[Any], header: Dataset, slope: float, intercept: float
) -> Mask | None:
    """Return the pixels that PixelPaddingValue and PixelPaddingRangeLimit name."""
    value = _integer(value_of(header, "PixelPaddingValue"))
    limit = _integer(value_of(header, "PixelPaddingRangeLimit"))
    if value is None:
        return None
    low, high = sorted((value, value if limit is None else limit))
    low_hu, high_hu = sorted((low * slope + intercept, high * slope + intercept))
    if low_hu >= AIR_PADDING_HU and high_hu <= AIR_HU:
        return None
    # The sign of the value tells its type: it may be written as signed for unsigned pixels, and
    # the reverse.
    values = stored.view(f"{'i' if low < 0 else 'u'}{stored.dtype.itemsize}")
    is_padding = (values >= low) & (values <= high)
    if stored is not pixels:
        values = np.where(is_padding, values, pixels)
        is_padding |= (pixels >= low) & (pixels <= high)
    if not is_padding.any():
        return None
    if low == high:
        is_off_scale = low_hu < AIR_PADDING_HU or low_hu > HIGHEST_HU
        padding = is_padding if is_off_scale else connected_to_edge(is_padding, MIN_SHARE)
    else:
        # A range that reaches into the scale is not believed there: it may be all of the body.
        hu = values * slope + intercept
        padding = is_padding & ((hu < AIR_PADDING_HU) | (hu > HIGHEST_HU))
    return padding if padding.any() else None


def _find_undeclared(
    stored: NDArray[Any], pixels: NDArray[Any], header: Dataset, slope: float, intercept: float
) -> Mask | None:
    """Return the pixels of one negative value off the scale, which the header does not declare.

    Such as -32768, or 63536, which is -2000 written in unsigned pixels.
    """
    signed = stored.view(f"i{stored.dtype.itemsize}")
    is_unsigned = pixels.dtype.kind == "u"
    value = int(signed.min())
    if value >= 0 or value * slope + intercept >= (AIR_PADDING_HU if is_unsigned else LOWEST_HU):
        return None
    bits = 8 * stored.dtype.itemsize
    bits_stored = int(value_of(header, "BitsStored") or bits)
    if bits_stored < bits:
        # The bits above carry a sign if all of them are set; otherwise an old overlay.
        is_off_scale = value >= -(1 << bits_stored)
    else:
        is_off_scale = not is_unsigned or int(pixels.max()) * slope + intercept > HIGHEST_HU
    if not is_off_scale or (is_unsigned and (signed[signed < 0] != value).any()):
        return None
    padding = connected_to_edge(signed == value, MIN_SHARE)
    return padding if padding.any() else None


def _slope_and_intercept(header: Dataset) -> tuple[float, float] | None:
    """Return slope and intercept; None if one is missing or NaN, which a later check refuses."""
    values = [value_of(header, name) for name in ("RescaleSlope", "RescaleIntercept")]
    if any(value is None for value in values):
        return None
    slope, intercept = (float(value) for value in values)
    return (slope, intercept) if np.isfinite([slope, intercept]).all() else None


def _integer(value: Any) -> int | None:
    """Return a value if it is a whole number of 16 or 32 bits, else None."""
    if not isinstance(value, int) or not -(1 << 31) <= value < 1 << 32:
        return None
    return int(value)
