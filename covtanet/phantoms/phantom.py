"""Synthetic chest CT with known truth, for demos, tests and benchmarks.

A phantom is a body with two lungs under a domed diaphragm, heart, aorta, spine, ribs, airways and branching vessels;
lesions are patches of ground glass with consolidated cores and diffuse edges, which prefer the lower, outer and
posterior lung. The same configuration always gives the same phantom. It looks like a chest; it teaches nothing about
disease.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

AIR, LUNG, FAT, MUSCLE, BLOOD, BONE = -1000.0, -850.0, -95.0, 50.0, 45.0, 420.0
GROUND_GLASS, CONSOLIDATION = -560.0, 20.0
EDGE_MM = 4.0
CORRELATION_MM = 13.0
NUM_VESSELS = 90


@dataclass(frozen=True, kw_only=True)
class PhantomConfig:
    """One phantom.

    involvement: share of the lung that is lesion, 0..0.7. consolidation: share of the lesion that is opaque.
    """

    seed: int = 0
    involvement: float = 0.0
    consolidation: float = 0.3
    size_px: int = 256
    num_slices: int = 36
    pixel_mm: float = 1.4
    slice_mm: float = 7.5
    noise_hu: float = 22.0

    def __post_init__(self) -> None:
        if not 0 <= self.involvement <= 0.7:
            raise ValueError(f"involvement is {self.involvement:g}, expected 0..0.7")


@dataclass(frozen=True, kw_only=True)
class Phantom:
    """A synthetic volume and its truth. hu: (z, y, x) int16; masks alike, bool; affine: index -> LPS mm."""

    hu: NDArray[np.int16]
    affine: NDArray[np.float64]
    lesion_mask: NDArray[np.bool_]
    lung_mask: NDArray[np.bool_]

    @property
    def involvement(self) -> float:
        """True lesion volume over true lung volume."""
        return float(self.lesion_mask.sum() / self.lung_mask.sum())


def make_phantom(config: PhantomConfig) -> Phantom:
    """Build one phantom; about half a second at the default size."""
    rng = np.random.default_rng(config.seed)
    height_mm = config.num_slices * config.slice_mm
    z = (np.arange(config.num_slices, dtype=np.float32)[:, None, None] + 0.5) / config.num_slices
    axis = (np.arange(config.size_px, dtype=np.float32) - (config.size_px - 1) / 2) * np.float32(
        config.pixel_mm
    )
    scale = rng.uniform(0.92, 1.06)
    y = (axis[None, :, None] - np.float32(rng.uniform(-6, 6))) / np.float32(scale)
    x = (axis[None, None, :] - np.float32(rng.uniform(-6, 6))) / np.float32(scale)

    shoulders = 1 + 0.12 * np.clip((z - 0.75) / 0.25, 0, 1)
    body = _ellipse(x, y, 0, 0, 165 * shoulders, 112)
    inner = _ellipse(x, y, 0, 2, 146 * shoulders, 95)
    left, right = (_lung(x, y, z, side, rng) for side in (1, -1))
    heart = (_ellipse(x, y, 22, -28, 52, 44) + ((z - 0.36) / 0.24) ** 2) < 1
    lung = (left | right) & ~heart
    hu = np.full(lung.shape, AIR, np.float32)
    hu[np.broadcast_to(body < 1, hu.shape)] = FAT
    hu[np.broadcast_to(inner < 1, hu.shape)] = MUSCLE
    _add_skeleton(hu, x, y, z, lung, config)
    mediastinum = (_ellipse(x, y, 0, 4, 34, 60) < 1) & (z > 0.3) & ~lung
    hu[mediastinum & (hu < 100)] = 5.0
    hu[heart & (inner < 1)] = BLOOD
    hu[(_ellipse(x, y, 16, 46, 12, 12) < 1) & (hu < 200)] = BLOOD
    hu[lung] = LUNG
    texture = _noise(rng, config, 9.0)
    hu[lung] += 28 * texture[lung] - 60 * (np.broadcast_to(y, hu.shape)[lung] < 0) * 0.4
    vessels = _vessels(lung, z, rng, config)
    hu = np.where(lung, hu + vessels * (BLOOD - hu), hu)
    lesion_mask = np.zeros(lung.shape, bool)
    if config.involvement:
        hu, lesion_mask = _add_lesions(hu, lung, x, y, z, rng, config)
    hu[_airways(x, y, z, lung)] = AIR
    hu = ndimage.gaussian_filter(hu, (0, 0.6, 0.6))
    hu += (
        config.noise_hu
        * ndimage.gaussian_filter(rng.standard_normal(hu.shape, dtype=np.float32), (0, 0.5, 0.5))
        * 1.6
    )
    affine = np.diag([0.0, 0.0, 0.0, 1.0])
    affine[2, 0], affine[1, 1], affine[0, 2] = config.slice_mm, config.pixel_mm, config.pixel_mm
    affine[:3, 3] = (
        -config.size_px * config.pixel_mm / 2,
        -config.size_px * config.pixel_mm / 2,
        -height_mm / 2,
    )
    return Phantom(
        hu=np.clip(np.rint(hu), -1024, 2000).astype(np.int16),
        affine=affine,
        lesion_mask=lesion_mask,
        lung_mask=lung,
    )


def _ellipse(x: Any, y: Any, centre_x: float, centre_y: float, radius_x: Any, radius_y: Any) -> Any:
    """Below 1 inside."""
    return ((x - centre_x) / radius_x) ** 2 + ((y - centre_y) / radius_y) ** 2


def _lung(x: Any, y: Any, z: Any, side: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    """One lung: rounded in the plane, tapering to the apex, hollowed at its base by the diaphragm's dome."""
    width, depth = 56 * rng.uniform(0.94, 1.04), 84 * rng.uniform(0.94, 1.03)
    taper = np.sqrt(np.clip(1 - np.clip((z - 0.35) / 0.57, 0, None) ** 2.4, 0, 1))
    centre = side * (74 - 22 * (1 - taper))
    u, v = (x - centre) / (width * taper + 1e-3), (y - 4) / (depth * (0.35 + 0.65 * taper) + 1e-3)
    inside = np.abs(u) ** 2.5 + np.abs(v) ** 2.2 < 1
    dome = rng.uniform(0.13, 0.17) * (1 - np.clip(u**2 + v**2, 0, 1)) + (0.03 if side < 0 else 0.0)
    return np.asarray(inside & (z > 0.1 + dome) & (z < 0.93))


