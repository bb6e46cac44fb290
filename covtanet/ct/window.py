"""From HU to the network's input and back: window, in-plane resize, choice of slices. No file, no model."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

AIR_HU = -1000
INTENSITY_STEPS = 65535


@dataclass(frozen=True, kw_only=True)
class WindowConfig:
    """How HU become the network's input.

    Choice: -1000..400 HU clipped to 0..1, slices as squares of ``size_px`` (the paper gives neither).
    """

    low_hu: float = -1000.0
    high_hu: float = 400.0
    size_px: int = 512

    def __post_init__(self) -> None:
        if self.low_hu >= self.high_hu:
            raise ValueError(f"window {self.low_hu:g}..{self.high_hu:g} HU is empty, low_hu must be below high_hu")
        if self.size_px < 32 or self.size_px % 16:
            raise ValueError(f"size_px is {self.size_px}, expected a multiple of 16, at least 32")


def to_input(slices_hu: NDArray[Any], window: WindowConfig) -> NDArray[np.uint16]:
    """Window, pad to a square and resize slices.

    slices_hu: (S, y, x) in HU. Returns (S, size, size) uint16, intensity 0..1 in steps of 1/65535: half the bytes of
    float32 on the way between processes, and finer than 0.03 HU.
    """
    num, height, width = slices_hu.shape
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    out = np.empty((num, window.size_px, window.size_px), np.uint16)
    scale = np.float32(INTENSITY_STEPS / (window.high_hu - window.low_hu))
    square = np.full((side, side), AIR_HU, np.float32)
    for index, slice_hu in enumerate(slices_hu):
        square[top : top + height, left : left + width] = slice_hu
        level = (np.clip(square, window.low_hu, window.high_hu) - np.float32(window.low_hu)) * scale
        if side != window.size_px:
            level = np.array(_resize(level, window.size_px))
        np.clip(np.rint(level), 0, INTENSITY_STEPS, out=level)
        out[index] = level
    return out


def mask_to_input(slices_mask: NDArray[np.bool_], window: WindowConfig) -> NDArray[np.uint8]:
    """Resize masks as ``to_input`` resizes slices; a pixel belongs to the mask where at least half of it does."""
    num, height, width = slices_mask.shape
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    out = np.empty((num, window.size_px, window.size_px), np.uint8)
    for index, slice_mask in enumerate(slices_mask):
        square = np.zeros((side, side), np.float32)
        square[top : top + height, left : left + width] = slice_mask
        out[index] = np.asarray(_resize(square, window.size_px)) >= 0.5
    return out


def from_input(probabilities: NDArray[np.float32], shape: tuple[int, int]) -> NDArray[np.float32]:
    """Bring one slice of the network's output back to the source's in-plane shape (y, x); the inverse of to_input."""
    height, width = shape
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    full = probabilities if side == probabilities.shape[0] else np.asarray(_resize(probabilities, side))
    return full[top : top + height, left : left + width]


def _resize(square: NDArray[np.float32], size_px: int) -> Image.Image:
    # Pillow's bilinear filter widens with the reduction, so shrinking averages rather than skips pixels.
    return Image.fromarray(square).resize((size_px, size_px), Image.Resampling.BILINEAR)


def thin_slices(
    lung_slices: NDArray[np.intp], spacing_z_mm: float, slice_step_mm: float
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Choose the slices to segment out of those that show lung.

    lung_slices: ascending z indices. Returns (chosen, extent_mm): slices at least ``slice_step_mm`` apart and the
    millimetres of lung each stands for (every lung slice counts for the nearest chosen one).
    """
    stride = max(1, int(np.ceil(slice_step_mm / spacing_z_mm - 1e-6)))
    first = lung_slices[0] + min(stride // 2, (lung_slices[-1] - lung_slices[0]) // 2)
    wanted = np.arange(first, lung_slices[-1] + 1, stride)
    chosen = wanted[np.isin(wanted, lung_slices)]
    if not len(chosen):
        chosen = lung_slices[len(lung_slices) // 2][None]
    nearest = np.abs(lung_slices[:, None] - chosen[None, :]).argmin(axis=1)
    extent_mm = np.bincount(nearest, minlength=len(chosen)) * spacing_z_mm
    return chosen.astype(np.intp), extent_mm.astype(np.float64)


def spread_slices(num_available: int, num_wanted: int) -> NDArray[np.intp]:
    """Indices of ``num_wanted`` slices spread evenly over those available; repeats where there are fewer.

    Choice: resampling along z by index, since the aggregation needs a fixed number (the paper's volumes have 30-46).
    """
    return np.rint(np.linspace(0, num_available - 1, num_wanted)).astype(np.intp)
