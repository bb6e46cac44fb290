"""Damage to the files of a phantom, by the reason for which the reader must refuse it."""

import tarfile
from collections.abc import Callable
from io import BytesIO

import pydicom
from pydicom.uid import UID

from covtanet.ct import nifti
from covtanet.phantoms.encodings import nifti_grid
from covtanet.phantoms.phantom import Phantom

Change = Callable[[int, pydicom.Dataset], None]
TISSUE_HU = 40


def _edit(objects: list[bytes], change: Change) -> list[bytes]:
    """Change each object. change: takes the index of a slice and its dataset."""
    edited = []
    for index, data in enumerate(objects):
        dataset = pydicom.dcmread(BytesIO(data))
        change(index, dataset)
        buffer = BytesIO()
        dataset.save_as(buffer, enforce_file_format=True)
        edited.append(buffer.getvalue())
    return edited


def _without(name: str) -> Callable[[list[bytes]], list[bytes]]:
    def drop(index: int, dataset: pydicom.Dataset) -> None:
        del dataset[name]

    return lambda objects: _edit(objects, drop)


def _tilt(index: int, dataset: pydicom.Dataset) -> None:
    # 15 degrees about x.
    dataset.ImageOrientationPatient = ["1", "0", "0", "0", "0.965926", "0.258819"]


def _make_uneven(index: int, dataset: pydicom.Dataset) -> None:
    x, y, z = dataset.ImagePositionPatient
    shift_mm = 2.1 if index % 3 == 1 else 0
    dataset.ImagePositionPatient = [x, y, f"{float(z) + shift_mm:.4f}"]


def _rename(index: int, dataset: pydicom.Dataset) -> None:
    uid = UID(f"{dataset.SOPInstanceUID}.1")
    dataset.SOPInstanceUID = uid
    dataset.file_meta.MediaStorageSOPInstanceUID = uid


def _turn_one(index: int, dataset: pydicom.Dataset) -> None:
    if index == 5:
        dataset.ImageOrientationPatient = ["0", "1", "0", "0", "0", "-1"]


def _make_lossy(index: int, dataset: pydicom.Dataset) -> None:
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.JPEGExtended12Bit
    dataset.PixelData = pydicom.encaps.encapsulate([b"\xff\xd8\xff\xd9"])
    dataset["PixelData"].is_undefined_length = True


def _damage_stream(index: int, dataset: pydicom.Dataset) -> None:
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.JPEG2000Lossless
    dataset.PixelData = pydicom.encaps.encapsulate([b"\xff\x4f\xff\x51 no codestream"])
    dataset["PixelData"].is_undefined_length = True


def _change_modality(index: int, dataset: pydicom.Dataset) -> None:
    dataset.Modality = "PT"


def _shift_hu(index: int, dataset: pydicom.Dataset) -> None:
    dataset.RescaleIntercept = "0"


DICOM_DAMAGE: dict[str, Callable[[list[bytes]], list[bytes]]] = {
    "not_ct": lambda objects: _edit(objects, _change_modality),
    "unsupported_syntax": lambda objects: _edit(objects, _make_lossy),
    "truncated": lambda objects: [*objects[:-1], objects[-1][: len(objects[-1]) // 2]],
    "undecodable": lambda objects: _edit(objects, _damage_stream),
    "missing_position": _without("ImagePositionPatient"),
    "missing_rescale": _without("RescaleIntercept"),
    "mixed_orientation": lambda objects: _edit(objects, _turn_one),
    "gantry_tilt": lambda objects: _edit(objects, _tilt),
    "duplicate_slice": lambda objects: [*objects, *_edit([objects[3]], _rename)],
    "missing_slices": lambda objects: objects[:10] + objects[12:],
    "irregular_spacing": lambda objects: _edit(objects, _make_uneven),
    "not_hu": lambda objects: _edit(objects, _shift_hu),
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
    hu[phantom.lung_mask] = TISSUE_HU
    return "no-lung.nii.gz", nifti.write(hu, nifti_grid(phantom))


# File name and bytes instead of a phantom.
OTHER_DAMAGE: dict[str, Callable[[Phantom], tuple[str, bytes]]] = {
    "unreadable": _not_dicom,
    "container": _container,
    "label_map": _label_map,
    "no_lung": _no_lung,
}
