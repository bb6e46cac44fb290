"""Shapes and densities of a phantom's chest, as functions of its coordinates.

Lengths in the plane are in mm from the middle of the body, x to the left and y to the back; z is
relative, 0 at the base and 1 at the apex.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from covtanet.ct.masks import Mask

# HU.
AIR, LUNG, FAT, MUSCLE, BLOOD, BONE = -1000.0, -850.0, -95.0, 50.0, 45.0, 420.0
GROUND_GLASS, CONSOLIDATION = -560.0, 20.0
EDGE_MM = 4.0
CORRELATION_MM = 13.0
NUM_VESSELS, STEPS_PER_VESSEL = 90, 90


@dataclass(frozen=True, kw_only=True)
class Coordinates:
    """Coordinates of all voxels, to be broadcast: z (S, 1, 1), y (1, H, 1), x (1, 1, W)."""

    z: NDArray[Any]
    y: NDArray[Any]
    x: NDArray[Any]
    pixel_mm: float
    slice_mm: float

    @property
    def num_slices(self) -> int:
        """Number of slices."""
        return int(self.z.shape[0])

    @property
    def size_px(self) -> int:
        """Side of a slice."""
        return int(self.y.shape[1])


def ellipse(
    at: Coordinates, centre_x: Any, centre_y: float, radius_x: Any, radius_y: float
) -> NDArray[np.float32]:
    """Return a field that is below 1 inside an ellipse."""
    x, y = (at.x - centre_x) / radius_x, (at.y - centre_y) / radius_y
    return np.asarray(x**2 + y**2)


def lung_shape(at: Coordinates, side: int, rng: np.random.Generator) -> Mask:
    """Return one lung: tapering to the apex, hollowed at its base by the diaphragm's dome.

    side: 1 for the left lung, -1 for the right.
    """
    width, depth = 56 * rng.uniform(0.94, 1.04), 84 * rng.uniform(0.94, 1.03)
    taper = np.sqrt(np.clip(1 - np.clip((at.z - 0.35) / 0.57, 0, None) ** 2.4, 0, 1))
    centre = side * (74 - 22 * (1 - taper))
    u = (at.x - centre) / (width * taper + 1e-3)
    v = (at.y - 4) / (depth * (0.35 + 0.65 * taper) + 1e-3)
    inside = np.abs(u) ** 2.5 + np.abs(v) ** 2.2 < 1
    # The liver lifts the right half of the diaphragm.
    lift = 0.03 if side < 0 else 0.0
    dome = rng.uniform(0.13, 0.17) * (1 - np.clip(u**2 + v**2, 0, 1)) + lift
    return np.asarray(inside & (at.z > 0.1 + dome) & (at.z < 0.93))


def add_skeleton(hu: NDArray[np.float32], at: Coordinates, lung: Mask) -> None:
    """Add, in place, ribs as slanted bands around the lungs, spine with its canal, breast bone."""
    chest = ellipse(at, 0, 2, 139, 95)
    shell = (chest > 0.86) & (chest < 0.98)
    slant = at.z * at.num_slices * at.slice_mm / 26 + np.abs(at.x) / 60 + at.y / 90
    rib = shell & (slant % 1.0 < 0.42) & (at.z > 0.12)
    hu[np.broadcast_to(rib, hu.shape) & ~lung] = BONE
    vertebra, marrow = ellipse(at, 0, 62, 21, 17) < 1, ellipse(at, 0, 62, 18, 14) < 1
    processes, canal = ellipse(at, 0, 88, 26, 7) < 1, ellipse(at, 0, 83, 8, 7) < 1
    breast_bone = (ellipse(at, 0, -84, 17, 5) < 1) & (at.z > 0.35)
    hu[np.broadcast_to(vertebra, hu.shape)] = 230.0
    # After the vertebra, whose rim it leaves.
    hu[np.broadcast_to(marrow, hu.shape)] = 160.0
    hu[np.broadcast_to(processes, hu.shape)] = BONE
    hu[np.broadcast_to(canal, hu.shape)] = 20.0
    hu[np.broadcast_to(breast_bone, hu.shape)] = 240.0


def airways(at: Coordinates, lung: Mask) -> Mask:
    """Return the trachea and the main bronchi down to the lungs."""
    trachea = (ellipse(at, 0, 12, 9, 9) < 1) & (at.z > 0.62)
    spread = np.clip((0.62 - at.z) / 0.12, 0, 1) * 38
    left, right = ellipse(at, spread, 14, 7, 6) < 1, ellipse(at, -spread, 14, 7, 6) < 1
    bronchi = (left | right) & (at.z > 0.52)
    return np.asarray((trachea | (bronchi & (at.z <= 0.62))) & ~lung)


def smooth_noise(
    rng: np.random.Generator, at: Coordinates, correlation_mm: float
) -> NDArray[np.float32]:
    """Return smooth noise with unit variance.

    Made on a coarse grid, which costs a twentieth of the full one.
    """
    step = max(1, int(correlation_mm / at.pixel_mm / 3))
    coarse_px = -(-at.size_px // step) + 2
    coarse = rng.standard_normal((at.num_slices, coarse_px, coarse_px), dtype=np.float32)
    sigma = correlation_mm / at.pixel_mm / step
    coarse = ndimage.gaussian_filter(coarse, (correlation_mm / at.slice_mm, sigma, sigma))
    # After the blur, which lowers the variance.
    coarse /= coarse.std()
    full = ndimage.zoom(coarse, (1, step, step), order=1)
    return np.asarray(full[:, : at.size_px, : at.size_px])


def vessels(lung: Mask, rng: np.random.Generator, at: Coordinates) -> NDArray[np.float32]:
    """Return the share of blood in each voxel: vessels from the hilum outwards, thinning."""
    voxels = np.argwhere(lung)
    out = np.zeros(lung.shape, np.float32)
    steps = np.linspace(0, 1, STEPS_PER_VESSEL)[:, None]
    for end in voxels[rng.integers(0, len(voxels), NUM_VESSELS)].astype(float):
        hilum = _hilum(end, at)
        bend = rng.normal(0, 6, 3) * np.array([0.3, 1, 1])
        path = hilum + (end - hilum) * steps + bend * np.sin(np.pi * steps)
        index = np.rint(path).astype(int)
        inside = ((index >= 0) & (index < lung.shape)).all(axis=1)
        # (z, y, x)
        k, j, i = index[inside].T
        out[k, j, i] = np.maximum(out[k, j, i], (1.25 - steps[inside, 0]).astype(np.float32))
    # In the plane only: a slice is several times as thick as a pixel.
    blurred = ndimage.gaussian_filter(out, (0, 0.8, 0.8))
    return np.asarray(np.clip(blurred * 2.6, 0, 1) * lung)


def _hilum(end: NDArray[np.float64], at: Coordinates) -> NDArray[np.float64]:
    """Return the index of the hilum on the side of a vessel's end."""
    middle = (at.size_px - 1) / 2
    side = np.sign(end[2] - middle) or 1.0
    y, x = middle + 8 / at.pixel_mm, middle + side * 38 / at.pixel_mm
    return np.array([0.5 * at.num_slices, y, x])


