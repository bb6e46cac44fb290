"""A DICOM CT series to a Volume in HU.

Slices are ordered by their position in the patient and rescaled one by one.
Not covered: lossy JPEG, deflated objects, colour.

The checks run in the order of the reasons in ``covtanet.errors``: of several reasons that hold, a
series gets the first.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileDataset

from covtanet.ct import limits
from covtanet.ct.dicom_acquisitions import check_one_acquisition
from covtanet.ct.dicom_contrast import has_contrast
from covtanet.ct.dicom_frames import Frame, read_frames
from covtanet.ct.dicom_geometry import Stack, check_positions, fit_stack
from covtanet.ct.dicom_image_type import is_localizer, is_projection, is_reformatted
from covtanet.ct.dicom_objects import (
    check_class,
    check_numbers,
    check_syntax,
    parse_object,
    read_text,
    silenced_pydicom,
)
from covtanet.ct.dicom_pixels import check_complete, decode, decode_stack, slice_to_hu
from covtanet.ct.dicom_values import value_of
from covtanet.ct.hounsfield import check_hu
from covtanet.ct.volume import Volume, canonical_volume
from covtanet.errors import QcFlag, Reason, StudyError

HEAD_AXIS = 2  # of LPS
# In capitals, without blanks and brackets; US means unspecified.
HU_TYPE = re.compile(r"|HUS?|HU_MOD|US|UNSPECIFIED|(CT_?)?HOUN[DS]*FIELDS?[A-Z_]*|CT_?NUMBERS?")


@dataclass(frozen=True)
class _Objects:
    """The parsed objects of a series, without copies."""

    datasets: list[FileDataset]
    has_copies: bool


@dataclass(frozen=True)
class _Slices:
    """The frames of a series. num_localizers: how many overview images were left out."""

    frames: list[Frame]
    num_localizers: int

    @property
    def headers(self) -> list[Dataset]:
        return [frame.dataset for frame in self.frames]


def read_series(objects: Iterable[bytes], *, num_threads: int = 1) -> Volume:
    """Read one series.

    objects: the bytes of its DICOM objects, in any order; the bytes of an object are released once
    it is parsed. num_threads: how many slices are decoded at a time.

    Raises:
        StudyError: with the first reason that holds, in the order of ``covtanet.errors``.
    """
    with silenced_pydicom():
        parsed = _parse_objects(objects)
        for dataset in parsed.datasets:
            check_numbers(dataset)
        volume = _read_volume(parsed.datasets, num_threads)
    if not parsed.has_copies:
        return volume
    return replace(volume, qc_flags=(*volume.qc_flags, QcFlag.DUPLICATE_OBJECTS))


def read_slice(data: bytes, shape: tuple[int, int]) -> NDArray[Any]:
    """Return the HU of one single-frame object, (rows, columns), as its rows and columns lie.

    shape: expected rows and columns.

    Raises:
        StudyError: the object cannot be read, or has another size.
    """
    with silenced_pydicom():
        dataset = parse_object(data)
        check_numbers(dataset)
        (frame,) = _find_slices([dataset]).frames
        check_complete([frame])
        size = (int(frame.dataset.Rows), int(frame.dataset.Columns))
        if size != shape:
            raise StudyError(Reason.UNREADABLE, f"a slice of {size} pixels, expected {shape}")
        _check_rescale([frame.dataset])
        return slice_to_hu(decode(frame), frame.dataset)


def _parse_objects(objects: Iterable[bytes]) -> _Objects:
    """Parse objects; leave out an object that came before, byte for byte."""
    first_by_key: dict[tuple[str, int, int], FileDataset] = {}
    datasets: list[FileDataset] = []
    has_copies = False
    for data in objects:
        if len(datasets) == limits.MAX_SLICES:
            raise StudyError(Reason.TOO_LARGE, f"more than {limits.MAX_SLICES} objects")
        dataset = parse_object(data)
        # The bytes of earlier objects are released. Objects of equal length, checksum, UID and
        # pixels were the same.
        key = (read_text(dataset, "SOPInstanceUID"), len(data), isal_zlib.crc32(data))
        first = first_by_key.setdefault(key, dataset)
        if first is not dataset and value_of(first, "PixelData") == value_of(dataset, "PixelData"):
            has_copies = True
        else:
            datasets.append(dataset)
    return _Objects(datasets, has_copies)


def _read_volume(datasets: Sequence[FileDataset], num_threads: int) -> Volume:
    slices = _find_slices(datasets)
    headers = slices.headers
    check_complete(slices.frames)
    num_voxels = sum(int(header.Rows) * int(header.Columns) for header in headers)
    # The geometry gives each slice its index before it is decoded. If it is refused, the slices
    # are decoded all the same: a damaged slice is the reason that goes first.
    stack: Stack | None = None
    geometry_error: StudyError | None = None
    try:
        stack = _fit_stack(datasets, headers)
    except StudyError as error:
        geometry_error = error
    hu, is_padded = None, False
    if num_voxels <= limits.MAX_VOXELS:
        order = None if stack is None else stack.order
        hu, is_padded = decode_stack(slices.frames, order, num_threads=num_threads)
    if stack is None:
        assert geometry_error is not None
        raise geometry_error
    if not all(_is_hu(header) for header in headers):
        raise StudyError(
            Reason.NOT_HU, "a slice's RescaleType is not HU, as of a dual-energy image"
        )
    if hu is None:
        raise StudyError(
            Reason.TOO_LARGE,
            f"{num_voxels} voxels, expected at most {limits.MAX_BYTES} bytes of HU, which are "
            f"{limits.MAX_VOXELS} voxels if all are whole numbers, and half of it if not",
        )
    check_hu(hu)
    if len(hu) < limits.MIN_SLICES:
        raise StudyError(
            Reason.TOO_FEW_SLICES, f"{len(hu)} slices, expected at least {limits.MIN_SLICES}"
        )
    volume = canonical_volume(hu, stack.affine)
    flags = _qc_flags(slices, stack, is_padded=is_padded)
    return replace(volume, qc_flags=(*volume.qc_flags, *flags))


def _qc_flags(slices: _Slices, stack: Stack, *, is_padded: bool) -> tuple[QcFlag, ...]:
    headers = slices.headers
    is_axial = int(np.abs(stack.affine[:3, 0]).argmax()) == HEAD_AXIS
    has_reformatted = any(is_reformatted(header) for header in headers)
    conditions = {
        QcFlag.CONTRAST: any(has_contrast(header) for header in headers),
        QcFlag.PADDING: is_padded,
        QcFlag.REFORMATTED: not is_axial or has_reformatted,
        QcFlag.LOCALIZER_DROPPED: slices.num_localizers > 0,
    }
    return tuple(flag for flag, holds in conditions.items() if holds)


def _fit_stack(datasets: Sequence[FileDataset], headers: Sequence[Dataset]) -> Stack:
    """Fit the grid of a series; it must be of one patient and acquisition and can be rescaled."""
    _check_one_patient(datasets)
    check_one_acquisition(headers)
    check_positions(headers)
    _check_rescale(headers)
    return fit_stack(headers)


def _find_slices(datasets: Sequence[FileDataset]) -> _Slices:
    """Return the frames of a series, if they are CT of a syntax that is read.

    Raises:
        StudyError: ``unreadable``, ``not_ct``, ``projection``, ``unsupported_syntax`` or
            ``too_large``.
    """
    images = [dataset for dataset in datasets if not _is_ct_localizer(dataset)]
    try:
        all_frames = read_frames(images)
        frames = [frame for frame in all_frames if not is_localizer(frame.dataset)]
        has_projection = any(is_projection(frame.dataset) for frame in frames)
    except StudyError:
        raise
    except Exception as error:  # pydicom converts the items of a sequence on access, too
        raise StudyError(Reason.UNREADABLE, "the frames of an object cannot be read") from error
    for frame in frames:
        if frame.dataset is not frame.source:  # objects of one frame have been checked
            check_numbers(frame.dataset)
    check_class(images)
    if not frames:
        raise StudyError(Reason.NOT_CT, "all objects are localizers, expected axial slices")
    if has_projection:
        raise StudyError(
            Reason.PROJECTION,
            "an object is a projection or a rendering by its ImageType, expected slices",
        )
    check_syntax(images)
    if len(frames) > limits.MAX_SLICES:
        raise StudyError(
            Reason.TOO_LARGE, f"{len(frames)} slices, expected at most {limits.MAX_SLICES}"
        )
    num_left_out = len(datasets) - len(images) + len(all_frames) - len(frames)
    return _Slices(frames, num_left_out)


def _is_ct_localizer(dataset: Dataset) -> bool:
    return is_localizer(dataset) and read_text(dataset, "Modality") == "CT"


def _check_one_patient(datasets: Sequence[FileDataset]) -> None:
    for name in ("PatientID", "StudyInstanceUID"):
        if len({read_text(dataset, name) for dataset in datasets} - {""}) > 1:
            raise StudyError(Reason.MIXED_PATIENTS, f"objects of one series differ in their {name}")


def _check_rescale(headers: Sequence[Dataset]) -> None:
    for header in headers:
        for name in ("RescaleSlope", "RescaleIntercept"):
            value = value_of(header, name)
            is_usable = value is not None and np.isfinite(float(value))
            if not is_usable or (name == "RescaleSlope" and not float(value)):
                raise StudyError(
                    Reason.MISSING_RESCALE, f"a slice has no {name}, so its values are not HU"
                )


def _is_hu(header: Dataset) -> bool:
    """Return whether RescaleType is missing or names HU, in whatever spelling."""
    letters = re.findall(r"[A-Z0-9_]", read_text(header, "RescaleType").upper())
    return HU_TYPE.fullmatch("".join(letters)) is not None
