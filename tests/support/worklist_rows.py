"""A ledger of six series, one of every kind that the worklist tells apart."""

from datetime import UTC, date, datetime, timedelta
from typing import Any

import pyarrow as pa

from covtanet.ledger.schema import LEDGER_SCHEMA

KEYS = "abcdef"


def row(key: str, **values: Any) -> dict[str, Any]:
    fixed = {
        "schema_version": 2,
        "run_id": "r",
        "run_date": date(2026, 11, 23),
        "series_key": key * 32,
        "screened_at": datetime(2026, 11, 23, tzinfo=UTC) + timedelta(minutes=KEYS.index(key)),
        "source_uri": f"s3://bucket/{key}",
        "source_format": "nifti",
        "source_version": "v",
        "num_objects": 1,
        "num_bytes": 1,
        "qc_flags": [],
        "model_name": "covtanet",
        "model_version": "1",
        "model_digest": "d" * 64,
        "config_digest": "c",
        "software_version": "0",
        "status": "screened",
    }
    return {name: {**fixed, **values}.get(name) for name in LEDGER_SCHEMA.names}


def ledger() -> pa.Table:
    rows = [
        row("a", status="rejected", reason="truncated", reason_detail="</script><b>"),
        row(
            "b",
            p_infected=0.45,
            diagnosis="normal",
            involvement=0.0,
            severity_by_involvement="mild",
        ),
        row(
            "c",
            p_infected=0.99,
            diagnosis="infected",
            severity="severe",
            p_severe=0.9,
            involvement=0.4,
        ),
        row(
            "d",
            p_infected=0.9,
            diagnosis="infected",
            severity="mild",
            p_severe=0.1,
            involvement=0.02,
            qc_flags=["contrast"],
        ),
        row(
            "e",
            p_infected=0.8,
            diagnosis="infected",
            severity="mild",
            p_severe=0.2,
            involvement=None,
        ),
        row("f", status="failed", reason="storage"),
    ]
    return pa.Table.from_pylist(rows, LEDGER_SCHEMA)
