"""From the network's lesion map to a lesion mask in the volume's grid, without torch.

Shared by screening and evaluation, so that a model is evaluated as it is used.
"""

import numpy as np
from numpy.typing import NDArray

from covtanet.ct.lung import Lungs
from covtanet.ct.masks import Mask
from covtanet.ct.window import WindowConfig, box_of, from_input, pixel_aspect
from covtanet.inference.quantization import PROBABILITY_STEPS
from covtanet.model.description import Readout


def lesion_in_source(
    lesion_levels: NDArray[np.uint8],
    chosen: NDArray[np.int64],
    lungs: Lungs,
    spacing_mm: tuple[float, float, float],
    window: WindowConfig,
    lesion_threshold: float | None,
) -> tuple[Mask, int]:
    """Return the lesion mask in the volume's grid, and how many segmented slices show a lesion.

    lesion_levels: (S, size, size) of the z indices ``chosen``. lesion_threshold: null for one half.
    A slice in between takes the mask of the nearest segmented slice, so that volumes count it. The
    mask is not cut to the lungs yet.
    """
    shape = lungs.lung_mask.shape
    aspect = pixel_aspect(spacing_mm)
    if lesion_threshold is None:
        lesion_threshold = Readout().lesion_threshold
    threshold = np.float32(lesion_threshold * PROBABILITY_STEPS)
    box = box_of(lungs.lung_mask, window, aspect)
    by_slice = np.empty((len(chosen), *shape[1:]), bool)
    for index, levels in enumerate(lesion_levels):
        probability = from_input(levels.astype(np.float32), shape[1:], aspect, box)
        by_slice[index] = probability >= threshold
    inside = lungs.lung_mask[chosen] | lungs.cavity_mask[chosen]
    lesion_slices = int((by_slice & inside).any(axis=(1, 2)).sum())
    lesion_mask = np.zeros(shape, bool)
    lung_slices = np.flatnonzero(lungs.lung_mask.any(axis=(1, 2)))
    nearest = np.abs(lung_slices[:, None] - chosen[None, :]).argmin(axis=1)
    lesion_mask[lung_slices] = by_slice[nearest]
    return lesion_mask, lesion_slices
