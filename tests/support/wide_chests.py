"""Chests of one size in mm and any number of voxels."""

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from covtanet.phantoms.phantom import Phantom, PhantomConfig, make_phantom


@cache
def chest(size_px: int = 128, num_slices: int = 30, involvement: float = 0.12) -> Phantom:
    """Return a chest 358 mm wide and 270 mm high, for any number of voxels."""
    return make_phantom(
        PhantomConfig(
            seed=11, involvement=involvement, size_px=size_px, num_slices=num_slices,
            pixel_mm=358.4 / size_px, slice_mm=270 / num_slices,
        )
    )  # fmt: skip


def averaged(array: NDArray[Any], factors: tuple[int, int, int]) -> NDArray[np.float64]:
    """Return the means of blocks; an incomplete block at the end is left out."""
    shape = [length // factor for length, factor in zip(array.shape, factors, strict=True)]
    z, y, x = (length * factor for length, factor in zip(shape, factors, strict=True))
    blocks = array[:z, :y, :x].reshape(
        shape[0], factors[0], shape[1], factors[1], shape[2], factors[2]
    )
    return np.asarray(blocks.mean(axis=(1, 3, 5), dtype=np.float64))
