"""Rows of an evaluation: a model's predictions of labelled volumes, with their truth.

One row per volume, from which every metric follows. Pixels are counted in the grid of the source
as screening would measure them (``evaluation.deployed``), or, for grey values without a line to HU
and joined single slices, at the network's input size (``evaluate_prepared``).
"""

from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from covtanet.ct.masks import Mask
from covtanet.ct.window import WindowConfig
from covtanet.data.prepared import PreparedVolume, Samples
from covtanet.inference.predictor import Prediction, VolumePredictor
from covtanet.inference.quantization import PROBABILITY_STEPS
from covtanet.model.description import Readout

Row = dict[str, Any]

COUNTS = ("tp", "fp", "fn", "tn")
# Without the lung mask.
UNMASKED_COUNTS = tuple(f"{name}_unmasked" for name in COUNTS)
# Grids in which pixels are counted.
SOURCE_GRID = "source"
INPUT_GRID = "input"
EVALUATION_SCHEMA = pa.schema([
    pa.field("volume", pa.string(), nullable=False),
    pa.field("patient", pa.string()),
    pa.field("source_digest", pa.string()),
    pa.field("network", pa.string(), nullable=False),
    pa.field("fold", pa.int32()),
    pa.field("grade", pa.string()),
    # Grid of the counts: source or input.
    pa.field("grid", pa.string()),
    # Code by which screening would reject the volume; its true lesion then counts as missed.
    pa.field("reason", pa.string()),
    pa.field("p_infected", pa.float32()),
    pa.field("p_severe", pa.float32()),
    # Predicted, as screening measures it.
    pa.field("involvement", pa.float32()),
    pa.field("slice", pa.list_(pa.int32()), nullable=False),
    # By slice: with the lung mask of screening in the source's grid, without it at the input size.
    *(pa.field(name, pa.list_(pa.int32())) for name in COUNTS),
    # By slice without the lung mask; null at the input size.
    *(pa.field(name, pa.list_(pa.int32())) for name in UNMASKED_COUNTS),
])  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class EvaluatedModel:
    """A model that is ready to run, and how its input is made and its output is read."""

    predictor: VolumePredictor
    window: WindowConfig
    readout: Readout
    slice_step_mm: float
    """Smallest distance of the slices that it reads."""
    segments: bool = True
    """The network marks lesions; else no pixels are counted."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One volume's row, and its slices with predicted and true lesion for a picture.

    Arrays are (S, H, W) of the row's slices; the masks are null without a lesion mask.
    """

    row: Row
    intensity: NDArray[np.uint16]
    lesion_mask: Mask | None = None
    truth: Mask | None = None


def new_row(volume: PreparedVolume, network: str, fold: int | None, grid: str) -> Row:
    """Return a volume's row without any prediction."""
    return {
        **dict.fromkeys(EVALUATION_SCHEMA.names),
        "volume": volume.key,
        "patient": volume.patient,
        "source_digest": volume.source_digest,
        "network": network,
        "fold": fold,
        "grade": volume.grade,
        "grid": grid,
        "slice": [],
    }


def evaluate_prepared(
    model: EvaluatedModel, row: Row, volume: PreparedVolume, samples: Samples
) -> Evaluation:
    """Predict one prepared volume and count pixels per slice at the network's input size.

    For values of which no lungs are found. row: that of ``new_row``. Single slices have neither
    neighbours nor a diagnosis.
    """
    if volume.is_continuous:
        prediction = model.predictor.predict(samples.levels)
    else:
        prediction = _predict_single(model.predictor, samples.levels)
    row = {
        **row,
        "p_infected": prediction.p_infected,
        "p_severe": prediction.p_severe,
        "slice": list(volume.slices),
    }
    if samples.lesion is None or not model.segments:
        return Evaluation(row=row, intensity=samples.levels)
    threshold = np.float32(model.readout.lesion_threshold * PROBABILITY_STEPS)
    # (S, H, W) bool
    lesion_mask = prediction.lesion_levels >= threshold
    truth = samples.lesion > 0
    return Evaluation(
        row=row | count_pixels(lesion_mask, truth, COUNTS),
        intensity=samples.levels,
        lesion_mask=lesion_mask,
        truth=truth,
    )


def _predict_single(predictor: VolumePredictor, slices: NDArray[np.uint16]) -> Prediction:
    """Predict slices of several patients one by one, so that none is the neighbour of another."""
    maps = [predictor.predict(slices[index, None]).lesion_levels for index in range(len(slices))]
    return Prediction(lesion_levels=np.concatenate(maps), p_infected=None, p_severe=None)


def count_pixels(predicted: Mask, truth: Mask, names: tuple[str, ...]) -> dict[str, list[int]]:
    """Return TP, FP, FN and TN of each slice under these names. Both masks: (S, H, W)."""
    pairs = (predicted & truth, predicted & ~truth, ~predicted & truth, ~predicted & ~truth)
    # (S, H, W) -> (S,)
    sums = [pair.sum(axis=(1, 2)).tolist() for pair in pairs]
    return dict(zip(names, sums, strict=True))


def to_parquet(rows: list[Row]) -> bytes:
    """Return rows as one file, in the order of their volumes."""
    buffer = BytesIO()
    # Sorted, so that equal evaluations give equal files.
    ordered = sorted(rows, key=lambda row: row["volume"])
    pq.write_table(pa.Table.from_pylist(ordered, schema=EVALUATION_SCHEMA), buffer)
    return buffer.getvalue()


def from_parquet(data: bytes) -> list[Row]:
    """Return the rows that ``to_parquet`` wrote; columns that an older version lacks are null."""
    rows: list[Row] = pq.read_table(BytesIO(data)).to_pylist()
    return [dict.fromkeys(EVALUATION_SCHEMA.names) | row for row in rows]
