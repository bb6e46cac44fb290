"""Series of a folder as manifest rows, and as prepared rows."""

from pathlib import Path
from typing import Any

from covtanet.archive import manifest
from covtanet.ct import dicom_headers
from covtanet.ct.window import WindowConfig
from covtanet.screening import stages
from covtanet.screening.config import ScreeningConfig
from covtanet.screening.records import PreparedSeries
from covtanet.storage import read_bytes, walk

CONFIG = ScreeningConfig(engine="eager", max_batch_slices=8)


WINDOW = WindowConfig(size_px=128)


def manifest_rows(archive: Path) -> list[dict[str, Any]]:
    rows = []
    for folder, objects in walk(str(archive)):
        found, _ = manifest.scan_folder(
            folder,
            objects,
            lambda path, size: read_bytes(f"{archive}/{path}", size),
            dicom_headers.read_identities,
        )
        rows += [series.to_row() for series in found]
    return rows


def prepare(row: dict[str, Any], archive: Path, config: ScreeningConfig = CONFIG) -> PreparedSeries:
    decoder = stages.in_process(WINDOW, config)
    return stages.prepare_series(
        row, archive=str(archive), window=WINDOW, config=config, decoder=decoder
    )
