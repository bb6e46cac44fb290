"""Lung and lesion drawn over slices, and a screened series' result files."""

from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage

from covtanet.ct import nifti
from covtanet.ct.lung import Involvement
from covtanet.ct.window import INTENSITY_STEPS, WindowConfig, mask_to_input, pixel_aspect

if TYPE_CHECKING:
    from covtanet.decoding.prepare import StoredMasks

LESION_RGB, LUNG_RGB = (255, 112, 67), (79, 195, 247)
FOUND_RGB, ALARM_RGB, MISSED_RGB = (60, 190, 90), (66, 120, 245), (230, 60, 60)
LESION_OPACITY, ERROR_OPACITY = 0.35, 0.5
PREVIEW_SLICES, PREVIEW_COLUMNS, PREVIEW_PX = 12, 6, 256
VIEWER_SLICES, VIEWER_COLUMNS, VIEWER_PX = 250, 10, 256


def result_files(
    slices: NDArray[np.uint16],
    chosen: NDArray[np.int64],
    masks: "StoredMasks",
    found: Involvement,
    window: WindowConfig,
) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of a series' results: lesion and lung masks in the source's grid, and a preview.

    window: the one by which HU became ``slices``.
    """
    yield "lesion_mask.nii.gz", nifti.write(found.lesion_mask, masks.source)
    yield "lung_mask.nii.gz", nifti.write(found.lung_mask, masks.source)
    lesions, lungs = found.lesion_mask[chosen], found.lung_mask[chosen]
    aspect = pixel_aspect(masks.spacing_mm)
    if aspect != 1:  # else a square around the source's own pixels shows the same
        lesions, lungs = (mask_to_input(each, window, aspect) > 0 for each in (lesions, lungs))
    yield "preview.png", png(preview(slices, lesions, lungs))
    yield "viewer.png", png(viewer(slices, lesions, lungs, window))


def viewer(
    slices: NDArray[np.uint16],
    lesion_mask: NDArray[np.bool_],
    lung_mask: NDArray[np.bool_],
    window: WindowConfig,
) -> NDArray[np.uint8]:
    """Every slice that the network read as a tile, base first, ten to a row, for a viewer that sets the window itself.

    Red is the level, 0 to 255 over the model's window; green is 1 in the lung, 2 in a lesion there. Blue of the first
    row is how many tiles there are, in the first pixel, and in the next eight the bytes of the window's ends in HU,
    two big-endian float32: without them no level has a meaning.
    """
    side = min(VIEWER_PX, slices.shape[1])
    count = min(len(slices), VIEWER_SLICES)
    shown = np.unique(np.rint(np.linspace(0, len(slices) - 1, count)).astype(int))
    marks = _to_square(lung_mask[shown]).astype(np.uint8)
    marks[_to_square(lesion_mask[shown])] = 2
    rows = -(-len(shown) // VIEWER_COLUMNS)
    out = np.zeros((rows, side, VIEWER_COLUMNS, side, 3), np.uint8)
    for tile, (index, mark) in enumerate(zip(shown, marks, strict=True)):
        row, column = divmod(tile, VIEWER_COLUMNS)
        grey = Image.fromarray(
            (slices[index].astype(np.float32) * (255 / INTENSITY_STEPS)).astype(np.uint8)
        )
        out[row, :, column, :, 0] = np.asarray(grey.resize((side, side), Image.Resampling.BILINEAR))
        out[row, :, column, :, 1] = np.asarray(
            Image.fromarray(mark).resize((side, side), Image.Resampling.NEAREST)
        )
    out = out.reshape(rows * side, VIEWER_COLUMNS * side, 3)
    window_hu = np.array([window.low_hu, window.high_hu], ">f4")
    out[0, 0, 2] = len(shown)
    out[0, 1:9, 2] = np.frombuffer(window_hu.tobytes(), np.uint8)
    return out


def preview(
    slices: NDArray[np.uint16], lesion_mask: NDArray[np.bool_], lung_mask: NDArray[np.bool_]
) -> NDArray[np.uint8]:
    """Up to twelve slices from the base to the apex with lung outline and lesion, (height, width, 3).

    All tiles show the same square around the lungs.
    """
    shown = np.unique(np.rint(np.linspace(0, len(slices) - 1, PREVIEW_SLICES)).astype(int))
    lesions, lungs = (_to_square(masks[shown]) for masks in (lesion_mask, lung_mask))
    top, left, side = _square_around(np.asarray(lungs.any(axis=0)))
    tiles = []
    for index, lesion, lung in zip(shown, lesions, lungs, strict=True):
        scale = slices.shape[1] / lungs.shape[1]
        box = (left * scale, top * scale, (left + side) * scale, (top + side) * scale)
        grey = Image.fromarray(
            (slices[index].astype(np.float32) * (255 / INTENSITY_STEPS)).astype(np.uint8)
        )
        picture = np.asarray(
            grey.resize((PREVIEW_PX, PREVIEW_PX), Image.Resampling.BICUBIC, box=box)
        )
        inside = (slice(top, top + side), slice(left, left + side))
        tiles.append(draw(picture, _enlarge(lesion[inside]), _enlarge(lung[inside])))
    tiles += [np.zeros_like(tiles[0])] * (-len(tiles) % PREVIEW_COLUMNS)
    rows = [
        np.concatenate(tiles[k : k + PREVIEW_COLUMNS], axis=1)
        for k in range(0, len(tiles), PREVIEW_COLUMNS)
    ]
    return np.concatenate(rows)


def draw(
    picture: NDArray[np.uint8], lesion_mask: NDArray[np.bool_], lung_mask: NDArray[np.bool_]
) -> NDArray[np.uint8]:
    """One grey slice with its masks, all (height, width), to colours (height, width, 3)."""
    rgb = np.repeat(picture[:, :, None], 3, axis=2).astype(np.float32)
    rgb[lesion_mask] = (1 - LESION_OPACITY) * rgb[lesion_mask] + LESION_OPACITY * np.array(
        LESION_RGB
    )
    rgb[_outline(lung_mask)] = LUNG_RGB
    rgb[_outline(lesion_mask)] = LESION_RGB
    return rgb.astype(np.uint8)


def errors(
    levels: NDArray[np.uint16], lesion_mask: NDArray[np.bool_], truth: NDArray[np.bool_]
) -> NDArray[np.uint8]:
    """Up to six slices, those with the most true lesion, in the colours of Fig. 8, (height, width, 3).

    Green is found, blue is a false alarm, red is missed. All inputs: (S, H, W).
    """
    most = np.argsort(-truth.sum(axis=(1, 2), dtype=np.int64), kind="stable")[:PREVIEW_COLUMNS]
    tiles = [errors_of(levels[index], lesion_mask[index], truth[index]) for index in np.sort(most)]
    tiles += [np.zeros_like(tiles[0])] * (PREVIEW_COLUMNS - len(tiles))
    return np.concatenate(tiles, axis=1)


def errors_of(
    level: NDArray[np.uint16], found: NDArray[np.bool_], truth: NDArray[np.bool_]
) -> NDArray[np.uint8]:
    """One slice as ``errors`` has it. All inputs: (H, W)."""
    rgb = np.repeat((level * (255 / INTENSITY_STEPS))[:, :, None], 3, axis=2)
    for where, colour in (
        (found & truth, FOUND_RGB),
        (found & ~truth, ALARM_RGB),
        (~found & truth, MISSED_RGB),
    ):
        rgb[where] = (1 - ERROR_OPACITY) * rgb[where] + ERROR_OPACITY * np.array(colour)
    return np.asarray(
        Image.fromarray(rgb.astype(np.uint8)).resize(
            (PREVIEW_PX, PREVIEW_PX), Image.Resampling.BILINEAR
        )
    )


def grid(
    rows: Mapping[str, str],
    columns: Sequence[str],
    tiles: Mapping[tuple[str, str], NDArray[np.uint8]],
) -> bytes:
    """Tiles in captioned rows and columns, as PNG; one that is missing stays dark. rows: name to caption."""
    side, head = PREVIEW_PX, 24
    out = Image.new("RGB", (side * len(columns), (side + head) * len(rows)), (16, 18, 22))
    pen = ImageDraw.Draw(out)
    for line, (row, caption) in enumerate(rows.items()):
        top = line * (side + head)
        for number, column in enumerate(columns):
            text = f"{caption}: {column}" if number == 0 else column
            pen.text((number * side + 6, top + 4), text, fill=(235, 235, 235), font_size=14)
            if (row, column) in tiles:
                out.paste(Image.fromarray(tiles[row, column]), (number * side, top + head))
    buffer = BytesIO()
    out.save(buffer, "png")
    return buffer.getvalue()


def _square_around(mask: NDArray[np.bool_]) -> tuple[int, int, int]:
    """Top, left and side of a square around a mask with a margin, within the (square) image."""
    size = mask.shape[0]
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return 0, 0, size
    side = min(size, int(1.15 * max(np.ptp(rows), np.ptp(columns)) + 1))
    top, left = ((int(span[0]) + int(span[-1]) + 1 - side) // 2 for span in (rows, columns))
    return min(max(top, 0), size - side), min(max(left, 0), size - side), side


def _to_square(masks: NDArray[np.bool_]) -> NDArray[np.bool_]:
    height, width = masks.shape[1:]
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    return np.pad(masks, ((0, 0), (top, side - height - top), (left, side - width - left)))


def _enlarge(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    grey = Image.fromarray(mask.astype(np.uint8) * 255).resize(
        (PREVIEW_PX, PREVIEW_PX), Image.Resampling.BILINEAR
    )
    return np.asarray(grey) >= 128


def _outline(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    return mask & ~ndimage.binary_erosion(mask)


def png(rgb: NDArray[np.uint8]) -> bytes:
    """Encode a picture."""
    buffer = BytesIO()
    Image.fromarray(rgb).save(buffer, "png", optimize=False)
    return buffer.getvalue()


def sheet(rows: list[tuple[str, Any]], width_px: int = 1536) -> Image.Image:
    """Captioned pictures below each other."""
    images = [(caption, Image.fromarray(np.asarray(picture))) for caption, picture in rows]
    heights = [24 + round(image.height * width_px / image.width) for _, image in images]
    out = Image.new("RGB", (width_px, sum(heights)), (16, 18, 22))
    pen, top = ImageDraw.Draw(out), 0
    for (caption, image), height in zip(images, heights, strict=True):
        pen.text((8, top + 4), caption, fill=(235, 235, 235), font_size=14)
        out.paste(image.resize((width_px, height - 24)), (0, top + 24))
        top += height
    return out
