"""Phantoms as data sets and archives: labelled volumes for training, and an archive to screen, damage included.

The archive's truth is written beside it, never into it.
"""

import tarfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from multiprocessing import get_context

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pydicom
from pydicom.uid import UID, generate_uid

from covtanet import storage
from covtanet.ct import dicom, nifti
from covtanet.ct.volume import SourceGrid
from covtanet.data import labels
from covtanet.data.labels import LabelledVolume, write_labels
from covtanet.phantoms.phantom import Phantom, PhantomConfig, make_phantom

GRADE_OF_SEVERITY = {None: 0, "mild": 1, "severe": 2}
TRUTH_SCHEMA = pa.schema([
    pa.field("source_path", pa.string(), nullable=False),
    pa.field("status", pa.string(), nullable=False),
    pa.field("reason", pa.string()),
    pa.field("diagnosis", pa.string()),
    pa.field("severity", pa.string()),
    pa.field("involvement", pa.float64()),
    pa.field("lesion_mask_path", pa.string()),
])  # fmt: skip


def nifti_grid(phantom: Phantom) -> SourceGrid:
    """A phantom's grid as NIfTI files usually have it: x to the right, y to the front, z to the head."""
    shape = (phantom.hu.shape[2], phantom.hu.shape[1], phantom.hu.shape[0])
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1], affine[:3, 2] = (
        -phantom.affine[:3, 2],
        -phantom.affine[:3, 1],
        phantom.affine[:3, 0],
    )
    affine[:, 3] = phantom.affine @ np.array([0, shape[1] - 1, shape[0] - 1, 1.0])
    return SourceGrid(shape=shape, affine=affine)


def draw_involvement(index: int, rng: np.random.Generator) -> float:
    """Normal, mild and severe in turn; clear of the border of a quarter, where the truth itself would be a coin."""
    return (0.0, float(rng.uniform(0.03, 0.18)), float(rng.uniform(0.33, 0.6)))[index % 3]


def configs(
    count: int, seed: int, size_px: int = 256, num_slices: int = 36
) -> Iterator[PhantomConfig]:
    """Different phantoms, a third each normal, mild and severe."""
    rng = np.random.default_rng(seed)
    for index in range(count):
        yield PhantomConfig(
            seed=seed * 100_003 + index,
            involvement=draw_involvement(index, rng),
            consolidation=float(rng.uniform(0.15, 0.45)),
            size_px=size_px,
            num_slices=num_slices,
            pixel_mm=360 / size_px,
            slice_mm=270 / num_slices,
            noise_hu=float(rng.uniform(14, 30)),
        )


def severity_of(involvement: float) -> str | None:
    """The paper's rule; null for a normal phantom."""
    return labels.severity_of(involvement) if involvement else None


def write_training_set(
    uri: str, phantoms: Iterable[PhantomConfig], num_processes: int = 1
) -> list[LabelledVolume]:
    """Write volumes, lesion masks and labels.parquet. Fresh processes: a forked one would share open connections."""
    with ProcessPoolExecutor(num_processes, get_context("spawn")) as pool:
        volumes = list(pool.map(partial(_write_labelled, uri), phantoms))
    write_labels(storage.join(uri, "labels.parquet"), volumes)
    return volumes


def _write_labelled(uri: str, config: PhantomConfig) -> LabelledVolume:
    phantom = make_phantom(config)
    grid, name = nifti_grid(phantom), f"phantom-{config.seed}"
    volume = LabelledVolume(
        volume_path=f"volumes/{name}.nii.gz",
        lesion_mask_path=f"masks/{name}_mask.nii.gz",
        patient=name,
        diagnosis="infected" if config.involvement else "normal",
        severity=severity_of(config.involvement),
    )
    storage.write_bytes(storage.join(uri, volume.volume_path), nifti.write(phantom.hu, grid))
    storage.write_bytes(
        storage.join(uri, str(volume.lesion_mask_path)), nifti.write(phantom.lesion_mask, grid)
    )
    return volume


def write_mosmed(uri: str, phantoms: Iterable[PhantomConfig], num_processes: int = 1) -> int:
    """Write phantoms in MosMedData's own layout, lesion masks of grade CT-1 alone; returns how many."""
    numbered = list(enumerate(phantoms, start=1))
    with ProcessPoolExecutor(num_processes, get_context("spawn")) as pool:
        return sum(pool.map(partial(_write_study, uri), numbered))