def _add_skeleton(
    hu: NDArray[np.float32], x: Any, y: Any, z: Any, lung: NDArray[np.bool_], config: PhantomConfig
) -> None:
    """Ribs as slanted bands around the lungs, spine with its canal, breast bone."""
    chest = _ellipse(x, y, 0, 2, 139, 95)
    shell = (chest > 0.86) & (chest < 0.98)
    slant = z * config.num_slices * config.slice_mm / 26 + np.abs(x) / 60 + y / 90
    rib = shell & (slant % 1.0 < 0.42) & (z > 0.12)
    hu[np.broadcast_to(rib, hu.shape) & ~lung] = BONE
    hu[np.broadcast_to(_ellipse(x, y, 0, 62, 21, 17) < 1, hu.shape)] = 230.0
    hu[np.broadcast_to(_ellipse(x, y, 0, 62, 18, 14) < 1, hu.shape)] = 160.0
    hu[np.broadcast_to(_ellipse(x, y, 0, 88, 26, 7) < 1, hu.shape)] = BONE
    hu[np.broadcast_to(_ellipse(x, y, 0, 83, 8, 7) < 1, hu.shape)] = 20.0
    hu[np.broadcast_to((_ellipse(x, y, 0, -84, 17, 5) < 1) & (z > 0.35), hu.shape)] = 240.0


