"""A DICOM CT series to a Volume in HU, and a volume to a DICOM series.

Slices are ordered by their position in the patient and rescaled one by one; the geometry's arithmetic is highdicom's.
Not covered: Enhanced multi-frame objects, lossy JPEG, colour.
"""

import hashlib
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import highdicom.spatial as spatial
import imagecodecs
import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.encaps import get_frame
from pydicom.errors import InvalidDicomError
from pydicom.tag import BaseTag, Tag
from pydicom.uid import (
    JPEG2000,
    CTImageStorage,
    EnhancedCTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    LegacyConvertedEnhancedCTImageStorage,
    RLELossless,
)

from covtanet.ct import nifti
from covtanet.ct.volume import MAX_SHEAR, Volume, canonical_volume
from covtanet.errors import StudyError

MAGIC_AT, MAGIC = 128, b"DICM"
PLAIN_SYNTAXES = {ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian}
DECODERS: dict[str, Callable[[bytes], NDArray[Any]]] = {
    JPEGLossless: imagecodecs.jpegsof3_decode,
    JPEGLosslessSV1: imagecodecs.jpegsof3_decode,
    JPEGLSLossless: imagecodecs.jpegls_decode,
    JPEGLSNearLossless: imagecodecs.jpegls_decode,
    JPEG2000: imagecodecs.jpeg2k_decode,
    JPEG2000Lossless: imagecodecs.jpeg2k_decode,
}
SYNTAXES = {*PLAIN_SYNTAXES, *DECODERS, RLELossless}
ENHANCED_CLASSES = {EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage}
SPACING_RTOL = 0.05
ORIENTATION_ATOL = 1e-3
PIXEL_SPACING_ATOL_MM = 1e-3
# The cosine of the tilt that MAX_SHEAR allows, about half a degree.
PERPENDICULAR_TOL = 1 - (1 - MAX_SHEAR**2) ** 0.5
HEAD_TAGS: list[BaseTag | int] = [Tag("StudyInstanceUID"), Tag("SeriesInstanceUID")]
SERIES_UID_TAG = BaseTag(0x0020000E)
UID = re.compile(r"[0-9.]{1,64}")
READ_TAGS = [
    "SOPClassUID", "Modality", "ImageType", "StudyInstanceUID", "SeriesInstanceUID",
    "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "NumberOfFrames",
    "RescaleSlope", "RescaleIntercept", "SamplesPerPixel", "Rows", "Columns", "BitsAllocated", "BitsStored",
    "PixelRepresentation", "PixelData",
]  # fmt: skip


NUMBERS = {
    "ImagePositionPatient": 3,
    "ImageOrientationPatient": 6,
    "PixelSpacing": 2,
    "RescaleSlope": 1,
    "RescaleIntercept": 1,
    "SamplesPerPixel": 1,
    "Rows": 1,
    "Columns": 1,
    "BitsAllocated": 1,
    "BitsStored": 1,
    "PixelRepresentation": 1,
    "NumberOfFrames": 1,
}


@dataclass(frozen=True)
class SeriesIdentity:
    """The UIDs that tell which series an object belongs to."""

    study_uid: str | None
    series_uid: str


def has_magic(head: bytes) -> bool:
    """Whether an object's first bytes carry the DICOM magic."""
    return head[MAGIC_AT : MAGIC_AT + len(MAGIC)] == MAGIC


def read_identity(head: bytes, *, is_whole: bool = False) -> SeriesIdentity | None:
    """Return the UIDs of an object from its first bytes, or None where they cannot be read or are not there yet.

    is_whole: ``head`` is all of the object.
    """
    if not has_magic(head):
        return None
    reached = []

    def after_series_uid(tag: BaseTag, vr: str | None, length: int) -> bool:
        if tag > SERIES_UID_TAG:
            reached.append(tag)
        return bool(reached)

    with _quiet():
        try:
            dataset = pydicom.filereader.read_partial(
                BytesIO(head), stop_when=after_series_uid, specific_tags=HEAD_TAGS
            )
            series_uid, study_uid = dataset.get("SeriesInstanceUID"), dataset.get("StudyInstanceUID")
        except Exception:  # any parser error on foreign bytes means the same: no identity
            return None
    if not series_uid or not (reached or is_whole):  # the value may have been cut
        return None
    return SeriesIdentity(_clean_uid(study_uid) if study_uid else None, _clean_uid(series_uid))


