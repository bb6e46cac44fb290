"""Columns of the ledger: the promise to everyone who reads one."""

import pyarrow as pa

SCHEMA_VERSION = 1

LEDGER_SCHEMA = pa.schema(
    [
        pa.field("schema_version", pa.int16(), nullable=False),
        pa.field("run_id", pa.string(), nullable=False),
        pa.field("run_date", pa.date32(), nullable=False),
        pa.field("screened_at", pa.timestamp("us", tz="UTC"), nullable=False),
        pa.field("series_key", pa.string(), nullable=False),
        pa.field("source_uri", pa.string(), nullable=False),
        pa.field("source_format", pa.string(), nullable=False),
        pa.field("source_version", pa.string(), nullable=False),
        pa.field("source_digest", pa.string()),
        pa.field("num_objects", pa.int32(), nullable=False),
        pa.field("num_bytes", pa.int64(), nullable=False),
        pa.field("study_uid", pa.string()),
        pa.field("series_uid", pa.string()),
        pa.field("status", pa.string(), nullable=False),
        pa.field("reason", pa.string()),
        pa.field("reason_detail", pa.string()),
        pa.field("qc_flags", pa.list_(pa.string()), nullable=False),
        pa.field("num_slices", pa.int32()),
        pa.field("num_slices_segmented", pa.int32()),
        pa.field("spacing_z_mm", pa.float64()),
        pa.field("spacing_y_mm", pa.float64()),
        pa.field("spacing_x_mm", pa.float64()),
        pa.field("p_infected", pa.float32()),
        pa.field("diagnosis", pa.string()),
        pa.field("p_severe", pa.float32()),
        pa.field("severity", pa.string()),
        pa.field("severity_by_involvement", pa.string()),
        pa.field("lesion_volume_ml", pa.float64()),
        pa.field("lung_volume_ml", pa.float64()),
        pa.field("involvement", pa.float64()),
        pa.field("lesion_slices", pa.int32()),
        pa.field("model_name", pa.string(), nullable=False),
        pa.field("model_version", pa.string(), nullable=False),
        pa.field("model_digest", pa.string(), nullable=False),
        pa.field("config_digest", pa.string(), nullable=False),
        pa.field("software_version", pa.string(), nullable=False),
        pa.field("decode_s", pa.float64()),
        pa.field("predict_s", pa.float64()),
    ],
    metadata={"covtanet.schema_version": str(SCHEMA_VERSION)},
)
