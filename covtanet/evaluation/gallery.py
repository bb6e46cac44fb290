"""Best, median and worst slices of a training's test parts, its networks side by side (Fig. 8).

Slices are ranked by the counts of their rows, and drawn as they were prepared, at the network's
input size and without the lung mask.
"""

import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from covtanet import drawing, storage
from covtanet.ct.window import with_neighbours
from covtanet.data import prepared_file
from covtanet.data.counts import Counts
from covtanet.evaluation.rows import COUNTS
from covtanet.inference.chunks import SliceChunk
from covtanet.inference.predictor import Predictor
from covtanet.inference.quantization import PROBABILITY_STEPS
from covtanet.model.model_files import fetch_model
from covtanet.model.saved_model import SavedModel, load_model

Row = dict[str, Any]
# Smaller lesions are left out: a handful of pixels says more about the outline's width than about
# a network.
MIN_LESION_PX = 50
# Quantiles of the ranked slices.
RANKS = {"best": 1.0, "median": 0.5, "worst": 0.0}


class Example(NamedTuple):
    """A slice of a test volume, and the Dice of the network it was ranked by."""

    volume: str
    fold: int
    slice_index: int
    """In the volume."""
    dice: float


class LabelledSlice(NamedTuple):
    """One slice with its neighbours in z, (3, H, W), and its lesion mask (H, W)."""

    neighbours: NDArray[np.uint16]
    lesion_mask: NDArray[np.bool_]


def choose(
    rows: Sequence[Row], prepared_slices: Mapping[str, Sequence[int]] | None = None
) -> dict[str, Example]:
    """Return the best, median and worst slice of one network's rows, by Dice.

    prepared_slices: indices of the slices that can be drawn, by volume; null for all slices. Empty
    if no lesion is large enough.
    """
    ranked = []
    for row in rows:
        if row["tp"] is not None:
            drawable = None if prepared_slices is None else prepared_slices[row["volume"]]
            ranked += _examples(row, drawable)
    if not ranked:
        return {}
    ranked.sort(key=lambda example: (example.dice, example.volume, example.slice_index))
    return {name: ranked[round(share * (len(ranked) - 1))] for name, share in RANKS.items()}


def _examples(row: Row, drawable: Sequence[int] | None) -> list[Example]:
    tp, fp, fn, tn = (np.array(row[name], np.float64) for name in COUNTS)
    indices = np.array(row["slice"], np.int64)
    is_large = tp + fn >= MIN_LESION_PX
    if drawable is not None:
        is_large &= np.isin(indices, drawable)
    positions = np.flatnonzero(is_large)
    numerator, denominator = Counts(tp, fp, fn, tn).fractions()["dice"]
    dice = numerator[positions] / denominator[positions]
    return [
        Example(row["volume"], row["fold"], int(index), float(value))
        for index, value in zip(indices[positions], dice, strict=True)
    ]


def side_by_side(
    rows: Sequence[Row], leader: str, models: Mapping[tuple[str, int], str], prepared_uri: str
) -> bytes:
    """Return a picture, a line per chosen slice and a column per network; empty without slices.

    leader: the network whose Dice ranks the slices, of the folds that all networks have, if there
    are any. models: URI of the saved model of a network's fold.
    """
    names = [leader, *sorted({row["network"] for row in rows if row["tp"] is not None} - {leader})]
    leading = [row for row in rows if row["network"] == leader and row["tp"] is not None]
    examples = _choose_shared(leading, names, models, prepared_uri)
    slices = {rank: _read(prepared_uri, example) for rank, example in examples.items()}
    tiles = _predicted_tiles(names, models, examples, slices)
    if not tiles:
        return b""
    captions = {rank: f"{rank}, Dice {example.dice:.2f}" for rank, example in examples.items()}
    for rank, (neighbours, truth) in slices.items():
        tiles[rank, "truth"] = drawing.errors_of(neighbours[1], truth, truth)
    return drawing.grid(captions, ["truth", *names], tiles)


def _choose_shared(
    rows: Sequence[Row],
    names: Sequence[str],
    models: Mapping[tuple[str, int], str],
    prepared_uri: str,
) -> dict[str, Example]:
    volumes = [row["volume"] for row in rows]
    slices = {volume: _prepared_slices(prepared_uri, volume) for volume in volumes}
    shared = [row for row in rows if all((name, row["fold"]) in models for name in names)]
    return choose(shared, slices) or choose(rows, slices)


def _prepared_slices(prepared_uri: str, volume: str) -> tuple[int, ...]:
    data = storage.read_bytes(prepared_file.description_uri(prepared_uri, volume))
    return prepared_file.from_json(data).slices


def _predicted_tiles(
    names: Sequence[str],
    models: Mapping[tuple[str, int], str],
    examples: Mapping[str, Example],
    slices: Mapping[str, LabelledSlice],
) -> dict[tuple[str, str], NDArray[np.uint8]]:
    """Return a tile by rank and network. Every model is loaded once."""
    by_fold: dict[int, list[str]] = defaultdict(list)
    for rank, example in examples.items():
        by_fold[example.fold].append(rank)
    tiles: dict[tuple[str, str], NDArray[np.uint8]] = {}
    for fold, ranks in by_fold.items():
        for name in names:
            if (name, fold) not in models:
                continue
            model = _load(models[name, fold])
            predictor = Predictor(model, engine="eager")
            threshold = np.float32(model.readout.lesion_threshold * PROBABILITY_STEPS)
            reach = predictor.num_neighbours
            for rank in ranks:
                neighbours, truth = slices[rank]
                # (1, 1 + 2 reach, H, W), with the slice itself in the middle
                channels = neighbours[None, 1 - reach : 2 + reach]
                (segmented,) = predictor.segment([SliceChunk(channels, [])])
                predicted = segmented.lesion_levels[0] >= threshold
                tiles[rank, name] = drawing.errors_of(neighbours[1], predicted, truth)
    return tiles


def _read(prepared_uri: str, example: Example) -> LabelledSlice:
    data = storage.read_bytes(prepared_file.file_uri(prepared_uri, example.volume))
    samples = prepared_file.read_samples(data)
    assert samples.lesion is not None
    position = prepared_file.describe(data).slices.index(example.slice_index)
    lesion_mask = samples.lesion[position] > 0
    (neighbours,) = with_neighbours(samples.levels, np.array([position]), 1)
    return LabelledSlice(neighbours, lesion_mask)


def _load(uri: str) -> SavedModel:
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "model"
        fetch_model(target, partial(storage.download_files, uri, target=target))
        return load_model(Path(folder) / "model")
