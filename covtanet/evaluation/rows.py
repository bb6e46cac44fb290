"""A model's answers on prepared volumes beside their truth: one row per volume, from which every figure follows."""

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
class Answer:
    """One volume's row, and its predicted lesion mask (S, H, W) bool."""

    row: dict[str, Any]
    lesion_mask: NDArray[np.bool_]


def answer(
    predictor: Predictor,
    volume: PreparedVolume,
    samples: Samples,
    network: str,
    fold: int | None,
    *,
    diagnoses: bool,
    segments: bool = True,
) -> Answer:
    """Predict one prepared volume. diagnoses: whether phase 2 was trained; else both probabilities are null.

    segments: whether the network marks lesions; else no pixels are counted.

    Pixels are counted at the network's input size, per slice.
    """
    prediction = predictor.predict(samples.levels)
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
        truth = samples.lesion > 0
        pairs = (
            lesion_mask & truth,
            lesion_mask & ~truth,
            ~lesion_mask & truth,
            ~lesion_mask & ~truth,
        )
        row.update(
            {name: pair.sum(axis=(1, 2)).tolist() for name, pair in zip(COUNTS, pairs, strict=True)}
        )
    return Answer(row=row, lesion_mask=lesion_mask)


def to_parquet(rows: list[dict[str, Any]]) -> bytes:
    """Rows as one file, by volume."""
    buffer = BytesIO()
    ordered = sorted(rows, key=lambda row: row["volume"])
    pq.write_table(pa.Table.from_pylist(ordered, schema=EVALUATION_SCHEMA), buffer)
    return buffer.getvalue()


def from_parquet(data: bytes) -> list[dict[str, Any]]:
    """The inverse of ``to_parquet``."""
    rows: list[dict[str, Any]] = pq.read_table(BytesIO(data)).to_pylist()
    return rows
