"""Training samples: slices with lesion masks for phase 1, volumes of a fixed slice count for phase 2.

Pure functions of a volume; Ray Data and a plain loader use the same ones.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from covtanet.ct.lung import find_lungs
from covtanet.ct.volume import Volume
from covtanet.ct.window import WindowConfig, mask_to_input, spread_slices, thin_slices, to_input


@dataclass(frozen=True, kw_only=True)
class SliceSamples:
    """Slices of one volume as the network reads them. levels: (S, H, W) uint16; lesion: (S, H, W) uint8 of 0 and 1."""

    levels: NDArray[np.uint16]
    lesion: NDArray[np.uint8]


def lung_slices(volume: Volume, slice_step_mm: float) -> NDArray[np.intp]:
    """The slices that screening would segment. Raises StudyError where there is no lung."""
    lungs = find_lungs(volume)
    shown = np.flatnonzero(lungs.lung_mask.any(axis=(1, 2)))
    return thin_slices(shown, volume.spacing_mm[0], slice_step_mm)[0]


def phase1_samples(
    volume: Volume, lesion_mask: NDArray[np.bool_], window: WindowConfig, slice_step_mm: float
) -> SliceSamples:
    """Every lung slice with its lesion mask. lesion_mask: (z, y, x) on the volume's grid."""
    chosen = lung_slices(volume, slice_step_mm)
    return SliceSamples(levels=to_input(volume.hu[chosen], window), lesion=mask_to_input(lesion_mask[chosen], window))


def phase2_sample(volume: Volume, window: WindowConfig, slice_step_mm: float, num_slices: int) -> NDArray[np.uint16]:
    """(num_slices, H, W): the lung slices spread evenly, as the diagnosis reads them in screening."""
    chosen = lung_slices(volume, slice_step_mm)
    return to_input(volume.hu[chosen[spread_slices(len(chosen), num_slices)]], window)
