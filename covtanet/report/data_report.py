"""Report of a data set before training: counts, grades, spacings, refusals, known traps."""

from collections import Counter
from collections.abc import Iterable, Sequence
from io import BytesIO
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from covtanet.data.prepared import PreparedVolume
from covtanet.report.summary import table

Line = tuple[str, str]

REPORT_SCHEMA = pa.schema(
    [
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
    ]
)


def as_parquet(volumes: Sequence[PreparedVolume]) -> bytes:
    """Return one row per volume as Parquet, refused volumes with their reason.

    The file names paths and patients, so it stays with the data.
    """
    rows = [_row(volume) for volume in volumes]
    buffer = BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=REPORT_SCHEMA), buffer)
    return buffer.getvalue()


def _row(volume: PreparedVolume) -> dict[str, Any]:
    z, y, x = volume.spacing_mm or (None, None, None)
    same = [name for name in REPORT_SCHEMA.names if hasattr(volume, name)]
    return {
        **{name: getattr(volume, name) for name in same},
        "num_prepared_slices": len(volume.slices),
        "num_lesion_slices": None if volume.lesion_px is None else _num_lesion_slices(volume),
        "spacing_z_mm": z,
        "spacing_y_mm": y,
        "spacing_x_mm": x,
    }


def as_text(volumes: Sequence[PreparedVolume], notes: Sequence[str]) -> str:
    """Return the report as plain text, which names no patient."""
    accepted = [volume for volume in volumes if not volume.reason]
    refused = [volume for volume in volumes if volume.reason]
    masked = [volume for volume in accepted if volume.lesion_px is not None]
    num_patients = len({volume.patient for volume in volumes})
    num_slices = sum(len(volume.slices) for volume in masked)
    num_lesion_slices = sum(_num_lesion_slices(volume) for volume in masked)
    lines: list[Line] = [
        ("volumes", f"{len(volumes)} of {num_patients} patients"),
        ("refused", str(len(refused))),
        *_reasons(refused),
        *_counts("grade", (volume.grade for volume in accepted)),
        ("with lesion masks", str(len(masked))),
        *_counts("  grade", (volume.grade for volume in masked)),
        ("slices with lesion", f"{num_lesion_slices} of {num_slices}"),
        *_counts("intensity", (volume.intensity for volume in accepted)),
        ("spacing z, y, x", _spacing(accepted)),
    ]
    return "\n".join([table("Data", lines), *(f"note: {note}" for note in notes)])


def _num_lesion_slices(volume: PreparedVolume) -> int:
    return sum(num_pixels > 0 for num_pixels in volume.lesion_px or ())


def _reasons(refused: Sequence[PreparedVolume]) -> list[Line]:
    counts = Counter(volume.reason for volume in refused)
    return [(f"  {reason}", str(count)) for reason, count in counts.items()]


def _counts(name: str, values: Iterable[str | None]) -> list[Line]:
    counts = sorted(Counter(values).items(), key=lambda item: str(item[0]))
    return [(f"{name} {value or 'unknown'}", str(count)) for value, count in counts]


def _spacing(volumes: Sequence[PreparedVolume]) -> str:
    spacings = np.array([volume.spacing_mm for volume in volumes if volume.spacing_mm])
    if not len(spacings):
        return "unknown"
    low, high = spacings.min(axis=0), spacings.max(axis=0)
    spans = ", ".join(f"{a:.2f}-{b:.2f}" for a, b in zip(low, high, strict=True))
    return f"{spans} mm ({len(volumes) - len(spacings)} unknown)"
