"""One CT series as an array in HU with its place in the patient. Opens no file.

Frame: arrays are (z, y, x) with z to the head, y to the back and x to the left of the patient, so that every series,
whatever its file's axis order, is the same array; ``affine`` maps index (z, y, x) to LPS millimetres.
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
# Wider than any chest CT: 0.1 mm is micro-CT, 10 mm a pixel of a localizer, 20 mm the steps of an old HRCT.
IN_PLANE_MM, BETWEEN_SLICES_MM = (0.1, 10.0), (0.1, 20.0)
# 20 mm along a rotated axis of float32 numbers is a little more.
SPACING_LIMIT_RTOL = 1e-4


@dataclass(frozen=True, kw_only=True)
class SourceGrid:
    """The voxel grid as the source stores it: ``shape`` in the source's axis order, ``affine`` index -> LPS mm."""

    shape: tuple[int, int, int]
    affine: NDArray[np.float64]

    def to_canonical(self) -> NDArray[np.float64]:
        """Axis permutation and flips that turn the source array into (z, y, x), as nibabel orientations."""
        ras = LPS_TO_RAS @ self.affine
        target = orientations.axcodes2ornt(CANONICAL_AXES)
        return np.asarray(orientations.ornt_transform(orientations.io_orientation(ras), target))

    def from_canonical(self, array: NDArray[Any]) -> NDArray[Any]:
        """Return a (z, y, x) array in the source's own axis order."""
        ras = LPS_TO_RAS @ self.affine
        target = orientations.axcodes2ornt(CANONICAL_AXES)
        back = orientations.ornt_transform(target, orientations.io_orientation(ras))
        return np.asarray(orientations.apply_orientation(array, back))


@dataclass(frozen=True, kw_only=True)
class Volume:
    """A CT series in HU.

    hu: (z, y, x), int16 where the source's values are whole numbers, else float32.
    affine: 4x4, index (z, y, x) -> LPS mm.
    has_known_spacing: False if the voxel size is nominal, 1 x 1 x 1 without a unit: no length, area or volume of this
    series means anything then.
    """

    hu: NDArray[Any]
    affine: NDArray[np.float64]
    source: SourceGrid
    qc_flags: tuple[str, ...] = field(default=())
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
    for name, lengths, (low, high) in (
        ("in plane", tuple(in_plane_mm), IN_PLANE_MM),
        ("between slices", (between_mm,), BETWEEN_SLICES_MM),
    ):
        for mm in lengths:
            if not low * (1 - SPACING_LIMIT_RTOL) <= mm <= high * (1 + SPACING_LIMIT_RTOL):
                raise StudyError(
                    Reason.IMPLAUSIBLE_SPACING,
                    f"{mm:.4g} mm {name}, expected {low:g} to {high:g} mm",
                )


def canonical_volume(
    array: NDArray[Any],
    affine: NDArray[np.float64],
) -> Volume:
    """Turn an array in any axis order into a Volume. array: 3-D in HU; affine: its index -> LPS mm.

    Nothing is resampled: axes are permuted and flipped to the nearest patient axes. A rotated series keeps its
    rotation in ``affine`` and gets the flag ``oblique``.

    Raises:
        StudyError: ``gantry_tilt`` where the axes are not perpendicular.
    """
    qc_flags: tuple[str, ...] = ()
    columns = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    shear = float(np.abs(columns.T @ columns - np.eye(3)).max())
    if shear > MAX_SHEAR:
        angle = np.degrees(np.arcsin(min(shear, 1.0)))
        raise StudyError(
            Reason.GANTRY_TILT,
            f"slices are stacked {angle:.1f} degrees off their normal, expected 0",
        )
    if np.abs(columns).max(axis=0).min() < 1 - MAX_SHEAR:
        qc_flags = (QcFlag.OBLIQUE,)
    shape = (int(array.shape[0]), int(array.shape[1]), int(array.shape[2]))
    grid = SourceGrid(shape=shape, affine=affine)
    ornt = grid.to_canonical()
    turned = affine @ orientations.inv_ornt_aff(ornt, shape)
    hu = orientations.apply_orientation(array, ornt)
    return Volume(hu=hu, affine=turned, source=grid, qc_flags=qc_flags)
