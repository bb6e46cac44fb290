"""Lung and lesion drawn over slices, and a screened series' result files."""

from collections.abc import Iterator
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from covtanet.ct import nifti
from covtanet.ct.lung import Involvement
from covtanet.ct.window import INTENSITY_STEPS

if TYPE_CHECKING:
    from covtanet.screening.stages import StoredMasks

LESION_RGB, LUNG_RGB = (255, 112, 67), (79, 195, 247)
LESION_OPACITY = 0.35
PREVIEW_SLICES, PREVIEW_COLUMNS, PREVIEW_PX = 12, 6, 256


def result_files(
    slices: NDArray[np.uint16], chosen: NDArray[np.int64], masks: "StoredMasks", found: Involvement
) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of a series' results: lesion and lung masks in the source's grid, and a preview."""
    yield "lesion_mask.nii.gz", nifti.write(found.lesion_mask, masks.source)
    yield "lung_mask.nii.gz", nifti.write(found.lung_mask, masks.source)
    yield "preview.png", png(preview(slices, found.lesion_mask[chosen], found.lung_mask[chosen]))


def preview(
    slices: NDArray[np.uint16], lesion_mask: NDArray[np.bool_], lung_mask: NDArray[np.bool_]
) -> NDArray[np.uint8]:
    """Up to twelve slices from the base to the apex with lung outline and lesion, (height, width, 3)."""
    shown = np.unique(np.rint(np.linspace(0, len(slices) - 1, PREVIEW_SLICES)).astype(int))
    tiles = [draw(slices[k], lesion_mask[k], lung_mask[k], PREVIEW_PX) for k in shown]
    tiles += [np.zeros_like(tiles[0])] * (-len(tiles) % PREVIEW_COLUMNS)
    rows = [np.concatenate(tiles[k : k + PREVIEW_COLUMNS], axis=1) for k in range(0, len(tiles), PREVIEW_COLUMNS)]
    return np.concatenate(rows)


def draw(
    levels: NDArray[np.uint16], lesion_mask: NDArray[np.bool_], lung_mask: NDArray[np.bool_], size_px: int
) -> NDArray[np.uint8]:
    """One slice with its masks. levels: the network's input, a square; masks: in the source's in-plane shape."""
    grey = (levels.astype(np.float32) * (255 / INTENSITY_STEPS)).astype(np.uint8)
    picture = np.asarray(Image.fromarray(grey).resize((size_px, size_px), Image.Resampling.BILINEAR))
    rgb = np.repeat(picture[:, :, None], 3, axis=2).astype(np.float32)
    lesion, lung = (_to_square(mask, size_px) for mask in (lesion_mask, lung_mask))
    rgb[lesion] = (1 - LESION_OPACITY) * rgb[lesion] + LESION_OPACITY * np.array(LESION_RGB)
    rgb[_outline(lung)] = LUNG_RGB
    rgb[_outline(lesion)] = LESION_RGB
    return rgb.astype(np.uint8)


def _to_square(mask: NDArray[np.bool_], size_px: int) -> NDArray[np.bool_]:
    height, width = mask.shape
    side = max(height, width)
    square = np.zeros((side, side), np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = mask
    return np.asarray(Image.fromarray(square * 255).resize((size_px, size_px), Image.Resampling.BILINEAR)) >= 128


def _outline(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    return mask & ~ndimage.binary_erosion(mask)


def png(rgb: NDArray[np.uint8]) -> bytes:
    """Encode a picture."""
    buffer = BytesIO()
    Image.fromarray(rgb).save(buffer, "png", optimize=False)
    return buffer.getvalue()


def sheet(rows: list[tuple[str, Any]], path_width_px: int = 1536) -> Image.Image:
    """Captioned pictures below each other."""
    from PIL import ImageDraw

    images = [(caption, Image.fromarray(np.asarray(picture))) for caption, picture in rows]
    heights = [24 + round(image.height * path_width_px / image.width) for _, image in images]
    out = Image.new("RGB", (path_width_px, sum(heights)), (16, 18, 22))
    pen, top = ImageDraw.Draw(out), 0
    for (caption, image), height in zip(images, heights, strict=True):
        pen.text((8, top + 4), caption, fill=(235, 235, 235), font_size=14)
        out.paste(image.resize((path_width_px, height - 24)), (0, top + 24))
        top += height
    return out
