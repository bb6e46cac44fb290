"""Prepare the slices of mosmed-mid that diagnosis_gpu.py reads: one file, no Ray.

python -m benchmarks.diagnosis_data --data DIR --out FILE.npz

Each slice is cropped to the box of its lungs with some context for shifts, in HU of the window, and
stored as JPEG. Folds are those of a training of five folds with seed 0. A slice whose lungs are not
found is counted and stored by name alone.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.diagnosis_slices import BOX_PX, CANVAS_PX, NUM_FOLDS, Slices, write
from covtanet.ct.lung import find_lungs
from covtanet.ct.lung_box import SliceBox, lung_box
from covtanet.ct.window import WindowConfig, mask_to_input, to_input
from covtanet.data.datasets import read_volumes
from covtanet.data.folds import Case, assign_folds
from covtanet.data.labels import LabelledVolume, grade_of
from covtanet.data.source import read_source
from covtanet.errors import StudyError

WINDOW = WindowConfig(low_hu=-1250.0, high_hu=250.0, size_px=CANVAS_PX)
SEED = 0


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
    image = replace(volume, lesion_mask_path=None)
    ct = read_source(image, {volume.volume_path: data}).ct
    lungs = find_lungs(ct)
    box = with_context(lung_box(lungs.lung_mask))
    intensity = to_input(ct.hu, WINDOW, box=box)[0]
    # 0..65535 to 0..255.
    grey = np.rint(intensity / 257.0).astype(np.uint8)
    masks = (lungs.lung_mask, lungs.lung_mask | lungs.cavity_mask)
    lung, inside = (mask_to_input(mask, WINDOW, box=box)[0] > 0 for mask in masks)
    return grey, lung, inside


def prepare(folder: Path) -> Slices:
    """Read all slices of a data set in the layout of mosmed-mid."""
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
