"""Fill values outside the scan, as resampling and converters leave them without naming them.

Not covered: fill values on the scale of HU, such as 0, which only the lung mask can tell from
tissue.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from covtanet.ct.masks import Mask

FILL_HU = -1024
# Noise of air in the sharpest kernels stays above the lower end; -2000, -2048 and -3024 are fill
# values of scanners.
LOWEST_SCALE_HU, HIGHEST_SCALE_HU = -1500, 40000
# Streaks of metal inside the body leave the scale, too. If more voxels than this do, compared with
# those outside the scan, the scale itself is wrong.
MAX_STRAY_SHARE = 0.01


def is_on_scale(hu: NDArray[Any]) -> Mask:
    """Return the voxels with a value that can be HU; NaN cannot."""
    return np.asarray((hu >= LOWEST_SCALE_HU) & (hu <= HIGHEST_SCALE_HU))


def replace_fill(hu: NDArray[Any]) -> tuple[NDArray[Any], bool]:
    """Replace fill values outside the scan by air; return the volume and whether there were any.

    hu: (z, y, x), int16 or float32; copied only if something is replaced. Outside the scan means
    connected, within its slice, to the edge of the image.
    """
    fill_masks: dict[int, Mask] = {}
    num_outside = num_stray = 0
    for index, slice_hu in enumerate(hu):
        # The extremes settle most slices, at less cost; both comparisons are false for NaN.
        if slice_hu.min() >= LOWEST_SCALE_HU and slice_hu.max() <= HIGHEST_SCALE_HU:
            continue
        is_off = ~is_on_scale(slice_hu)
        fill_masks[index] = connected_to_edge(is_off)
        num_in_slice = int(np.count_nonzero(fill_masks[index]))
        num_outside += num_in_slice
        num_stray += int(np.count_nonzero(is_off)) - num_in_slice
    if not num_outside or num_stray > MAX_STRAY_SHARE * num_outside:
        return hu, False
    replaced = hu.copy()
    for index, mask in fill_masks.items():
        replaced[index][mask] = FILL_HU
    return replaced, True


def connected_to_edge(mask: Mask, min_share: float = 0.0) -> Mask:
    """Return the parts of a slice's mask that are connected to the edge of the image.

    min_share: smaller parts, as a share of the slice, are left out as specks.
    """
    labels, count = ndimage.label(mask)
    is_outside = np.zeros(count + 1, bool)
    for edge in (labels[0], labels[-1], labels[:, 0], labels[:, -1]):
        is_outside[edge] = True
    if min_share:
        is_outside &= np.bincount(labels.ravel(), minlength=count + 1) >= min_share * mask.size
    is_outside[0] = False
    return np.asarray(is_outside[labels])
