"""Series and records of a run that nothing was screened for."""

from pathlib import Path
from typing import Any

from covtanet.archive.manifest import IGNORED_SCHEMA, Series
from covtanet.ledger.record import ScreeningRecord
from covtanet.ledger.run import (
    Run,
    begin_run,
)
from covtanet.ledger.work import write_manifest, write_rows
from covtanet.storage import ObjectInfo


def series(name: str) -> dict[str, Any]:
    path = f"{name}.nii.gz"
    return Series(
        source_path=path, source_format="nifti", objects=(ObjectInfo(path, 7, "v"),)
    ).to_row()


def record(row: dict[str, Any], **values: Any) -> ScreeningRecord:
    columns: dict[str, Any] = {
        "series_key": row["series_key"],
        "source_uri": f"/archive/{row['source_path']}",
        "source_format": "nifti",
        "source_version": row["source_version"],
        "num_objects": 1,
        "num_bytes": 7,
        "started_at": 0.0,
        "status": "rejected",
        "reason": "not_hu",
    }
    return ScreeningRecord(**{**columns, **values})


def freeze(run: Run, tmp_path: Path, *names: str) -> list[dict[str, Any]]:
    rows = [series(name) for name in names]
    ignored = tmp_path / "ignored.parquet"
    write_rows(ignored, IGNORED_SCHEMA, [{"path": "x.txt", "num_bytes": 3}])
    begin_run(run)
    write_manifest(run, rows, ignored)
    return rows
