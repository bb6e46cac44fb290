"""DICOM series as archives hold them: odd and sound, or to be refused. All from one small phantom,
12 slices of 64.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from io import BytesIO
from typing import Any

import numpy as np
import pydicom
from hostile_dicom import enhanced
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileDataset
from pydicom.sequence import Sequence as Items
from pydicom.uid import UID, ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian
from sound_input import phantom, slices

from covtanet.ct import dicom
from covtanet.ct.volume import Volume
from covtanet.errors import QcFlag, StudyError
from covtanet.phantoms.dicom_writer import write_series

Change = Callable[[int, FileDataset], None]
STEP_MM, NUM_SLICES, SIZE = 18.0, 12, 64
# Beside the chest, off the circle of reconstruction.
ROW, COLUMN = np.mgrid[:SIZE, :SIZE]
CORNERS = (ROW - 31.5) ** 2 + (COLUMN - 31.5) ** 2 > 32**2


def datasets() -> list[FileDataset]:
    return [pydicom.dcmread(BytesIO(data)) for data in slices()]


def to_bytes(series: Iterable[FileDataset], **how: bool) -> list[bytes]:
    out = []
    for dataset in series:
        buffer = BytesIO()
        dataset.save_as(buffer, **{"enforce_file_format": True, **how})
        out.append(buffer.getvalue())
    return out


def read(series: Iterable[FileDataset]) -> Volume:
    return dicom.read_series(to_bytes(series))


def reason_of(series: list[FileDataset] | list[bytes]) -> str:
    """The reason for which a series is refused; empty if it is read."""
    objects = [data if isinstance(data, bytes) else to_bytes([data])[0] for data in series]
    try:
        flags = dicom.read_series(objects).qc_flags
    except StudyError as error:
        return error.reason
    return "" if set(flags) <= set(QcFlag) else f"flags {flags}"


def changed(change: Change, series: Sequence[FileDataset] | None = None) -> list[FileDataset]:
    series = datasets() if series is None else list(series)
    for index, dataset in enumerate(series):
        change(index, dataset)
    return series


def with_values(**values: object) -> list[FileDataset]:
    def change(index: int, dataset: FileDataset) -> None:
        for name, value in values.items():
            setattr(dataset, name, value)

    return changed(change)


def pixels(dataset: FileDataset) -> np.ndarray:
    kind = "<i2" if dataset.PixelRepresentation else "<u2"
    return np.frombuffer(dataset.PixelData, kind).reshape(dataset.Rows, dataset.Columns).copy()


def put(dataset: FileDataset, array: np.ndarray) -> None:
    """Store the low 16 bits of each value."""
    dataset.PixelData = (array.astype(np.int64) & 0xFFFF).astype("<u2").tobytes()
    dataset["PixelData"].VR = "OW"


def copied(dataset: FileDataset, number: object) -> FileDataset:
    """Another object of the series."""
    twin = copy.deepcopy(dataset)
    twin.SOPInstanceUID = twin.file_meta.MediaStorageSOPInstanceUID = UID(f"1.2.3.{number}")
    return twin


def move(dataset: FileDataset, *offset_mm: float) -> None:
    """Move a slice by x, y, z millimetres."""
    position = [
        float(mm) + by for mm, by in zip(dataset.ImagePositionPatient, offset_mm, strict=True)
    ]
    dataset.ImagePositionPatient = [f"{mm:.6f}" for mm in position]


def at_depths(depths_mm: Sequence[float] | NDArray[Any], decimals: int = 6) -> list[FileDataset]:
    """The phantom's slices, again and again, at these places along the patient."""
    series = datasets()
    placed = []
    for number, depth in enumerate(depths_mm):
        dataset = copied(series[number * len(series) // len(depths_mm)], number)
        x, y, _ = dataset.ImagePositionPatient
        dataset.ImagePositionPatient = [f"{float(mm):.{decimals}f}" for mm in (x, y, depth)]
        dataset.InstanceNumber = number + 1
        placed.append(dataset)
    return placed


def turned(
    degrees: Sequence[float], decimals: int, step_mm: float = STEP_MM, position_decimals: int = 6
) -> list[FileDataset]:
    """The patient turned about z and x; cosines and positions of so many decimals."""
    (cos_z, sin_z), (cos_x, sin_x) = (
        (np.cos(angle), np.sin(angle)) for angle in np.radians(degrees)
    )
    about_z = np.array([[cos_z, -sin_z, 0], [sin_z, cos_z, 0], [0, 0, 1]])
    turn = about_z @ np.array([[1, 0, 0], [0, cos_x, -sin_x], [0, sin_x, cos_x]])
    series = datasets()
    start = turn @ np.array(series[0].ImagePositionPatient, float)
    for index, dataset in enumerate(series):
        dataset.ImageOrientationPatient = [
            f"{cosine:.{decimals}f}" for cosine in (*turn[:, 0], *turn[:, 1])
        ]
        position = start + index * step_mm * turn[:, 2]
        dataset.ImagePositionPatient = [f"{mm:.{position_decimals}f}" for mm in position]
    return series


def interleaved(
    change: Change, other_change: Change, offset_mm: float = STEP_MM / 2
) -> list[FileDataset]:
    """Two acquisitions of one series UID, the slices of one between those of the other."""
    one, other = (
        datasets(),
        [copied(dataset, f"9.{index}") for index, dataset in enumerate(datasets())],
    )
    for dataset in other:
        move(dataset, 0, 0, offset_mm)
    return [*changed(change, one), *changed(other_change, other)]


def sets(**values: object) -> Change:
    """A change of every slice; a callable gives the value for the slice's number."""

    def change(index: int, dataset: FileDataset) -> None:
        for name, value in values.items():
            setattr(dataset, name, value(index) if callable(value) else value)

    return change


def clock(start_s: float, step_s: float = 0.0) -> Callable[[int], str]:
    """TM of a slice's number; a day has 24 hours."""

    def time(index: int) -> str:
        seconds = (start_s + index * step_s) % 86_400
        return f"{int(seconds // 3600):02d}{int(seconds % 3600 // 60):02d}{seconds % 60:09.6f}"

    return time


def reformatted(plane: str) -> list[FileDataset]:
    """Coronal or sagittal slices of the chest, of equal voxels."""
    hu = np.repeat(phantom().hu, 3, axis=0)  # 6 x 5.6 x 5.6 mm
    affine = phantom().affine.copy()
    affine[:3, 0] /= 3
    order = {"coronal": (1, 0, 2), "sagittal": (2, 0, 1)}[plane]
    stack = affine[:, [*order, 3]]
    objects = write_series(np.transpose(hu, order), stack, study_uid="1.2", series_uid="1.2.3")
    return [pydicom.dcmread(BytesIO(data)) for data in objects]


def localizer() -> FileDataset:
    """A coronal overview, as it stands under the UID of the axial slices."""
    scout = copied(datasets()[0], 77)
    scout.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    scout.ImageOrientationPatient = ["1", "0", "0", "0", "0", "-1"]
    scout.Rows, scout.Columns, scout.PixelSpacing = 40, 30, ["1.2", "2.8"]
    put(scout, np.full((40, 30), 1000))
    return scout


def bare(
    series: Sequence[FileDataset], syntax: str = ExplicitVRLittleEndian, has_meta: bool = True
) -> list[bytes]:
    """Objects without preamble and magic, with or without a file meta."""
    out = []
    for dataset in series:
        is_big = syntax == ExplicitVRBigEndian
        plain = Dataset()
        for item in dataset:
            plain.add(copy.deepcopy(item))
        if is_big:
            plain.PixelData = np.frombuffer(dataset.PixelData, "<u2").astype(">u2").tobytes()
        plain.file_meta = copy.deepcopy(dataset.file_meta)
        plain.file_meta.TransferSyntaxUID = UID(syntax)
        buffer = BytesIO()
        plain.save_as(
            buffer,
            implicit_vr=syntax == ImplicitVRLittleEndian,
            little_endian=not is_big,
            enforce_file_format=True,
        )
        data = buffer.getvalue()
        at = 132 if has_meta else 132 + 12 + int(dataset_meta_bytes(data))
        out.append(data[at:])
    return out


def dataset_meta_bytes(data: bytes) -> int:
    """Return the length of the file meta, the value of (0002,0000)."""
    return int.from_bytes(data[140:144], "little")


def with_groups(change: Callable[[int, Dataset], None], **values: object) -> FileDataset:
    """The series as one Enhanced CT, each frame's functional groups changed, with attributes of the
    whole.
    """
    dataset = pydicom.dcmread(BytesIO(enhanced()["enhanced.dcm"]))
    for index, frame in enumerate(dataset.PerFrameFunctionalGroupsSequence):
        change(index, frame)
    for name, value in values.items():
        setattr(dataset, name, value)
    return dataset


def item(**values: object) -> Items:
    """Return a sequence of one item."""
    dataset = Dataset()
    for name, value in values.items():
        setattr(dataset, name, value)
    return Items([dataset])
