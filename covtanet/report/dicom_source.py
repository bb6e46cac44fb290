"""Headers of a screened series, completed for the SEG and the SR that refer to it.

De-identification removes attributes, and scanners and converters write values that DICOM does not
allow. Attributes that DICOM requires, empty if unknown, are left empty. No value of a patient is
invented, and no value of the source can prevent its results from being written.
"""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from typing import Any

import numpy as np
import pydicom
from highdicom.enum import PatientSexValues, SpecificCharacterSetValues
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.tag import BaseTag
from pydicom.uid import CTImageStorage, generate_uid
from pydicom.valuerep import DA, TM, PersonName

# Type 2 in the modules Patient and General Study (PS3.3 C.7.1.1, C.7.2.1).
TYPE_2 = (
    "PatientName", "PatientID", "PatientBirthDate", "PatientSex",
    "StudyDate", "StudyTime", "AccessionNumber", "StudyID", "ReferringPhysicianName",
)  # fmt: skip
# highdicom raises if it cannot turn such a value into one of these.
CHECKED = {"PatientBirthDate": DA, "StudyDate": DA, "StudyTime": TM, "PatientSex": PatientSexValues}
LOSSY = ("LossyImageCompression", "LossyImageCompressionRatio", "LossyImageCompressionMethod")
UTF_8 = "ISO_IR 192"
# Sets of two bytes, which stand behind a set of one byte (PS3.3 C.12.1.1.2).
MULTI_BYTE_SETS = ("ISO 2022 IR 87", "ISO 2022 IR 159", "ISO 2022 IR 149", "ISO 2022 IR 58")
PIXEL_GROUP, FILE_META_GROUP = 0x7FE0, 0x0002