def _write_study(uri: str, numbered: tuple[int, PhantomConfig]) -> int:
    number, config = numbered
    phantom, name = make_phantom(config), f"study_{number:04d}"
    grid, grade = nifti_grid(phantom), GRADE_OF_SEVERITY[severity_of(config.involvement)]
    storage.write_bytes(
        storage.join(uri, f"studies/CT-{grade}/{name}.nii.gz"), nifti.write(phantom.hu, grid)
    )
    if grade == 1:
        mask = nifti.write(phantom.lesion_mask, grid)
        storage.write_bytes(storage.join(uri, f"masks/{name}_mask.nii.gz"), mask)
    return 1


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One series of an archive to be written."""

    config: PhantomConfig
    as_dicom: bool
    damage: str = ""


def write_archive(
    archive: str, truth: str, phantoms: list[PhantomConfig], num_processes: int = 1
) -> list[dict[str, object]]:
    """Write sound series, NIfTI and DICOM in turn, then one series per kind of damage; returns the truth's rows.

    truth: where ``truth.parquet`` and the lesion masks go, apart from the archive.
    """
    entries = [Entry(config=config, as_dicom=bool(k % 2)) for k, config in enumerate(phantoms)]
    base = phantoms[0]
    entries += [
        Entry(
            config=PhantomConfig(**{**vars(base), "seed": base.seed + 7919 + k}),
            as_dicom=True,
            damage=damage,
        )
        for k, damage in enumerate([*DICOM_DAMAGE, *OTHER_DAMAGE])
    ]
    with ProcessPoolExecutor(num_processes, get_context("spawn")) as pool:
        rows = list(pool.map(partial(_write_entry, archive, truth), range(len(entries)), entries))
    storage.write_bytes(storage.join(archive, "README.txt"), b"Phantoms, no patients.\n")
    buffer = BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=TRUTH_SCHEMA), buffer)
    storage.write_bytes(storage.join(truth, "truth.parquet"), buffer.getvalue())
    return rows


def _write_entry(archive: str, truth: str, number: int, entry: Entry) -> dict[str, object]:
    phantom, name = make_phantom(entry.config), f"{number:03d}"
    row: dict[str, object] = dict.fromkeys(TRUTH_SCHEMA.names)
    if entry.damage in OTHER_DAMAGE:
        path, data = OTHER_DAMAGE[entry.damage](phantom)
        path = f"damaged/{name}-{path}"
        storage.write_bytes(storage.join(archive, path), data)
    elif entry.as_dicom:
        path = f"dicom/{name}/"
        objects = dicom_objects(phantom, entry.config.seed)
        objects = DICOM_DAMAGE[entry.damage](objects) if entry.damage else objects
        # Names that say nothing about the order, as scanners write them.
        order = np.random.default_rng(entry.config.seed).permutation(len(objects))
        for index, data in zip(order, objects, strict=True):
            storage.write_bytes(storage.join(archive, f"{path}IM{index:05d}"), data)
    else:
        path = f"nifti/{name}.nii.gz"
        storage.write_bytes(
            storage.join(archive, path), nifti.write(phantom.hu, nifti_grid(phantom))
        )
    row["source_path"] = path
    if entry.damage:
        return {**row, "status": "rejected", "reason": entry.damage}
    mask_path = f"masks/{name}.nii.gz"
    storage.write_bytes(
        storage.join(truth, mask_path), nifti.write(phantom.lesion_mask, nifti_grid(phantom))
    )
    return {
        **row,
        "status": "screened",
        "diagnosis": "infected" if entry.config.involvement else "normal",
        "severity": severity_of(entry.config.involvement),
        "involvement": phantom.involvement,
        "lesion_mask_path": mask_path,
    }


def dicom_objects(phantom: Phantom, seed: int) -> list[bytes]:
    """A phantom as a DICOM series, with UIDs that follow from the seed."""
    study_uid, series_uid = (
        generate_uid(prefix="1.2.826.0.1.3680043.10.1471.", entropy_srcs=[f"phantom {seed}", kind])
        for kind in ("study", "series")
    )
    # Room for the slice's number behind the series' UID.
    return dicom.write_series(
        phantom.hu, phantom.affine, study_uid=study_uid[:58], series_uid=series_uid[:58]
    )


def _edit(objects: list[bytes], change: Callable[[int, pydicom.Dataset], None]) -> list[bytes]:
    out = []
    for index, data in enumerate(objects):
        dataset = pydicom.dcmread(BytesIO(data))
        change(index, dataset)
        buffer = BytesIO()
        dataset.save_as(buffer, enforce_file_format=True)
        out.append(buffer.getvalue())
    return out


def _without(name: str) -> Callable[[list[bytes]], list[bytes]]:
    def drop(index: int, dataset: pydicom.Dataset) -> None:
        del dataset[name]

    return lambda objects: _edit(objects, drop)


def _tilt(index: int, dataset: pydicom.Dataset) -> None:
    dataset.ImageOrientationPatient = ["1", "0", "0", "0", "0.965926", "0.258819"]


def _uneven(index: int, dataset: pydicom.Dataset) -> None:
    x, y, z = dataset.ImagePositionPatient
    dataset.ImagePositionPatient = [x, y, f"{float(z) + (2.1 if index % 3 == 1 else 0):.4f}"]


def _rename(index: int, dataset: pydicom.Dataset) -> None:
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = UID(
        f"{dataset.SOPInstanceUID}.1"
    )


def _turn_last(index: int, dataset: pydicom.Dataset) -> None:
    if index == 5:
        dataset.ImageOrientationPatient = ["0", "1", "0", "0", "0", "-1"]


def _lossy(index: int, dataset: pydicom.Dataset) -> None:
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.JPEGExtended12Bit
    dataset.PixelData = pydicom.encaps.encapsulate([b"\xff\xd8\xff\xd9"])
    dataset["PixelData"].is_undefined_length = True


def _damaged_stream(index: int, dataset: pydicom.Dataset) -> None:
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.JPEG2000Lossless
    dataset.PixelData = pydicom.encaps.encapsulate([b"\xff\x4f\xff\x51 no codestream"])
    dataset["PixelData"].is_undefined_length = True


def _modality(index: int, dataset: pydicom.Dataset) -> None:
    dataset.Modality = "PT"


def _not_hu(index: int, dataset: pydicom.Dataset) -> None:
    dataset.RescaleIntercept = "0"


DICOM_DAMAGE: dict[str, Callable[[list[bytes]], list[bytes]]] = {
    "not_ct": lambda objects: _edit(objects, _modality),
    "unsupported_syntax": lambda objects: _edit(objects, _lossy),
    "truncated": lambda objects: [*objects[:-1], objects[-1][: len(objects[-1]) // 2]],
    "undecodable": lambda objects: _edit(objects, _damaged_stream),
    "missing_position": _without("ImagePositionPatient"),
    "missing_rescale": _without("RescaleIntercept"),
    "mixed_orientation": lambda objects: _edit(objects, _turn_last),
    "gantry_tilt": lambda objects: _edit(objects, _tilt),
    "duplicate_slice": lambda objects: [*objects, *_edit([objects[3]], _rename)],
    "missing_slices": lambda objects: objects[:10] + objects[12:],
    "irregular_spacing": lambda objects: _edit(objects, _uneven),
    "not_hu": lambda objects: _edit(objects, _not_hu),
    "too_few_slices": lambda objects: objects[15:20],
}


def _label_map(phantom: Phantom) -> tuple[str, bytes]:
    return "mask.nii.gz", nifti.write(phantom.lung_mask, nifti_grid(phantom))


def _not_dicom(phantom: Phantom) -> tuple[str, bytes]:
    return "note.dcm", b"not a DICOM object"


def _container(phantom: Phantom) -> tuple[str, bytes]:
    buffer = BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("empty"))
    return "study.tar", buffer.getvalue()


def _no_lung(phantom: Phantom) -> tuple[str, bytes]:
    hu = phantom.hu.copy()
    hu[phantom.lung_mask] = 40
    return "no-lung.nii.gz", nifti.write(hu, nifti_grid(phantom))


OTHER_DAMAGE: dict[str, Callable[[Phantom], tuple[str, bytes]]] = {
    "unreadable": _not_dicom,
    "container": _container,
    "label_map": _label_map,
    "no_lung": _no_lung,
}