def _clean_uid(value: object) -> str:
    """A UID as it is, or a digest of what stands in its place: free text may name a patient."""
    text = str(value)
    return text if UID.fullmatch(text) else f"invalid-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def read_series(objects: Sequence[bytes], *, num_threads: int = 1) -> Volume:
    """Read one series.

    objects: the bytes of its DICOM objects, in any order. num_threads: how many slices are decoded at a time.

    Raises:
        StudyError: with the first reason that holds, in the order of ``covtanet.screening.records.REASONS``.
    """
    with _quiet():
        datasets = [_parse(data) for data in objects]
        for dataset in datasets:
            _check_numbers(dataset)
        return _read(datasets, num_threads)


def _read(datasets: Sequence[FileDataset], num_threads: int) -> Volume:
    _check_class(datasets)
    for dataset in datasets:
        _check_complete(dataset)
    shapes = {(int(dataset.Rows), int(dataset.Columns)) for dataset in datasets}
    num_voxels = sum(int(dataset.Rows) * int(dataset.Columns) for dataset in datasets)
    is_large = num_voxels > nifti.MAX_VOXELS
    decoded: list[NDArray[Any]] = []
    if not is_large:
        with ThreadPoolExecutor(num_threads) as pool:
            decoded = list(pool.map(_decode, datasets))
    _check_position_and_rescale(datasets)
    spacing_mm, order = _slice_order(datasets, shapes)
    if is_large:
        raise StudyError("too_large", f"{num_voxels} voxels, expected at most {nifti.MAX_VOXELS}")
    stored = [decoded[index] for index in order]
    slopes = [(float(datasets[i].RescaleSlope), float(datasets[i].RescaleIntercept)) for i in order]
    hu = _stack_hu(stored, slopes)
    nifti.check_hu(hu)
    if len(hu) < nifti.MIN_SLICES:
        raise StudyError("too_few_slices", f"{len(hu)} slices, expected at least {nifti.MIN_SLICES}")
    bottom = datasets[order[0]]
    affine = spatial.create_affine_matrix_from_attributes(
        image_position=bottom.ImagePositionPatient,
        image_orientation=bottom.ImageOrientationPatient,
        pixel_spacing=bottom.PixelSpacing,
        spacing_between_slices=spacing_mm,
        index_convention="DR",
        slices_first=True,
    )
    return canonical_volume(hu, np.asarray(affine, np.float64))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep pydicom's warnings and log lines, which may quote the input, out of the log."""
    logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _parse(data: bytes) -> FileDataset:
    try:
        return pydicom.dcmread(BytesIO(data), specific_tags=[*READ_TAGS])
    except (InvalidDicomError, EOFError) as error:
        raise StudyError("unreadable", "an object of the series has no DICOM header") from error
    except Exception as error:  # pydicom raises many kinds on damaged bytes
        raise StudyError("unreadable", "an object of the series cannot be parsed as DICOM") from error


def _check_numbers(dataset: FileDataset) -> None:
    """Every number that is read later is one, and as many as there should be. Missing ones are judged in their turn."""
    for name, length in NUMBERS.items():
        try:
            value = dataset.get(name)
            numbers = np.atleast_1d(np.asarray(value, float)) if value not in (None, "") else None
        except Exception as error:  # pydicom converts on access, with errors of many kinds
            raise StudyError("unreadable", f"the {name} of an object is no number") from error
        if numbers is not None and len(numbers) != length:
            raise StudyError("unreadable", f"the {name} of an object has {len(numbers)} values, expected {length}")


def _text(dataset: Dataset, name: str) -> str:
    return str(dataset.get(name) or "").strip()


def _check_class(datasets: Sequence[FileDataset]) -> None:
    known = [dataset for dataset in datasets if _text(dataset, "SOPClassUID") or _text(dataset, "Modality")]
    for dataset in known:
        sop_class, modality = _text(dataset, "SOPClassUID"), _text(dataset, "Modality")
        if sop_class not in {CTImageStorage, *ENHANCED_CLASSES} or modality != "CT":
            raise StudyError("not_ct", "the class or modality of an object is not CT")
        if "LOCALIZER" in (dataset.get("ImageType") or []):
            raise StudyError("not_ct", "an object is a localizer, expected axial slices")
        if int(dataset.get("SamplesPerPixel") or 1) != 1:
            raise StudyError("not_ct", "pixels are colours, expected one value each")
    for dataset in datasets:
        syntax = dataset.file_meta.get("TransferSyntaxUID")
        if syntax not in SYNTAXES:
            name = syntax.name if syntax is not None and syntax.is_transfer_syntax else "none"
            raise StudyError("unsupported_syntax", f"transfer syntax {name}, expected uncompressed or lossless CT")
        if _text(dataset, "SOPClassUID") in ENHANCED_CLASSES:
            raise StudyError("unsupported_syntax", "Enhanced CT, expected one object per slice")
        if int(dataset.get("NumberOfFrames") or 1) != 1:
            raise StudyError("unsupported_syntax", f"{int(dataset.NumberOfFrames)} frames in an object, expected one")


