"""Sound chests as DICOM and NIfTI, and the changes that archives make to them."""

import copy
import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import imagecodecs
import nibabel as nib
import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.uid import UID, EnhancedCTImageStorage, JPEG2000Lossless, JPEGLSLossless
from scipy import ndimage

from covtanet.ct import nifti
from covtanet.ct.volume import LPS_TO_RAS
from covtanet.phantoms.encodings import dicom_objects, nifti_grid
from covtanet.phantoms.phantom import Phantom, PhantomConfig, make_phantom

PIXELS, ITEM, SEQUENCE_END = (
    b"\xe0\x7f\x10\x00",
    b"\xfe\xff\x00\xe0",
    b"\xfe\xff\xdd\xe0" + bytes(4),
)
APPLE_DOUBLE = bytes.fromhex("0005160700020000") + b"Mac OS X        " + bytes(4000)


@cache
def chest(
    size_px: int = 96,
    num_slices: int = 24,
    pixel_mm: float = 3.75,
    slice_mm: float = 11.0,
    seed: int = 11,
) -> Phantom:
    """Return a chest of 360 x 360 x 264 mm; coarse, so that many of them stay small."""
    return make_phantom(
        PhantomConfig(
            seed=seed,
            involvement=0.12,
            size_px=size_px,
            num_slices=num_slices,
            pixel_mm=pixel_mm,
            slice_mm=slice_mm,
        )
    )


def lung_ml(phantom: Phantom) -> float:
    """Return the true lung volume of a chest."""
    spacing = np.linalg.norm(phantom.affine[:3, :3], axis=0)
    return float(phantom.lung_mask.sum() * np.prod(spacing) / 1000)


def body_aspect(slice_hu: NDArray[Any], pixel_mm: Sequence[float] = (1.0, 1.0)) -> float:
    """Return width over height of the body in one axial slice. pixel_mm: of rows and columns."""
    is_body = slice_hu > -300
    rows, columns = np.flatnonzero(is_body.any(axis=1)), np.flatnonzero(is_body.any(axis=0))
    return float(np.ptp(columns) * pixel_mm[1] / (np.ptp(rows) * pixel_mm[0]))


