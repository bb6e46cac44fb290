"""Rows of an evaluation: a model's predictions of prepared volumes, with their truth.

One row per volume, from which every metric follows.
"""

from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from covtanet.data.prepared import PreparedVolume, Samples
from covtanet.inference.predictor import Predictor
from covtanet.inference.quantization import PROBABILITY_STEPS

# A probability of one half.
THRESHOLD = PROBABILITY_STEPS // 2

COUNTS = ("tp", "fp", "fn", "tn")
EVALUATION_SCHEMA = pa.schema([
    pa.field("volume", pa.string(), nullable=False),
    pa.field("source_digest", pa.string()),
    pa.field("network", pa.string(), nullable=False),
    pa.field("fold", pa.int32()),
    pa.field("grade", pa.string()),
    pa.field("p_infected", pa.float32()),
    pa.field("p_severe", pa.float32()),
    pa.field("slice", pa.list_(pa.int32()), nullable=False),
    *(pa.field(name, pa.list_(pa.int32())) for name in COUNTS),
])  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One volume's row, and its predicted lesion mask."""

    row: dict[str, Any]
    lesion_mask: NDArray[np.bool_]
    """(S, H, W), at the network's input size."""


def evaluate_volume(
    predictor: Predictor,
    volume: PreparedVolume,
    samples: Samples,
    network: str,
    fold: int | None,
    *,
    diagnoses: bool,
    segments: bool = True,
) -> Evaluation:
    """Predict one prepared volume and count pixels per slice at the network's input size.

    diagnoses: phase 2 was trained; else both probabilities are null. segments: the network marks
    lesions; else no pixels are counted.
    """
    prediction = predictor.predict(samples.levels)
    # (S, H, W) bool
    lesion_mask = prediction.lesion_levels >= THRESHOLD
    row: dict[str, Any] = {
        "volume": volume.key,
        "source_digest": volume.source_digest,
        "network": network,
        "fold": fold,
        "grade": volume.grade,
        "p_infected": prediction.p_infected if diagnoses else None,
        "p_severe": prediction.p_severe if diagnoses else None,
        "slice": list(volume.slices),
        **dict.fromkeys(COUNTS),
    }
    if samples.lesion is not None and segments:
        row |= _count_pixels(lesion_mask, samples.lesion > 0)
    return Evaluation(row=row, lesion_mask=lesion_mask)


def _count_pixels(predicted: NDArray[np.bool_], truth: NDArray[np.bool_]) -> dict[str, list[int]]:
    """Return TP, FP, FN and TN of each slice. Both masks: (S, H, W)."""
    pairs = (predicted & truth, predicted & ~truth, ~predicted & truth, ~predicted & ~truth)
    # (S, H, W) -> (S,)
    sums = [pair.sum(axis=(1, 2)).tolist() for pair in pairs]
    return dict(zip(COUNTS, sums, strict=True))


def to_parquet(rows: list[dict[str, Any]]) -> bytes:
    """Return rows as one file, in the order of their volumes."""
    buffer = BytesIO()
    # Sorted, so that equal evaluations give equal files.
    ordered = sorted(rows, key=lambda row: row["volume"])
    pq.write_table(pa.Table.from_pylist(ordered, schema=EVALUATION_SCHEMA), buffer)
    return buffer.getvalue()


def from_parquet(data: bytes) -> list[dict[str, Any]]:
    """Return the rows that ``to_parquet`` wrote."""
    rows: list[dict[str, Any]] = pq.read_table(BytesIO(data)).to_pylist()
    return rows
