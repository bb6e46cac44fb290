"""Prepare the slices of mosmed-mid that diagnosis_gpu.py reads: one file, no Ray.

python -m benchmarks.diagnosis_data --data DIR --out FILE.npz

Each slice is cropped to the box of its lungs with some context for shifts, in HU of the window, and
stored as JPEG. Folds are those of a training of five folds with seed 0. A slice whose lungs are not
found is counted and stored by name alone.
"""

import argparse
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from covtanet.ct.lung_box import SliceBox, lung_box
from covtanet.ct.window import WindowConfig, mask_to_input, to_input
from covtanet.data.folds import Case, assign_folds
from covtanet.data.labels import LabelledVolume, grade_of, hu_line

# The lung box at 256 pixels, and 16 pixels of context on each side.
BOX_PX = 256
CANVAS_PX = 288
WINDOW = WindowConfig(low_hu=-1250.0, high_hu=250.0, size_px=CANVAS_PX)
# 11 MiB for 887 slices; by 90 and by 97 the lesion share moves alike.
JPEG_QUALITY = 92
NUM_FOLDS = 5
SEED = 0


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


def with_context(box: SliceBox) -> SliceBox:
    """Return the box enlarged from 256 to 288 of its pixels, about its middle."""
    height, width = (round(side * CANVAS_PX / BOX_PX) for side in (box.height, box.width))
    return SliceBox(
        top=box.top - (height - box.height) // 2,
        left=box.left - (width - box.width) // 2,
        height=height,
        width=width,
    )


def folds_of(volumes: Sequence[LabelledVolume]) -> dict[str, int]:
    """Return the fold of each patient, as a training with these volumes deals them out."""
    cases = [
        Case(
            key=volume.volume_path,
            patient=volume.patient,
            grade=grade_of(volume.diagnosis, volume.severity),
            has_lesion_mask=volume.lesion_mask_path is not None,
        )
        for volume in volumes
    ]
    return assign_folds(cases, NUM_FOLDS, SEED)


def read_slice(volume: LabelledVolume, data: bytes) -> tuple[NDArray[Any], ...]:
    """Return grey values, lung mask and mask of lungs and cavity of one slice, (288, 288) each.

    Raises:
        StudyError: the slice cannot be read, or shows no lungs.
    """
    # Here, not above: the machine that reads the file has no nibabel.
    from covtanet.ct import picture
    from covtanet.ct.lung import find_lungs

    ct = picture.read(data, *hu_line(volume.hu_line))
    lungs = find_lungs(ct)
    box = with_context(lung_box(lungs.lung_mask))
    intensity = to_input(ct.hu, WINDOW, box=box)[0]
    # 0..65535 to 0..255.
    grey = np.rint(intensity / 257.0).astype(np.uint8)
    masks = (lungs.lung_mask, lungs.lung_mask | lungs.cavity_mask)
    lung, inside = (mask_to_input(mask, WINDOW, box=box)[0] > 0 for mask in masks)
    return grey, lung, inside


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


def prepare(folder: Path) -> Slices:
    """Read all slices of a data set in the layout of mosmed-mid."""
    from covtanet.data.datasets import read_volumes
    from covtanet.errors import StudyError

    volumes = read_volumes("mosmed-mid", str(folder))
    accepted, arrays, refused = [], [], []
    for volume in volumes:
        try:
            arrays.append(read_slice(volume, (folder / volume.volume_path).read_bytes()))
        except StudyError as error:
            print(f"{volume.patient}: {error.reason}, {error}")
            refused.append(volume.patient)
            continue
        accepted.append(volume)
    grey, lung, inside = (np.stack(part) for part in zip(*arrays, strict=True))
    folds = folds_of(accepted)
    return Slices(
        names=np.array([volume.patient for volume in accepted]),
        grades=np.array([grade_of(volume.diagnosis, volume.severity) for volume in accepted]),
        folds=np.array([folds[volume.patient] for volume in accepted]),
        grey=grey,
        lung=lung,
        inside=inside,
        refused=tuple(refused),
    )


def main() -> int:
    """Write the file and print what it holds."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--data", type=Path, required=True)
    options.add_argument("--out", type=Path, required=True)
    arguments = options.parse_args()
    slices = prepare(arguments.data)
    write(arguments.out, slices)
    size = arguments.out.stat().st_size / 2**20
    print(f"{len(slices.names)} slices, {len(slices.refused)} refused, {size:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
