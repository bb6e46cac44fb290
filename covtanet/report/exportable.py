"""The rows of a run that are exported."""

from collections.abc import Sequence
from typing import Any

from covtanet.errors import Status


def exportable_rows(rows: Sequence[dict[str, Any]], keys: Sequence[str]) -> list[dict[str, Any]]:
    """Return the screened DICOM series of a run. keys: of these series alone; empty for all."""
    return [
        row
        for row in rows
        if row["status"] == Status.SCREENED
        and row["source_format"] == "dicom"
        and (not keys or row["series_key"] in keys)
    ]
