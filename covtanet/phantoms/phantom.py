"""Synthetic chest CT with known truth, for demos, tests and benchmarks.

A phantom is a body with two lungs under a domed diaphragm, heart, aorta, spine, ribs, airways and
branching vessels. Lesions are patches of ground glass with consolidated cores and diffuse edges,
which prefer the lower, outer and posterior lung. The same configuration always gives the same
phantom. It looks like a chest; it teaches nothing about disease.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from covtanet.phantoms.anatomy import (
    AIR,
    BLOOD,
    FAT,
    LUNG,
    MUSCLE,
    Coordinates,
    add_lesions,
    add_skeleton,
    airways,
    ellipse,
    lung_shape,
    smooth_noise,
    vessels,
)

TEXTURE_MM = 9.0
# Blurring takes most of the noise away; this brings its standard deviation back to noise_hu.
NOISE_GAIN = 1.6


@dataclass(frozen=True, kw_only=True)
class PhantomConfig:
    """One phantom."""

    seed: int = 0
    involvement: float = 0.0
    """Share of the lung that is lesion, 0..0.7."""
    consolidation: float = 0.3
    """Share of the lesion that is opaque."""
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
    """A synthetic volume and its truth.

    hu: (z, y, x) int16. Masks: (z, y, x) bool. affine: index -> LPS mm.
    """

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
    # The order of the random draws fixes the phantom of a seed.
    rng = np.random.default_rng(config.seed)
    at = _coordinates(config, rng)
    left, right = (lung_shape(at, side, rng) for side in (1, -1))
    heart = (ellipse(at, 22, -28, 52, 44) + ((at.z - 0.36) / 0.24) ** 2) < 1
    # (z, y, x) bool
    lung = (left | right) & ~heart
    hu = _tissues(at, lung, heart)
    texture = smooth_noise(rng, at, TEXTURE_MM)
    is_front = np.broadcast_to(at.y, hu.shape)[lung] < 0
    hu[lung] += 28 * texture[lung] - 60 * is_front * 0.4
    blood_share = vessels(lung, rng, at)
    hu = np.where(lung, hu + blood_share * (BLOOD - hu), hu)
    lesion_mask = np.zeros(lung.shape, bool)
    if config.involvement:
        hu, lesion_mask = add_lesions(
            hu, lung, at, rng, involvement=config.involvement, consolidation=config.consolidation
        )
    # After the lesions, which must not fill the airways.
    hu[airways(at, lung)] = AIR
    hu = ndimage.gaussian_filter(hu, (0, 0.6, 0.6))
    # Noise comes after the blur of the tissues and has a blur of its own.
    noise = rng.standard_normal(hu.shape, dtype=np.float32)
    hu += config.noise_hu * ndimage.gaussian_filter(noise, (0, 0.5, 0.5)) * NOISE_GAIN
    return Phantom(
        hu=np.clip(np.rint(hu), -1024, 2000).astype(np.int16),
        affine=_affine(config),
        lesion_mask=lesion_mask,
        lung_mask=lung,
    )


def _coordinates(config: PhantomConfig, rng: np.random.Generator) -> Coordinates:
    """Return coordinates of a body that is a little scaled and shifted."""
    z = np.arange(config.num_slices, dtype=np.float32)[:, None, None] + 0.5
    centre_px = (config.size_px - 1) / 2
    axis = np.arange(config.size_px, dtype=np.float32) - centre_px
    axis_mm = axis * np.float32(config.pixel_mm)
    scale = rng.uniform(0.92, 1.06)
    y = (axis_mm[None, :, None] - np.float32(rng.uniform(-6, 6))) / np.float32(scale)
    x = (axis_mm[None, None, :] - np.float32(rng.uniform(-6, 6))) / np.float32(scale)
    return Coordinates(
        z=z / config.num_slices, y=y, x=x, pixel_mm=config.pixel_mm, slice_mm=config.slice_mm
    )


def _tissues(
    at: Coordinates, lung: NDArray[np.bool_], heart: NDArray[np.bool_]
) -> NDArray[np.float32]:
    """Return the HU of body wall, skeleton, mediastinum, heart, aorta and plain lung."""
    shoulders = 1 + 0.12 * np.clip((at.z - 0.75) / 0.25, 0, 1)
    body = ellipse(at, 0, 0, 165 * shoulders, 112)
    inner = ellipse(at, 0, 2, 146 * shoulders, 95)
    hu = np.full(lung.shape, AIR, np.float32)
    hu[np.broadcast_to(body < 1, hu.shape)] = FAT
    hu[np.broadcast_to(inner < 1, hu.shape)] = MUSCLE
    add_skeleton(hu, at, lung)
    mediastinum = (ellipse(at, 0, 4, 34, 60) < 1) & (at.z > 0.3) & ~lung
    hu[mediastinum & (hu < 100)] = 5.0
    hu[heart & (inner < 1)] = BLOOD
    aorta = ellipse(at, 16, 46, 12, 12) < 1
    hu[aorta & (hu < 200)] = BLOOD
    hu[lung] = LUNG
    return hu


def _affine(config: PhantomConfig) -> NDArray[np.float64]:
    """Return index (z, y, x) -> LPS mm, with the origin in the middle of the volume."""
    affine = np.diag([0.0, 0.0, 0.0, 1.0])
    affine[2, 0] = config.slice_mm
    affine[1, 1] = config.pixel_mm
    affine[0, 2] = config.pixel_mm
    half_width_mm = config.size_px * config.pixel_mm / 2
    height_mm = config.num_slices * config.slice_mm
    affine[:3, 3] = (-half_width_mm, -half_width_mm, -height_mm / 2)
    return affine
