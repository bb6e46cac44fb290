"""Checks of a night over a PACS: its ledger beside that of a folder, and its results."""

import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from covtanet.storage import dicomweb
from infra.pacs.orthanc import Orthanc

VALIDATOR = "dciodvfy"
# Columns that belong to the run, its time or the kind of archive; all others belong to the series.
OF_THE_RUN = {
    "run_id", "run_date", "screened_at", "source_uri", "source_version", "series_key", "decode_s",
    "predict_s",
}  # fmt: skip
RESULTS = ("SEG", "SR", "OT")


def differing_series(pacs: Iterable[dict[str, Any]], folder: Iterable[dict[str, Any]]) -> list[str]:
    """Return the UIDs of the series whose rows differ, or that only one ledger has."""
    first, second = by_series(pacs), by_series(folder)
    return sorted(uid for uid in first | second if first.get(uid) != second.get(uid))


def by_series(rows: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the values that belong to each series, by its UID."""
    return {
        row["series_uid"]: {name: row[name] for name in row if name not in OF_THE_RUN}
        for row in rows
    }


def result_series(orthanc: Orthanc, study_uids: Iterable[str]) -> list[dicomweb.FoundSeries]:
    """Return the series of results that the PACS holds for some studies."""
    found = (series for uid in study_uids for series in dicomweb.find_series(orthanc.archive, uid))
    return [series for series in found if series.modality in RESULTS]


def count_modalities(series: Iterable[dicomweb.FoundSeries]) -> Counter[str]:
    """Return the number of series of each modality."""
    return Counter(one.modality for one in series)


def invalid_objects(orthanc: Orthanc, series: Iterable[dicomweb.FoundSeries]) -> list[str] | None:
    """Return the errors that dciodvfy finds in the objects of some series; None without it."""
    if not shutil.which(VALIDATOR):
        return None
    errors = []
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "object.dcm"
        for one in series:
            with dicomweb.retrieve(orthanc.archive, one.path) as parts:
                for part in parts:
                    path.write_bytes(b"".join(part.read()))
                    errors += validation_errors(path, one.modality)
    return errors


def validation_errors(path: Path, modality: str) -> list[str]:
    """Return the lines in which dciodvfy reports an error in a file."""
    checked = subprocess.run(
        [VALIDATOR, str(path)], capture_output=True, text=True, errors="replace", check=False
    )
    lines = (checked.stdout + checked.stderr).splitlines()
    return [f"{modality}: {line}" for line in lines if line.startswith("Error")]
