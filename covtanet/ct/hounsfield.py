"""Stored values to Hounsfield units by slope and intercept, and the check that values are HU."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from covtanet.errors import Reason, StudyError

INT16, UINT16 = np.dtype(np.int16), np.dtype(np.uint16)
FLOAT32 = np.dtype(np.float32)
INT16_RANGE = np.iinfo(np.int16)
# A chest has more than 1 % of air and of soft tissue.
AIR_BELOW_HU = -500
TISSUE_HU = (-200, 300)
MIN_SHARE = 0.01
LOWEST_HU, HIGHEST_HU = -10000, 40000
SAMPLED_SLICES = 32


def rescale(stored: NDArray[Any], slope: float, intercept: float) -> NDArray[Any]:
    """Return stored values in HU: ``slope * stored + intercept``.

    int16 if slope, intercept and values are whole numbers that fit, else float32.
    """
    return rescale_to(stored, slope, intercept, hu_dtype(stored, slope, intercept))


def hu_dtype(stored: NDArray[Any], slope: float, intercept: float) -> np.dtype[Any]:
    """Return the type that holds stored values in HU: int16 if it loses nothing, else float32."""
    if stored.dtype.kind not in "iu" or not slope.is_integer() or not intercept.is_integer():
        return FLOAT32
    ends = [int(end) * int(slope) + int(intercept) for end in (stored.min(), stored.max())]
    fits = min(ends) >= INT16_RANGE.min and max(ends) <= INT16_RANGE.max
    return INT16 if fits else FLOAT32


def rescale_to(
    stored: NDArray[Any], slope: float, intercept: float, dtype: np.dtype[Any]
) -> NDArray[Any]:
    """Return stored values in HU in the type that ``hu_dtype`` gave for them or for all slices.

    The same array comes back if there is nothing to do.
    """
    if dtype == INT16:
        if stored.dtype == INT16 and slope == 1 and intercept == 0:
            return stored
        # All in 16 bits, without conversion to 32 and back: the result fits, so that steps before
        # it may overflow, and their overflows cancel.
        is_unsigned = stored.dtype == UINT16  # of this machine's byte order
        hu = stored.view(INT16) if is_unsigned else stored.astype(INT16, copy=False)
        if slope != 1:
            hu = hu * _low_16_bits(slope)
        return hu + _low_16_bits(intercept)
    # Fill values of float64 become infinite, which is off the scale of HU as well.
    with np.errstate(over="ignore"):
        return stored.astype(np.float32) * np.float32(slope) + np.float32(intercept)


def _low_16_bits(whole: float) -> np.int16:
    """Return the lower 16 bits of a whole number, as signed."""
    return np.int16(((int(whole) + (1 << 15)) & 0xFFFF) - (1 << 15))


def check_hu(hu: NDArray[Any]) -> None:
    """Refuse values that cannot be HU.

    A chest has air and soft tissue, and nothing far outside the scale. Counted in about 32 slices;
    NaN is looked for in all of them.

    Raises:
        StudyError: ``not_hu``.
    """
    sample = hu[:: max(1, len(hu) // SAMPLED_SLICES)]
    if hu.dtype.kind == "f" and not all(np.isfinite(slice_hu).all() for slice_hu in hu):
        raise StudyError(Reason.NOT_HU, "some voxels are NaN or infinite")
    low, high = float(sample.min()), float(sample.max())
    num_air = num_tissue = 0
    for slice_hu in sample:
        num_air += int(np.count_nonzero(slice_hu < AIR_BELOW_HU))
        is_tissue = (slice_hu > TISSUE_HU[0]) & (slice_hu < TISSUE_HU[1])
        num_tissue += int(np.count_nonzero(is_tissue))
    air, tissue = num_air / sample.size, num_tissue / sample.size
    if low < LOWEST_HU or high > HIGHEST_HU or air < MIN_SHARE or tissue < MIN_SHARE:
        raise StudyError(
            Reason.NOT_HU,
            f"values {low:.0f}..{high:.0f}, {air:.1%} air and {tissue:.1%} soft tissue; "
            "expected HU with 1 % of each",
        )
