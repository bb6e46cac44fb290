"""A mask of a volume as frames in the geometry of its DICOM source."""

from collections.abc import Sequence

import numpy as np
import pydicom
from numpy.typing import NDArray

from covtanet.ct.dicom_geometry import off_grid_limit_mm
from covtanet.errors import Reason, StudyError

# A step of one pixel in the source is a step of one voxel in the mask, except for the digits that
# decimal strings lose.
MAX_OFF_STEP = 0.05
# The file of a mask stores its affine as float32.
STORED_AFFINE_MM = 1e-3


def frames_of(
    headers: Sequence[pydicom.Dataset], mask: NDArray[np.bool_], affine: NDArray[np.float64]
) -> NDArray[np.bool_]:
    """Return a mask as frames (slices, rows, columns), in the order of the headers.

    mask: in any axis order; affine: its index -> LPS mm.

    Raises:
        StudyError: ``missing_position`` if a slice is off the grid of the mask.
    """
    grid = MaskGrid(affine)
    # (slices, rows, columns)
    return np.stack([_frame(header, mask, grid) for header in headers])


class MaskGrid:
    """The voxels of a mask in space. limits_mm: how far a pixel may be from its voxel."""

    def __init__(self, affine: NDArray[np.float64]) -> None:
        self.to_index = np.asarray(np.linalg.inv(affine), np.float64)
        self.voxel_mm = np.linalg.norm(affine[:3, :3], axis=0)
        limits_mm = [off_grid_limit_mm(float(mm)) for mm in self.voxel_mm]
        self.limits_mm = np.array(limits_mm) + STORED_AFFINE_MM

    def pixel_steps(
        self, header: pydicom.Dataset
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Return the index of a slice's first pixel, and its steps to the next row and column."""
        # LPS, mm, as DICOM has it.
        corner = np.array([*header.ImagePositionPatient, 1.0], float)
        # Along a row of the image the column grows, and the other way round.
        along_row = np.array([*header.ImageOrientationPatient[0:3], 0.0], float)
        along_column = np.array([*header.ImageOrientationPatient[3:6], 0.0], float)
        # PixelSpacing gives the distance of rows first.
        row_mm, column_mm = (float(value) for value in header.PixelSpacing)
        return (
            (self.to_index @ corner)[:3],
            (self.to_index @ (along_column * row_mm))[:3],
            (self.to_index @ (along_row * column_mm))[:3],
        )


def _frame(header: pydicom.Dataset, mask: NDArray[np.bool_], grid: MaskGrid) -> NDArray[np.bool_]:
    """Return the mask at the pixels of one slice."""
    corner, step_row, step_column = grid.pixel_steps(header)
    start = np.rint(corner).astype(int)
    by_row = np.rint(step_row).astype(int)
    by_column = np.rint(step_column).astype(int)
    off_corner_mm = np.abs(corner - start) * grid.voxel_mm
    off_steps = np.abs([step_row - by_row, step_column - by_column])
    is_on_grid = (off_corner_mm <= grid.limits_mm).all() and np.max(off_steps) < MAX_OFF_STEP
    rows = np.arange(header.Rows)[:, None]
    columns = np.arange(header.Columns)[None, :]
    # Three index arrays (rows, columns), one for each axis of the mask.
    index = [start[k] + by_row[k] * rows + by_column[k] * columns for k in range(3)]
    if not is_on_grid or not _is_inside(index, mask.shape):
        raise StudyError(Reason.MISSING_POSITION, "a slice is off the grid of its mask")
    # Indexing, not resampling: the slices lie on the grid of the mask.
    frame: NDArray[np.bool_] = mask[index[0], index[1], index[2]]
    return frame


def _is_inside(index: Sequence[NDArray[np.int64]], shape: Sequence[int]) -> bool:
    lowest = min(int(axis.min()) for axis in index)
    return lowest >= 0 and all(axis.max() < size for axis, size in zip(index, shape, strict=True))
