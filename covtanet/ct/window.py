"""From HU to the network's input and back: window, crop, in-plane resize, choice of slices."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from covtanet.ct.densities import AIR_HU
from covtanet.ct.lung_box import Region, SliceBox, lung_box, whole_box
from covtanet.ct.masks import Mask

INTENSITY_STEPS = 65535
SQUARE_RTOL = 0.005
# Pixels of a mask are inside from this share on.
INSIDE_SHARE = 0.5


@dataclass(frozen=True, kw_only=True)
class WindowConfig:
    """Settings of the step from HU to the network's input."""

    low_hu: float = -1000.0
    """HU of intensity 0. Choice: air; the paper gives no window."""
    high_hu: float = 400.0
    """HU of intensity 1; denser voxels are clipped. Choice: the paper gives no window."""
    size_px: int = 512
    """Side of the square slices in pixels. Choice: the paper gives no size."""
    crops_to_lungs: bool = False
    """Whether slices are cropped to the box of the lungs (``lung_box``); the paper's are whole."""
    num_neighbours: int = 0
    """Slices on either side that the network reads together with a slice, 0 or 1."""

    def __post_init__(self) -> None:
        if self.num_neighbours not in (0, 1):
            raise ValueError(f"num_neighbours is {self.num_neighbours}, expected 0 or 1")
        if self.low_hu >= self.high_hu:
            raise ValueError(
                f"window {self.low_hu:g}..{self.high_hu:g} HU is empty, "
                "low_hu must be below high_hu"
            )
        if self.size_px < 32 or self.size_px % 16:
            raise ValueError(f"size_px is {self.size_px}, expected a multiple of 16, at least 32")


def pixel_aspect(spacing_mm: tuple[float, float, float]) -> float:
    """Return pixel height over pixel width of an axial slice; exactly 1 for square pixels.

    spacing_mm: z, y, x. Choice: pixels within half a percent of a square are square, so that the
    rounding of a decimal string resamples nothing.
    """
    aspect = spacing_mm[1] / spacing_mm[2]
    return 1.0 if abs(aspect - 1) <= SQUARE_RTOL else aspect


def box_of(lung_mask: Mask, window: WindowConfig, aspect: float) -> SliceBox | None:
    """Return the box that a volume's slices are cropped to; null if the window takes them whole.

    lung_mask: (z, y, x) bool. aspect: ``pixel_aspect`` of the volume.

    Raises:
        StudyError: ``no_lung`` if the mask is empty and the window crops.
    """
    return lung_box(lung_mask, aspect) if window.crops_to_lungs else None


@dataclass(frozen=True)
class _Frame:
    """A canvas of pixels, the part of it that shows the slice, and that part of the slice."""

    height: int
    width: int
    inner: Region
    source: Region


def _frame(shape: tuple[int, int], size_px: int, aspect: float, box: SliceBox | None) -> _Frame:
    """Lay a slice of any shape on a canvas that is square in millimetres.

    With square pixels the canvas has the slice's own pixels and is resized as a whole afterwards.
    Else each axis is resized by its own factor, and the canvas is the network's, which stays small
    however long and narrow the voxels are.
    """
    box = box or whole_box(shape, aspect)
    inner, source = box.overlap(shape)
    if aspect == 1:
        return _Frame(box.height, box.width, inner, source)
    rows = _scaled(inner[0], size_px / box.height, size_px)
    columns = _scaled(inner[1], size_px / box.width, size_px)
    return _Frame(size_px, size_px, (rows, columns), source)


def _scaled(part: slice, factor: float, size_px: int) -> slice:
    """Return a part of a side times a factor, at least one pixel, within 0..size_px."""
    length = min(size_px, max(1, round((part.stop - part.start) * factor)))
    start = min(round(part.start * factor), size_px - length)
    return slice(start, start + length)


def to_input(
    slices_hu: NDArray[Any],
    window: WindowConfig,
    aspect: float = 1.0,
    box: SliceBox | None = None,
    fill_hu: float = AIR_HU,
) -> NDArray[np.uint16]:
    """Window slices, crop or pad them to a square in millimetres and resize them.

    slices_hu: (S, y, x) in HU. aspect: ``pixel_aspect`` of the series, so that the network sees
    anatomy undistorted. box: that of ``box_of``; null for whole slices. fill_hu: value beyond a
    slice.

    Returns (S, size, size) uint16, intensity 0..1 in steps of 1/65535: half the bytes of float32 on
    the way between processes, and finer than 0.03 HU.
    """
    frame = _frame((slices_hu.shape[1], slices_hu.shape[2]), window.size_px, aspect, box)
    out = np.empty((len(slices_hu), window.size_px, window.size_px), np.uint16)
    fill = hu_to_intensity(np.float32(fill_hu), window)
    canvas = np.full((frame.height, frame.width), fill, np.float32)
    for index, slice_hu in enumerate(slices_hu):
        intensity = hu_to_intensity(slice_hu[frame.source].astype(np.float32), window)
        if aspect != 1:
            intensity = _resize_axes(intensity, *canvas[frame.inner].shape)
        canvas[frame.inner] = intensity
        resized = resize_slice(canvas, window.size_px, window.size_px)
        out[index] = np.clip(np.rint(resized), 0, INTENSITY_STEPS)
    return out


