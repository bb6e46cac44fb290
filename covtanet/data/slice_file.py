"""Labelled slices of one series as one small .npz: 8 bits per pixel, cropped to the lungs.

For trainings that hold all slices in memory or on a GPU. Steps of 10 HU over a window of 1500 HU
are as fine as the noise of a chest CT, 10 to 30 HU; the file is an eighth smaller than with 255
steps.
"""

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from covtanet.ct.lung_box import SliceBox
from covtanet.ct.window import WindowConfig

GREY_STEPS = 150


@dataclass(frozen=True, kw_only=True)
class SliceFile:
    """Successive slices of one series in the source's pixels (z, y, x)."""

    grey: NDArray[np.uint8]
    """(S, y, x), HU over the window in ``GREY_STEPS`` steps."""
    lesion: NDArray[np.bool_]
    """(S, y, x)."""
    inside: NDArray[np.bool_]
    """(S, y, x), lungs and chest cavity; screening drops marked pixels outside."""
    has_lung: NDArray[np.bool_]
    """(S,), slices that screening segments; the rest are neighbours of these."""
    box: SliceBox
    is_continuous: bool = True
    """Whether successive slices are neighbours in the patient."""


def to_grey(slices_hu: NDArray[Any], window: WindowConfig) -> NDArray[np.uint8]:
    """Map HU to 0..GREY_STEPS over a window."""
    # Steps per HU.
    scale = GREY_STEPS / (window.high_hu - window.low_hu)
    clipped = np.clip(slices_hu.astype(np.float32), window.low_hu, window.high_hu)
    grey: NDArray[np.uint8] = np.rint((clipped - window.low_hu) * scale).astype(np.uint8)
    return grey


def save_slices(path: Path, slices: SliceFile, context_px: int) -> None:
    """Write the box and ``context_px`` around it; reading fills the rest."""
    height, width = slices.grey.shape[1:]
    box = slices.box
    top = max(0, box.top - context_px)
    left = max(0, box.left - context_px)
    bottom = min(height, box.top + box.height + context_px)
    right = min(width, box.left + box.width + context_px)
    window = (slice(None), slice(top, bottom), slice(left, right))
    grey = slices.grey[window]
    arrays = {
        # Differences between slices, modulo 256: a fifth smaller than the slices themselves.
        "grey": np.diff(grey, axis=0, prepend=np.zeros_like(grey[:1])),
        "lesion": np.packbits(slices.lesion[window]),
        "inside": np.packbits(slices.inside[window]),
        "has_lung": slices.has_lung,
        "frame": np.array([top, left, height, width]),
        "box": np.array([box.top, box.left, box.height, box.width]),
        "is_continuous": np.array(slices.is_continuous),
    }
    # As np.savez_compressed, but LZMA instead of Deflate: a sixth smaller. np.load reads both.
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def load_slices(path: Path, fill: int) -> SliceFile:
    """Read a file of ``save_slices``. fill: grey value of pixels that were not written."""
    # No pickles: a file of data must not run code.
    with np.load(path, allow_pickle=False) as arrays:
        # Undoes the differences; uint8 wraps modulo 256 as they did.
        grey = np.add.accumulate(arrays["grey"], axis=0, dtype=np.uint8)
        has_lung = arrays["has_lung"]
        top, left, height, width = (int(value) for value in arrays["frame"])
        box_top, box_left, box_height, box_width = (int(value) for value in arrays["box"])
        masks = [
            # The count drops the bits that fill the last byte.
            np.unpackbits(arrays[name], count=grey.size).reshape(grey.shape).astype(bool)
            for name in ("lesion", "inside")
        ]
        is_continuous = bool(arrays["is_continuous"])
    corner = (top, left)
    return SliceFile(
        grey=_paste(grey, corner, (height, width), fill),
        lesion=_paste(masks[0], corner, (height, width), False),
        inside=_paste(masks[1], corner, (height, width), False),
        has_lung=has_lung,
        box=SliceBox(top=box_top, left=box_left, height=box_height, width=box_width),
        is_continuous=is_continuous,
    )


def _paste(
    slices: NDArray[Any], corner: tuple[int, int], shape: tuple[int, int], fill: int
) -> NDArray[Any]:
    """Put cropped slices at ``corner`` of whole ones of ``shape``."""
    # (S, y, x) of the source.
    whole = np.full((len(slices), *shape), fill, slices.dtype)
    rows = slice(corner[0], corner[0] + slices.shape[1])
    columns = slice(corner[1], corner[1] + slices.shape[2])
    whole[:, rows, columns] = slices
    return whole
