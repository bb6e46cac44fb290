"""Square box around both lungs, to which slices are cropped for networks that read lungs alone.

One box serves a whole volume. Coordinates are rows and columns of the source slice; a box may reach
beyond it. The same box is computed in screening, evaluation and training, from the lung mask.
"""

from dataclasses import dataclass

import numpy as np

from covtanet.ct.masks import Mask
from covtanet.errors import Reason, StudyError

# Choice: 8 % of the longer side, half of it at each end. The outline of the lung mask is about 2 mm
# off, and a lesion below the pleura needs the adjacent chest wall in view.
MARGIN = 0.08
# Rows and columns.
Region = tuple[slice, slice]


@dataclass(frozen=True, kw_only=True)
class SliceBox:
    """Rows ``top`` to ``top + height`` and columns ``left`` to ``left + width`` of a slice."""

    top: int
    left: int
    height: int
    width: int

    def __post_init__(self) -> None:
        if min(self.height, self.width) < 1:
            raise ValueError(f"box of {self.height} x {self.width} pixels, expected at least 1 x 1")

    def overlap(self, shape: tuple[int, int]) -> tuple[Region, Region]:
        """Return the overlap of box and slice, as indices into the box and into the slice."""
        inner: list[slice] = []
        source: list[slice] = []
        for start, length, size in zip(
            (self.top, self.left), (self.height, self.width), shape, strict=True
        ):
            first = min(max(start, 0), size)
            last = max(min(start + length, size), first)
            source.append(slice(first, last))
            inner.append(slice(first - start, last - start))
        return (inner[0], inner[1]), (source[0], source[1])


def lung_box(lung_mask: Mask, aspect: float = 1.0, margin: float = MARGIN) -> SliceBox:
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
    height, width = _square(lung_height, lung_width, aspect, 1 + margin)
    return SliceBox(
        top=int(rows[0]) - (height - lung_height) // 2,
        left=int(columns[0]) - (width - lung_width) // 2,
        height=height,
        width=width,
    )


def whole_box(shape: tuple[int, int], aspect: float = 1.0) -> SliceBox:
    """Return the smallest box, square in millimetres, with a slice of any shape in its middle.

    aspect: ``pixel_aspect`` of the series.
    """
    height, width = _square(*shape, aspect)
    return SliceBox(
        top=(shape[0] - height) // 2, left=(shape[1] - width) // 2, height=height, width=width
    )


def _square(height: int, width: int, aspect: float, factor: float = 1.0) -> tuple[int, int]:
    """Return rows and columns of the square in millimetres around a rectangle, enlarged."""
    side = max(height * aspect, width) * factor
    return round(side / aspect), round(side)