def hu_to_intensity(hu: Any, window: WindowConfig) -> Any:
    """Map HU, float32 of any shape, to 0..65535 over the window."""
    scale = np.float32(INTENSITY_STEPS / (window.high_hu - window.low_hu))
    return (np.clip(hu, window.low_hu, window.high_hu) - np.float32(window.low_hu)) * scale


def mask_to_input(
    slices_mask: Mask,
    window: WindowConfig,
    aspect: float = 1.0,
    box: SliceBox | None = None,
) -> NDArray[np.uint8]:
    """Crop or pad masks and resize them as ``to_input`` does with slices.

    A pixel belongs to the mask if at least half of it does.
    """
    frame = _frame((slices_mask.shape[1], slices_mask.shape[2]), window.size_px, aspect, box)
    out = np.empty((len(slices_mask), window.size_px, window.size_px), np.uint8)
    canvas = np.zeros((frame.height, frame.width), np.float32)
    for index, slice_mask in enumerate(slices_mask):
        canvas[frame.inner] = resize_slice(slice_mask[frame.source], *canvas[frame.inner].shape)
        resized = resize_slice(canvas, window.size_px, window.size_px)
        out[index] = resized >= INSIDE_SHARE
    return out


def from_input(
    probabilities: NDArray[np.float32],
    shape: tuple[int, int],
    aspect: float = 1.0,
    box: SliceBox | None = None,
) -> NDArray[np.float32]:
    """Bring one map of the network back to the source's in-plane shape (y, x); 0 beyond the box.

    The inverse of ``to_input``.
    """
    region, inner = from_input_region(probabilities, shape, aspect, box)
    out = np.zeros(shape, np.float32)
    out[region] = inner
    return out


def from_input_region(
    probabilities: NDArray[np.float32],
    shape: tuple[int, int],
    aspect: float = 1.0,
    box: SliceBox | None = None,
) -> tuple[Region, NDArray[np.float32]]:
    """Return the part of the source's slice that the network reads, and its map at that size."""
    frame = _frame(shape, len(probabilities), aspect, box)
    inner = resize_slice(probabilities, frame.height, frame.width)[frame.inner]
    height, width = (part.stop - part.start for part in frame.source)
    if inner.shape != (height, width):  # of the same size already if pixels are square
        inner = resize_slice(inner, height, width)
    return frame.source, inner


def with_neighbours(
    slices: NDArray[Any], indices: NDArray[np.intp], num_neighbours: int
) -> NDArray[Any]:
    """Return slices with their neighbours in z as channels, (len(indices), 1 + 2 n, H, W).

    slices: (S, H, W), all that are read of a volume. At its ends a slice is repeated. Choice:
    neighbours among the slices that are read, 2.5 mm apart or more, so that a volume keeps one copy
    of each.
    """
    steps = np.arange(-num_neighbours, num_neighbours + 1)
    rows = np.clip(indices[:, None] + steps[None, :], 0, len(slices) - 1)
    neighbours: NDArray[Any] = slices[rows]
    return neighbours


def resize_slice(array: NDArray[Any], height: int, width: int) -> NDArray[np.float32]:
    """Resize one slice or map, bilinear."""
    # Pillow's bilinear filter widens with the reduction, so that shrinking averages all pixels.
    image = Image.fromarray(np.ascontiguousarray(array, np.float32))
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))


def _resize_axes(intensity: NDArray[np.float32], height: int, width: int) -> NDArray[np.float32]:
    """Resize each axis by its own factor.

    Choice: bicubic along an axis that is enlarged, since bilinear would blur the long side of a
    voxel once more: of a phantom's sagittal reformat, 5.6 mm thick, the network then finds a fifth
    less lesion.
    """
    image = Image.fromarray(intensity)
    image = image.resize((width, image.height), _filter(width / image.width))
    image = image.resize((width, height), _filter(height / image.height))
    return np.asarray(image)


def _filter(factor: float) -> Image.Resampling:
    return Image.Resampling.BICUBIC if factor > 1 else Image.Resampling.BILINEAR


def thin_slices(
    lung_slices: NDArray[np.intp], spacing_z_mm: float, slice_step_mm: float
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Choose the slices to segment out of those that show lung.

    lung_slices: ascending z indices.

    Returns (chosen, extent_mm): slices at least ``slice_step_mm`` apart, and the millimetres of
    lung that each stands for; every lung slice counts for the nearest chosen one.
    """
    # 1e-6: a step that is a whole number of slices must not round up.
    stride = max(1, int(np.ceil(slice_step_mm / spacing_z_mm - 1e-6)))
    first = lung_slices[0] + min(stride // 2, (lung_slices[-1] - lung_slices[0]) // 2)
    candidates = np.arange(first, lung_slices[-1] + 1, stride)
    chosen = candidates[np.isin(candidates, lung_slices)]
    if not len(chosen):
        chosen = lung_slices[len(lung_slices) // 2][None]
    nearest = np.abs(lung_slices[:, None] - chosen[None, :]).argmin(axis=1)
    extent_mm = np.bincount(nearest, minlength=len(chosen)) * spacing_z_mm
    return chosen.astype(np.intp), extent_mm.astype(np.float64)


def spread_slices(num_available: int, num_slices: int) -> NDArray[np.intp]:
    """Return the indices of slices spread evenly over those available, repeated if too few.

    Choice: resampling along z by index, since the aggregation needs a fixed number (the paper's
    volumes have 30-46 slices).
    """
    return np.rint(np.linspace(0, num_available - 1, num_slices)).astype(np.intp)
