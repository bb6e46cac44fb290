"""Labelled volumes for training: what a data set says of each, and the validation split."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from covtanet import storage
from covtanet.errors import ConfigError

LABELS_SCHEMA = pa.schema([
    pa.field("volume_path", pa.string(), nullable=False),
    pa.field("lesion_mask_path", pa.string()),
    pa.field("patient", pa.string(), nullable=False),
    pa.field("diagnosis", pa.string(), nullable=False),
    pa.field("severity", pa.string()),
])  # fmt: skip
GRADES = ("normal", "mild", "severe")


@dataclass(frozen=True, kw_only=True)
class LabelledVolume:
    """One NIfTI volume with its truth. Paths are relative to the data set; severity is null for a normal one."""

    volume_path: str
    lesion_mask_path: str | None
    patient: str
    diagnosis: str
    severity: str | None

    def __post_init__(self) -> None:
        if self.grade not in GRADES or (self.diagnosis == "normal") != (self.severity is None):
            raise ConfigError(f"label {self.diagnosis}/{self.severity}, expected normal, infected/mild or /severe")

    @property
    def grade(self) -> str:
        """Normal, mild or severe."""
        return self.severity or self.diagnosis


def write_labels(uri: str, volumes: Iterable[LabelledVolume]) -> None:
    """Write a data set's labels as Parquet."""
    table = pa.Table.from_pylist([vars(volume) for volume in volumes], schema=LABELS_SCHEMA)
    buffer = BytesIO()
    pq.write_table(table, buffer)
    storage.write_bytes(uri, buffer.getvalue())


def read_labels(uri: str) -> list[LabelledVolume]:
    """Read a data set's labels.

    Raises:
        ConfigError: where columns are missing or a label is none of ours.
    """
    table = pq.read_table(BytesIO(storage.read_bytes(uri)))
    missing = set(LABELS_SCHEMA.names) - set(table.column_names)
    if missing:
        raise ConfigError(f"the labels have no column {sorted(missing)[0]}, expected {', '.join(LABELS_SCHEMA.names)}")
    return [LabelledVolume(**row) for row in table.select(LABELS_SCHEMA.names).to_pylist()]


def digest(volumes: Sequence[LabelledVolume]) -> str:
    """SHA-256 over all labels, in whatever order they come."""
    lines = sorted(repr(sorted(vars(volume).items())) for volume in volumes)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def split_validation(
    volumes: Sequence[LabelledVolume], share: float, seed: int
) -> tuple[list[LabelledVolume], list[LabelledVolume]]:
    """Training and validation volumes, split by patient within each grade; independent of the volumes' order."""
    by_patient: dict[str, list[LabelledVolume]] = defaultdict(list)
    for volume in volumes:
        by_patient[volume.patient].append(volume)
    by_grade: dict[str, list[str]] = defaultdict(list)
    for patient, own in by_patient.items():
        by_grade[max((volume.grade for volume in own), key=GRADES.index)].append(patient)
    chosen: set[str] = set()
    for patients in by_grade.values():
        ranked = sorted(patients, key=lambda patient: hashlib.sha256(f"{seed}:{patient}".encode()).digest())
        chosen.update(ranked[: round(share * len(ranked))])
    parts: tuple[list[Any], list[Any]] = ([], [])
    for volume in sorted(volumes, key=lambda volume: volume.volume_path):
        parts[volume.patient in chosen].append(volume)
    return parts
