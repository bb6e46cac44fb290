"""Phantoms as an archive to screen, damage included.

Its truth is written apart from it, never into it.
"""

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from io import BytesIO
from multiprocessing import get_context

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from covtanet import storage
from covtanet.ct import nifti
from covtanet.errors import Status
from covtanet.phantoms.damage import DICOM_DAMAGE, OTHER_DAMAGE
from covtanet.phantoms.encodings import dicom_objects, nifti_grid
from covtanet.phantoms.phantom import Phantom, PhantomConfig, make_phantom
from covtanet.phantoms.sampling import severity_of

TRUTH_SCHEMA = pa.schema([
    pa.field("source_path", pa.string(), nullable=False),
    pa.field("status", pa.string(), nullable=False),
    pa.field("reason", pa.string()),
    pa.field("diagnosis", pa.string()),
    pa.field("severity", pa.string()),
    pa.field("involvement", pa.float64()),
    pa.field("lesion_mask_path", pa.string()),
])  # fmt: skip
# Damaged series are further phantoms: their seeds must not be those of sound ones.
DAMAGE_SEED_OFFSET = 7919


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One series of an archive to be written. damage: its reason, empty for a sound series."""

    config: PhantomConfig
    as_dicom: bool
    damage: str = ""


def write_archive(
    archive: str, truth: str, phantoms: list[PhantomConfig], num_processes: int = 1
) -> list[dict[str, object]]:
    """Write sound series, NIfTI and DICOM in turn, then one series per kind of damage.

    truth: the folder of ``truth.parquet`` and the lesion masks, apart from the archive.

    Returns the rows of the truth.
    """
    entries = _entries(phantoms)
    with ProcessPoolExecutor(num_processes, get_context("spawn")) as pool:
        rows = list(pool.map(partial(_write_entry, archive, truth), range(len(entries)), entries))
    storage.write_bytes(storage.join(archive, "README.txt"), b"Phantoms, no patients.\n")
    buffer = BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=TRUTH_SCHEMA), buffer)
    storage.write_bytes(storage.join(truth, "truth.parquet"), buffer.getvalue())
    return rows


def _entries(phantoms: list[PhantomConfig]) -> list[Entry]:
    entries = [Entry(config=config, as_dicom=bool(k % 2)) for k, config in enumerate(phantoms)]
    base = phantoms[0]
    for number, damage in enumerate([*DICOM_DAMAGE, *OTHER_DAMAGE]):
        config = replace(base, seed=base.seed + DAMAGE_SEED_OFFSET + number)
        entries.append(Entry(config=config, as_dicom=True, damage=damage))
    return entries


def _write_entry(archive: str, truth: str, number: int, entry: Entry) -> dict[str, object]:
    """Write one series and the lesion mask of a sound one; return the row of the truth."""
    phantom = make_phantom(entry.config)
    name = f"{number:03d}"
    row: dict[str, object] = dict.fromkeys(TRUTH_SCHEMA.names)
    row["source_path"] = _write_series(archive, name, phantom, entry)
    if entry.damage:
        return {**row, "status": Status.REJECTED, "reason": entry.damage}
    mask_path = f"masks/{name}.nii.gz"
    mask = nifti.write(phantom.lesion_mask, nifti_grid(phantom))
    storage.write_bytes(storage.join(truth, mask_path), mask)
    return {
        **row,
        "status": Status.SCREENED,
        "diagnosis": "infected" if entry.config.involvement else "normal",
        "severity": severity_of(entry.config.involvement),
        "involvement": phantom.involvement,
        "lesion_mask_path": mask_path,
    }


def _write_series(archive: str, name: str, phantom: Phantom, entry: Entry) -> str:
    """Write the objects of one series; return its path in the archive."""
    if entry.damage in OTHER_DAMAGE:
        file_name, data = OTHER_DAMAGE[entry.damage](phantom)
        path = f"damaged/{name}-{file_name}"
        storage.write_bytes(storage.join(archive, path), data)
        return path
    if not entry.as_dicom:
        path = f"nifti/{name}.nii.gz"
        data = nifti.write(phantom.hu, nifti_grid(phantom))
        storage.write_bytes(storage.join(archive, path), data)
        return path
    folder = f"dicom/{name}/"
    objects = dicom_objects(phantom, entry.config.seed)
    if entry.damage:
        objects = DICOM_DAMAGE[entry.damage](objects)
    # Names that say nothing about the order, as scanners write them.
    order = np.random.default_rng(entry.config.seed).permutation(len(objects))
    for index, data in zip(order, objects, strict=True):
        storage.write_bytes(storage.join(archive, f"{folder}IM{index:05d}"), data)
    return folder
