"""DICOM SEG and SR of one screened series, from its row, its masks and its source."""

import gzip
import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from functools import partial
from io import BytesIO
from typing import Any

import nibabel as nib
import numpy as np
import pydicom

from covtanet import storage
from covtanet.archive import manifest
from covtanet.ct.dicom_frames import ENHANCED_CLASSES
from covtanet.ct.dicom_headers import (
    DEFLATED,
    MAGIC,
    MAGIC_AT,
    data_start,
    has_magic,
    transfer_syntax,
)
from covtanet.ct.dicom_image_type import is_localizer
from covtanet.ct.volume import LPS_TO_RAS
from covtanet.decoding import headers
from covtanet.decoding.child_process import header_reader
from covtanet.decoding.process import Limits
from covtanet.errors import Reason, Status, StudyError, error_location
from covtanet.report import dicom_results
from covtanet.report.dicom_source import quiet
from covtanet.report.mask_frames import frames_of

SEG = "lesion.seg.dcm"
SR = "measurements.sr.dcm"
WRITTEN = "written"
THERE_ALREADY = "there already"
# run_id and series_key become a folder.
SAFE_NAME = re.compile(r"[0-9A-Za-z]+")
# If the kernel cannot confine the reader, the run has decoded all the same, as its site decided.
READER_LIMITS = Limits(memory_mib=512, timeout_s=60, allow_weak=True)


class NotExportedError(Exception):
    """A series is not exported, by no fault of its own; the message is its outcome."""


def exportable_rows(rows: Sequence[dict[str, Any]], keys: Sequence[str]) -> list[dict[str, Any]]:
    """Return the screened DICOM series of a run. keys: of these series alone; empty for all."""
    return [
        row
        for row in rows
        if row["status"] == Status.SCREENED
        and row["source_format"] == "dicom"
        and (not keys or row["series_key"] in keys)
    ]


def export_series(row: dict[str, Any], results: str) -> dict[str, Any]:
    """Write one series' objects; return its outcome, which names nobody.

    Raises:
        AccessError: the store refuses the credentials, which concerns every series.
    """
    key = row["series_key"]
    # Before any path is made of them.
    if not all(SAFE_NAME.fullmatch(row[name]) for name in ("run_id", "series_key")):
        return outcome_of("", "run_id or series_key is not of letters and digits")
    try:
        return outcome_of(key, _write(row, storage.join(results, row["run_id"], key)))
    except StudyError as error:
        return outcome_of(key, error.reason, str(error))
    except NotExportedError as error:
        return outcome_of(key, str(error))
    except storage.AccessError:
        raise
    # Before OSError, of which it is a kind.
    except storage.ObjectChangedError:
        return outcome_of(key, Reason.CHANGED)
    except OSError as error:
        return outcome_of(key, Reason.STORAGE, type(error).__name__)
    except Exception as error:  # its text may quote the source
        return outcome_of(key, Reason.INTERNAL_ERROR, error_location(error))


def outcome_of(series_key: str, outcome: str, detail: str = "") -> dict[str, Any]:
    """Return the outcome of a series as plain values. detail: for the log alone."""
    return {"series_key": series_key, "outcome": str(outcome), "detail": detail}


def _write(row: dict[str, Any], folder: str) -> str:
    """Write a row's objects unless they are there; return ``written`` or ``there already``."""
    targets = [storage.join(folder, name) for name in (SEG, SR)]
    # Both files: an export that was killed between them writes both again.
    if all(storage.exists(target) for target in targets):
        return THERE_ALREADY
    with quiet():
        objects = _make_objects(row, folder)
    for target, data in zip(targets, objects, strict=True):
        storage.write_bytes(target, data)
    return WRITTEN


def _make_objects(row: dict[str, Any], folder: str) -> tuple[bytes, bytes]:
    """Return SEG and SR of a row.

    Raises:
        StudyError: source and masks do not belong together.
        NotExportedError: there are no masks, or no slices of the kind that is exported.
        OSError: storage fails.
    """
    lesion_file, lung_file = (
        _read_mask(storage.join(folder, f"{name}_mask.nii.gz")) for name in ("lesion", "lung")
    )
    source = source_headers(row)
    num_slices = math.prod(lesion_file.shape) // (int(source[0].Rows) * int(source[0].Columns))
    # Voxels of the mask over pixels of a frame, whatever the order of the mask's axes.
    if len(source) != num_slices:
        message = f"{len(source)} slices, expected {num_slices} as in the mask"
        raise StudyError(Reason.MISSING_SLICES, message)
    # The files of masks are NIfTI, in RAS; the matrix is its own inverse.
    affine = LPS_TO_RAS @ lesion_file.affine
    lesion, lung = (
        frames_of(source, np.asarray(mask.dataobj) > 0, affine) for mask in (lesion_file, lung_file)
    )
    finding = dicom_results.Finding(
        run_id=row["run_id"],
        series_key=row["series_key"],
        software_version=row["software_version"],
        model=f"{row['model_name']} {row['model_version']} {row['model_digest'][:12]}",
        lesion_volume_ml=row["lesion_volume_ml"],
        lung_volume_ml=row["lung_volume_ml"],
        involvement=row["involvement"],
        p_infected=row["p_infected"],
    )
    # The report refers to the segmentation, which therefore comes first.
    seg = dicom_results.segmentation(source, lesion, lung, finding)
    sr = dicom_results.structured_report(source, seg, finding)
    return dicom_results.to_bytes(seg), dicom_results.to_bytes(sr)


