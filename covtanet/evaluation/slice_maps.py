"""Lesion maps of a series at the source's resolution, and their counts against the truth.

Cropped to the lung box, with neighbours in z, and with or without four flips. Not covered: the lung
mask, which the caller applies.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from covtanet.ct.window import INTENSITY_STEPS, WindowConfig, from_input, to_input
from covtanet.data.slice_file import GREY_STEPS, SliceFile
from covtanet.inference.segmenter import FLIPS

BATCH_SIZE = 32


@dataclass(frozen=True, kw_only=True)
class SliceMaps:
    """Probabilities of lesion in [0, 1] on the slices with lung, (S, y, x)."""

    single: NDArray[np.float32]
    """Without flips."""
    flipped: NDArray[np.float32]
    """Mean over the four flips."""


def lung_slices_with_neighbours(
    slices: SliceFile, size_px: int, channels: int, fill: int
) -> NDArray[np.uint16]:
    """Return the network's input of the slices with lung, (S, channels, size, size) uint16.

    At the ends of a series, and if successive slices are not neighbours, a slice is repeated.
    """
    window = WindowConfig(low_hu=0.0, high_hu=float(GREY_STEPS), size_px=size_px)
    levels = to_input(slices.grey, window, box=slices.box, fill_hu=fill)
    shown = np.flatnonzero(slices.has_lung)
    reach = 1 if slices.is_continuous and channels > 1 else 0
    distances = (-reach, 0, reach) if channels > 1 else (0,)
    # (S, channels), clipped at the ends of the series.
    rows = np.stack([np.clip(shown + step, 0, len(levels) - 1) for step in distances], axis=1)
    # (S, channels, size, size)
    return levels[rows]


def predict_maps(
    module: nn.Module, slices: SliceFile, size_px: int, channels: int, fill: int
) -> SliceMaps:
    """Predict the slices with lung in float32.

    module: in eval mode. fill: grey value beyond the slice.
    """
    device = next(module.parameters()).device
    levels = lung_slices_with_neighbours(slices, size_px, channels, fill)
    shape = (slices.grey.shape[1], slices.grey.shape[2])
    # (S, y, x), in the pixels of the source.
    single = np.empty((len(levels), *shape), np.float32)
    flipped = np.empty_like(single)
    for start in range(0, len(levels), BATCH_SIZE):
        batch = levels[start : start + BATCH_SIZE].astype(np.float32) / INTENSITY_STEPS
        maps = _probabilities(module, torch.from_numpy(batch).to(device))
        for index, pair in enumerate(maps.cpu().numpy(), start):
            single[index] = from_input(pair[0], shape, box=slices.box)
            flipped[index] = from_input(pair[1], shape, box=slices.box)
    return SliceMaps(single=single, flipped=flipped)


@torch.inference_mode()
def _probabilities(module: nn.Module, batch: Tensor) -> Tensor:
    """Return the map without flips and the mean over four, (B, 2, size, size)."""
    images = batch.contiguous(memory_format=torch.channels_last)
    maps = []
    for axes in FLIPS:
        logits = module(torch.flip(images, axes))
        # Flipped back, so that the four maps lie upon each other.
        maps.append(torch.flip(torch.sigmoid(logits.float()), axes))
    # (B, 1, size, size) twice
    return torch.cat([maps[0], torch.stack(maps).mean(0)], 1)


def slice_counts(
    probabilities: Tensor, truth: Tensor, thresholds: Sequence[float]
) -> NDArray[np.int64]:
    """Count TP, FP and FN of each slice at each threshold, (thresholds, S, 3).

    probabilities: (S, y, x). truth: (S, y, x) bool, on the same device.
    """
    lesion = truth.sum((1, 2))
    rows = []
    for threshold in thresholds:
        predicted = probabilities >= threshold
        tp = (predicted & truth).sum((1, 2))
        # (S, 3): TP, FP and FN
        rows.append(torch.stack([tp, predicted.sum((1, 2)) - tp, lesion - tp], 1))
    counts: NDArray[np.int64] = torch.stack(rows).cpu().numpy()
    return counts
