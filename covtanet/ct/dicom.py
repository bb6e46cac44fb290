"""A DICOM CT series to a Volume in HU, and a volume to a DICOM series.

Slices are ordered by their position in the patient and rescaled one by one.
Not covered: lossy JPEG, deflated objects, colour.
"""

import logging
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from io import BytesIO

import numpy as np
import pydicom
from isal import isal_zlib
from numpy.typing import NDArray
from pydicom.datadict import dictionary_VR
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.errors import InvalidDicomError
from pydicom.uid import (
    UID,
    CTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from covtanet.ct import nifti
from covtanet.ct.acquisitions import check_one_acquisition
from covtanet.ct.contrast import has_contrast
from covtanet.ct.dicom_head import (
    DEFLATED,
    MAGIC,
    MAGIC_AT,
    data_start,
    has_magic,
    looks_like_dicom,
    transfer_syntax,
)
from covtanet.ct.frames import ENHANCED_CLASSES, OPTIONAL, Frame, frames_of, is_sound
from covtanet.ct.image_type import is_localizer, is_projection, is_reformatted
from covtanet.ct.pixels import SYNTAXES, check_complete, decode_stack
from covtanet.ct.series_geometry import Stack, check_positions, fit_stack
from covtanet.ct.volume import Volume, canonical_volume
from covtanet.errors import QcFlag, Reason, StudyError

HEAD_AXIS = 2  # of LPS
GREY = {"", "MONOCHROME1", "MONOCHROME2"}
# In capitals, without blanks and brackets; US is unspecified.
HU_TYPE = re.compile(r"|HUS?|HU_MOD|US|UNSPECIFIED|(CT_?)?HOUN[DS]*FIELDS?[A-Z_]*|CT_?NUMBERS?")
READ_TAGS = [
    "SOPClassUID", "SOPInstanceUID", "Modality", "StudyInstanceUID", "SeriesInstanceUID",
    "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "NumberOfFrames",
    "RescaleSlope", "RescaleIntercept", "SamplesPerPixel", "Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit",
    "PixelRepresentation", "PixelData", "PatientID", "PhotometricInterpretation", "RescaleType",
    "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
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
    "HighBit": 1,
    "PixelRepresentation": 1,
    "NumberOfFrames": 1,
}


def read_series(objects: Iterable[bytes], *, num_threads: int = 1) -> Volume:
    """Read one series.

    objects: the bytes of its DICOM objects, in any order; each is let go once it is parsed. num_threads: how many
    slices are decoded at a time.

    Raises:
        StudyError: with the first reason that holds, in the order of ``covtanet.ledger.schema.REASONS``.
    """
    with _quiet():
        datasets, num_repeated = _parse_all(objects)
        for dataset in datasets:
            _check_numbers(dataset)
        volume = _read(datasets, num_threads)
    flags = (*volume.qc_flags, *([QcFlag.DUPLICATE_OBJECTS] if num_repeated else []))
    return replace(volume, qc_flags=flags)


def _parse_all(objects: Iterable[bytes]) -> tuple[list[FileDataset], int]:
    """The objects, each once, and how many were there again, byte for byte."""
    parsed: dict[tuple[str, int, int], FileDataset] = {}
    datasets: list[FileDataset] = []
    num_repeated = 0
    for data in objects:
        if len(datasets) == nifti.MAX_SLICES:
            raise StudyError(Reason.TOO_LARGE, f"more than {nifti.MAX_SLICES} objects")
        dataset = _parse(data)
        # The first one's bytes are gone: of equal length, checksum, UID and pixels they were the same.
        key = (_text(dataset, "SOPInstanceUID"), len(data), isal_zlib.crc32(data))
        first = parsed.setdefault(key, dataset)
        if first is not dataset and first.get("PixelData") == dataset.get("PixelData"):
            num_repeated += 1
        else:
            datasets.append(dataset)
    return datasets, num_repeated


def _read(datasets: Sequence[FileDataset], num_threads: int) -> Volume:
    frames, num_localizers = _slices_of(datasets)
    headers = [frame.dataset for frame in frames]
    check_complete(frames)
    num_voxels = sum(int(header.Rows) * int(header.Columns) for header in headers)
    is_large = num_voxels > nifti.MAX_VOXELS
    stack, problem = None, None
    try:  # the geometry tells the place of a slice before it is decoded; a damaged slice is the first reason
        stack = _stack_of(datasets, headers)
    except StudyError as error:
        problem = error
    hu, is_padded = None, False
    if not is_large:
        hu, is_padded = decode_stack(
            frames, None if stack is None else stack.order, num_threads=num_threads
        )
    if stack is None:
        assert problem is not None
        raise problem
    if not all(_is_hu(header) for header in headers):
        raise StudyError(
            Reason.NOT_HU, "a slice's RescaleType is not HU, as of a dual-energy image"
        )
    if hu is None:
        raise StudyError(
            Reason.TOO_LARGE,
            f"{num_voxels} voxels, expected at most {nifti.MAX_BYTES} bytes of HU, which are "
            f"{nifti.MAX_VOXELS} voxels if all are whole numbers, and half of it if not",
        )
    nifti.check_hu(hu)
    if len(hu) < nifti.MIN_SLICES:
        raise StudyError(
            Reason.TOO_FEW_SLICES, f"{len(hu)} slices, expected at least {nifti.MIN_SLICES}"
        )
    volume = canonical_volume(hu, stack.affine)
    is_axial = int(np.abs(stack.affine[:3, 0]).argmax()) == HEAD_AXIS
    flags = {
        QcFlag.CONTRAST: any(has_contrast(header) for header in headers),
        QcFlag.PADDING: is_padded,
        QcFlag.REFORMATTED: not is_axial or any(is_reformatted(header) for header in headers),
        QcFlag.LOCALIZER_DROPPED: num_localizers > 0,
    }
    return replace(
        volume, qc_flags=(*volume.qc_flags, *(name for name, holds in flags.items() if holds))
    )


def _stack_of(datasets: Sequence[FileDataset], headers: Sequence[Dataset]) -> Stack:
    """The slices' places along the stack, if they are of one patient and acquisition and can be rescaled."""
    _check_one_patient(datasets)
    check_one_acquisition(headers)
    check_positions(headers)
    _check_rescale(headers)
    return fit_stack(headers)


def _slices_of(datasets: Sequence[FileDataset]) -> tuple[list[Frame], int]:
    """The frames of a series, which are CT of a syntax that is read, and how many localizers were left out.

    Raises:
        StudyError: ``unreadable``, ``not_ct``, ``projection``, ``unsupported_syntax`` or ``too_large``.
    """
    kept = [
        dataset
        for dataset in datasets
        if not (is_localizer(dataset) and _text(dataset, "Modality") == "CT")
    ]
    try:
        all_frames = frames_of(kept)
        frames = [frame for frame in all_frames if not is_localizer(frame.dataset)]
        is_any_projection = any(is_projection(frame.dataset) for frame in frames)
    except StudyError:
        raise
    except Exception as error:  # the items of a sequence are converted when they are asked for, too
        raise StudyError(Reason.UNREADABLE, "the frames of an object cannot be read") from error
    for frame in frames:
        _check_numbers(frame.dataset)
    _check_class(kept)
    if not frames:
        raise StudyError(Reason.NOT_CT, "all objects are localizers, expected axial slices")
    if is_any_projection:
        raise StudyError(
            Reason.PROJECTION,
            "an object is a projection or a rendering by its ImageType, expected slices",
        )
    _check_syntax(kept)
    if len(frames) > nifti.MAX_SLICES:
        raise StudyError(
            Reason.TOO_LARGE, f"{len(frames)} slices, expected at most {nifti.MAX_SLICES}"
        )
    return frames, len(datasets) - len(kept) + len(all_frames) - len(frames)


def _check_one_patient(datasets: Sequence[FileDataset]) -> None:
    for name in ("PatientID", "StudyInstanceUID"):
        if len({_text(dataset, name) for dataset in datasets} - {""}) > 1:
            raise StudyError(Reason.MIXED_PATIENTS, f"objects of one series differ in their {name}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep pydicom's warnings and log lines, which may quote the input, out of the log."""
    logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _parse(data: bytes) -> FileDataset:
    is_bare = not has_magic(data) and looks_like_dicom(data)
    if is_bare:  # an object without preamble; what it is instead of DICOM shows when its elements are asked for
        data = bytes(MAGIC_AT) + MAGIC + data[data_start(data) :]
    try:
        is_deflated = has_magic(data) and transfer_syntax(data)[0] == DEFLATED
    except ValueError as error:
        raise StudyError(
            Reason.UNREADABLE, "an object of the series has no end of its file meta"
        ) from error
    if is_deflated:
        raise StudyError(
            Reason.UNSUPPORTED_SYNTAX, "a deflated object, expected uncompressed or lossless CT"
        )
    try:
        dataset = pydicom.dcmread(BytesIO(data), specific_tags=[*READ_TAGS, *OPTIONAL])
        dataset.buffer = None  # all of the object, beside the values that were read from it
        for name in READ_TAGS:  # pydicom converts a value when it is first asked for
            if isinstance(dataset.get(name), pydicom.Sequence) and dictionary_VR(name) != "SQ":
                raise ValueError("a sequence in the place of a value")
        for name in OPTIONAL:
            if not is_sound(dataset, name):
                del dataset[name]
        syntax = dataset.file_meta.get("TransferSyntaxUID") or _found_syntax(dataset)
        if syntax is not None:
            dataset.file_meta.TransferSyntaxUID = syntax
    except (InvalidDicomError, EOFError) as error:
        raise StudyError(
            Reason.UNREADABLE, "an object of the series has no DICOM header"
        ) from error
    except Exception as error:  # pydicom raises many kinds on damaged bytes
        raise StudyError(
            Reason.UNREADABLE, "an object of the series cannot be parsed as DICOM"
        ) from error
    if is_bare and not _text(dataset, "SeriesInstanceUID"):
        raise StudyError(Reason.UNREADABLE, "an object of the series has no DICOM header")
    return dataset


def _found_syntax(dataset: FileDataset) -> UID | None:
    """The syntax of an object whose file meta says none, by how it was parsed; none if its pixels are in pieces."""
    is_implicit, is_little = dataset.original_encoding
    if "PixelData" in dataset and dataset["PixelData"].is_undefined_length:
        return None
    plain = ExplicitVRLittleEndian if is_little else ExplicitVRBigEndian
    return ImplicitVRLittleEndian if is_implicit else plain


def _check_numbers(dataset: Dataset) -> None:
    """Every number that is read later is one, and as many as there should be. Missing ones are judged in their turn."""
    for name, length in NUMBERS.items():
        try:
            value = dataset.get(name)
            numbers = np.atleast_1d(np.asarray(value, float)) if value not in (None, "") else None
        except Exception as error:  # pydicom converts on access, with errors of many kinds
            raise StudyError(Reason.UNREADABLE, f"the {name} of an object is no number") from error
        if numbers is not None and len(numbers) != length:
            raise StudyError(
                Reason.UNREADABLE,
                f"the {name} of an object has {len(numbers)} values, expected {length}",
            )


def _text(dataset: Dataset, name: str) -> str:
    return str(dataset.get(name) or "").strip()


def _check_class(datasets: Sequence[FileDataset]) -> None:
    known = [
        dataset
        for dataset in datasets
        if _text(dataset, "SOPClassUID") or _text(dataset, "Modality")
    ]
    for dataset in known:
        sop_class, modality = _text(dataset, "SOPClassUID"), _text(dataset, "Modality")
        if sop_class not in {CTImageStorage, *ENHANCED_CLASSES} or modality != "CT":
            raise StudyError(Reason.NOT_CT, "the class or modality of an object is not CT")
        if (
            int(dataset.get("SamplesPerPixel") or 1) != 1
            or _text(dataset, "PhotometricInterpretation") not in GREY
        ):
            raise StudyError(Reason.NOT_CT, "pixels are colours, expected one grey value each")


def _check_syntax(datasets: Sequence[FileDataset]) -> None:
    for dataset in datasets:
        syntax = dataset.file_meta.get("TransferSyntaxUID")
        if not isinstance(syntax, UID) or syntax not in SYNTAXES:
            name = syntax.name if isinstance(syntax, UID) and syntax.is_transfer_syntax else "none"
            raise StudyError(
                Reason.UNSUPPORTED_SYNTAX,
                f"transfer syntax {name}, expected uncompressed or lossless CT",
            )
        is_enhanced = _text(dataset, "SOPClassUID") in ENHANCED_CLASSES
        if int(dataset.get("NumberOfFrames") or 1) != 1 and not is_enhanced:
            raise StudyError(
                Reason.UNSUPPORTED_SYNTAX,
                f"{int(dataset.NumberOfFrames)} frames in an object, expected one",
            )


def _check_rescale(headers: Sequence[Dataset]) -> None:
    for header in headers:
        for name in ("RescaleSlope", "RescaleIntercept"):
            value = header.get(name)
            if (
                value is None
                or not np.isfinite(float(value))
                or (name == "RescaleSlope" and not float(value))
            ):
                raise StudyError(
                    Reason.MISSING_RESCALE, f"a slice has no {name}, so its values are not HU"
                )


def _is_hu(header: Dataset) -> bool:
    """Whether RescaleType names HU, in whatever spelling, or nothing."""
    return (
        HU_TYPE.fullmatch("".join(re.findall(r"[A-Z0-9_]", _text(header, "RescaleType").upper())))
        is not None
    )


def write_series(
    hu: NDArray[np.int16],
    affine: NDArray[np.float64],
    *,
    study_uid: str,
    series_uid: str,
    intercept: int = -1024,
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
        dataset.PatientBirthDate, dataset.PatientSex, dataset.StudyDate, dataset.StudyTime = (
            "",
            "",
            "",
            "",
        )
        dataset.AccessionNumber, dataset.StudyID, dataset.ReferringPhysicianName = "", "", ""
        dataset.Manufacturer, dataset.PositionReferenceIndicator = "covtanet phantom", ""
        dataset.SeriesNumber, dataset.InstanceNumber = 1, index + 1
        dataset.ImagePositionPatient = [f"{mm:.6g}" for mm in position]
        dataset.ImageOrientationPatient = [
            f"{c:.6g}" for c in (*directions[:, 2], *directions[:, 1])
        ]
        dataset.PixelSpacing = [f"{spacing[1]:.6g}", f"{spacing[2]:.6g}"]
        dataset.SliceThickness = f"{spacing[0]:.6g}"
        dataset.Rows, dataset.Columns = slice_hu.shape
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = (
            16,
            16,
            15,
            1,
        )
        dataset.RescaleSlope, dataset.RescaleIntercept, dataset.RescaleType = (
            "1",
            str(intercept),
            "HU",
        )
        dataset.PixelData = (slice_hu.astype(np.int32) - intercept).astype("<i2").tobytes()
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = (
            CTImageStorage,
            dataset.SOPInstanceUID,
        )
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dataset.file_meta = meta
        buffer = BytesIO()
        pydicom.dcmwrite(buffer, dataset, enforce_file_format=True)
        objects.append(buffer.getvalue())
    return objects
