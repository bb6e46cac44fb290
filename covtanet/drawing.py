"""Slices with lung and lesion drawn over them, and the result files of a screened series."""

import json
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage

from covtanet.ct import nifti
from covtanet.ct.lung import Involvement
from covtanet.ct.masks import Mask
from covtanet.ct.window import (
    INTENSITY_STEPS,
    WindowConfig,
    box_of,
    mask_to_input,
    pixel_aspect,
    spread_slices,
)

if TYPE_CHECKING:
    from covtanet.decoding.stored_masks import StoredMasks

# (height, width, 3), except for single channels.
Picture = NDArray[np.uint8]

LESION_RGB, LUNG_RGB = (255, 112, 67), (79, 195, 247)
# Colours of Fig. 8: lesion that was detected, false alarm, lesion that was missed.
DETECTED_RGB, ALARM_RGB, MISSED_RGB = (60, 190, 90), (66, 120, 245), (230, 60, 60)
BACKGROUND_RGB, TEXT_RGB = (16, 18, 22), (235, 235, 235)
LESION_OPACITY, ERROR_OPACITY = 0.35, 0.5
PREVIEW_SLICES, PREVIEW_COLUMNS, PREVIEW_PX = 12, 6, 256
VIEWER_SLICES, VIEWER_COLUMNS, VIEWER_PX = 250, 10, 256
CAPTION_PX, FONT_PX = 24, 14
# Of 0 to 9. Pillow's default of 6 takes four times the time of 1 and saves a fifth of the bytes:
# the pictures of a series would cost as much as all else that is done to measure it.
PNG_LEVEL = 1
SHEET_PX = 1536
# Side of the preview's square over the extent of the lungs.
PREVIEW_MARGIN = 1.15


def result_files(
    slices: NDArray[np.uint16],
    chosen: NDArray[np.int64],
    masks: "StoredMasks",
    measured: Involvement,
    window: WindowConfig,
) -> Iterator[tuple[str, bytes]]:
    """Yield name and bytes of a series' result files: masks in the source's grid, and pictures.

    window: the window by which HU became ``slices``.
    """
    yield "lesion_mask.nii.gz", nifti.write(measured.lesion_mask, masks.source)
    yield "lung_mask.nii.gz", nifti.write(measured.lung_mask, masks.source)
    lesions, lungs = measured.lesion_mask[chosen], measured.lung_mask[chosen]
    aspect = pixel_aspect(masks.spacing_mm)
    box = box_of(masks.lungs.lung_mask, window, aspect)
    # With square pixels, a square around the source's pixels already shows the same.
    if aspect != 1 or box is not None:
        lesions = mask_to_input(lesions, window, aspect, box) > 0
        lungs = mask_to_input(lungs, window, aspect, box) > 0
    yield "preview.png", png(preview(slices, lesions, lungs))
    tiles, layout = viewer(slices, lesions, lungs, window)
    yield "viewer.png", png(tiles)
    yield "viewer.json", json.dumps(layout).encode()