def true_aspect(phantom: Phantom) -> float:
    """Return width over height of a chest's body in its middle slice, in millimetres."""
    mm = np.linalg.norm(phantom.affine[:3, :3], axis=0)
    return body_aspect(phantom.hu[len(phantom.hu) // 2], (float(mm[1]), float(mm[2])))


def rotation(axis: NDArray[np.float64], degrees: float) -> NDArray[np.float64]:
    """Return the matrix of a rotation about an axis through the origin."""
    x, y, z = axis / np.linalg.norm(axis)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    angle = np.radians(degrees)
    return np.asarray(np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross)


def stretched(phantom: Phantom, axis: int, factor: float) -> Phantom:
    """Return a chest with other voxels along an axis, ``factor`` times as long."""
    zoom = [1.0, 1.0, 1.0]
    zoom[axis] = 1 / factor
    shape = [round(length * scale) for length, scale in zip(phantom.hu.shape, zoom, strict=True)]
    matrix, offset = np.ones(3), np.zeros(3)
    matrix[axis], offset[axis] = factor, (factor - 1) / 2
    smooth = ndimage.uniform_filter1d(
        phantom.hu.astype(np.float32),
        max(1, round(factor)),
        axis=axis,
    )
    if round(factor) == 2:  # the mean of two voxels stands at the second of them
        offset[axis] += 0.5
    hu = ndimage.affine_transform(smooth, matrix, offset, tuple(shape), order=1, mode="nearest")
    affine = phantom.affine.copy()
    affine[:3, 3] += affine[:3, axis] * (factor - 1) / 2
    affine[:3, axis] *= factor
    return replace(phantom, hu=np.rint(hu).astype(np.int16), affine=affine)


def scaled(phantom: Phantom, *factors: float) -> Phantom:
    """Return the same voxels in another size. factors: one, or those of z, y and x."""
    return replace(phantom, affine=phantom.affine @ np.diag([*np.broadcast_to(factors, 3), 1.0]))


def cropped(phantom: Phantom, axis: int, start: int, stop: int) -> Phantom:
    """Return a chest of some slices, rows or columns alone."""
    affine = phantom.affine.copy()
    affine[:3, 3] += affine[:3, axis] * start
    indices = range(start, stop)
    return replace(
        phantom,
        hu=phantom.hu.take(indices, axis),
        affine=affine,
        lung_mask=phantom.lung_mask.take(indices, axis),
        lesion_mask=phantom.lesion_mask.take(indices, axis),
    )


def round_field(phantom: Phantom, radius_mm: float) -> NDArray[np.bool_]:
    """Return a slice's pixels beyond a circle around its middle, (y, x)."""
    _, height, width = phantom.hu.shape
    mm = np.linalg.norm(phantom.affine[:3, :3], axis=0)
    y, x = np.mgrid[:height, :width]
    down_mm, across_mm = (y - (height - 1) / 2) * mm[1], (x - (width - 1) / 2) * mm[2]
    return np.asarray(np.hypot(down_mm, across_mm) > radius_mm)


# DICOM


def datasets(name: str, phantom: Phantom | None = None) -> list[Dataset]:
    """Return a chest's slices with UIDs that follow from a name, from feet to head."""
    objects = dicom_objects(phantom or chest(), zlib.crc32(name.encode()))
    return [pydicom.dcmread(BytesIO(data)) for data in objects]


def plane_datasets(
    name: str,
    array: NDArray[Any],
    *,
    origin: NDArray[np.float64],
    cosines: Sequence[float],
    pixel_mm: Sequence[float],
    step_mm: NDArray[np.float64],
) -> list[Dataset]:
    """Return slices of any plane. array: (slices, rows, columns) in HU; origin, step_mm: LPS."""
    head = datasets(name)[0]
    series = []
    for index, slice_hu in enumerate(array):
        dataset = copy.deepcopy(head)
        set_uid(dataset, f"{head.SeriesInstanceUID}.{index + 1}")
        position = origin + index * step_mm
        dataset.ImagePositionPatient = [f"{mm:.8g}" for mm in position]
        dataset.ImageOrientationPatient = [f"{cosine:.8g}" for cosine in cosines]
        dataset.PixelSpacing = [f"{mm:.6g}" for mm in pixel_mm]
        dataset.SliceThickness = f"{np.linalg.norm(step_mm):.6g}"
        dataset.InstanceNumber = index + 1
        set_pixels(dataset, np.rint(slice_hu) + 1024)
        series.append(dataset)
    return series


def set_uid(dataset: Dataset, uid: str) -> None:
    """Give an object another SOPInstanceUID."""
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = UID(uid)


def pixels(dataset: Dataset) -> NDArray[np.int32]:
    """Return the stored values of an uncompressed slice."""
    stored = np.frombuffer(dataset.PixelData, "<i2" if dataset.PixelRepresentation else "<u2")
    return stored.reshape(dataset.Rows, dataset.Columns).astype(np.int32)


def set_pixels(dataset: Dataset, stored: NDArray[Any]) -> None:
    """Store values in an uncompressed slice."""
    dataset.Rows, dataset.Columns = stored.shape
    dataset.PixelData = stored.astype("<i2" if dataset.PixelRepresentation else "<u2").tobytes()
    dataset["PixelData"].VR = "OW"


def to_bytes(dataset: Dataset, **how: Any) -> bytes:
    """Write an object without the writer's checks of its values."""
    buffer = BytesIO()
    with pydicom.config.disable_value_validation():
        dataset.save_as(buffer, **{"enforce_file_format": True, **how})
    return buffer.getvalue()


def save(folder: Path, series: Iterable[Dataset], name: str = "IM{:04d}", **how: Any) -> None:
    """Write slices as objects of a folder, which is made."""
    write(
        folder,
        {name.format(index): to_bytes(dataset, **how) for index, dataset in enumerate(series)},
    )


def write(folder: Path, objects: dict[str, bytes]) -> None:
    """Write objects below a folder, which is made."""
    for name, data in objects.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def with_excess(data: bytes, excess: bytes) -> bytes:
    """Return an explicit-VR object with bytes behind its pixels, which are its last element."""
    at = data.rindex(PIXELS)
    (length,) = struct.unpack_from("<I", data, at + 8)
    return data[: at + 8] + struct.pack("<I", length + len(excess)) + data[at + 12 :] + excess


def encapsulate(dataset: Dataset, fragments: Sequence[bytes], syntax: str) -> None:
    """Store compressed fragments behind an empty Basic Offset Table."""
    items = b"".join(ITEM + struct.pack("<I", len(each)) + each for each in (b"", *fragments))
    dataset.PixelData = items + SEQUENCE_END
    dataset["PixelData"].VR = "OB"
    dataset["PixelData"].is_undefined_length = True
    dataset.file_meta.TransferSyntaxUID = UID(syntax)


def stream_of(stored: NDArray[Any], syntax: str) -> bytes:
    """Compress one frame to an even number of bytes."""
    if syntax == JPEG2000Lossless:
        stream = bytes(
            imagecodecs.jpeg2k_encode(stored, level=0, reversible=True, codecformat="j2k"),
        )
    elif syntax == JPEGLSLossless:
        stream = bytes(imagecodecs.jpegls_encode(stored.view(np.uint16)))
    else:
        stream = bytes(imagecodecs.ljpeg_encode(stored.view(np.uint16), bitspersample=16))
    return stream + bytes(len(stream) % 2)


def item_of(dataset: Dataset, *names: str) -> pydicom.Sequence:
    """Return a sequence of one item with some of a dataset's elements."""
    item = Dataset()
    for name in names:
        setattr(item, name, dataset[name].value)
    return pydicom.Sequence([item])


def enhanced(slices: Sequence[Dataset]) -> Dataset:
    """Return slices as one Enhanced CT object."""
    whole = copy.deepcopy(slices[0])
    for name in (
        "ImagePositionPatient",
        "ImageOrientationPatient",
        "PixelSpacing",
        "RescaleSlope",
        "RescaleIntercept",
    ):
        del whole[name]
    whole.SOPClassUID = whole.file_meta.MediaStorageSOPClassUID = EnhancedCTImageStorage
    shared = Dataset()
    shared.PlaneOrientationSequence = item_of(slices[0], "ImageOrientationPatient")
    shared.PixelMeasuresSequence = item_of(slices[0], "PixelSpacing", "SliceThickness")
    whole.SharedFunctionalGroupsSequence = pydicom.Sequence([shared])
    frames = []
    for dataset in slices:
        frame = Dataset()
        frame.PlanePositionSequence = item_of(dataset, "ImagePositionPatient")
        frame.PixelValueTransformationSequence = item_of(
            dataset,
            "RescaleSlope",
            "RescaleIntercept",
        )
        frames.append(frame)
    whole.PerFrameFunctionalGroupsSequence = pydicom.Sequence(frames)
    whole.NumberOfFrames = len(frames)
    whole.PixelData = b"".join(dataset.PixelData for dataset in slices)
    whole["PixelData"].VR = "OW"
    return whole


# NIfTI


def nifti_gz(phantom: Phantom) -> bytes:
    """Return a chest as the project writes it, a gzip with the unit mm and whole numbers."""
    return nifti.write(phantom.hu, nifti_grid(phantom))


def nifti_image(
    phantom: Phantom,
    values: NDArray[Any] | None = None,
    *,
    has_unit: bool = True,
) -> nib.Nifti1Image:
    """Return a chest as an image with other stored values. values: (z, y, x)."""
    grid = nifti_grid(phantom)
    array = grid.from_canonical(phantom.hu if values is None else values)
    image = nib.Nifti1Image(array, LPS_TO_RAS @ grid.affine, dtype=array.dtype)
    if has_unit:
        image.header.set_xyzt_units("mm")
    return image


def nifti_plain(phantom: Phantom) -> bytes:
    """Return a chest as an uncompressed NIfTI-1 file with sform and qform."""
    image = nifti_image(phantom)
    image.set_qform(image.affine, 1)
    return bytes(image.to_bytes())


def save_field(folder: Path, name: str, phantom: Phantom, *, as_nifti: bool = False) -> None:
    if as_nifti:
        write(folder, {"ct.nii.gz": nifti_gz(phantom)})
    else:
        save(folder, datasets(name, phantom))
