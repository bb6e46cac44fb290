"""Columns of the ledger: the promise to everyone who reads one.

``docs/ledger.md`` is generated from the columns (``python -m covtanet.ledger.schema``).
"""

import sys
from dataclasses import dataclass

import pyarrow as pa

SCHEMA_VERSION = 2
# Version 1 lacks the column ``engine``, which readers fill with nulls.
READABLE_VERSIONS = (1, 2)


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column: its type, its meaning with the unit, and when it is null."""

    name: str
    type: pa.DataType
    meaning: str
    null: str = ""
    """When the value is null; empty for a column that never is."""

    @property
    def field(self) -> pa.Field:
        """The column as Parquet has it."""
        return pa.field(self.name, self.type, nullable=bool(self.null))


NOT_SCREENED = "not screened"
NOT_DIAGNOSED = "not screened, or the model gives no diagnosis"
NOT_INFECTED = "not screened, the model gives no diagnosis, or the diagnosis is normal"
NO_INVOLVEMENT = "not screened, or the lungs are cut or implausible"
NO_VOXEL_SIZE = "not screened, or the voxel size is unknown"

COLUMNS = (
    Column(
        name="schema_version", type=pa.int16(),
        meaning="Version of these columns. Readers refuse a version that they do not know.",
    ),
    Column(
        name="run_id", type=pa.string(),
        meaning="Digest of archive, filter, model, configuration, limit, `--since` and date; name "
        "of the file.",
    ),
    Column(name="run_date", type=pa.date32(), meaning="Date of the run."),
    Column(
        name="screened_at", type=pa.timestamp("us", tz="UTC"),
        meaning="Time (UTC) at which the row was made, by the clock of the driver; the time of the "
        "commit if that clock was more than five minutes ahead.",
    ),
    Column(
        name="series_key", type=pa.string(),
        meaning="First 32 hex digits of SHA-256 over the path relative to the archive and the "
        "series UID; a pseudonym if identities are hidden.",
    ),
    Column(
        name="source_uri", type=pa.string(),
        meaning="The NIfTI object, or the folder of the DICOM series, or the series at a DICOMweb "
        "server; a pseudonym if identities are hidden.",
    ),
    Column(name="source_format", type=pa.string(), meaning="`dicom` or `nifti`."),
    Column(
        name="source_version", type=pa.string(),
        meaning="Digest of names, sizes and versions of the objects as they were listed; a "
        "pseudonym if identities are hidden.",
    ),
    Column(
        name="source_digest", type=pa.string(),
        meaning="SHA-256 over names and content of all objects as they were read; a pseudonym if "
        "identities are hidden.",
        null="not all objects were read",
    ),
    Column(name="num_objects", type=pa.int32(), meaning="Number of objects of the series."),
    Column(
        name="num_bytes", type=pa.int64(), meaning="Bytes of all objects as they are stored.",
        null="a PACS, which tells no sizes, and not all objects were read",
    ),
    Column(
        name="study_uid", type=pa.string(),
        meaning="StudyInstanceUID; a pseudonym if identities are hidden.",
        null="NIfTI, or the header lacks it",
    ),
    Column(
        name="series_uid", type=pa.string(),
        meaning="SeriesInstanceUID; a pseudonym if identities are hidden.",
        null="NIfTI, or the header lacks it",
    ),
    Column(
        name="status", type=pa.string(),
        meaning="`screened`, `rejected` (by the input's fault) or `failed` (storage, node or "
        "software).",
    ),
    Column(
        name="reason", type=pa.string(),
        meaning="Code of the reason why the series is rejected or failed (docs/input.md).",
        null="screened",
    ),
    Column(
        name="reason_detail", type=pa.string(),
        meaning="The reason in words: found, expected and where, without any text of the input.",
        null="screened",
    ),
    Column(
        name="qc_flags", type=pa.list_(pa.string()),
        meaning="Doubts about the numbers (docs/input.md); empty if there are none.",
    ),
    Column(
        name="num_slices", type=pa.int32(), meaning="Slices of the volume.", null=NOT_SCREENED,
    ),
    Column(
        name="num_slices_segmented", type=pa.int32(),
        meaning="Slices that the network read: those with lung, at least `slice_step_mm` apart.",
        null=NOT_SCREENED,
    ),
    Column(
        name="spacing_z_mm", type=pa.float64(),
        meaning="Distance of slices in mm; nominal with the flag `unknown_spacing`.",
        null=NOT_SCREENED,
    ),
    Column(
        name="spacing_y_mm", type=pa.float64(),
        meaning="Distance of pixels from front to back in mm; nominal with `unknown_spacing`.",
        null=NOT_SCREENED,
    ),
    Column(
        name="spacing_x_mm", type=pa.float64(),
        meaning="Distance of pixels from right to left in mm; nominal with `unknown_spacing`.",
        null=NOT_SCREENED,
    ),
    Column(
        name="p_infected", type=pa.float32(),
        meaning="Probability of infection, by the network; with `diagnosis_by_burden` from the "
        "involvement.",
        null=NOT_DIAGNOSED,
    ),
    Column(
        name="diagnosis", type=pa.string(),
        meaning="`infected` if `p_infected` reaches `infected_threshold`, else `normal`.",
        null=NOT_DIAGNOSED,
    ),
    Column(
        name="p_severe", type=pa.float32(),
        meaning="Probability that an infection is severe, by the network; null with "
        "`diagnosis_by_burden`.",
        null=NOT_INFECTED,
    ),
    Column(
        name="severity", type=pa.string(),
        meaning="`severe` if `p_severe` reaches `severe_threshold`, else `mild`; with "
        "`diagnosis_by_burden` the same as `severity_by_involvement`.",
        null=NOT_INFECTED,
    ),
    Column(
        name="severity_by_involvement", type=pa.string(),
        meaning="The paper's rule: `severe` if the involvement is above `severe_involvement`, else "
        "`mild`.",
        null=NO_INVOLVEMENT,
    ),
    Column(
        name="lesion_volume_ml", type=pa.float64(),
        meaning="Volume of the lesions within the lungs in ml.", null=NO_VOXEL_SIZE,
    ),
    Column(
        name="lung_volume_ml", type=pa.float64(),
        meaning="Volume of both lungs with their lesions in ml.", null=NO_VOXEL_SIZE,
    ),
    Column(
        name="involvement", type=pa.float64(),
        meaning="Lesion volume over lung volume, in [0, 1].", null=NO_INVOLVEMENT,
    ),
    Column(
        name="lesion_slices", type=pa.int32(),
        meaning="Segmented slices with a lesion pixel in the lung mask or the chest cavity; "
        "slices between segmented ones do not count.", null=NOT_SCREENED,
    ),
    Column(name="model_name", type=pa.string(), meaning="Name of the model."),
    Column(
        name="model_version", type=pa.string(), meaning="Version of the model in its registry."
    ),
    Column(name="model_digest", type=pa.string(), meaning="SHA-256 of the model's files."),
    Column(
        name="config_digest", type=pa.string(),
        meaning="SHA-256 of every setting that can change a number.",
    ),
    Column(
        name="software_version", type=pa.string(),
        meaning="Version of this software, with the digest of its source.",
    ),
    Column(
        name="decode_s", type=pa.float64(),
        meaning="Seconds for fetching, decoding and finding the lungs.",
        null="no attempt was finished",
    ),
    Column(
        name="predict_s", type=pa.float64(),
        meaning="Seconds for the network.", null="the network did not answer",
    ),
    # Last, so that a table of version 1 has the same columns in the same order before it.
    Column(
        name="engine", type=pa.string(),
        meaning="The inference engine and precision that ran the network, such as `openvino-int8`.",
        null="the network did not answer, or a row of version 1",
    ),
)  # fmt: skip

LEDGER_SCHEMA = pa.schema(
    [column.field for column in COLUMNS],
    metadata={"covtanet.schema_version": str(SCHEMA_VERSION)},
)


def with_columns(table: pa.Table, names: list[str]) -> pa.Table:
    """Return these columns of a ledger of any readable version; those that it lacks are null."""
    for name in names:
        if name not in table.column_names:  # an older version has fewer columns
            nulls = pa.nulls(table.num_rows, LEDGER_SCHEMA.field(name).type)
            table = table.append_column(LEDGER_SCHEMA.field(name), nulls)
    # An older file may allow fewer columns to be null; no value is converted.
    fields = [table.schema.field(name) for name in names]
    allowed = [field.with_nullable(LEDGER_SCHEMA.field(field.name).nullable) for field in fields]
    return table.select(names).cast(pa.schema(allowed))


def markdown() -> str:
    """Return ``docs/ledger.md``."""
    lines = [
        "# The ledger",
        "",
        "One row per series and run, in `LEDGER/date=YYYY-MM-DD/<run_id>.parquet`. Generated from",
        "`covtanet/ledger/schema.py`; a test compares them. A missing number is null, never 0.",
        "",
        f"This is version {SCHEMA_VERSION} of the columns. Version 1 has no `engine`; `covtanet "
        "ledger` and `--since last` read",
        "both, and `diff` compares the engine only if both rows are of version 2. To read files of "
        "both versions as they lie,",
        "DuckDB needs `union_by_name`.",
        "",
        "| column | type | meaning | null |",
        "|---|---|---|---|",
    ]
    for column in COLUMNS:
        null = column.null or "never"
        lines.append(f"| `{column.name}` | {column.type} | {column.meaning} | {null} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.stdout.write(markdown())
