"""From the network's lesion map to a lesion mask in the volume's grid, without torch.

Shared by screening and evaluation, so that a model is evaluated as it is used.
"""

import numpy as np
from numpy.typing import NDArray

from covtanet.ct.lung import Lungs
from covtanet.ct.masks import Mask
from covtanet.ct.window import WindowConfig, box_of, from_input_region, pixel_aspect
from covtanet.inference.quantization import PROBABILITY_STEPS
from covtanet.model.description import Readout

# Of the interpolation, in steps of probability.
ROUNDING_STEPS = 0.01


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
    depth, *in_plane = lungs.lung_mask.shape
    aspect = pixel_aspect(spacing_mm)
    if lesion_threshold is None:
        lesion_threshold = Readout().lesion_threshold
    threshold = np.float32(lesion_threshold * PROBABILITY_STEPS)
    box = box_of(lungs.lung_mask, window, aspect)
    lung_slices = np.flatnonzero(lungs.lung_mask.any(axis=(1, 2)))
    nearest = np.abs(lung_slices[:, None] - chosen[None, :]).argmin(axis=1)
    # Memory that is not written to costs nothing: slices without a lesion stay as they are.
    lesion_mask = np.zeros((depth, *in_plane), bool)
    lesion_slices = 0
    for index, levels in enumerate(lesion_levels):
        # Interpolation exceeds the largest of its values by rounding at most.
        if float(levels.max()) < threshold - ROUNDING_STEPS:
            continue
        region, probability = from_input_region(
            levels.astype(np.float32), (in_plane[0], in_plane[1]), aspect, box
        )
        lesion = probability >= threshold
        z = int(chosen[index])
        inside = lungs.lung_mask[z][region] | lungs.cavity_mask[z][region]
        lesion_slices += bool((lesion & inside).any())
        for shown in lung_slices[nearest == index]:
            lesion_mask[shown][region] = lesion
    return lesion_mask, lesion_slices
