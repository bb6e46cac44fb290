"""Labelled volumes, and the index of a data set that lists them in CSV or Parquet.

An index has one row per volume. Only ``volume_path`` and ``patient`` are needed; the other columns
may be left out.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

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
    pa.field("slice_order", pa.string()),
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
SLICE_ORDERS = ("continuous", "single")
# A line from grey values to HU.
GREY_LINE = re.compile(r"grey8:(-?\d+(?:\.\d+)?):(-?\d+(?:\.\d+)?)")
# Grey values are 0..255.
GREY_STEPS = 255
# Section III-A: severe above a quarter of the lung.
SEVERE_INVOLVEMENT = 0.25


@dataclass(frozen=True, kw_only=True)
class LabelledVolume:
    """One volume with its truth: NIfTI, or a JPEG or PNG of one slice.

    Paths are absolute, or relative to the data set.
    """

    volume_path: str
    patient: str
    lesion_mask_path: str | None = None
    lung_mask_path: str | None = None
    lesion_labels: str = ""
    """Values of the lesion mask that count, as ``2`` or ``1 2``; empty for all above 0."""
    lung_labels: str = ""
    """Values of the lung mask that count; empty for all above 0."""
    diagnosis: str | None = None
    """``normal`` or ``infected``; null if it follows from the masks."""
    severity: str | None = None
    """``mild`` or ``severe`` of an infected volume, else null."""
    intensity: str = "hu"
    """``hu``; ``grey8:LOW:HIGH`` for grey values 0..255 whose line to HU is known, LOW and HIGH
    being the HU of 0 and 255, which are read as HU; ``grey8`` for grey values that were windowed
    at their source by an unknown line; ``auto`` takes values that all lie in 0..255 for grey
    values without a line, as HU would have air below 0."""
    slice_order: str = "continuous"
    """``continuous``; ``single`` for a stack of slices that are not neighbours in one patient."""

    def __post_init__(self) -> None:
        if (self.diagnosis, self.severity) not in LABELS:
            allowed = "normal, infected, infected/mild, infected/severe or none"
            raise ConfigError(f"label {self.diagnosis}/{self.severity}, expected {allowed}")
        check_intensity(self.intensity)
        if self.slice_order not in SLICE_ORDERS:
            raise ConfigError(
                f"slice_order {self.slice_order}, expected {' or '.join(SLICE_ORDERS)}"
            )
        for values in (self.lesion_labels, self.lung_labels):
            if not all(value.isdecimal() for value in values.split()):
                raise ConfigError(
                    f"mask labels {values}, expected whole numbers with spaces between them"
                )


def check_intensity(intensity: str) -> None:
    """Refuse an unknown kind of values.

    Raises:
        ConfigError: the name is unknown, or the line to HU does not rise.
    """
    if intensity not in INTENSITIES and hu_of_greys(intensity) is None:
        raise ConfigError(
            f"intensity {intensity}, expected {', '.join(INTENSITIES)} or grey8:LOW:HIGH with "
            "the HU of grey values 0 and 255"
        )


def hu_of_greys(intensity: str) -> tuple[float, float] | None:
    """Return the HU of grey values 0 and 255 of ``grey8:LOW:HIGH``; null for any other kind.

    Raises:
        ConfigError: LOW is not below HIGH.
    """
    match = GREY_LINE.fullmatch(intensity)
    if match is None:
        return None
    low_hu = float(match[1])
    high_hu = float(match[2])
    if low_hu >= high_hu:
        raise ConfigError(f"intensity {intensity}, expected LOW below HIGH")
    return low_hu, high_hu


def label_values(labels: str) -> tuple[int, ...]:
    """Return ``1 2`` as (1, 2)."""
    return tuple(int(value) for value in labels.split())


def grade_of(diagnosis: str | None, severity: str | None) -> str | None:
    """Return ``normal``, ``mild`` or ``severe``; null if it is not known."""
    return "normal" if diagnosis == "normal" else severity


def severity_of(involvement: float) -> str:
    """Return the severity by the paper's rule (Section III-A)."""
    return "severe" if involvement > SEVERE_INVOLVEMENT else "mild"


def write_labels(uri: str, volumes: Iterable[LabelledVolume]) -> None:
    """Write an index as Parquet."""
    table = pa.Table.from_pylist([vars(volume) for volume in volumes], schema=LABELS_SCHEMA)
    buffer = BytesIO()
    pq.write_table(table, buffer)
    storage.write_bytes(uri, buffer.getvalue())


def read_labels(uri: str) -> list[LabelledVolume]:
    """Read an index, CSV or Parquet by its name.

    Raises:
        ConfigError: a column is missing or unknown, a required value is missing, or a label is
            unknown.
    """
    table = _read_table(uri)
    _check_columns(table.column_names)
    table = table.cast(pa.schema([pa.field(name, pa.string()) for name in table.column_names]))
    return [_volume(number, row) for number, row in enumerate(table.to_pylist(), start=1)]


def _read_table(uri: str) -> pa.Table:
    data = BytesIO(storage.read_bytes(uri))
    try:
        if not uri.lower().endswith(".csv"):
            return pq.read_table(data)
        # Every column is text: pyarrow would guess numbers for patients and labels.
        options = pacsv.ConvertOptions(
            column_types={name: pa.string() for name in LABELS_SCHEMA.names},
            strings_can_be_null=True,
            null_values=[""],
        )
        return pacsv.read_csv(data, convert_options=options)
    except pa.ArrowInvalid as error:
        raise ConfigError("the index cannot be read, expected CSV or Parquet") from error


def _check_columns(columns: Sequence[str]) -> None:
    names = LABELS_SCHEMA.names
    for name in REQUIRED:
        if name not in columns:
            optional = ", ".join(names[len(REQUIRED) :])
            raise ConfigError(
                f"the index has no column {name}, expected {', '.join(REQUIRED)} and any of "
                f"{optional}"
            )
    unknown = sorted(set(columns) - set(names))
    if unknown:
        raise ConfigError(f"the index has a column {unknown[0]}, expected {', '.join(names)}")


def _volume(number: int, row: dict[str, str | None]) -> LabelledVolume:
    # An empty field is the column's default.
    values: dict[str, Any] = {name: value for name, value in row.items() if value is not None}
    for name in REQUIRED:
        if name not in values:
            raise ConfigError(f"row {number} of the index has no {name}")
    return LabelledVolume(**values)
