"""Labelled volumes for training: what a data set says of each, as a manifest in CSV or Parquet.

A manifest has one row per volume. Only ``volume_path`` and ``patient`` are needed; the other columns may be left out.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from io import BytesIO

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from covtanet import storage
from covtanet.errors import ConfigError

LABELS_SCHEMA = pa.schema([
    pa.field("volume_path", pa.string(), nullable=False),
    pa.field("patient", pa.string(), nullable=False),
    pa.field("lesion_mask_path", pa.string()),
    pa.field("lung_mask_path", pa.string()),
    pa.field("lesion_labels", pa.string()),
    pa.field("lung_labels", pa.string()),
    pa.field("diagnosis", pa.string()),
    pa.field("severity", pa.string()),
    pa.field("intensity", pa.string()),
])  # fmt: skip
REQUIRED = ("volume_path", "patient")
GRADES = ("normal", "mild", "severe")
LABELS = (
    (None, None),
    ("normal", None),
    ("infected", None),
    ("infected", "mild"),
    ("infected", "severe"),
)
INTENSITIES = ("hu", "grey8", "auto")
SEVERE_INVOLVEMENT = 0.25


@dataclass(frozen=True, kw_only=True)
class LabelledVolume:
    """One NIfTI volume with its truth.

    Paths are absolute, or relative to the data set. lesion_labels, lung_labels: the mask's values that count, as
    ``2`` or ``1 2``; empty for every value above 0. diagnosis: ``normal``, ``infected``, or null where it follows from
    the masks. severity: ``mild`` or ``severe`` of an infected one, else null. intensity: ``hu``, or ``grey8`` for
    volumes that were windowed to 0..255 at their source, which no window can undo; ``auto`` takes values that all lie
    in 0..255 for grey values, where HU would have air below 0.
    """

    volume_path: str
    patient: str
    lesion_mask_path: str | None = None
    lung_mask_path: str | None = None
    lesion_labels: str = ""
    lung_labels: str = ""
    diagnosis: str | None = None
    severity: str | None = None
    intensity: str = "hu"

    def __post_init__(self) -> None:
        if (self.diagnosis, self.severity) not in LABELS:
            allowed = "normal, infected, infected/mild, infected/severe or none"
            raise ConfigError(f"label {self.diagnosis}/{self.severity}, expected {allowed}")
        if self.intensity not in INTENSITIES:
            raise ConfigError(f"intensity {self.intensity}, expected {' or '.join(INTENSITIES)}")
        for values in (self.lesion_labels, self.lung_labels):
            if not all(value.isdecimal() for value in values.split()):
                raise ConfigError(
                    f"mask labels {values}, expected whole numbers with spaces between them"
                )


def label_values(labels: str) -> tuple[int, ...]:
    """``1 2`` to (1, 2)."""
    return tuple(int(value) for value in labels.split())


def grade_of(diagnosis: str | None, severity: str | None) -> str | None:
    """``normal``, ``mild`` or ``severe``; null where it is not known."""
    return "normal" if diagnosis == "normal" else severity


def severity_of(involvement: float) -> str:
    """The paper's rule (Section III-A): severe above a quarter of the lung."""
    return "severe" if involvement > SEVERE_INVOLVEMENT else "mild"


def write_labels(uri: str, volumes: Iterable[LabelledVolume]) -> None:
    """Write a manifest as Parquet."""
    table = pa.Table.from_pylist([vars(volume) for volume in volumes], schema=LABELS_SCHEMA)
    buffer = BytesIO()
    pq.write_table(table, buffer)
    storage.write_bytes(uri, buffer.getvalue())


def read_labels(uri: str) -> list[LabelledVolume]:
    """Read a manifest, CSV or Parquet by its name.

    Raises:
        ConfigError: where a column is missing or unknown, or a label is none of ours.
    """
    data = BytesIO(storage.read_bytes(uri))
    names = LABELS_SCHEMA.names
    try:
        if uri.lower().endswith(".csv"):
            options = pacsv.ConvertOptions(
                column_types={name: pa.string() for name in names},
                strings_can_be_null=True,
                null_values=[""],
            )
            table = pacsv.read_csv(data, convert_options=options)
        else:
            table = pq.read_table(data)
    except pa.ArrowInvalid as error:
        raise ConfigError("the manifest cannot be read, expected CSV or Parquet") from error
    for name in REQUIRED:
        if name not in table.column_names:
            raise ConfigError(
                f"the manifest has no column {name}, expected {', '.join(REQUIRED)} and any of {names[2:]}"
            )
    if unknown := set(table.column_names) - set(names):
        raise ConfigError(
            f"the manifest has a column {sorted(unknown)[0]}, expected {', '.join(names)}"
        )
    defaults = {
        field.name: field.default for field in fields(LabelledVolume) if field.name not in REQUIRED
    }
    table = table.cast(pa.schema([pa.field(name, pa.string()) for name in table.column_names]))
    rows = [
        {name: value for name, value in row.items() if value is not None}
        for row in table.to_pylist()
    ]
    for number, row in enumerate(rows, start=1):
        if missing := [name for name in REQUIRED if name not in row]:
            raise ConfigError(f"row {number} of the manifest has no {missing[0]}")
    return [LabelledVolume(**{**defaults, **row}) for row in rows]


def digest(volumes: Sequence[LabelledVolume]) -> str:
    """SHA-256 over all labels, in whatever order they come."""
    lines = sorted(repr(sorted(vars(volume).items())) for volume in volumes)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
