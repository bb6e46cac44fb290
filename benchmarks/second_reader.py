"""Agreement of two readers on the same scans, slice by slice: the ceiling of a segmenter's Dice.

python -m benchmarks.second_reader --images DIR --masks DIR --second-images DIR --second-masks DIR
    --stack NAME SECOND_NAME [--stack ...] [--rows FOLDER/rows.parquet]

Masks are named as for ``covtanet evaluate``. The second stack may hold some of the slices only,
flipped in plane and with another contrast: slices are matched by the structure of their images, and
compared in the grid that both share. --rows: those of ``covtanet evaluate`` on the first images and
masks; the model is then measured on the same slices. Not covered: stacks of another size or
spacing.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from covtanet.ct.masks import Mask
from covtanet.data.labels import LabelledVolume
from covtanet.data.source import SourceVolume, paths_of, read_source
from covtanet.data.stacks import pair
from covtanet.errors import ConfigError
from covtanet.evaluation import rows
from covtanet.evaluation.overlap import overlap
from covtanet.inference.segmenter import FLIPS

# Pixels per block: neighbouring pixels are alike, and the correlation of all slices takes seconds.
BLOCK_PX = 2
# Widths of Gaussians in blocks: structure finer than the first, relative to its strength within the
# second, survives a local equalisation of the contrast.
FINE_BLOCKS = 3.0
LOCAL_BLOCKS = 6.0
# Keeps noise in flat regions, of a few grey values, from counting as structure.
FLAT_GREY = 2.0
# Measured on two stacks with their equalised copies: 0.73 to 0.86 for the right slice, at most 0.51
# in a wrong orientation.
MIN_CORRELATION = 0.6


@dataclass(frozen=True, kw_only=True)
class Match:
    """Slices of two stacks that show the same."""

    axes: tuple[int, ...]
    """Axes of the second stack's slices that are flipped."""
    first: NDArray[np.intp]
    """(M,), indices in the first stack."""
    second: NDArray[np.intp]
    """(M,), indices in the second stack."""


def match_slices(first: NDArray[Any], second: NDArray[Any]) -> Match:
    """Return which slices of two stacks show the same, each at most once.

    first, second: grey values (S, y, x) with the same y and x.

    Raises:
        ConfigError: the slices have other sizes.
    """
    if first.shape[1:] != second.shape[1:]:
        raise ConfigError(f"slices of {second.shape[1:]} pixels, expected {first.shape[1:]}")
    structure = _structure(first)
    # (second slices, first slices) for each orientation
    correlations = [_structure(np.flip(second, axes)) @ structure.T for axes in FLIPS]
    best = max(range(len(FLIPS)), key=lambda index: np.median(correlations[index].max(axis=1)))
    nearest = correlations[best].argmax(axis=1)
    is_match = correlations[best].max(axis=1) >= MIN_CORRELATION
    # Neighbours that both look most like one slice are not told apart, and left out.
    counts = np.bincount(nearest[is_match], minlength=len(first))
    chosen = np.flatnonzero(is_match & (counts[nearest] == 1))
    return Match(axes=FLIPS[best], first=nearest[chosen], second=chosen)


def _structure(slices: NDArray[Any]) -> NDArray[np.float32]:
    """Return fine structure of each slice at unit norm, (S, pixels)."""
    num_slices, height, width = slices.shape
    rows = height // BLOCK_PX
    columns = width // BLOCK_PX
    cut = slices[:, : rows * BLOCK_PX, : columns * BLOCK_PX].astype(np.float32)
    blocks = cut.reshape(num_slices, rows, BLOCK_PX, columns, BLOCK_PX).mean(axis=(2, 4))
    fine = blocks - ndimage.gaussian_filter(blocks, (0, FINE_BLOCKS, FINE_BLOCKS))
    strength = ndimage.gaussian_filter(fine**2, (0, LOCAL_BLOCKS, LOCAL_BLOCKS))
    structure = (fine / (np.sqrt(strength) + FLAT_GREY)).reshape(num_slices, -1)
    structure -= structure.mean(axis=1, keepdims=True)
    norm: NDArray[np.float32] = np.linalg.norm(structure, axis=1, keepdims=True)
    # A flat slice has no structure and correlates with no slice.
    return np.asarray(structure / np.maximum(norm, 1e-6))


