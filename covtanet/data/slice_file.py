"""Labelled slices of one series as one small .npz: 8 bits a pixel, cropped to the lungs.

For trainings that keep all of their slices in memory or on a GPU. A window of 1500 HU in steps of
10 HU is as fine as the noise of a chest CT, 10 to 30 HU, and an eighth smaller than in 255 steps.
"""

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from covtanet.ct.lung_box import LungBox
from covtanet.ct.window import WindowConfig

GREY_STEPS = 150


@dataclass(frozen=True, kw_only=True)
class SliceFile:
    """Slices of one series in a row, on the source's own pixels (z, y, x).

    grey: (S, y, x) uint8, HU over the window in steps of 1/150. lesion: (S, y, x) bool.
    inside: (S, y, x) bool, lungs and chest cavity, where screening keeps what a network marks.
    has_lung: (S,) bool, slices that screening segments; the rest are neighbours of these.
    is_continuous: whether slices in a row are neighbours in the patient.
    """

    grey: NDArray[np.uint8]
    lesion: NDArray[np.bool_]
    inside: NDArray[np.bool_]
    has_lung: NDArray[np.bool_]
    box: LungBox
    is_continuous: bool = True


def to_grey(slices_hu: NDArray[Any], window: WindowConfig) -> NDArray[np.uint8]:
    """Map HU to 0..GREY_STEPS over a window."""
    scale = GREY_STEPS / (window.high_hu - window.low_hu)
    clipped = np.clip(slices_hu.astype(np.float32), window.low_hu, window.high_hu)
    grey: NDArray[np.uint8] = np.rint((clipped - window.low_hu) * scale).astype(np.uint8)
    return grey


def save_slices(path: Path, slices: SliceFile, context_px: int) -> None:
    """Write a file that keeps ``context_px`` around the box; the rest is filled when it is read."""
    height, width = slices.grey.shape[1:]
    box = slices.box
    top, left = max(0, box.top - context_px), max(0, box.left - context_px)
    bottom = min(height, box.top + box.height + context_px)
    right = min(width, box.left + box.width + context_px)
    window = (slice(None), slice(top, bottom), slice(left, right))
    grey = slices.grey[window]
    arrays = {
        # From slice to slice, modulo 256: a fifth smaller than the slices themselves.
        "grey": np.diff(grey, axis=0, prepend=np.zeros_like(grey[:1])),
        "lesion": np.packbits(slices.lesion[window]),
        "inside": np.packbits(slices.inside[window]),
        "has_lung": slices.has_lung,
        "frame": np.array([top, left, height, width]),
        "box": np.array([box.top, box.left, box.height, box.width]),
        "is_continuous": np.array(slices.is_continuous),
    }
    # As np.savez_compressed, with LZMA for Deflate: a sixth smaller. np.load reads either.
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def load_slices(path: Path, fill: int) -> SliceFile:
    """Read a file of ``save_slices``. fill: grey value of pixels that were not kept."""
    with np.load(path, allow_pickle=False) as arrays:
        grey = np.add.accumulate(arrays["grey"], axis=0, dtype=np.uint8)
        has_lung = arrays["has_lung"]
        top, left, height, width = (int(value) for value in arrays["frame"])
        box_top, box_left, box_height, box_width = (int(value) for value in arrays["box"])
        masks = [
            np.unpackbits(arrays[name], count=grey.size).reshape(grey.shape).astype(bool)
            for name in ("lesion", "inside")
        ]
        is_continuous = bool(arrays["is_continuous"])
    place = (slice(None), slice(top, top + grey.shape[1]), slice(left, left + grey.shape[2]))
    whole = []
    for array, value in ((grey, fill), (masks[0], False), (masks[1], False)):
        out = np.full((len(grey), height, width), value, array.dtype)
        out[place] = array
        whole.append(out)
    return SliceFile(
        grey=whole[0],
        lesion=whole[1],
        inside=whole[2],
        has_lung=has_lung,
        box=LungBox(top=box_top, left=box_left, height=box_height, width=box_width),
        is_continuous=is_continuous,
    )
