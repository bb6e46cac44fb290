"""What a data set holds before anything is trained on it: counts, grades, spacings, refusals, known traps."""

from collections import Counter
from collections.abc import Sequence
from io import BytesIO
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from covtanet.data.prepared import PreparedVolume
from covtanet.report.summary import table

REPORT_SCHEMA = pa.schema([
    pa.field("key", pa.string(), nullable=False),
    pa.field("volume_path", pa.string(), nullable=False),
    pa.field("patient", pa.string(), nullable=False),
    pa.field("grade", pa.string()),
    pa.field("intensity", pa.string(), nullable=False),
    pa.field("reason", pa.string()),
    pa.field("reason_detail", pa.string()),
    pa.field("num_slices", pa.int32()),
    pa.field("num_prepared_slices", pa.int32(), nullable=False),
    pa.field("num_lesion_slices", pa.int32()),
    pa.field("spacing_z_mm", pa.float64()),
    pa.field("spacing_y_mm", pa.float64()),
    pa.field("spacing_x_mm", pa.float64()),
    pa.field("involvement", pa.float64()),
    pa.field("source_digest", pa.string()),
])  # fmt: skip


def as_parquet(volumes: Sequence[PreparedVolume]) -> bytes:
    """One row per volume, refused ones with their reason. Holds paths and patients: it stays with the data."""
    buffer = BytesIO()
    pq.write_table(
        pa.Table.from_pylist([_row(volume) for volume in volumes], schema=REPORT_SCHEMA), buffer
    )
    return buffer.getvalue()


def _row(volume: PreparedVolume) -> dict[str, Any]:
    z, y, x = volume.spacing_mm or (None, None, None)
    kept = {name: getattr(volume, name) for name in REPORT_SCHEMA.names if hasattr(volume, name)}
    return {
        **kept,
        "num_prepared_slices": len(volume.slices),
        "num_lesion_slices": None
        if volume.lesion_px is None
        else sum(pixels > 0 for pixels in volume.lesion_px),
        "spacing_z_mm": z,
        "spacing_y_mm": y,
        "spacing_x_mm": x,
    }


def as_text(volumes: Sequence[PreparedVolume], notes: Sequence[str]) -> str:
    """The report for people; names nobody."""
    sound = [volume for volume in volumes if not volume.reason]
    masked = [volume for volume in sound if volume.lesion_px is not None]
    lines = [
        ("volumes", f"{len(volumes)} of {len({volume.patient for volume in volumes})} patients"),
        ("refused", str(len(volumes) - len(sound))),
        *[
            (f"  {reason}", str(count))
            for reason, count in Counter(v.reason for v in volumes if v.reason).items()
        ],
        *[
            (f"grade {grade or 'unknown'}", str(count))
            for grade, count in _sorted(v.grade for v in sound)
        ],
        ("with lesion masks", str(len(masked))),
        *[
            (f"  grade {grade or 'unknown'}", str(count))
            for grade, count in _sorted(v.grade for v in masked)
        ],
        (
            "slices with lesion",
            f"{sum(p > 0 for v in masked for p in v.lesion_px or ())} of {_slices(masked)}",
        ),
        *[(f"intensity {kind}", str(count)) for kind, count in _sorted(v.intensity for v in sound)],
        ("spacing z, y, x", _spacing(sound)),
    ]
    text = table("Data", lines)
    return "\n".join([text, *(f"note: {note}" for note in notes)])


def _sorted(values: Any) -> list[tuple[str | None, int]]:
    return sorted(Counter(values).items(), key=lambda item: str(item[0]))


def _slices(volumes: Sequence[PreparedVolume]) -> int:
    return sum(len(volume.slices) for volume in volumes)


def _spacing(volumes: Sequence[PreparedVolume]) -> str:
    known = np.array([volume.spacing_mm for volume in volumes if volume.spacing_mm])
    if not len(known):
        return "unknown"
    low, high = known.min(axis=0), known.max(axis=0)
    spans = ", ".join(f"{a:.2f}-{b:.2f}" for a, b in zip(low, high, strict=True))
    return f"{spans} mm ({len(volumes) - len(known)} unknown)"