def viewer(
    slices: NDArray[np.uint16], lesion_mask: Mask, lung_mask: Mask, window: WindowConfig
) -> tuple[Picture, dict[str, float]]:
    """Return the slices that the network read as tiles, base first, and their layout.

    Red is the intensity, 0 to 255 over the model's window; green is 1 in the lung, 2 in a lesion
    there. The layout has the number of tiles and of columns, and the window's ends in HU, without
    which an intensity has no meaning.
    """
    side = min(VIEWER_PX, slices.shape[1])
    shown = np.unique(spread_slices(len(slices), min(len(slices), VIEWER_SLICES)))
    marks = _to_square(lung_mask[shown]).astype(np.uint8)
    marks[_to_square(lesion_mask[shown])] = 2
    rows = -(-len(shown) // VIEWER_COLUMNS)
    tiles = np.zeros((rows, side, VIEWER_COLUMNS, side, 3), np.uint8)
    for tile, (index, mark) in enumerate(zip(shown, marks, strict=True)):
        row, column = divmod(tile, VIEWER_COLUMNS)
        grey = _to_grey(slices[index]).resize((side, side), Image.Resampling.BILINEAR)
        mark_image = Image.fromarray(mark).resize((side, side), Image.Resampling.NEAREST)
        tiles[row, :, column, :, 0] = np.asarray(grey)
        tiles[row, :, column, :, 1] = np.asarray(mark_image)
    layout = {
        "tiles": len(shown),
        "columns": VIEWER_COLUMNS,
        "low_hu": window.low_hu,
        "high_hu": window.high_hu,
    }
    return tiles.reshape(rows * side, VIEWER_COLUMNS * side, 3), layout


def preview(slices: NDArray[np.uint16], lesion_mask: Mask, lung_mask: Mask) -> Picture:
    """Return up to twelve slices from the base to the apex with lung outline and lesion.

    All tiles show the same square around the lungs.
    """
    shown = np.unique(spread_slices(len(slices), PREVIEW_SLICES))
    lesions, lungs = _to_square(lesion_mask[shown]), _to_square(lung_mask[shown])
    top, left, side = _square_around(np.asarray(lungs.any(axis=0)))
    inside = (slice(top, top + side), slice(left, left + side))
    scale = slices.shape[1] / lungs.shape[1]
    box = (left * scale, top * scale, (left + side) * scale, (top + side) * scale)
    size = (PREVIEW_PX, PREVIEW_PX)
    tiles = []
    for index, lesion, lung in zip(shown, lesions, lungs, strict=True):
        grey = _to_grey(slices[index]).resize(size, Image.Resampling.BICUBIC, box=box)
        tiles.append(draw(np.asarray(grey), _enlarge(lesion[inside]), _enlarge(lung[inside])))
    tiles += [np.zeros_like(tiles[0])] * (-len(tiles) % PREVIEW_COLUMNS)
    rows = [
        np.concatenate(tiles[start : start + PREVIEW_COLUMNS], axis=1)
        for start in range(0, len(tiles), PREVIEW_COLUMNS)
    ]
    return np.concatenate(rows)


def draw(picture: Picture, lesion_mask: Mask, lung_mask: Mask) -> Picture:
    """Draw masks over a grey slice, all (height, width), in colours (height, width, 3)."""
    rgb = np.repeat(picture[:, :, None], 3, axis=2).astype(np.float32)
    _tint(rgb, lesion_mask, LESION_RGB, LESION_OPACITY)
    rgb[_outline(lung_mask)] = LUNG_RGB
    rgb[_outline(lesion_mask)] = LESION_RGB
    return rgb.astype(np.uint8)


def errors(intensity: NDArray[np.uint16], lesion_mask: Mask, truth: Mask) -> Picture:
    """Return up to six slices, those with the most true lesion, in the colours of Fig. 8.

    Green was detected, blue is a false alarm, red was missed. All inputs: (S, H, W).
    """
    num_lesion = truth.sum(axis=(1, 2), dtype=np.int64)
    most = np.argsort(-num_lesion, kind="stable")[:PREVIEW_COLUMNS]
    tiles = [
        errors_of(intensity[index], lesion_mask[index], truth[index]) for index in np.sort(most)
    ]
    tiles += [np.zeros_like(tiles[0])] * (PREVIEW_COLUMNS - len(tiles))
    return np.concatenate(tiles, axis=1)


def errors_of(intensity: NDArray[np.uint16], lesion_mask: Mask, truth: Mask) -> Picture:
    """Return one slice as ``errors`` draws it. All inputs: (H, W)."""
    rgb = np.repeat((intensity * (255 / INTENSITY_STEPS))[:, :, None], 3, axis=2)
    _tint(rgb, lesion_mask & truth, DETECTED_RGB, ERROR_OPACITY)
    _tint(rgb, lesion_mask & ~truth, ALARM_RGB, ERROR_OPACITY)
    _tint(rgb, ~lesion_mask & truth, MISSED_RGB, ERROR_OPACITY)
    image = Image.fromarray(rgb.astype(np.uint8))
    return np.asarray(image.resize((PREVIEW_PX, PREVIEW_PX), Image.Resampling.BILINEAR))


def grid(
    rows: Mapping[str, str],
    columns: Sequence[str],
    tiles: Mapping[tuple[str, str], Picture],
) -> bytes:
    """Return tiles in captioned rows and columns, as PNG; a missing tile stays dark.

    rows: caption by name.
    """
    side = PREVIEW_PX
    size = (side * len(columns), (side + CAPTION_PX) * len(rows))
    out = Image.new("RGB", size, BACKGROUND_RGB)
    pen = ImageDraw.Draw(out)
    for line, (row, caption) in enumerate(rows.items()):
        top = line * (side + CAPTION_PX)
        for number, column in enumerate(columns):
            text = f"{caption}: {column}" if number == 0 else column
            pen.text((number * side + 6, top + 4), text, fill=TEXT_RGB, font_size=FONT_PX)
            if (row, column) in tiles:
                tile = Image.fromarray(tiles[row, column])
                out.paste(tile, (number * side, top + CAPTION_PX))
    return png(np.asarray(out))


def sheet(rows: list[tuple[str, Any]]) -> Image.Image:
    """Return captioned pictures below each other."""
    images = [(caption, Image.fromarray(np.asarray(picture))) for caption, picture in rows]
    heights = [CAPTION_PX + round(image.height * SHEET_PX / image.width) for _, image in images]
    out = Image.new("RGB", (SHEET_PX, sum(heights)), BACKGROUND_RGB)
    pen = ImageDraw.Draw(out)
    top = 0
    for (caption, image), height in zip(images, heights, strict=True):
        pen.text((8, top + 4), caption, fill=TEXT_RGB, font_size=FONT_PX)
        resized = image.resize((SHEET_PX, height - CAPTION_PX))
        out.paste(resized, (0, top + CAPTION_PX))
        top += height
    return out


def png(rgb: Picture) -> bytes:
    """Encode a picture."""
    buffer = BytesIO()
    Image.fromarray(rgb).save(buffer, "png", compress_level=PNG_LEVEL)
    return buffer.getvalue()


def _to_grey(intensity: NDArray[np.uint16]) -> Image.Image:
    scaled = intensity.astype(np.float32) * (255 / INTENSITY_STEPS)
    return Image.fromarray(scaled.astype(np.uint8))


def _tint(rgb: NDArray[Any], mask: Mask, colour: tuple[int, int, int], opacity: float) -> None:
    """Blend a colour over the pixels of a mask, in place."""
    rgb[mask] = (1 - opacity) * rgb[mask] + opacity * np.array(colour)


def _square_around(mask: Mask) -> tuple[int, int, int]:
    """Return top, left and side of a square around a mask with a margin, within a square image."""
    size = mask.shape[0]
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return 0, 0, size
    extent = max(np.ptp(rows), np.ptp(columns))
    side = min(size, int(PREVIEW_MARGIN * extent + 1))
    top, left = ((int(span[0]) + int(span[-1]) + 1 - side) // 2 for span in (rows, columns))
    return min(max(top, 0), size - side), min(max(left, 0), size - side), side


def _to_square(masks: Mask) -> Mask:
    height, width = masks.shape[1:]
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    return np.pad(masks, ((0, 0), (top, side - height - top), (left, side - width - left)))


def _enlarge(mask: Mask) -> Mask:
    image = Image.fromarray(mask.astype(np.uint8) * 255)
    grey = image.resize((PREVIEW_PX, PREVIEW_PX), Image.Resampling.BILINEAR)
    return np.asarray(grey) >= 128


def _outline(mask: Mask) -> Mask:
    return np.asarray(mask & ~ndimage.binary_erosion(mask))
