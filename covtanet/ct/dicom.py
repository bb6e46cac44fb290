"""A DICOM CT series to a Volume in HU, and a volume to a DICOM series.

Slices are ordered by their position in the patient and rescaled one by one; the geometry's arithmetic is highdicom's.
Not covered: lossy JPEG, deflated objects, colour.
"""

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from io import BytesIO
from typing import Any

import imagecodecs
import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.datadict import dictionary_VR
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.errors import InvalidDicomError
from pydicom.uid import (
    JPEG2000,
    UID,
    CTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from covtanet.ct import nifti
from covtanet.ct.dicom_head import DEFLATED, has_magic, transfer_syntax
from covtanet.ct.frames import ENHANCED_CLASSES, PLAIN_SYNTAXES, Frame, frames_of
from covtanet.ct.series_geometry import check_positions, fit_stack
from covtanet.ct.volume import Volume, canonical_volume
from covtanet.errors import StudyError

DECODERS: dict[str, Callable[[bytes], NDArray[Any]]] = {
    JPEGLossless: imagecodecs.jpegsof3_decode,
    JPEGLosslessSV1: imagecodecs.jpegsof3_decode,
    JPEGLSLossless: imagecodecs.jpegls_decode,
    JPEGLSNearLossless: imagecodecs.jpegls_decode,
    JPEG2000: imagecodecs.jpeg2k_decode,
    JPEG2000Lossless: imagecodecs.jpeg2k_decode,
}
SYNTAXES = {*PLAIN_SYNTAXES, *DECODERS, RLELossless}
RLE_HEADER_BYTES, MAX_RLE_SEGMENTS = 64, 15
_decode_rle = imagecodecs.dicomrle_decode  # loaded now: the sandbox opens no file later
GREY = {"", "MONOCHROME1", "MONOCHROME2"}
HU_TYPES = {"", "HU", "HU_MOD", "US"}
AIR_PADDING_HU = -1024
READ_TAGS = [
    "SOPClassUID", "Modality", "ImageType", "StudyInstanceUID", "SeriesInstanceUID",
    "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "NumberOfFrames",
    "RescaleSlope", "RescaleIntercept", "SamplesPerPixel", "Rows", "Columns", "BitsAllocated", "BitsStored",
    "PixelRepresentation", "PixelData", "PatientID", "PhotometricInterpretation", "PixelPaddingValue", "RescaleType",
    "ContrastBolusAgent", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
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


def read_series(objects: Iterable[bytes], *, num_threads: int = 1) -> Volume:
    """Read one series.

    objects: the bytes of its DICOM objects, in any order; each is let go once it is parsed. num_threads: how many
    slices are decoded at a time.

    Raises:
        StudyError: with the first reason that holds, in the order of ``covtanet.screening.records.REASONS``.
    """
    with _quiet():
        datasets: list[FileDataset] = []
        for data in objects:
            if len(datasets) == nifti.MAX_SLICES:
                raise StudyError("too_large", f"more than {nifti.MAX_SLICES} objects")
            datasets.append(_parse(data))
        for dataset in datasets:
            _check_numbers(dataset)
        return _read(datasets, num_threads)


def _read(datasets: Sequence[FileDataset], num_threads: int) -> Volume:
    _check_class(datasets)
    _check_one_patient(datasets)
    try:
        frames = frames_of(datasets)
    except StudyError:
        raise
    except Exception as error:  # the items of a sequence are converted when they are asked for, too
        raise StudyError("unreadable", "the frames of an object cannot be read") from error
    if len(frames) > nifti.MAX_SLICES:
        raise StudyError("too_large", f"{len(frames)} slices, expected at most {nifti.MAX_SLICES}")
    for frame in frames:
        _check_numbers(frame.dataset)
        _check_complete(frame)
    headers = [frame.dataset for frame in frames]
    num_voxels = sum(int(header.Rows) * int(header.Columns) for header in headers)
    is_large = num_voxels > nifti.MAX_VOXELS
    decoded: list[NDArray[Any]] = []
    if not is_large:
        with ThreadPoolExecutor(num_threads) as pool:
            decoded = list(pool.map(_decode, frames))
    check_positions(headers)
    _check_rescale(headers)
    stack = fit_stack(headers)
    if is_large:
        raise StudyError("too_large", f"{num_voxels} voxels, expected at most {nifti.MAX_VOXELS}")
    slopes = [(float(headers[i].RescaleSlope), float(headers[i].RescaleIntercept)) for i in stack.order]
    hu = _stack_hu([decoded[index] for index in stack.order], slopes)
    is_padded = _replace_padding(hu, [decoded[i] for i in stack.order], [headers[i] for i in stack.order])
    nifti.check_hu(hu)
    if len(hu) < nifti.MIN_SLICES:
        raise StudyError("too_few_slices", f"{len(hu)} slices, expected at least {nifti.MIN_SLICES}")
    volume = canonical_volume(hu, stack.affine)
    has_contrast = any(_text(dataset, "ContrastBolusAgent") for dataset in datasets)
    flags = [name for name, holds in (("contrast", has_contrast), ("padding", is_padded)) if holds]
    return replace(volume, qc_flags=(*volume.qc_flags, *flags))


def _check_one_patient(datasets: Sequence[FileDataset]) -> None:
    for name in ("PatientID", "StudyInstanceUID"):
        if len({_text(dataset, name) for dataset in datasets} - {""}) > 1:
            raise StudyError("mixed_patients", f"objects of one series differ in their {name}")


def _replace_padding(hu: NDArray[Any], stored: Sequence[NDArray[Any]], headers: Sequence[Dataset]) -> bool:
    """Put air where the scanner padded with a value below it; returns whether there was such padding."""
    found = False
    for slice_hu, pixels, header in zip(hu, stored, headers, strict=True):
        value = header.get("PixelPaddingValue")
        if not isinstance(value, int):
            continue
        value = int(np.array(value).astype(pixels.dtype)) if pixels.dtype.kind == "i" else value
        if value * float(header.RescaleSlope) + float(header.RescaleIntercept) >= AIR_PADDING_HU:
            continue
        padded = pixels == value
        if padded.any():
            slice_hu[padded] = AIR_PADDING_HU
            found = True
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep pydicom's warnings and log lines, which may quote the input, out of the log."""
    logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _parse(data: bytes) -> FileDataset:
    try:
        is_deflated = has_magic(data) and transfer_syntax(data)[0] == DEFLATED
    except ValueError as error:
        raise StudyError("unreadable", "an object of the series has no end of its file meta") from error
    if is_deflated:
        raise StudyError("unsupported_syntax", "a deflated object, expected uncompressed or lossless CT")
    try:
        dataset = pydicom.dcmread(BytesIO(data), specific_tags=[*READ_TAGS])
        for name in READ_TAGS:  # pydicom converts a value when it is first asked for
            if isinstance(dataset.get(name), pydicom.Sequence) and dictionary_VR(name) != "SQ":
                raise ValueError("a sequence in the place of a value")
        dataset.file_meta.get("TransferSyntaxUID")
        return dataset
    except (InvalidDicomError, EOFError) as error:
        raise StudyError("unreadable", "an object of the series has no DICOM header") from error
    except Exception as error:  # pydicom raises many kinds on damaged bytes
        raise StudyError("unreadable", "an object of the series cannot be parsed as DICOM") from error


def _check_numbers(dataset: Dataset) -> None:
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
        if int(dataset.get("SamplesPerPixel") or 1) != 1 or _text(dataset, "PhotometricInterpretation") not in GREY:
            raise StudyError("not_ct", "pixels are colours, expected one grey value each")
    for dataset in datasets:
        syntax = dataset.file_meta.get("TransferSyntaxUID")
        if not isinstance(syntax, UID) or syntax not in SYNTAXES:
            name = syntax.name if isinstance(syntax, UID) and syntax.is_transfer_syntax else "none"
            raise StudyError("unsupported_syntax", f"transfer syntax {name}, expected uncompressed or lossless CT")
        is_enhanced = _text(dataset, "SOPClassUID") in ENHANCED_CLASSES
        if int(dataset.get("NumberOfFrames") or 1) != 1 and not is_enhanced:
            raise StudyError("unsupported_syntax", f"{int(dataset.NumberOfFrames)} frames in an object, expected one")


def _check_complete(frame: Frame) -> None:
    """Every slice has all its pixels, before anything is allocated for them."""
    dataset, syntax = frame.dataset, frame.syntax
    for name in ("Rows", "Columns", "BitsAllocated"):
        if not dataset.get(name):
            raise StudyError("truncated", f"an object ends before its {name}")
    if not frame.source.get("PixelData"):
        raise StudyError("truncated", "an object ends before its PixelData")
    if dataset.BitsAllocated not in (8, 16, 32):
        raise StudyError("undecodable", f"{int(dataset.BitsAllocated)} bits per pixel, expected 8, 16 or 32")
    if not 0 < int(dataset.get("BitsStored") or dataset.BitsAllocated) <= dataset.BitsAllocated:
        raise StudyError("undecodable", f"{int(dataset.BitsStored)} of {int(dataset.BitsAllocated)} bits are stored")
    expected, present = frame.num_bytes * frame.count, len(frame.source.PixelData)
    if syntax in PLAIN_SYNTAXES and present < expected:
        raise StudyError("truncated", f"{present} bytes of pixels in an object, expected {expected}")
    if syntax in PLAIN_SYNTAXES and present > expected + 1:
        raise StudyError("undecodable", f"{present} bytes of pixels in an object, expected {expected}")


def _decode(frame: Frame) -> NDArray[Any]:
    """The stored values of one slice, (rows, columns), signed where the header says so."""
    dataset, syntax = frame.dataset, frame.syntax
    rows, columns = int(dataset.Rows), int(dataset.Columns)
    bits, stored_bits = int(dataset.BitsAllocated), int(dataset.get("BitsStored") or dataset.BitsAllocated)
    is_signed = bool(dataset.get("PixelRepresentation"))
    dtype = np.dtype(f"<{'i' if is_signed else 'u'}{bits // 8}")
    if syntax in PLAIN_SYNTAXES:
        stored = dtype.newbyteorder(">") if syntax == ExplicitVRBigEndian else dtype
        pixels = np.frombuffer(frame.stream(), stored, rows * columns).reshape(rows, columns)
    else:
        try:
            if syntax == RLELossless:
                plain = decode_rle(bytes(frame.stream()), dtype)
                pixels = np.frombuffer(plain, dtype, rows * columns).reshape(rows, columns)
            else:
                pixels = DECODERS[syntax](bytes(frame.stream()))
        except MemoryError:
            raise
        except Exception as error:  # each codec has its own errors
            raise StudyError("undecodable", f"a slice's {UID(syntax).name} stream is damaged") from error
    if pixels.shape != (rows, columns):
        raise StudyError("undecodable", f"a slice decodes to {pixels.shape} pixels, expected {(rows, columns)}")
    # A codec gives the bits as it finds them, often unsigned: the header says what they mean.
    pixels = pixels.view(dtype) if pixels.dtype.itemsize == dtype.itemsize and pixels.dtype.isnative else pixels
    pixels = pixels.astype(dtype, copy=False)
    unused = bits - stored_bits
    if unused > 0:  # the bits above BitsStored mean nothing: drop them, and carry the sign over them
        pixels = (pixels << unused) >> unused
    return pixels


def decode_rle(frame: bytes, dtype: np.dtype[Any]) -> bytes:
    """The bytes of an RLE frame (PS3.5 annex G), its header checked: the codec believes what it says.

    Raises:
        ValueError: as many segments as bytes in a pixel are expected, one behind the other within the frame.
    """
    header = np.frombuffer(frame, "<u4", RLE_HEADER_BYTES // 4)
    count, offsets = int(header[0]), header[1:].astype(np.int64)
    used = offsets[: min(count, MAX_RLE_SEGMENTS)]
    if count != dtype.itemsize or used[0] != RLE_HEADER_BYTES or (np.diff([*used, len(frame)]) <= 0).any():
        raise ValueError("the RLE header contradicts itself")
    return bytes(_decode_rle(frame, dtype))


def _check_rescale(datasets: Sequence[Dataset]) -> None:
    for dataset in datasets:
        for name in ("RescaleSlope", "RescaleIntercept"):
            value = dataset.get(name)
            if value is None or not np.isfinite(float(value)) or (name == "RescaleSlope" and not float(value)):
                raise StudyError("missing_rescale", f"a slice has no {name}, so its values are not HU")
        if _text(dataset, "RescaleType").upper() not in HU_TYPES:
            raise StudyError("not_hu", "a slice's RescaleType is not HU, as of a dual-energy image")


def _stack_hu(stored: list[NDArray[Any]], rescales: Sequence[tuple[float, float]]) -> NDArray[Any]:
    """Rescale slice by slice; int16 where every slice stays in whole numbers that fit, else float32."""
    out: NDArray[Any] = np.empty((len(stored), *stored[0].shape), np.int16)
    for index, (pixels, rescale) in enumerate(zip(stored, rescales, strict=True)):
        slice_hu = nifti.rescale(pixels, *rescale)
        if slice_hu.dtype != np.int16 and out.dtype == np.int16:
            out = out.astype(np.float32)
        out[index] = slice_hu
    return out


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
