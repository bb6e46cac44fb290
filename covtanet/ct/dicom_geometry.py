"""The voxel grid of a DICOM series: a regular grid fitted to its slices.

The reader judges a series by ``off_grid_limit_mm``, and so does the export of SEG and SR, so that
it takes every series that the reader takes.

Not covered: series with slices of different orientations.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import highdicom.spatial as spatial
import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from covtanet.ct.dicom_values import value_of
from covtanet.ct.volume import MAX_SHEAR, check_spacing
from covtanet.errors import Reason, StudyError

Vectors = NDArray[np.float64]

# Largest distance of a slice from its grid position, along each axis of the grid: a tenth of the
# voxel leaves room for a table that wavers by 0.5 mm under slices of 5 mm. Positions of one decimal
# are up to 0.05 mm off along an axis of the patient and 0.087 mm along an oblique normal: hence
# 0.1 mm at least, but never so much of the slice distance that the grid position is in doubt.
MAX_OFF_GRID_SHARE, MAX_OFF_GRID_MM = 0.1, 1.0
MIN_OFF_GRID_MM, LARGEST_OFF_GRID_SHARE = 0.1, 0.3
# A stack that is exact to a micrometre, as most are, needs no fit: its first slice is the origin.
EXACT_MM = 1e-3
DUPLICATE_MM, DUPLICATE_SHARE = 1e-3, 0.01
# With steps of less than this share of the median distance, a grid fits any positions.
SMALLEST_STEP_SHARE = 0.3
ORIENTATION_ATOL = 1e-3
PIXEL_SPACING_ATOL_MM = 1e-3
# Of 20,000 random orientations, rounding the cosines to 3 decimals takes unit vectors at most
# 0.0008 off their length and 0.0014 off a right angle, 2 decimals 0.008 and 0.014.
UNIT_ATOL = 0.02
# Cosines of 5 decimals and more are used as they are.
EXACT_COSINES_ATOL = 2e-5
TYPICAL_STEP_MM = 1.0


@dataclass(frozen=True)
class Stack:
    """Slices on their grid.

    order: the index of the header for each slice of the volume. affine: index (slice, row, column)
    -> LPS mm.
    """

    order: list[int]
    affine: Vectors


@dataclass(frozen=True)
class _Grid:
    """Equidistant points on a line. origin: the first; step_mm: the vector to the next; LPS mm."""

    origin: Vectors
    step_mm: Vectors


@dataclass(frozen=True)
class _Slices:
    """Slices in their order along the normal.

    positions: of the corners, (n, 3) LPS mm; orientation: six cosines.
    """

    positions: Vectors
    orientation: Vectors
    pixel_spacing: Vectors

    @property
    def normal(self) -> Vectors:
        return _normal(self.orientation)

    @property
    def depths(self) -> Vectors:
        return _depths(self.positions, self.orientation)

    def fit(self, steps: NDArray[np.int64]) -> _Grid:
        """Fit a grid by least squares. steps: the grid index of each slice.

        A sideways step is taken for rounding if it moves no slice off the normal by more than the
        limit.
        """
        centred = steps - steps.mean()
        step_mm = centred @ (self.positions - self.positions.mean(axis=0)) / (centred @ centred)
        row_and_column_axes = self.orientation.reshape(2, 3)[::-1]
        for axis, voxel_mm in zip(row_and_column_axes, self.pixel_spacing, strict=True):
            if abs(step_mm @ axis) * np.ptp(steps) <= off_grid_limit_mm(float(voxel_mm)):
                step_mm = step_mm - (step_mm @ axis) * axis
        return _Grid(self.positions.mean(axis=0) - steps.mean() * step_mm, step_mm)

    def are_on(self, grid: _Grid, steps: NDArray[np.int64]) -> bool:
        """Return whether each slice lies on its grid position."""
        off_mm = self.positions - grid.origin - steps[:, None] * grid.step_mm
        axes = np.stack([self.normal, self.orientation[3:], self.orientation[:3]])
        voxel_mm = (float(np.linalg.norm(grid.step_mm)), *map(float, self.pixel_spacing))
        limits_mm = np.array([off_grid_limit_mm(mm) for mm in voxel_mm])
        return bool((np.abs(off_mm @ axes.T) <= limits_mm).all())


def off_grid_limit_mm(voxel_mm: float) -> float:
    """Return the largest distance of a slice from its grid position, along one axis of the grid.

    voxel_mm: size of the voxels along that axis.
    """
    floor_mm = min(MIN_OFF_GRID_MM, LARGEST_OFF_GRID_SHARE * voxel_mm)
    return min(MAX_OFF_GRID_MM, max(MAX_OFF_GRID_SHARE * voxel_mm, floor_mm))


def check_positions(headers: Sequence[Dataset]) -> None:
    """Refuse slices without a position in the patient, or with voxels that no CT has.

    Raises:
        StudyError: ``missing_position`` or ``implausible_spacing``.
    """
    for header in headers:
        _check_vectors(header)
    _check_orientations(_orientations(headers))
    for header in headers:
        check_spacing([float(mm) for mm in header.PixelSpacing], TYPICAL_STEP_MM)
    gaps = np.diff(np.sort(depths(headers)))
    gaps = gaps[gaps > DUPLICATE_MM]
    # If one distance is plausible, the others are a matter of missing or irregular slices.
    if len(gaps):
        check_spacing((), float(np.clip(TYPICAL_STEP_MM, gaps.min(), gaps.max())))


def depths(headers: Sequence[Dataset]) -> Vectors:
    """Return the position of each slice along the normal of the series, in mm."""
    return _depths(_positions(headers), _orthonormal(np.median(_orientations(headers), axis=0)))


def have_one_direction(headers: Sequence[Dataset]) -> bool:
    """Return whether the slices are parallel to each other."""
    return bool(np.ptp(_orientations(headers), axis=0).max() <= ORIENTATION_ATOL)


def fit_stack(headers: Sequence[Dataset]) -> Stack:
    """Return the regular grid on which the slices lie; their positions were checked.

    Raises:
        StudyError: ``mixed_orientation``, ``gantry_tilt``, ``duplicate_slice``, ``missing_slices``
            or ``irregular_spacing``.
    """
    pixel_spacings = np.array([header.PixelSpacing for header in headers], float)
    num_shapes = len({(int(header.Rows), int(header.Columns)) for header in headers})
    if num_shapes > 1 or np.ptp(pixel_spacings, axis=0).max() > PIXEL_SPACING_ATOL_MM:
        raise StudyError(
            Reason.MIXED_ORIENTATION, "slices differ in size or pixel spacing, expected one grid"
        )
    if not have_one_direction(headers):
        raise StudyError(
            Reason.MIXED_ORIENTATION, "slices differ in orientation, expected one direction"
        )
    orientation = _orthonormal(np.median(_orientations(headers), axis=0))
    positions = _positions(headers)
    pixel_spacing = np.median(pixel_spacings, axis=0)
    order = np.argsort(_depths(positions, orientation), kind="stable")
    grid = _fit_grid(_Slices(positions[order], orientation, pixel_spacing))
    affine = np.eye(4)
    affine[:3, 0] = grid.step_mm
    affine[:3, 1] = orientation[3:] * pixel_spacing[0]
    affine[:3, 2] = orientation[:3] * pixel_spacing[1]
    affine[:3, 3] = grid.origin
    return Stack([int(index) for index in order], affine)


def _check_vectors(header: Dataset) -> None:
    for name, length in (
        ("ImagePositionPatient", 3),
        ("ImageOrientationPatient", 6),
        ("PixelSpacing", 2),
    ):
        values = value_of(header, name)
        has_length = values is not None and len(values) == length
        if not has_length or not np.isfinite(np.asarray(values, float)).all():
            raise StudyError(Reason.MISSING_POSITION, f"a slice has no {name}")
    if min(float(mm) for mm in header.PixelSpacing) <= 0:
        raise StudyError(Reason.MISSING_POSITION, "a slice's PixelSpacing is not above 0")


def _check_orientations(orientations: Vectors) -> None:
    """Refuse orientations, (n, 6), that are not two unit vectors at a right angle."""
    cosines = orientations.reshape(-1, 2, 3)
    off_unit = np.abs(np.linalg.norm(cosines, axis=2) - 1).max()
    off_right_angle = np.abs((cosines[:, 0] * cosines[:, 1]).sum(axis=1)).max()
    if not off_unit <= UNIT_ATOL or off_right_angle > UNIT_ATOL:
        raise StudyError(
            Reason.MISSING_POSITION,
            "ImageOrientationPatient is not two unit vectors at a right angle",
        )


def _fit_grid(slices: _Slices) -> _Grid:
    positions, depth, normal = slices.positions, slices.depths, slices.normal
    if len(positions) == 1:
        return _Grid(positions[0], normal * TYPICAL_STEP_MM)
    steps = np.arange(len(positions))
    exact = _Grid(positions[0], normal * ((depth[-1] - depth[0]) / steps[-1]))
    off_mm = np.abs(positions - exact.origin - steps[:, None] * exact.step_mm)
    if off_mm.max() < EXACT_MM < np.diff(depth).min():
        return exact
    grid = slices.fit(steps)
    step_mm = float(np.linalg.norm(grid.step_mm))
    sideways_mm = float(np.linalg.norm(grid.step_mm - (grid.step_mm @ normal) * normal))
    is_straight = step_mm > DUPLICATE_MM and sideways_mm <= MAX_SHEAR * step_mm
    if is_straight and slices.are_on(grid, steps):
        return grid
    _refuse_tilt(slices)
    _refuse_gaps(slices)
    limit_mm = off_grid_limit_mm(step_mm)
    raise StudyError(
        Reason.IRREGULAR_SPACING,
        f"slices lie more than {limit_mm:.2f} mm off a grid of {step_mm:.2f} mm, expected on it",
    )


def _refuse_tilt(slices: _Slices) -> None:
    stack_mm = slices.positions[-1] - slices.positions[0]
    along_mm = float(stack_mm @ slices.normal)
    sideways_mm = float(np.linalg.norm(stack_mm - along_mm * slices.normal))
    limit_mm = max(MIN_OFF_GRID_MM, MAX_SHEAR * float(np.linalg.norm(stack_mm)))
    if along_mm > DUPLICATE_MM and sideways_mm > limit_mm:
        angle = float(np.degrees(np.arctan2(sideways_mm, along_mm)))
        raise StudyError(
            Reason.GANTRY_TILT,
            f"slices are stacked {angle:.1f} degrees off their normal, expected 0",
        )


def _refuse_gaps(slices: _Slices) -> None:
    """Refuse slices that share a position or lack one; return if only distances are irregular."""
    gaps = np.diff(slices.depths)
    are_shared = gaps < max(DUPLICATE_MM, DUPLICATE_SHARE * float(gaps.mean()))
    if are_shared.any():
        raise StudyError(
            Reason.DUPLICATE_SLICE, f"{int(are_shared.sum())} slices share a position with another"
        )
    # The slice distance is the median of the gaps, or their minimum if most of them lack a slice.
    for step_mm in (float(np.median(gaps)), float(gaps.min())):
        steps = np.concatenate([[0], np.rint(gaps / step_mm).cumsum()]).astype(np.int64)
        if step_mm < SMALLEST_STEP_SHARE * np.median(gaps) or np.diff(steps).min() < 1:
            continue
        if steps[-1] >= len(steps) and slices.are_on(slices.fit(steps), steps):
            raise StudyError(
                Reason.MISSING_SLICES,
                f"a gap of {gaps.max():.2f} mm, expected {step_mm:.2f} mm throughout",
            )


def _positions(headers: Sequence[Dataset]) -> Vectors:
    return np.array([header.ImagePositionPatient for header in headers], float)


def _orientations(headers: Sequence[Dataset]) -> Vectors:
    return np.array([header.ImageOrientationPatient for header in headers], float)


def _depths(positions: Vectors, orientation: Vectors) -> Vectors:
    return np.asarray(positions @ _normal(orientation))


def _normal(orientation: Vectors) -> Vectors:
    return np.asarray(spatial.get_normal_vector(orientation, index_convention="DR"))


def _orthonormal(orientation: Vectors) -> Vectors:
    """Return the nearest two unit vectors at a right angle; rounded cosines are a little off."""
    cosines = orientation.reshape(2, 3)
    if np.abs(cosines @ cosines.T - np.eye(2)).max() <= EXACT_COSINES_ATOL:
        return orientation
    left, _, right = np.linalg.svd(cosines, full_matrices=False)
    return np.asarray((left @ right).ravel())