def _airways(x: Any, y: Any, z: Any, lung: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The trachea and the main bronchi down to the lungs."""
    trachea = (_ellipse(x, y, 0, 12, 9, 9) < 1) & (z > 0.62)
    spread = np.clip((0.62 - z) / 0.12, 0, 1) * 38
    bronchi = ((_ellipse(x, y, spread, 14, 7, 6) < 1) | (_ellipse(x, y, -spread, 14, 7, 6) < 1)) & (
        z > 0.52
    )
    return np.asarray((trachea | (bronchi & (z <= 0.62))) & ~lung)


def _noise(
    rng: np.random.Generator, config: PhantomConfig, correlation_mm: float
) -> NDArray[np.float32]:
    """Smooth noise with unit variance. Made on a coarse grid, which costs a twentieth of the full one."""
    step = max(1, int(correlation_mm / config.pixel_mm / 3))
    coarse_px = -(-config.size_px // step) + 2
    coarse = rng.standard_normal((config.num_slices, coarse_px, coarse_px), dtype=np.float32)
    sigma = correlation_mm / config.pixel_mm / step
    coarse = ndimage.gaussian_filter(coarse, (correlation_mm / config.slice_mm, sigma, sigma))
    coarse /= coarse.std()
    full = ndimage.zoom(coarse, (1, step, step), order=1)
    return np.asarray(full[:, : config.size_px, : config.size_px])


def _vessels(
    lung: NDArray[np.bool_], z: Any, rng: np.random.Generator, config: PhantomConfig
) -> NDArray[np.float32]:
    """Vessels from the hilum outwards, thinning as they go: 0..1, how much of a voxel is blood."""
    voxels = np.argwhere(lung)
    out = np.zeros(lung.shape, np.float32)
    middle = (config.size_px - 1) / 2
    for end in voxels[rng.integers(0, len(voxels), NUM_VESSELS)].astype(float):
        side = np.sign(end[2] - middle) or 1.0
        hilum = np.array(
            [
                0.5 * config.num_slices,
                middle + 8 / config.pixel_mm,
                middle + side * 38 / config.pixel_mm,
            ]
        )
        steps = np.linspace(0, 1, 90)[:, None]
        bend = rng.normal(0, 6, 3) * np.array([0.3, 1, 1])
        path = hilum + (end - hilum) * steps + bend * np.sin(np.pi * steps)
        index = np.rint(path).astype(int)
        inside = ((index >= 0) & (index < lung.shape)).all(axis=1)
        k, j, i = index[inside].T
        out[k, j, i] = np.maximum(out[k, j, i], (1.25 - steps[inside, 0]).astype(np.float32))
    blurred = ndimage.gaussian_filter(out, (0, 0.8, 0.8))
    return np.asarray(np.clip(blurred * 2.6, 0, 1) * lung)


def _add_lesions(
    hu: NDArray[np.float32],
    lung: NDArray[np.bool_],
    x: Any,
    y: Any,
    z: Any,
    rng: np.random.Generator,
    config: PhantomConfig,
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Cover the asked share of the lung: a smooth random field above its quantile is lesion, its peaks are opaque."""
    depth_mm = ndimage.distance_transform_edt(
        lung, sampling=(1e3, config.pixel_mm, config.pixel_mm)
    )
    field = _noise(rng, config, CORRELATION_MM) + 0.25 * _noise(rng, config, 4.0)
    field += 0.5 * np.clip(1 - depth_mm / 30, 0, 1) + 0.006 * y - 0.8 * z
    inside = field[lung]
    threshold, core = np.quantile(
        inside, [1 - config.involvement, 1 - config.involvement * config.consolidation]
    )
    lesion_mask = lung & (field > threshold)
    slope = EDGE_MM / CORRELATION_MM
    opacity = lung / (1 + np.exp(-(field - threshold) / slope * 8))
    opaque = lung / (1 + np.exp(-(field - core) / slope * 8))
    glass = GROUND_GLASS + 60 * _noise(rng, config, 6.0)
    hu = np.where(hu < glass, hu + opacity * (glass - hu), hu)
    hu = np.where(hu < CONSOLIDATION, hu + opaque * (CONSOLIDATION - hu), hu)
    return hu.astype(np.float32), np.asarray(lesion_mask)