def _check_complete(dataset: FileDataset) -> None:
    """Every slice has all its pixels, before anything is allocated for them."""
    for name in ("PixelData", "Rows", "Columns", "BitsAllocated"):
        if not dataset.get(name):
            raise StudyError("truncated", f"an object ends before its {name}")
    if dataset.BitsAllocated not in (8, 16, 32):
        raise StudyError("undecodable", f"{int(dataset.BitsAllocated)} bits per pixel, expected 8, 16 or 32")
    expected = int(dataset.Rows) * int(dataset.Columns) * int(dataset.BitsAllocated) // 8
    if dataset.file_meta.TransferSyntaxUID in PLAIN_SYNTAXES and len(dataset.PixelData) < expected:
        raise StudyError("truncated", f"{len(dataset.PixelData)} bytes of pixels in a slice, expected {expected}")


def _decode(dataset: FileDataset) -> NDArray[Any]:
    """The stored values of one slice, (rows, columns), signed where the header says so."""
    syntax = dataset.file_meta.TransferSyntaxUID
    rows, columns = int(dataset.Rows), int(dataset.Columns)
    bits, stored_bits = int(dataset.BitsAllocated), int(dataset.get("BitsStored") or dataset.BitsAllocated)
    is_signed = bool(dataset.get("PixelRepresentation"))
    dtype = np.dtype(f"<{'i' if is_signed else 'u'}{bits // 8}")
    if syntax in PLAIN_SYNTAXES:
        stored = dtype.newbyteorder(">") if syntax == ExplicitVRBigEndian else dtype
        pixels = np.frombuffer(dataset.PixelData, stored, rows * columns).reshape(rows, columns)
    else:
        try:
            frame = get_frame(dataset.PixelData, 0, number_of_frames=1)
            if syntax == RLELossless:
                plain = imagecodecs.dicomrle_decode(frame, dtype)
                pixels = np.frombuffer(plain, dtype, rows * columns).reshape(rows, columns)
            else:
                pixels = DECODERS[syntax](frame)
        except Exception as error:  # each codec has its own errors
            raise StudyError("undecodable", f"a slice's {syntax.name} stream is damaged") from error
    if pixels.shape != (rows, columns):
        raise StudyError("undecodable", f"a slice decodes to {pixels.shape} pixels, expected {(rows, columns)}")
    # A codec gives the bits as it finds them, often unsigned: the header says what they mean.
    pixels = pixels.view(dtype) if pixels.dtype.itemsize == dtype.itemsize and pixels.dtype.isnative else pixels
    pixels = pixels.astype(dtype, copy=False)
    unused = bits - stored_bits
    if unused > 0:  # the bits above BitsStored mean nothing: drop them, and carry the sign over them
        pixels = (pixels << unused) >> unused
    return pixels


def _check_position_and_rescale(datasets: Sequence[FileDataset]) -> None:
    for dataset in datasets:
        for name, length in (("ImagePositionPatient", 3), ("ImageOrientationPatient", 6), ("PixelSpacing", 2)):
            values = dataset.get(name)
            if values is None or len(values) != length or not np.isfinite(np.asarray(values, float)).all():
                raise StudyError("missing_position", f"a slice has no {name}")
        if min(float(mm) for mm in dataset.PixelSpacing) <= 0:
            raise StudyError("missing_position", "a slice's PixelSpacing is not above 0")
    for dataset in datasets:
        for name in ("RescaleSlope", "RescaleIntercept"):
            value = dataset.get(name)
            if value is None or not np.isfinite(float(value)) or (name == "RescaleSlope" and not float(value)):
                raise StudyError("missing_rescale", f"a slice has no {name}, so its values are not HU")


def _slice_order(datasets: Sequence[FileDataset], shapes: set[tuple[int, int]]) -> tuple[float, list[int]]:
    """Distance between slices in mm and the indices of the datasets along the stack."""
    orientations = np.array([dataset.ImageOrientationPatient for dataset in datasets], float)
    spacings = np.array([dataset.PixelSpacing for dataset in datasets], float)
    if len(shapes) > 1 or np.ptp(spacings, axis=0).max() > PIXEL_SPACING_ATOL_MM:
        raise StudyError("mixed_orientation", "slices differ in size or pixel spacing, expected one grid")
    if np.ptp(orientations, axis=0).max() > ORIENTATION_ATOL:
        raise StudyError("mixed_orientation", "slices differ in orientation, expected one direction")

    def positions(**allow: Any) -> tuple[float | None, list[int] | None]:
        found: tuple[float | None, list[int] | None] = spatial.get_series_volume_positions(
            datasets,
            rtol=SPACING_RTOL,
            orientation_tol=ORIENTATION_ATOL,
            perpendicular_tol=PERPENDICULAR_TOL,
            index_convention="DR",
            **allow,
        )
        return found

    spacing_mm, places = positions()
    if spacing_mm is None or places is None:
        _refuse_stack(datasets, positions)
        raise StudyError("irregular_spacing", "distances between slices differ by more than 5 %, expected one step")
    return float(spacing_mm), [int(index) for index in np.argsort(places)]