def _read_mask(uri: str) -> nib.Nifti1Image:
    """Return a mask that the run kept.

    Raises:
        NotExportedError: it kept none.
    """
    try:
        return nib.Nifti1Image.from_bytes(gzip.decompress(storage.read_bytes(uri)))
    except FileNotFoundError as error:
        raise NotExportedError("no_masks") from error


def source_headers(row: dict[str, Any]) -> list[pydicom.Dataset]:
    """Return the headers of a row's slices, without pixels.

    They are parsed in this process. The digest of their content must therefore be that of the row:
    then a sandboxed decoder has read the same bytes. Localizers and repeated objects are left out,
    as they were when the series was screened.

    Raises:
        StudyError: ``unsupported_syntax`` for a deflated object.
        NotExportedError: the series is gone or hidden, or has several slices in an object.
        ObjectChangedError: the series is another than was screened.
    """
    if not _is_location(row["source_uri"]):
        raise NotExportedError("hidden")
    root = row["source_uri"].rstrip("/")
    try:
        listed = next((objects for folder, objects in storage.walk(root) if not folder), [])
        objects = objects_of(row["series_uid"], root, listed)
        datasets = [parse_header(data) for data in _screened_bytes(row, root, objects)]
    except FileNotFoundError as error:
        raise NotExportedError("vanished") from error
    if any(dataset.get("SOPClassUID") in ENHANCED_CLASSES for dataset in datasets):
        raise NotExportedError("enhanced_multi_frame")
    return [dataset for dataset in datasets if not is_localizer(dataset)]


def _is_location(uri: str) -> bool:
    """Return whether a row holds the location of its series, and not a keyed digest of it."""
    return storage.is_s3(uri) or uri.startswith("/")


def objects_of(
    series_uid: str, root: str, listed: Sequence[storage.ObjectInfo]
) -> Sequence[storage.ObjectInfo]:
    """Return the objects of a folder that belong to a series.

    Raises:
        NotExportedError: there are none.
    """

    def read_head(path: str, num_bytes: int) -> bytes:
        return storage.read_bytes(storage.join(root, path), num_bytes)

    identify = partial(headers.read_identities, header_reader(READER_LIMITS))
    folder_series, _ = manifest.scan_folder("", listed, read_head, identify)
    for series in folder_series:
        if series.series_uid == series_uid and series.objects:
            return series.objects
    raise NotExportedError("vanished")


def _screened_bytes(
    row: dict[str, Any], root: str, objects: Sequence[storage.ObjectInfo]
) -> Iterator[bytes]:
    """Yield the bytes of each different object, once all are known to be those that were screened.

    Every object is read twice, since a series may be larger than the memory of a worker, and is
    compared again at the second time.

    Raises:
        ObjectChangedError: an object is another.
    """
    series_digest = storage.ContentDigest()
    different: dict[bytes, storage.ObjectInfo] = {}  # of equal objects the first
    for item in objects:
        object_digest = hashlib.sha256()
        chunks = storage.read_chunks(storage.join(root, item.path), item)
        for chunk in series_digest.tee(item.path, chunks):
            object_digest.update(chunk)
        different.setdefault(object_digest.digest(), item)
    if series_digest.hexdigest() != row["source_digest"]:
        raise storage.ObjectChangedError("the series is another than was screened, by its content")
    for expected, item in different.items():
        data = b"".join(storage.read_chunks(storage.join(root, item.path), item))
        if hashlib.sha256(data).digest() != expected:
            raise storage.ObjectChangedError("an object changed while it was read")
        yield data


def parse_header(data: bytes) -> pydicom.Dataset:
    """Return one object's header.

    Raises:
        StudyError: the object is deflated, since a parser would inflate all of it, or has no file
            meta group.
    """
    try:
        syntax, _ = transfer_syntax(data)
    except ValueError as error:
        raise StudyError(Reason.UNREADABLE, "an object has no end of its file meta") from error
    if syntax == DEFLATED:
        message = "a deflated object, expected uncompressed or lossless CT"
        raise StudyError(Reason.UNSUPPORTED_SYNTAX, message)
    if not has_magic(data):  # an object that was screened may lack the preamble
        data = bytes(MAGIC_AT) + MAGIC + data[data_start(data) :]
    return pydicom.dcmread(BytesIO(data), stop_before_pixels=True)
