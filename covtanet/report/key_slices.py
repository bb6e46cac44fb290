"""The slices of a series that its key images show."""

import numpy as np
import pydicom
from numpy.typing import NDArray

from covtanet.ct.masks import Mask
from covtanet.report.mask_frames import MaskGrid

MAX_KEY_SLICES = 12
# Of a series without lesion.
NUM_LUNG_SLICES = 4
# Slices with less lesion than this share of the largest are not shown.
LEAST_SHARE = 0.1


class KeySlices:
    """The choice of key slices by the masks of a series, before its headers are read.

    lesion, lung: in any axis order. affine: their index -> LPS mm.
    """

    def __init__(self, lesion: Mask, lung: Mask, affine: NDArray[np.float64]) -> None:
        self._lesion, self._lung = lesion, lung
        self._grid = MaskGrid(affine)
        # The axis across the slices and the planes along it, known from the first header.
        self._chosen: tuple[int, set[int]] | None = None

    def is_key(self, header: pydicom.Dataset) -> bool:
        """Return whether a slice is shown."""
        start, by_row, by_column = self._grid.pixel_steps(header)
        if self._chosen is None:
            axis = int(np.argmin(np.abs(by_row) + np.abs(by_column)))
            self._chosen = axis, set(choose_planes(self._lesion, self._lung, axis).tolist())
        axis, planes = self._chosen
        return int(np.rint(start[axis])) in planes


def choose_planes(lesion: Mask, lung: Mask, axis: int) -> NDArray[np.intp]:
    """Return the indices of the planes to show, ascending.

    Of the planes with much lesion those with most of it, one of each twelfth of them; without a
    lesion a few that are spread over the lungs.
    """
    across = tuple(other for other in range(3) if other != axis)
    num_lesion = np.count_nonzero(lesion, axis=across)
    if num_lesion.any():
        planes = np.flatnonzero(num_lesion >= max(1.0, LEAST_SHARE * num_lesion.max()))
        groups = np.array_split(planes, min(MAX_KEY_SLICES, len(planes)))
        return np.array([group[num_lesion[group].argmax()] for group in groups])
    planes = np.flatnonzero(lung.any(axis=across))
    if not len(planes):
        planes = np.arange(lung.shape[axis])
    # Without the base and the apex, which show little.
    inner = np.rint(np.linspace(0, len(planes) - 1, NUM_LUNG_SLICES + 2)[1:-1]).astype(int)
    return np.unique(planes[inner])
