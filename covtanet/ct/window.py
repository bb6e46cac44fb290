"""From HU to the network's input and back: window, in-plane resize, choice of slices."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from covtanet.ct.densities import AIR_HU

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

    def __post_init__(self) -> None:
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


@dataclass(frozen=True)
class _Frame:
    """Rows ``top`` to ``top + height`` and columns ``left`` to ``left + width`` of a square."""

    side: int
    top: int
    left: int
    height: int
    width: int

    @property
    def inner(self) -> tuple[slice, slice]:
        """The slice's part of the square."""
        return slice(self.top, self.top + self.height), slice(self.left, self.left + self.width)


def _centred(side: int, height: int, width: int) -> _Frame:
    return _Frame(side, (side - height) // 2, (side - width) // 2, height, width)


def _frame(shape: tuple[int, int], size_px: int, aspect: float) -> _Frame:
    """Place a slice of any shape in a square.

    With square pixels that is the smallest square of the slice's own pixels, which is resized as a
    whole afterwards. Else each axis is resized by its own factor, and the square is the network's.
    """
    height, width = shape
    if aspect == 1:
        return _centred(max(height, width), height, width)
    scale = size_px / max(height * aspect, width)
    return _centred(size_px, max(1, round(height * aspect * scale)), max(1, round(width * scale)))


def to_input(
    slices_hu: NDArray[Any], window: WindowConfig, aspect: float = 1.0
) -> NDArray[np.uint16]:
    """Window slices, pad them to a square in millimetres and resize them.

    slices_hu: (S, y, x) in HU. aspect: ``pixel_aspect`` of the series, so that the network sees
    anatomy undistorted.

    Returns (S, size, size) uint16, intensity 0..1 in steps of 1/65535: half the bytes of float32 on
    the way between processes, and finer than 0.03 HU.
    """
    frame = _frame(slices_hu.shape[1:], window.size_px, aspect)
    out = np.empty((len(slices_hu), window.size_px, window.size_px), np.uint16)
    air = hu_to_intensity(np.float32(AIR_HU), window)
    square = np.full((frame.side, frame.side), air, np.float32)
    for index, slice_hu in enumerate(slices_hu):
        intensity = hu_to_intensity(slice_hu.astype(np.float32), window)
        if aspect != 1:
            intensity = _resize_axes(intensity, frame.height, frame.width)
        square[frame.inner] = intensity
        resized = square
        if frame.side != window.size_px:
            resized = resize_slice(square, window.size_px, window.size_px)
        out[index] = np.clip(np.rint(resized), 0, INTENSITY_STEPS)
    return out


def hu_to_intensity(hu: Any, window: WindowConfig) -> Any:
    """Map HU, float32 of any shape, to 0..65535 over the window."""
    scale = np.float32(INTENSITY_STEPS / (window.high_hu - window.low_hu))
    return (np.clip(hu, window.low_hu, window.high_hu) - np.float32(window.low_hu)) * scale


def mask_to_input(
    slices_mask: NDArray[np.bool_], window: WindowConfig, aspect: float = 1.0
) -> NDArray[np.uint8]:
    """Resize masks as ``to_input`` resizes slices.

    A pixel belongs to the mask if at least half of it does.
    """
    frame = _frame(slices_mask.shape[1:], window.size_px, aspect)
    out = np.empty((len(slices_mask), window.size_px, window.size_px), np.uint8)
    for index, slice_mask in enumerate(slices_mask):
        square = np.zeros((frame.side, frame.side), np.float32)
        if aspect == 1:
            square[frame.inner] = slice_mask
        else:
            square[frame.inner] = resize_slice(slice_mask, frame.height, frame.width)
        out[index] = resize_slice(square, window.size_px, window.size_px) >= INSIDE_SHARE
    return out


def from_input(
    probabilities: NDArray[np.float32], shape: tuple[int, int], aspect: float = 1.0
) -> NDArray[np.float32]:
    """Bring one slice of the network's output back to the source's in-plane shape (y, x).

    The inverse of ``to_input``.
    """
    size_px = probabilities.shape[0]
    frame = _frame(shape, size_px, aspect)
    if frame.side != size_px:
        probabilities = resize_slice(probabilities, frame.side, frame.side)
    inner = probabilities[frame.inner]
    return inner if aspect == 1 else resize_slice(inner, *shape)


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
