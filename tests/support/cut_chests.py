"""Chests cut, filled and turned, and how much of their lungs is found."""

from dataclasses import replace

import numpy as np
from scipy import ndimage
from wide_chests import chest

from covtanet.ct import lung
from covtanet.ct.volume import canonical_volume
from covtanet.phantoms.phantom import Phantom

Array = np.ndarray


def found_in(
    hu: Array, phantom: Phantom, *, scale: float = 1.0, is_known: bool = True
) -> lung.Lungs:
    """Find the lungs in an edited phantom."""
    affine = phantom.affine @ np.diag([scale, scale, scale, 1])
    return lung.find_lungs(replace(canonical_volume(hu, affine), has_known_spacing=is_known))


def share(lungs: lung.Lungs, truth: Array) -> float:
    """Lung volume found, over the true one."""
    return float(np.count_nonzero(lungs.lung_mask) / np.count_nonzero(truth))


def beyond(
    radius_mm: float, centre_mm: tuple[float, float] = (0, 0), phantom: Phantom | None = None
) -> Array:
    """Pixels outside a round field of view, (y, x)."""
    phantom = phantom or chest()
    size = phantom.hu.shape[1]
    y, x = (np.mgrid[:size, :size] - (size - 1) / 2) * phantom.affine[1, 1]
    return np.asarray((y - centre_mm[0]) ** 2 + (x - centre_mm[1]) ** 2 > radius_mm**2)


def filled(where: Array, value: int, hu: Array | None = None) -> Array:
    hu = (chest().hu if hu is None else hu).copy()
    hu[:, where] = value
    return hu


def lung_box(phantom: Phantom) -> tuple[Array, Array]:
    """First and last row and column with lung."""
    rows, columns = (
        np.flatnonzero(phantom.lung_mask.any(axis=axes))[[0, -1]] for axes in ((0, 2), (0, 1))
    )
    return rows, columns


FILLS = (0, -1000, -1024, -2000, -3024, 100, 3071)


def with_arms(*, has_pocket: bool) -> Array:
    """Arms next to the chest; between arm and chest may be a closed pocket of air."""
    hu = chest().hu.copy()
    size = hu.shape[1]
    y, x = (np.mgrid[:size, :size] - (size - 1) / 2) * 2.8
    noise = np.random.default_rng(0).normal(40, 15, hu.shape)
    for side in (-168, 168):
        arm = ((x - side) / 22) ** 2 + (y / 70) ** 2 < 1
        if has_pocket:
            arm &= ((x - side) / 12) ** 2 + (y / 50) ** 2 >= 1
        is_air = arm & (hu[4:-5] < -950)
        hu[4:-5][is_air] = noise[4:-5][is_air]
    return hu


def with_air_of(air_hu: int, hu: Array) -> Array:
    """Move room air, and voxels as dark, to another value."""
    return np.where(hu < -940, np.clip(hu + (air_hu + 1000), -1024, None), hu).astype(np.int16)


def turned(hu: Array, degrees: float, axes: tuple[int, int], fill: float, order: int = 1) -> Array:
    """Rotate in millimetres and resample on the same grid."""
    spacing = np.array([9.0, 2.8, 2.8])
    angle = np.radians(degrees)
    matrix = np.eye(3)
    one, other = axes
    matrix[one, one] = matrix[other, other] = np.cos(angle)
    matrix[one, other], matrix[other, one] = -np.sin(angle), np.sin(angle)
    matrix = matrix * spacing / spacing[:, None]
    centre = (np.array(hu.shape) - 1) / 2
    out = ndimage.affine_transform(  # type: ignore[call-overload]
        hu.astype(np.float32),
        matrix,
        centre - matrix @ centre,
        order=order,
        mode="constant",
        cval=fill,
    )
    return np.asarray(np.rint(out))
