"""The DICOM objects that a ledger row was screened from: their headers, once their bytes are known.

Headers are parsed in this process. The digest of the content must therefore be that of the row:
then a sandboxed decoder has read the same bytes.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from typing import Any

import pydicom

from covtanet import storage
from covtanet.archive import manifest
from covtanet.archive.fetch import fetch_series
from covtanet.archive.manifest import Series
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
from covtanet.decoding import headers
from covtanet.decoding.child_process import header_reader
from covtanet.decoding.process import Limits
from covtanet.errors import Reason, StudyError

# If the kernel cannot confine the reader, the run has decoded all the same, as its site decided.
READER_LIMITS = Limits(memory_mib=512, timeout_s=60, allow_weak=True)


class NotExportedError(Exception):
    """A series is not exported, by no fault of its own; the message is its outcome."""


@dataclass(frozen=True, kw_only=True)
class SourceSlice:
    """One slice of a source: its header without pixels, and its object if that was asked for."""

    header: pydicom.Dataset
    data: bytes | None = None


def find_series(row: dict[str, Any]) -> tuple[str, Series]:
    """Return the archive of a row's series and the series in it, as it is there now.

    Raises:
        NotExportedError: the series is gone or hidden.
        OSError: storage fails.
    """
    uri = row["source_uri"]
    if not _is_location(uri):
        raise NotExportedError("hidden")
    try:
        archive, found = _list_dicomweb(uri) if storage.is_dicomweb(uri) else _list_folder(uri)
    except FileNotFoundError as error:
        raise NotExportedError("vanished") from error
    for series in found:
        if series.series_uid == row["series_uid"] and series.objects:
            return archive, series
    raise NotExportedError("vanished")


def _is_location(uri: str) -> bool:
    """Return whether a row holds the location of its series, and not a keyed digest of it."""
    return storage.is_s3(uri) or storage.is_dicomweb(uri) or uri.startswith("/")


def _list_dicomweb(uri: str) -> tuple[str, list[Series]]:
    # Only here: other archives do without its libraries.
    from covtanet.archive.dicomweb_series import find_study

    return find_study(uri.rstrip("/"))


def _list_folder(uri: str) -> tuple[str, list[Series]]:
    root = uri.rstrip("/")
    listed = next((objects for folder, objects in storage.walk(root) if not folder), [])

    def read_head(path: str, num_bytes: int) -> bytes:
        return storage.read_bytes(storage.join(root, path), num_bytes)

    identify = partial(headers.read_identities, header_reader(READER_LIMITS))
    folder_series, _ = manifest.scan_folder("", listed, read_head, identify)
    return root, folder_series


def read_source(
    archive: str,
    series: Series,
    source_digest: str | None,
    keeps: Callable[[pydicom.Dataset], bool] = lambda header: False,
) -> list[SourceSlice]:
    """Return the slices of a series in the order of their UIDs.

    Localizers and repeated objects are left out, as they were when the series was screened.

    source_digest: of the row. keeps: whether the object of a slice is kept, by its header.

    Raises:
        StudyError: ``unsupported_syntax`` for a deflated object.
        NotExportedError: the series is gone, or has several slices in an object.
        ObjectChangedError: the series is another than was screened.
        OSError: storage fails.
    """
    slices = []
    try:
        for data in _screened_bytes(archive, series, source_digest):
            header = parse_header(data)
            if header.get("SOPClassUID") in ENHANCED_CLASSES:
                raise NotExportedError("enhanced_multi_frame")
            if not is_localizer(header):
                kept = data if keeps(header) else None
                slices.append(SourceSlice(header=header, data=kept))
    except FileNotFoundError as error:
        raise NotExportedError("vanished") from error
    # A DICOMweb server sends them in any order; the results of equal objects are equal.
    return sorted(slices, key=lambda item: str(item.header.get("SOPInstanceUID", "")))


def _screened_bytes(archive: str, series: Series, source_digest: str | None) -> Iterator[bytes]:
    """Yield the bytes of each different object, once all are known to be those that were screened.

    Every object is read twice, since a series may be larger than the memory of a worker, and is
    compared again at the second time.

    Raises:
        ObjectChangedError: an object is another.
    """
    expected = set()
    series_digest = storage.ContentDigest()
    for chunks in fetch_series(series, archive, series_digest):
        object_digest = hashlib.sha256()
        for chunk in chunks:
            object_digest.update(chunk)
        expected.add(object_digest.digest())
    if series_digest.hexdigest() != source_digest:
        raise storage.ObjectChangedError("the series is another than was screened, by its content")
    missing = set(expected)
    for chunks in fetch_series(series, archive, storage.ContentDigest()):
        data = b"".join(chunks)
        digest = hashlib.sha256(data).digest()
        if digest not in expected:
            raise storage.ObjectChangedError("an object changed while it was read")
        if digest in missing:  # of equal objects the first
            missing.discard(digest)
            yield data
    if missing:
        raise storage.ObjectChangedError("an object is missing at the second time")


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
