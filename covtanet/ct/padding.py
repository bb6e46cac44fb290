"""Pixels of a CT slice that the scanner padded, which are no part of the image (PS3.3 C.7.5.1.1.2).

A declared padding value is not believed blindly: many objects declare one that is also a HU, such
as 0 for water. Off the scale of HU it is padding wherever it stands; on the scale only outside,
which is connected to the edge of the image, so that nothing is cut out of a body.

Not covered: padding on the scale of HU that nothing declares.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from covtanet.ct.fill import reaching_edge

Mask = NDArray[np.bool_]

AIR_PADDING_HU = -1024
# The end of the extended scale of 16 bits with a slope of 10; metal is on the scale.
HIGHEST_HU = 30_710.0
# Below it no volume is taken for HU.
LOWEST_HU = -10_000.0
# A padding value up to here is read as air anyway.
AIR_HU = -900.0
# The corners beside a round field of view are 5 % each; a clump of noise of one value has a few
# pixels.
MIN_SHARE = 0.001


def find_padding(stored: NDArray[Any], pixels: NDArray[Any], header: Dataset) -> Mask | None:
    """Return where a slice is padded with something else than air, None if nowhere.

    stored: the values with all their allocated bits, in which padding is written even if fewer bits
    are declared. pixels: the values that BitsStored leaves.
    """
    rescale = _rescale(header)
    if rescale is None:
        return None
    found = _declared(stored, pixels, header, *rescale)
    return _undeclared(stored, pixels, header, *rescale) if found is None else found


def _declared(
    stored: NDArray[Any], pixels: NDArray[Any], header: Dataset, slope: float, intercept: float
) -> Mask | None:
    value, limit = (_integer(header.get(f"PixelPadding{what}")) for what in ("Value", "RangeLimit"))
    if value is None:
        return None
    low, high = sorted((value, value if limit is None else limit))
    ends = sorted((low * slope + intercept, high * slope + intercept))
    if ends[0] >= AIR_PADDING_HU and ends[1] <= AIR_HU:
        return None
    # The value's own sign tells how it is meant: it may be written as signed for unsigned pixels,
    # and the reverse.
    values = stored.view(f"{'i' if low < 0 else 'u'}{stored.dtype.itemsize}")
    is_padding = (values >= low) & (values <= high)
    if stored is not pixels:
        is_kept = (pixels >= low) & (pixels <= high)
        values = np.where(is_padding, values, pixels)
        is_padding |= is_kept
    if not is_padding.any():
        return None
    if low == high:
        is_off_scale = ends[0] < AIR_PADDING_HU or ends[0] > HIGHEST_HU
        found = is_padding if is_off_scale else reaching_edge(is_padding, MIN_SHARE)
    else:  # a range that reaches into the scale is not believed there: it may be all of the body
        hu = values * slope + intercept
        found = is_padding & ((hu < AIR_PADDING_HU) | (hu > HIGHEST_HU))
    return found if found.any() else None


def _undeclared(
    stored: NDArray[Any], pixels: NDArray[Any], header: Dataset, slope: float, intercept: float
) -> Mask | None:
    """One negative value, off the scale, that nothing declares: -32768, or 63536 for -2000 in unsigned pixels."""
    signed, is_unsigned = stored.view(f"i{stored.dtype.itemsize}"), pixels.dtype.kind == "u"
    value = int(signed.min())
    if value >= 0 or value * slope + intercept >= (AIR_PADDING_HU if is_unsigned else LOWEST_HU):
        return None
    bits = 8 * stored.dtype.itemsize
    bits_stored = int(header.get("BitsStored") or bits)
    if (
        bits_stored < bits
    ):  # the bits above carry a sign if they are all set; others are an old overlay's
        is_off_scale = value >= -(1 << bits_stored)
    else:
        is_off_scale = not is_unsigned or int(pixels.max()) * slope + intercept > HIGHEST_HU
    if not is_off_scale or (is_unsigned and (signed[signed < 0] != value).any()):
        return None
    found = reaching_edge(signed == value, MIN_SHARE)
    return found if found.any() else None


def _rescale(header: Dataset) -> tuple[float, float] | None:
    """Slope and intercept; None if they are missing, which is judged later."""
    values = [header.get(name) for name in ("RescaleSlope", "RescaleIntercept")]
    if (
        any(value is None for value in values)
        or not np.isfinite([float(value) for value in values]).all()
    ):
        return None
    return float(values[0]), float(values[1])


def _integer(value: Any) -> int | None:
    """The value; None if it is no whole number of 16 or 32 bits."""
    if not isinstance(value, int) or not -(1 << 31) <= value < 1 << 32:
        return None
    return int(value)
