"""Square box around both lungs: crop slices to it for the network, bring its maps back.

Used by ``benchmarks/train_gpu.py``; no command crops to it yet. Evaluation crops with these
functions; training samples the same box on its device, bilinear without averaging
(``training/batch_augment.py``). Coordinates are rows and columns of the source slice; a box may
reach beyond it. Not covered: boxes of single slices (one box serves a whole volume), rotation.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from covtanet.ct.densities import AIR_HU
from covtanet.ct.window import (
    INTENSITY_STEPS,
    WindowConfig,
    hu_to_intensity,
    resize_slice,
)
from covtanet.errors import Reason, StudyError

# Choice: 8 % of the longer side, half of it at each end. The outline of the lung mask is about 2 mm
# off, and a lesion below the pleura needs the adjacent chest wall in view.
MARGIN = 0.08


@dataclass(frozen=True, kw_only=True)
class LungBox:
    """Rows ``top`` to ``top + height`` and columns ``left`` to ``left + width`` of a slice."""

    top: int
    left: int
    height: int
    width: int

    def __post_init__(self) -> None:
        if min(self.height, self.width) < 1:
            raise ValueError(f"box of {self.height} x {self.width} pixels, expected at least 1 x 1")


def lung_box(lung_mask: NDArray[np.bool_], aspect: float = 1.0, margin: float = MARGIN) -> LungBox:
    """Return the box of a whole volume's lungs, square in millimetres.

    lung_mask: (z, y, x) bool. aspect: pixel height over width (``pixel_aspect``); 1 if the spacing
    is unknown, so that pixels are taken as square.

    Raises:
        StudyError: ``no_lung`` if the mask is empty.
    """
    rows = np.flatnonzero(lung_mask.any(axis=(0, 2)))
    columns = np.flatnonzero(lung_mask.any(axis=(0, 1)))
    if not len(rows):
        raise StudyError(Reason.NO_LUNG, "the lung mask is empty, expected lungs to crop to")
    lung_height = int(rows[-1] - rows[0] + 1)
    lung_width = int(columns[-1] - columns[0] + 1)
    width = max(lung_height * aspect, lung_width) * (1 + margin)
    side_rows = round(width / aspect)
    side_columns = round(width)
    return LungBox(
        top=int(rows[0]) - (side_rows - lung_height) // 2,
        left=int(columns[0]) - (side_columns - lung_width) // 2,
        height=side_rows,
        width=side_columns,
    )


def crop_to_box(slices: NDArray[Any], box: LungBox, fill: float) -> NDArray[Any]:
    """Return the box's pixels, (S, box.height, box.width); ``fill`` beyond the slice."""
    out = np.full((len(slices), box.height, box.width), fill, slices.dtype)
    inner, source = _overlap(box, slices.shape[1:])
    out[:, *inner] = slices[:, *source]
    return out


def box_to_input(
    slices_hu: NDArray[Any], box: LungBox, window: WindowConfig, fill_hu: float = AIR_HU
) -> NDArray[np.uint16]:
    """Crop, window and resize slices to squares of ``window.size_px``, as ``window.to_input`` does.

    slices_hu: (S, y, x) in HU. fill_hu: value beyond the slice. The result is (S, size, size)
    uint16, intensity 0..1 in steps of 1/65535.
    """
    out = np.empty((len(slices_hu), window.size_px, window.size_px), np.uint16)
    for index, slice_hu in enumerate(crop_to_box(slices_hu, box, fill_hu)):
        intensity = hu_to_intensity(slice_hu.astype(np.float32), window)
        resized = resize_slice(intensity, window.size_px, window.size_px)
        out[index] = np.clip(np.rint(resized), 0, INTENSITY_STEPS)
    return out


def box_from_input(
    probabilities: NDArray[np.float32], box: LungBox, shape: tuple[int, int]
) -> NDArray[np.float32]:
    """Resize one map (size, size) of the network to a slice of ``shape``; 0 outside the box."""
    resized = resize_slice(probabilities, box.height, box.width)
    out = np.zeros(shape, np.float32)
    inner, source = _overlap(box, shape)
    out[source] = resized[inner]
    return out


def _overlap(
    box: LungBox, shape: tuple[int, ...]
) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Return the overlap of box and slice, as indices into the box and into the slice."""
    inner: list[slice] = []
    source: list[slice] = []
    for start, length, size in zip(
        (box.top, box.left), (box.height, box.width), shape, strict=True
    ):
        first = min(max(start, 0), size)
        last = max(min(start + length, size), first)
        source.append(slice(first, last))
        inner.append(slice(first - start, last - start))
    return (inner[0], inner[1]), (source[0], source[1])
