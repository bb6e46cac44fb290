"""Fill values outside the scan of a volume whose file does not name them, as resampling and converters leave them.

Not covered: fill values on the scale of HU, such as 0, which only the lung mask can tell from tissue.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

FILL_HU = -1024
# Noise of air in the sharpest kernels stays above; -2000, -2048 and -3024 are the fill values of scanners.
LOWEST_SCALE_HU, HIGHEST_SCALE_HU = -1500, 40000
# Streaks of metal inside the body are off the scale, too. With more than that it is the scale that is wrong.
MAX_STRAY_SHARE = 0.01


def on_scale(hu: NDArray[Any]) -> NDArray[np.bool_]:
    """Return the voxels whose value can be HU; NaN cannot."""
    found: NDArray[np.bool_] = (hu >= LOWEST_SCALE_HU) & (hu <= HIGHEST_SCALE_HU)
    return found


def replace_fill(hu: NDArray[Any]) -> tuple[NDArray[Any], bool]:
    """Put air where the volume is off the scale of HU outside the scan; return it and whether there was such fill.

    hu: (z, y, x), int16 or float32; copied only if something is replaced. Outside the scan means connected, within its
    slice, to the edge of the image.
    """
    outside: dict[int, NDArray[np.bool_]] = {}
    num_outside = num_stray = 0
    for index, slice_hu in enumerate(hu):
        if (
            slice_hu.min() >= LOWEST_SCALE_HU and slice_hu.max() <= HIGHEST_SCALE_HU
        ):  # false for NaN
            continue
        is_off = ~on_scale(slice_hu)
        outside[index] = reaching_edge(is_off)
        num_here = int(np.count_nonzero(outside[index]))
        num_outside += num_here
        num_stray += int(np.count_nonzero(is_off)) - num_here
    if not num_outside or num_stray > MAX_STRAY_SHARE * num_outside:
        return hu, False
    replaced = hu.copy()
    for index, mask in outside.items():
        replaced[index][mask] = FILL_HU
    return replaced, True


def reaching_edge(mask: NDArray[np.bool_], min_share: float = 0.0) -> NDArray[np.bool_]:
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
    found: NDArray[np.bool_] = is_outside[labels]
    return found
