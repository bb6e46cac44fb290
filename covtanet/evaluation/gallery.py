"""Best, median and worst slices of a training's test parts, all its networks side by side (in the manner of Fig. 8)."""

import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from covtanet import drawing as overlay
from covtanet import storage
from covtanet.data import prepared
from covtanet.evaluation.rows import COUNTS, THRESHOLD
from covtanet.inference.predictor import Part, Predictor
from covtanet.model.checkpoint import MODEL_FILES, load_model

Row = dict[str, Any]
# Smaller lesions are left out: a handful of pixels says more about the outline's width than about a network.
MIN_LESION_PX = 50
RANKS = {"best": 1.0, "median": 0.5, "worst": 0.0}


class Shown(NamedTuple):
    """A slice of a test volume: its place among the prepared slices, and the Dice of the network it was ranked by."""

    volume: str
    fold: int
    position: int
    dice: float


def choose(rows: Sequence[Row]) -> dict[str, Shown]:
    """Best, median and worst slice of one network's rows, by Dice; empty where no lesion is large enough."""
    ranked = []
    for row in rows:
        if row["tp"] is None:
            continue
        tp, fp, fn, _ = (np.array(row[name], np.int64) for name in COUNTS)
        for position in np.flatnonzero(tp + fn >= MIN_LESION_PX):
            dice = 2 * tp[position] / (2 * tp[position] + fp[position] + fn[position])
            ranked.append(Shown(row["volume"], row["fold"], int(position), float(dice)))
    ranked.sort(key=lambda shown: (shown.dice, shown.volume, shown.position))
    return (
        {name: ranked[round(share * (len(ranked) - 1))] for name, share in RANKS.items()}
        if ranked
        else {}
    )


def side_by_side(
    rows: Sequence[Row], leader: str, models: Mapping[tuple[str, int], str], prepared_uri: str
) -> bytes:
    """A picture, a line per chosen slice and a column per network; no bytes where there is nothing to show.

    leader: the network whose Dice ranks the slices, of the folds that all networks have, if there are such. models: URI
    of the saved model of a network's fold.
    """
    names = [leader, *sorted({row["network"] for row in rows if row["tp"] is not None} - {leader})]
    own = [row for row in rows if row["network"] == leader]
    chosen = choose(
        [row for row in own if all((name, row["fold"]) in models for name in names)]
    ) or choose(own)
    by_fold: dict[int, list[str]] = defaultdict(list)
    for rank, shown in chosen.items():
        by_fold[shown.fold].append(rank)
    slices = {rank: _read(prepared_uri, shown) for rank, shown in chosen.items()}
    tiles: dict[tuple[str, str], NDArray[np.uint8]] = {}
    for fold, ranks in by_fold.items():
        for name in names:
            if (name, fold) not in models:
                continue
            predictor = _load(models[name, fold])
            for rank in ranks:
                level, truth = slices[rank]
                (segmented,) = predictor.segment([Part(level[None], [])])
                found = segmented.lesion_levels[0] >= THRESHOLD
                tiles[rank, name] = overlay.errors_of(level, found, truth)
    if not tiles:
        return b""
    captions = {rank: f"{rank}, Dice {shown.dice:.2f}" for rank, shown in chosen.items()}
    for rank, (level, truth) in slices.items():
        tiles[rank, "truth"] = overlay.errors_of(level, truth, truth)
    return overlay.grid(captions, ["truth", *names], tiles)


def _read(prepared_uri: str, shown: Shown) -> tuple[NDArray[np.uint16], NDArray[np.bool_]]:
    samples = prepared.read_samples(
        storage.read_bytes(storage.join(prepared_uri, f"{shown.volume}.parquet"))
    )
    assert samples.lesion is not None
    return samples.levels[shown.position], samples.lesion[shown.position] > 0


def _load(uri: str) -> Predictor:
    with tempfile.TemporaryDirectory() as folder:
        storage.download_files(uri, MODEL_FILES, Path(folder) / "model")
        return Predictor(load_model(Path(folder) / "model"), engine="eager")
