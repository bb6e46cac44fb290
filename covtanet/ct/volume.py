"""One CT series as an array in HU with its affine. Opens no file.

Frame: arrays are (z, y, x) with z to the head, y to the back and x to the left of the patient, so
that a series gives the same array in whatever axis order its file stores it. ``affine`` maps index
(z, y, x) to LPS millimetres.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import nibabel.orientations as orientations
import numpy as np
from numpy.typing import NDArray

from covtanet.errors import QcFlag, Reason, StudyError

CANONICAL_AXES = ("S", "P", "L")
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
MAX_SHEAR = 0.01
# Wider than any chest CT: 0.1 mm is micro-CT, 10 mm is a pixel of a localizer, 20 mm is the step of
# an old HRCT.
IN_PLANE_MM = (0.1, 10.0)
BETWEEN_SLICES_MM = (0.1, 20.0)
# A spacing of 20 mm comes out a little larger along a rotated axis of float32 numbers.
SPACING_LIMIT_RTOL = 1e-4


@dataclass(frozen=True, kw_only=True)
class SourceGrid:
    """The voxel grid as the source stores it.

    shape: in the source's axis order. affine: source index -> LPS mm.
    """

    shape: tuple[int, int, int]
    affine: NDArray[np.float64]

    def to_canonical(self) -> NDArray[np.float64]:
        """Return the axis permutation and flips from the source's order to (z, y, x).

        In the notation of nibabel.orientations.
        """
        ras = LPS_TO_RAS @ self.affine
        target = orientations.axcodes2ornt(CANONICAL_AXES)
        return np.asarray(orientations.ornt_transform(orientations.io_orientation(ras), target))

    def from_canonical(self, array: NDArray[Any]) -> NDArray[Any]:
        """Return a (z, y, x) array in the source's axis order."""
        ras = LPS_TO_RAS @ self.affine
        target = orientations.axcodes2ornt(CANONICAL_AXES)
        back = orientations.ornt_transform(target, orientations.io_orientation(ras))
        return np.asarray(orientations.apply_orientation(array, back))


@dataclass(frozen=True, kw_only=True)
class Volume:
    """A CT series in HU.

    hu: (z, y, x), int16 if the source's values are whole numbers, else float32.
    affine: 4x4, index (z, y, x) -> LPS mm.
    has_known_spacing: False if the voxel size is nominal, 1 x 1 x 1 without a unit: then no length,
    area or volume of this series means anything.
    """

    hu: NDArray[Any]
    affine: NDArray[np.float64]
    source: SourceGrid
    qc_flags: tuple[QcFlag, ...] = field(default=())
    has_known_spacing: bool = True

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance between voxel centres along z, y and x."""
        z, y, x = (float(length) for length in np.linalg.norm(self.affine[:3, :3], axis=0))
        return z, y, x

    @property
    def voxel_ml(self) -> float:
        """Volume of one voxel in millilitres."""
        return float(np.prod(self.spacing_mm)) / 1000.0


def check_spacing(in_plane_mm: Iterable[float], between_mm: float) -> None:
    """Refuse voxel sizes that no chest CT has.

    Raises:
        StudyError: ``implausible_spacing``.
    """
    for mm in in_plane_mm:
        _check_length("in plane", mm, IN_PLANE_MM)
    _check_length("between slices", between_mm, BETWEEN_SLICES_MM)


def _check_length(name: str, mm: float, limits: tuple[float, float]) -> None:
    low, high = limits
    if not low * (1 - SPACING_LIMIT_RTOL) <= mm <= high * (1 + SPACING_LIMIT_RTOL):
        raise StudyError(
            Reason.IMPLAUSIBLE_SPACING, f"{mm:.4g} mm {name}, expected {low:g} to {high:g} mm"
        )


def canonical_volume(array: NDArray[Any], affine: NDArray[np.float64]) -> Volume:
    """Turn an array in any axis order into a Volume.

    array: 3-D, in HU. affine: its index -> LPS mm.

    Nothing is resampled: axes are permuted and flipped to the nearest patient axes. A rotated
    series keeps its rotation in ``affine`` and gets the flag ``oblique``.

    Raises:
        StudyError: ``gantry_tilt`` if the axes are not perpendicular.
    """
    columns = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    shear = float(np.abs(columns.T @ columns - np.eye(3)).max())
    if shear > MAX_SHEAR:
        angle = np.degrees(np.arcsin(min(shear, 1.0)))
        raise StudyError(
            Reason.GANTRY_TILT,
            f"slices are stacked {angle:.1f} degrees off their normal, expected 0",
        )
    is_oblique = bool(np.abs(columns).max(axis=0).min() < 1 - MAX_SHEAR)
    shape = (int(array.shape[0]), int(array.shape[1]), int(array.shape[2]))
    source = SourceGrid(shape=shape, affine=affine)
    orientation = source.to_canonical()
    return Volume(
        hu=orientations.apply_orientation(array, orientation),
        affine=affine @ orientations.inv_ornt_aff(orientation, shape),
        source=source,
        qc_flags=(QcFlag.OBLIQUE,) if is_oblique else (),
    )