def compare_readers(first: SourceVolume, second: SourceVolume, match: Match) -> NDArray[np.int64]:
    """Return pixels that both readers mark, the second alone and the first alone, (M, 3)."""
    assert first.lesion is not None
    assert second.lesion is not None
    ours: Mask = first.lesion[match.first]
    theirs: Mask = np.flip(second.lesion, match.axes)[match.second]
    pairs = (ours & theirs, theirs & ~ours, ours & ~theirs)
    return np.stack([marked.sum(axis=(1, 2)) for marked in pairs], axis=1).astype(np.int64)


def counts_of_model(row: dict[str, Any], match: Match) -> NDArray[np.int64]:
    """Return TP, FP and FN of a model on the matched slices, (M, 3).

    row: that of the first stack. Slices on which screening finds neither lung nor lesion have none.
    """
    by_slice = dict(
        zip(row["slice"], zip(row["tp"], row["fp"], row["fn"], strict=True), strict=True)
    )
    return np.array([by_slice.get(index, (0, 0, 0)) for index in match.first.tolist()], np.int64)


def read_stacks(images: str, masks: str) -> dict[str, LabelledVolume]:
    """Return the stacks of a folder by name."""
    return {volume.patient: volume for volume in pair(images, masks)}


def read(volumes: dict[str, LabelledVolume], name: str) -> SourceVolume:
    """Return a stack with its lesion mask.

    Raises:
        ConfigError: the folder has no such stack.
    """
    if name not in volumes:
        raise ConfigError(f"no stack {name} with a mask, expected one of {', '.join(volumes)}")
    volume = volumes[name]
    return read_source(volume, {path: Path(path).read_bytes() for path in paths_of(volume)})


def main(argv: Sequence[str] | None = None) -> int:
    """Print the agreement of both readers as JSON."""
    options = argparse.ArgumentParser(description=__doc__)
    for name in ("--images", "--masks", "--second-images", "--second-masks"):
        options.add_argument(name, required=True)
    options.add_argument("--stack", nargs=2, action="append", required=True)
    options.add_argument("--rows", type=Path)
    arguments = options.parse_args(argv)
    first_stacks = read_stacks(arguments.images, arguments.masks)
    second_stacks = read_stacks(arguments.second_images, arguments.second_masks)
    model_rows = rows.from_parquet(arguments.rows.read_bytes()) if arguments.rows else []
    by_name = {row["patient"]: row for row in model_rows}
    readers = {}
    model = {}
    slices = {}
    for name, second_name in arguments.stack:
        first = read(first_stacks, name)
        second = read(second_stacks, second_name)
        match = match_slices(first.ct.hu, second.ct.hu)
        readers[name] = compare_readers(first, second, match)
        if name in by_name:
            model[name] = counts_of_model(by_name[name], match)
        slices[name] = describe(first, second, match)
    result = {"stacks": slices, "second_reader": overlap(readers)}
    if model:
        result["model"] = overlap(model)
    sys.stdout.write(json.dumps(result, indent=1) + "\n")
    return 0


def describe(first: SourceVolume, second: SourceVolume, match: Match) -> dict[str, Any]:
    """Return how many slices were matched, and how many that the first reader marks were not."""
    assert first.lesion is not None
    is_shared = np.isin(np.arange(len(first.ct.hu)), match.first)
    return {
        "num_slices": len(first.ct.hu),
        "num_second_slices": len(second.ct.hu),
        "num_matched": len(match.first),
        "flipped_axes": match.axes,
        "num_lesion_slices_unmatched": int(first.lesion[~is_shared].any(axis=(1, 2)).sum()),
    }


if __name__ == "__main__":
    sys.exit(main())
