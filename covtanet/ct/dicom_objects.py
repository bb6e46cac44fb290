"""One DICOM object of a CT series: parsed, and refused if it is not CT of a syntax that is read.

pydicom converts values at the first access and raises many kinds of errors on damaged bytes. So
every value that is read later is accessed here once, and each of these errors becomes a
``StudyError``.
"""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO

import numpy as np
import pydicom
from pydicom.datadict import dictionary_VR
from pydicom.dataset import Dataset, FileDataset
from pydicom.errors import InvalidDicomError
from pydicom.uid import (
    UID,
    CTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from covtanet.ct.dicom_frames import ENHANCED_CLASSES, OPTIONAL, is_convertible
from covtanet.ct.dicom_headers import (
    DEFLATED,
    MAGIC,
    MAGIC_AT,
    data_start,
    has_magic,
    looks_like_dicom,
    transfer_syntax,
)
from covtanet.ct.dicom_pixels import SYNTAXES
from covtanet.ct.dicom_values import tag_of, value_of
from covtanet.errors import Reason, StudyError

GREY = {"", "MONOCHROME1", "MONOCHROME2"}
READ_TAGS = [
    "SOPClassUID", "SOPInstanceUID", "Modality", "StudyInstanceUID", "SeriesInstanceUID",
    "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "NumberOfFrames",
    "RescaleSlope", "RescaleIntercept", "SamplesPerPixel", "Rows", "Columns", "BitsAllocated",
    "BitsStored", "HighBit", "PixelRepresentation", "PixelData", "PatientID",
    "PhotometricInterpretation", "RescaleType", "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
]  # fmt: skip
# Tags rather than keywords, which pydicom would look up for each object.
SPECIFIC_TAGS = [tag_of(name) for name in (*READ_TAGS, *OPTIONAL)]
# How many numbers an attribute holds.
NUM_VALUES = {
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


@contextmanager
def silenced_pydicom() -> Iterator[None]:
    """Keep pydicom's warnings and log lines, which may quote the input, out of the log."""
    logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def parse_object(data: bytes) -> FileDataset:
    """Parse one object, with or without preamble, and read every value that is needed later.

    Raises:
        StudyError: ``unreadable`` or ``unsupported_syntax``.
    """
    is_bare = not has_magic(data) and looks_like_dicom(data)
    if is_bare:
        data = bytes(MAGIC_AT) + MAGIC + data[data_start(data) :]
    _refuse_deflated(data)
    try:
        dataset = _parse(data)
    except (InvalidDicomError, EOFError) as error:
        raise StudyError(
            Reason.UNREADABLE, "an object of the series has no DICOM header"
        ) from error
    except Exception as error:  # pydicom raises many kinds on damaged bytes
        raise StudyError(
            Reason.UNREADABLE, "an object of the series cannot be parsed as DICOM"
        ) from error
    # Other files may look like DICOM in their first bytes; they name no series.
    if is_bare and not read_text(dataset, "SeriesInstanceUID"):
        raise StudyError(Reason.UNREADABLE, "an object of the series has no DICOM header")
    return dataset


def read_text(dataset: Dataset, name: str) -> str:
    """Return an attribute as text without surrounding blanks; empty if it is missing."""
    return str(value_of(dataset, name) or "").strip()


def check_numbers(dataset: Dataset) -> None:
    """Refuse attributes that should hold numbers and do not, or not as many as they should.

    A missing attribute passes; a later check refuses it if it is needed.

    Raises:
        StudyError: ``unreadable``.
    """
    for name, num_values in NUM_VALUES.items():
        try:
            value = value_of(dataset, name)
            if value in (None, ""):
                continue
            numbers = np.atleast_1d(np.asarray(value, float))
        except Exception as error:  # pydicom converts on access, with errors of many kinds
            raise StudyError(
                Reason.UNREADABLE, f"the {name} of an object is not a number"
            ) from error
        if len(numbers) != num_values:
            raise StudyError(
                Reason.UNREADABLE,
                f"the {name} of an object has {len(numbers)} values, expected {num_values}",
            )


def check_class(datasets: Sequence[Dataset]) -> None:
    """Refuse objects of another class or modality than CT, and colours.

    An object that names neither class nor modality passes.

    Raises:
        StudyError: ``not_ct``.
    """
    for dataset in datasets:
        sop_class, modality = read_text(dataset, "SOPClassUID"), read_text(dataset, "Modality")
        if not sop_class and not modality:
            continue
        if sop_class not in {CTImageStorage, *ENHANCED_CLASSES} or modality != "CT":
            raise StudyError(Reason.NOT_CT, "the class or modality of an object is not CT")
        is_grey = read_text(dataset, "PhotometricInterpretation") in GREY
        if int(value_of(dataset, "SamplesPerPixel") or 1) != 1 or not is_grey:
            raise StudyError(Reason.NOT_CT, "pixels are colours, expected one grey value each")


def check_syntax(datasets: Sequence[FileDataset]) -> None:
    """Refuse transfer syntaxes that are not read, and several frames outside Enhanced CT.

    Raises:
        StudyError: ``unsupported_syntax``.
    """
    for dataset in datasets:
        syntax = dataset.file_meta.get("TransferSyntaxUID")
        if not isinstance(syntax, UID) or syntax not in SYNTAXES:
            is_named = isinstance(syntax, UID) and syntax.is_transfer_syntax
            name = syntax.name if is_named else "unknown or missing"
            raise StudyError(
                Reason.UNSUPPORTED_SYNTAX,
                f"transfer syntax {name}, expected uncompressed or lossless CT",
            )
        is_enhanced = read_text(dataset, "SOPClassUID") in ENHANCED_CLASSES
        if int(value_of(dataset, "NumberOfFrames") or 1) != 1 and not is_enhanced:
            raise StudyError(
                Reason.UNSUPPORTED_SYNTAX,
                f"{int(dataset.NumberOfFrames)} frames in an object, expected one",
            )


def _refuse_deflated(data: bytes) -> None:
    try:
        is_deflated = has_magic(data) and transfer_syntax(data)[0] == DEFLATED
    except ValueError as error:
        raise StudyError(Reason.UNREADABLE, "the file meta of an object does not end") from error
    if is_deflated:
        raise StudyError(
            Reason.UNSUPPORTED_SYNTAX, "a deflated object, expected uncompressed or lossless CT"
        )


def _parse(data: bytes) -> FileDataset:
    dataset = pydicom.dcmread(BytesIO(data), specific_tags=list(SPECIFIC_TAGS))
    # The buffer holds all of the object, in addition to the values that were read from it.
    dataset.buffer = None
    for name in READ_TAGS:  # the first access converts the value
        if isinstance(value_of(dataset, name), pydicom.Sequence) and dictionary_VR(name) != "SQ":
            raise ValueError("a sequence instead of a value")
    for name in OPTIONAL:
        if not is_convertible(dataset, name):
            del dataset[name]
    syntax = dataset.file_meta.get("TransferSyntaxUID") or _guess_syntax(dataset)
    if syntax is not None:
        dataset.file_meta.TransferSyntaxUID = syntax
    return dataset


def _guess_syntax(dataset: FileDataset) -> UID | None:
    """Return the syntax of an object without one in its file meta, by its encoding.

    None if the pixels are encapsulated: their compression is unknown then.
    """
    is_implicit, is_little = dataset.original_encoding
    if "PixelData" in dataset and dataset["PixelData"].is_undefined_length:
        return None
    if is_implicit:
        return ImplicitVRLittleEndian
    return ExplicitVRLittleEndian if is_little else ExplicitVRBigEndian
