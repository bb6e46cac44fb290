"""Lungs and involvement by image processing, without a learned model.

Thresholds by themselves lose exactly the lung that matters, the opaque part. So the aerated lung is
closed lung by lung, and any lesion that the network finds within the chest cavity is lung as well
(``measure_involvement``). Airways down to the main bronchi are left out.

Not covered: lobes, pleural effusion as such, a lung that shows no air in any slice.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from covtanet.ct.densities import AERATED_HU
from covtanet.ct.lung_coverage import is_cut, lacks_a_lung
from covtanet.ct.lung_grid import (
    ADULT_BODY_CM2,
    GridVolume,
    from_grid,
    guess_spacing,
    sharpen,
    to_grid,
)
from covtanet.ct.lung_regions import close_lung, find_cavity, find_gas, find_lung_pieces, halve
from covtanet.ct.masks import Mask, dilate, rim
from covtanet.ct.unmeasured import blank_slices
from covtanet.ct.volume import Volume
from covtanet.errors import Reason, StudyError

MIN_LUNG_CM2 = 20.0
# Choice: a newborn has 90 ml, the largest lungs of adults about 10,000 ml.
LUNGS_ML = (50.0, 12000.0)
SMALL_BODY_CM2 = 200.0


@dataclass(frozen=True, kw_only=True)
class Lungs:
    """Both lungs and the space that they may fill. Masks are (z, y, x) bool on the volume's grid.

    lung_mask: both lungs, closed. cavity_mask: the chest cavity, within which a lesion is lung.
    is_partial: the field of view cuts the lungs. has_blank_slices: slices between the first and the
    last of the lungs are blank; both masks are empty there.
    """

    lung_mask: Mask
    cavity_mask: Mask
    is_partial: bool
    has_blank_slices: bool = False


@dataclass(frozen=True, kw_only=True)
class Involvement:
    """Lesion and lung of one volume, as masks and as measurements.

    lesion_mask: the lesion within lungs and chest cavity. lungs: those that were measured.
    Volumes are null if the voxel size is unknown. ``involvement`` is null if lungs are cut or
    ``is_implausible``, that is, if lungs cannot have their volume.
    """

    lesion_mask: Mask
    lungs: Lungs
    lesion_volume_ml: float | None
    lung_volume_ml: float | None
    involvement: float | None
    is_implausible: bool = False

    @cached_property
    def lung_mask(self) -> Mask:
        """Both lungs with the lesion, (z, y, x) bool; made when it is first read, for pictures."""
        return self.lungs.lung_mask | self.lesion_mask


def measure_involvement(lungs: Lungs, lesion_mask: Mask, voxel_ml: float | None) -> Involvement:
    """Measure the lesion inside the lung.

    lesion_mask: (z, y, x) bool as predicted, anywhere. voxel_ml: null if the voxel size is unknown;
    involvement is a ratio of voxel counts either way.
    """
    lesion = np.zeros_like(lesion_mask)
    num_lesion, num_lung = 0, int(np.count_nonzero(lungs.lung_mask))
    # Slice by slice: most of a volume has no lesion, and its memory stays untouched.
    for z in np.flatnonzero(lesion_mask.any(axis=(1, 2))):
        lung_slice = lungs.lung_mask[z]
        np.logical_and(lesion_mask[z], lung_slice | lungs.cavity_mask[z], out=lesion[z])
        num_lesion += int(np.count_nonzero(lesion[z]))
        num_lung += int(np.count_nonzero(lesion[z] & ~lung_slice))
    lesion_volume_ml = lung_volume_ml = None
    if voxel_ml is not None:
        lesion_volume_ml = float(num_lesion) * voxel_ml
        lung_volume_ml = float(num_lung) * voxel_ml
    is_implausible = is_implausible_volume(lungs, num_lung, voxel_ml)
    is_measurable = not lungs.is_partial and not is_implausible
    return Involvement(
        lesion_mask=lesion,
        lungs=lungs,
        lesion_volume_ml=lesion_volume_ml,
        lung_volume_ml=lung_volume_ml,
        involvement=num_lesion / num_lung if is_measurable else None,
        is_implausible=is_implausible,
    )


def is_implausible_volume(lungs: Lungs, num_voxels: int, voxel_ml: float | None) -> bool:
    """Return whether whole lungs of known voxel size measure outside 50 to 12,000 ml."""
    if voxel_ml is None or lungs.is_partial:
        return False
    low, high = LUNGS_ML
    return bool(not low <= num_voxels * voxel_ml <= high)


def find_lungs(volume: Volume) -> Lungs:
    """Segment both lungs.

    Works on a grid of about 2.5 mm and sharpens the outline at full resolution.

    Choice: a body of less than 200 cm2 is enlarged to that size, so that every limit in mm or cm2
    shrinks with a small child. Without a voxel size the body is taken for an adult's of 650 cm2,
    with lungs of 220 mm height: each limit is then a share of the body.

    Raises:
        StudyError: ``no_lung`` if no slice shows 20 cm2 of lung.
    """
    shown = np.flatnonzero(~blank_slices(volume.hu))
    if not len(shown):
        raise StudyError(Reason.NO_LUNG, "every slice holds one value throughout, expected a chest")
    grid, enlarged = _to_grid(volume, shown)
    aerated = (grid.hu < AERATED_HU) & ~grid.outside
    gas = find_gas(aerated, grid)
    aerated &= ~gas
    pieces = find_lung_pieces(aerated, grid)
    lungs = halve(pieces[0]) if len(pieces) == 1 else pieces
    _check_lung_area(lungs, grid, enlarged, volume.has_known_spacing)
    closed = np.zeros_like(aerated)
    for lung in lungs:
        closed |= close_lung(lung, grid.grid_mm)
    closed &= ~grid.outside
    cavity = find_cavity(closed, grid)
    # Lung that consolidation cut off from the rest. Aerated voxels around gas are its rim.
    closed |= aerated & cavity & ~dilate(gas, rim(grid.grid_mm))
    is_partial = is_cut(closed, grid) or (len(pieces) == 1 and lacks_a_lung(pieces[0], grid))
    return _to_source(volume, grid, shown, closed, cavity, is_partial)


def _to_grid(volume: Volume, shown: NDArray[np.intp]) -> tuple[GridVolume, float]:
    """Bring a volume to the working grid; return it and by how much its lengths were enlarged."""
    if not volume.has_known_spacing:
        return to_grid(volume.hu, shown, guess_spacing(volume.hu, shown)), 1.0
    grid = to_grid(volume.hu, shown, volume.spacing_mm)
    if not 0 < grid.body_cm2 < SMALL_BODY_CM2:
        return grid, 1.0
    enlarged = float(np.sqrt(SMALL_BODY_CM2 / grid.body_cm2))
    z, y, x = (mm * enlarged for mm in volume.spacing_mm)
    return to_grid(volume.hu, shown, (z, y, x)), enlarged


def _to_source(
    volume: Volume,
    grid: GridVolume,
    shown: NDArray[np.intp],
    closed: Mask,
    cavity: Mask,
    is_partial: bool,
) -> Lungs:
    """Bring the masks to the volume's grid; blank slices have neither lung nor cavity."""
    lung_mask = sharpen(closed, volume, grid.steps)
    cavity_mask = from_grid(cavity, volume.hu.shape, grid.steps)
    has_blank = False
    if len(shown) < len(volume.hu):
        blank = np.setdiff1d(np.arange(len(volume.hu)), shown)
        lung_mask[blank], cavity_mask[blank] = False, False
        with_lung = np.flatnonzero(lung_mask.any(axis=(1, 2)))
        if len(with_lung):
            has_blank = bool(((blank > with_lung[0]) & (blank < with_lung[-1])).any())
    return Lungs(
        lung_mask=lung_mask,
        cavity_mask=cavity_mask,
        is_partial=is_partial,
        has_blank_slices=has_blank,
    )


def _check_lung_area(
    lungs: list[Mask], grid: GridVolume, enlarged: float, has_known_spacing: bool
) -> None:
    """Refuse a volume in which no slice shows 20 cm2 of lung, in the units of the enlarged body."""
    areas = np.count_nonzero(lungs[0] | lungs[1], axis=(1, 2)) if lungs else np.zeros(1)
    largest_cm2 = float(areas.max()) * grid.pixel_cm2
    if largest_cm2 >= MIN_LUNG_CM2:
        return
    if not has_known_spacing:
        largest, smallest = (100.0 * cm2 / ADULT_BODY_CM2 for cm2 in (largest_cm2, MIN_LUNG_CM2))
        raise StudyError(
            Reason.NO_LUNG,
            f"no slice shows more lung than {largest:.1f} % of the body, expected {smallest:.0f} %",
        )
    largest, smallest = (cm2 / enlarged**2 for cm2 in (largest_cm2, MIN_LUNG_CM2))
    raise StudyError(
        Reason.NO_LUNG,
        f"no slice shows more than {largest:.0f} cm2 of lung, expected {smallest:.0f}",
    )
