"""Rows of the ledger and stored masks of series to export."""

from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from stage_rows import CONFIG, WINDOW, manifest_rows

from covtanet.ct import dicom, nifti
from covtanet.screening import stages

RUN_ID = "5e1ec7ed"


def write_objects(folder: Path, objects: list[bytes]) -> None:
    folder.mkdir(parents=True)
    for index, data in enumerate(objects):
        (folder / f"{index:03d}.dcm").write_bytes(data)


def screened_row(archive: Path | str, row: dict[str, Any] | None = None) -> dict[str, Any]:
    """The ledger row of a series of an archive, as far as decoding fills it.

    row: of the manifest; by default that of the folder's one series.
    """
    if row is None:
        (row,) = manifest_rows(Path(archive))
    decoder = stages.in_process(WINDOW, CONFIG)
    prepared = stages.prepare_series(
        row, archive=str(archive), window=WINDOW, config=CONFIG, decoder=decoder
    )
    record = prepared.record.to_columns()
    measured = {
        "lesion_volume_ml": 310.25,
        "lung_volume_ml": 4890.5,
        "involvement": 0.0634,
        "p_infected": 0.98,
    }
    model = {
        "model_name": "m",
        "model_version": "1",
        "model_digest": "0" * 64,
        "software_version": "0",
    }
    return {**record, **measured, **model, "run_id": RUN_ID}


def keep_masks(
    row: dict[str, Any], results: Path, lung: NDArray[Any], objects: list[bytes]
) -> Path:
    """Masks as a run keeps them; lung and its front half as lesion, in the frame of a Volume."""
    folder = results / str(row["run_id"]) / str(row["series_key"])
    folder.mkdir(parents=True)
    lesion = lung.copy()
    lesion[:, lung.shape[1] // 2 :] = False
    grid = dicom.read_series(objects).source
    for name, mask in (("lesion", lesion), ("lung", lung)):
        (folder / f"{name}_mask.nii.gz").write_bytes(nifti.write(mask, grid))
    return folder