def _refuse_stack(datasets: Sequence[FileDataset], positions: Any) -> None:
    """Say why the slices are no regular stack; returns where no more than their distances are irregular."""
    normal = np.cross(*np.array(datasets[0].ImageOrientationPatient, float).reshape(2, 3))
    places = np.array([dataset.ImagePositionPatient for dataset in datasets], float)
    depth = places @ normal
    stack = places[depth.argmax()] - places[depth.argmin()]
    length = float(np.linalg.norm(stack))
    if length and np.ptp(depth) / length < 1 - PERPENDICULAR_TOL:
        angle = float(np.degrees(np.arccos(np.ptp(depth) / length)))
        raise StudyError("gantry_tilt", f"slices are stacked {angle:.1f} degrees off their normal, expected 0")
    gaps = np.diff(np.sort(depth))
    if gaps.min() < 1e-3:
        raise StudyError("duplicate_slice", f"{int((gaps < 1e-3).sum())} slices share a position with another")
    if positions(allow_missing_positions=True)[1] is not None:
        raise StudyError("missing_slices", f"a gap of {gaps.max():.2f} mm, expected {gaps.min():.2f} mm throughout")


def _stack_hu(stored: Sequence[NDArray[Any]], rescales: Sequence[tuple[float, float]]) -> NDArray[Any]:
    """Rescale slice by slice; int16 where every slice stays in whole numbers that fit."""
    slices = [nifti.rescale(pixels, *rescale) for pixels, rescale in zip(stored, rescales, strict=True)]
    dtype = np.int16 if all(slice_hu.dtype == np.int16 for slice_hu in slices) else np.float32
    return np.stack(slices, dtype=dtype, casting="unsafe")


def write_series(
    hu: NDArray[np.int16], affine: NDArray[np.float64], *, study_uid: str, series_uid: str, intercept: int = -1024
) -> list[bytes]:
    """Return a volume as DICOM objects, one per slice, Explicit VR Little Endian.

    hu: (z, y, x), whole numbers. affine: index (z, y, x) -> LPS mm.
    """
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    directions = affine[:3, :3] / spacing
    objects = []
    for index, slice_hu in enumerate(hu):
        position = (affine @ np.array([index, 0, 0, 1.0]))[:3]
        dataset = Dataset()
        dataset.SOPClassUID = CTImageStorage
        dataset.SOPInstanceUID = f"{series_uid}.{index + 1}"
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID = study_uid, series_uid
        dataset.FrameOfReferenceUID = f"{study_uid}.0"
        dataset.Modality, dataset.ImageType = "CT", ["ORIGINAL", "PRIMARY", "AXIAL"]
        dataset.PatientID, dataset.PatientName = "PHANTOM", "PHANTOM"
        dataset.PatientBirthDate, dataset.PatientSex, dataset.StudyDate, dataset.StudyTime = "", "", "", ""
        dataset.AccessionNumber, dataset.StudyID, dataset.ReferringPhysicianName = "", "", ""
        dataset.Manufacturer, dataset.PositionReferenceIndicator = "covtanet phantom", ""
        dataset.SeriesNumber, dataset.InstanceNumber = 1, index + 1
        dataset.ImagePositionPatient = [f"{mm:.6g}" for mm in position]
        dataset.ImageOrientationPatient = [f"{c:.6g}" for c in (*directions[:, 2], *directions[:, 1])]
        dataset.PixelSpacing = [f"{spacing[1]:.6g}", f"{spacing[2]:.6g}"]
        dataset.SliceThickness = f"{spacing[0]:.6g}"
        dataset.Rows, dataset.Columns = slice_hu.shape
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 16, 15, 1
        dataset.RescaleSlope, dataset.RescaleIntercept, dataset.RescaleType = "1", str(intercept), "HU"
        dataset.PixelData = (slice_hu.astype(np.int32) - intercept).astype("<i2").tobytes()
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, dataset.SOPInstanceUID
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dataset.file_meta = meta
        buffer = BytesIO()
        pydicom.dcmwrite(buffer, dataset, enforce_file_format=True)
        objects.append(buffer.getvalue())
    return objects