def add_lesions(
    hu: NDArray[np.float32],
    lung: Mask,
    at: Coordinates,
    rng: np.random.Generator,
    *,
    involvement: float,
    consolidation: float,
) -> tuple[NDArray[np.float32], Mask]:
    """Cover a share of the lung with lesion; return the HU and the lesion mask.

    A smooth random field above its quantile is lesion, and its peaks are opaque.
    """
    # Millimetres to the lung's edge within the slice: the next slice counts as far away.
    depth_mm = ndimage.distance_transform_edt(lung, sampling=(1e3, at.pixel_mm, at.pixel_mm))
    field = smooth_noise(rng, at, CORRELATION_MM) + 0.25 * smooth_noise(rng, at, 4.0)
    field += 0.5 * np.clip(1 - depth_mm / 30, 0, 1) + 0.006 * at.y - 0.8 * at.z
    quantiles = [1 - involvement, 1 - involvement * consolidation]
    threshold, core = np.quantile(field[lung], quantiles)
    lesion_mask = lung & (field > threshold)
    slope = EDGE_MM / CORRELATION_MM
    opacity = lung / (1 + np.exp(-(field - threshold) / slope * 8))
    opaque = lung / (1 + np.exp(-(field - core) / slope * 8))
    glass = GROUND_GLASS + 60 * smooth_noise(rng, at, 6.0)
    hu = np.where(hu < glass, hu + opacity * (glass - hu), hu)
    hu = np.where(hu < CONSOLIDATION, hu + opaque * (CONSOLIDATION - hu), hu)
    return hu.astype(np.float32), np.asarray(lesion_mask)