@contextmanager
def quiet() -> Iterator[None]:
    """Keep messages of highdicom and pydicom, which quote patients' names, out of the log."""
    for name in ("highdicom", "pydicom"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def completed(headers: Sequence[Dataset]) -> list[Dataset]:
    """Return a header per slice, in the same order, with the attributes that SEG and SR copy.

    headers: single-frame CT slices of one series; they are not changed. Patient, study and scanner
    are in the first header alone, since highdicom reads them from no other.
    """
    common = _common(headers)
    completed_headers = []
    for header in headers:
        slice_header = Dataset()
        slice_header.update(common)
        slice_header.SOPInstanceUID = _instance_uid(header)
        slice_header.ImagePositionPatient = header.ImagePositionPatient
        completed_headers.append(slice_header)
    described = _described(headers)
    described.update(completed_headers[0])
    return [described, *completed_headers[1:]]


def slice_distance_mm(headers: Sequence[Dataset]) -> float:
    """Return the distance between slices along their normal, 0 for a single slice."""
    across, down = np.array(headers[0].ImageOrientationPatient, float).reshape(2, 3)
    positions = np.array([header.ImagePositionPatient for header in headers], float)
    return float(np.ptp(positions @ np.cross(across, down)) / max(1, len(headers) - 1))


def _common(headers: Sequence[Dataset]) -> Dataset:
    """Return the attributes that all slices share.

    Slices of one series may differ in the last digits of their orientation, or lack a UID.
    """
    first = headers[0]
    series_uid = _text(first.SeriesInstanceUID)
    common = Dataset()
    common.SOPClassUID = CTImageStorage
    common.Modality = "CT"
    common.SeriesInstanceUID = series_uid
    for name in ("StudyInstanceUID", "FrameOfReferenceUID"):
        stable = generate_uid(entropy_srcs=[series_uid, name])
        setattr(common, name, _first_text(headers, name) or stable)
    common.Rows = int(first.Rows)
    common.Columns = int(first.Columns)
    common.ImageOrientationPatient = first.ImageOrientationPatient
    common.PixelSpacing = first.PixelSpacing
    if _is_length(first.get("SliceThickness")):
        common.SliceThickness = first.SliceThickness
    else:
        common.SliceThickness = f"{slice_distance_mm(headers):.6g}"
    if _is_length(first.get("SpacingBetweenSlices")):
        common.SpacingBetweenSlices = first.SpacingBetweenSlices
    return common


def _described(headers: Sequence[Dataset]) -> Dataset:
    """Return the attributes of the first header that can be written, and those of type 2."""
    first = headers[0]
    described = Dataset()
    for tag in list(first.keys()):
        element = _element(first, tag)
        if element is not None:
            described.add(element)
    for name in TYPE_2:
        if name not in described or not _fits(name, described[name].value):
            setattr(described, name, _first_fitting(headers, name))
    if isinstance(described.PatientName, MultiValue):
        described.PatientName = described.PatientName[0]
    if described.get("LossyImageCompression") != "01":
        _remove(described, LOSSY)
    _remove(described, ("SpecificCharacterSet", "SpacingBetweenSlices"))
    if character_set := _character_set(first):
        described.SpecificCharacterSet = character_set
    return described


def _first_fitting(headers: Sequence[Dataset], name: str) -> Any:
    """Return the first value of an attribute that can be written; else an empty text."""
    values = (_value(header, name) for header in headers)
    return next((value for value in values if value and _fits(name, value)), "")


def _remove(header: Dataset, names: Sequence[str]) -> None:
    for name in names:
        if name in header:
            delattr(header, name)


def _element(header: Dataset, tag: BaseTag) -> DataElement | None:
    """Return a public element that can be written, with the VR of its attribute; else None."""
    if tag.is_private or tag.group in (FILE_META_GROUP, PIXEL_GROUP):
        return None
    try:
        element = header[tag]
        representation = dictionary_VR(tag)
        if representation != element.VR:
            value = element.value
            if not isinstance(value, str | PersonName):  # bytes or items instead of a text
                return None
            element = DataElement(tag, representation, str(value))
        for item in element.value if representation == "SQ" else ():
            item.decode()  # its text would keep the bytes of the source's character set
        probe = Dataset()
        probe.add(element)
        pydicom.dcmwrite(BytesIO(), probe, implicit_vr=False, little_endian=True)
    except Exception:  # pydicom converts and checks on access, with errors of many kinds
        return None
    return element


def _value(header: Dataset, name: str) -> Any:
    """Return an attribute's value, None if it is missing or cannot be read."""
    if name not in header:
        return None
    element = _element(header, BaseTag(pydicom.datadict.tag_for_keyword(name) or 0))
    return None if element is None else element.value


def _fits(name: str, value: Any) -> bool:
    if value in (None, "") or name not in CHECKED:
        return True
    try:
        CHECKED[name](value)
    except (ValueError, TypeError):
        return False
    return True


def _character_set(header: Dataset) -> str | list[str] | None:
    """Return the source's character set; None for the default.

    UTF-8 replaces a character set that PS3.3 does not define.
    """
    declared = header.get("SpecificCharacterSet") or ""
    values = [declared] if isinstance(declared, str) else [str(value) for value in declared]
    if not any(values):
        return None
    defined = {term.value for term in SpecificCharacterSetValues}
    has_extensions = [value.startswith("ISO 2022") for value in values]
    if len(values) == 1:
        is_defined = values[0] in defined and not has_extensions[0]
    else:
        is_defined = (
            set(values) <= defined and all(has_extensions) and values[0] not in MULTI_BYTE_SETS
        )
    if not is_defined:
        return UTF_8
    return values[0] if len(values) == 1 else values


def _instance_uid(header: Dataset) -> str:
    """Return the UID of a slice; a missing UID follows from series and position."""
    meta = getattr(header, "file_meta", None) or Dataset()
    uid = _text(header.get("SOPInstanceUID")) or _text(meta.get("MediaStorageSOPInstanceUID"))
    entropy = [_text(header.SeriesInstanceUID), str(list(header.ImagePositionPatient))]
    return uid or str(generate_uid(entropy_srcs=entropy))


def _first_text(headers: Sequence[Dataset], name: str) -> str:
    texts = (_text(header.get(name)) for header in headers)
    return next((text for text in texts if text), "")


def _text(value: Any) -> str:
    return str(value or "").strip("\0 ")


def _is_length(value: Any) -> bool:
    """Return whether a value is a length in mm above 0."""
    try:
        return 0 < float(value or 0) < np.inf
    except (TypeError, ValueError):
        return False
