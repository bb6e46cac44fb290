"""Configurations of many different phantoms: a third each normal, mild and severe."""

from collections.abc import Iterator

import numpy as np

from covtanet.data import labels
from covtanet.phantoms.phantom import PhantomConfig

# Seeds of two calls overlap only beyond this many phantoms.
SEED_STRIDE = 100_003
# Width of the image and height of the volume.
WIDTH_MM, HEIGHT_MM = 360, 270


def configs(
    count: int, seed: int, size_px: int = 256, num_slices: int = 36
) -> Iterator[PhantomConfig]:
    """Yield configurations of different phantoms, a third each normal, mild and severe."""
    rng = np.random.default_rng(seed)
    for index in range(count):
        yield PhantomConfig(
            seed=seed * SEED_STRIDE + index,
            involvement=draw_involvement(index, rng),
            consolidation=float(rng.uniform(0.15, 0.45)),
            size_px=size_px,
            num_slices=num_slices,
            pixel_mm=WIDTH_MM / size_px,
            slice_mm=HEIGHT_MM / num_slices,
            noise_hu=float(rng.uniform(14, 30)),
        )


def draw_involvement(index: int, rng: np.random.Generator) -> float:
    """Draw the involvement of a normal, a mild or a severe phantom, in turn.

    Clear of the border at a quarter, at which the truth itself would be a matter of chance.
    """
    # Both are drawn each time, so that a phantom does not depend on the kinds before it.
    mild, severe = float(rng.uniform(0.03, 0.18)), float(rng.uniform(0.33, 0.6))
    return (0.0, mild, severe)[index % 3]


def severity_of(involvement: float) -> str | None:
    """Return the severity by the paper's rule; null for a normal phantom."""
    return labels.severity_of(involvement) if involvement else None
