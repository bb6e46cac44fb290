"""The file of slices that diagnosis_data.py writes and diagnosis_gpu.py reads; numpy and Pillow."""

import io
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

# The lung box at 256 pixels, and 16 pixels of context on each side.
BOX_PX = 256
CANVAS_PX = 288
# 17 MiB for 877 slices.
JPEG_QUALITY = 92
NUM_FOLDS = 5


@dataclass(frozen=True, kw_only=True)
class Slices:
    """Middle slices of studies, with grade and fold of each study."""

    names: NDArray[np.str_]
    grades: NDArray[np.str_]
    folds: NDArray[np.int64]
    grey: NDArray[np.uint8]
    """(N, 288, 288), HU over the window in 255 steps; the lung box is the middle 256 pixels."""
    lung: NDArray[np.bool_]
    """(N, 288, 288), both lungs."""
    inside: NDArray[np.bool_]
    """(N, 288, 288), lungs and chest cavity, outside which screening drops lesions."""
    refused: tuple[str, ...] = ()
    """Names of studies whose slice cannot be read or shows no lungs."""

    def some(self, rows: NDArray[np.int64]) -> "Slices":
        """Return some of the slices."""
        return replace(
            self,
            names=self.names[rows],
            grades=self.grades[rows],
            folds=self.folds[rows],
            grey=self.grey[rows],
            lung=self.lung[rows],
            inside=self.inside[rows],
        )


def write(path: Path, slices: Slices) -> None:
    """Write slices as JPEG in one file."""
    pictures = [_to_jpeg(grey) for grey in slices.grey]
    ends = np.cumsum([len(picture) for picture in pictures])
    arrays: dict[str, Any] = {
        "names": slices.names,
        "grades": slices.grades,
        "folds": slices.folds,
        "pictures": np.frombuffer(b"".join(pictures), np.uint8),
        "ends": ends,
        "lung": np.packbits(slices.lung),
        "inside": np.packbits(slices.inside),
        "refused": np.array(slices.refused, np.str_),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **arrays)


def read(path: Path) -> Slices:
    """Read a file of ``write``."""
    # No pickles: a file of data must not run code.
    with np.load(path, allow_pickle=False) as arrays:
        data = arrays["pictures"].tobytes()
        ends = arrays["ends"].tolist()
        starts = [0, *ends[:-1]]
        pictures = [data[start:end] for start, end in zip(starts, ends, strict=True)]
        grey = np.stack([np.asarray(Image.open(io.BytesIO(picture))) for picture in pictures])
        # The count drops the bits that fill the last byte.
        lung, inside = (
            np.unpackbits(arrays[name], count=grey.size).reshape(grey.shape).astype(bool)
            for name in ("lung", "inside")
        )
        return Slices(
            names=arrays["names"],
            grades=arrays["grades"],
            folds=arrays["folds"],
            grey=grey,
            lung=lung,
            inside=inside,
            refused=tuple(arrays["refused"].tolist()),
        )


def _to_jpeg(grey: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(grey).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()
