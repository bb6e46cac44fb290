"""The kinds of objects in an archive, by name, first bytes and header.

A series of DICOM objects is recognised by its UIDs, any other object by name and magic number.
Debris are a DICOMDIR, and the AppleDouble files that a Mac leaves next to other files.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from enum import StrEnum
from itertools import islice

from covtanet.ct.dicom_headers import SeriesIdentity, has_magic, is_directory, looks_like_dicom
from covtanet.ct.gzip_stream import GZIP_MAGIC
from covtanet.errors import AccessError, UnreachableError
from covtanet.storage import OUTSIDE, ObjectInfo

NIFTI_SUFFIXES = (".nii", ".nii.gz")
DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
CONTAINER_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".7z")
# The names on a CD may end with a version.
DIRECTORY_NAME = re.compile(r"dicomdir(\.dcm|\.dicom|\.ima)?\.?(;\d+)?")
# A Mac keeps data for which other file systems have no place in AppleDouble files: ._NAME next to
# NAME, or NAME in a folder.
APPLE_DOUBLE, APPLE_PREFIX = b"\x00\x05\x16\x07", "._"
APPLE_FOLDERS = {"__macosx", ".appledouble"}
# A NIfTI header gives its size first.
NIFTI_SIZES = tuple(size.to_bytes(4, order) for size in (348, 540) for order in ("little", "big"))
# Most headers name their series within the first; a few have thousands of elements before it.
HEADER_BYTES, LONG_HEADER_BYTES = 16 << 10, 4 << 20
# Headers in memory at a time: 1 MiB of them, or 16 MiB of long ones.
# Long ones are read only if the first bytes hold no UIDs.
HEADERS_AT_A_TIME, LONG_HEADERS_AT_A_TIME = 64, 4

# (First bytes of objects, how many were asked for) -> their UIDs, None for an object without UIDs.
Identify = Callable[[list[bytes], int], list[SeriesIdentity | None]]
# (Path, number of bytes) -> the first bytes of an object.
ReadHeader = Callable[[str, int], bytes]


class ObjectKind(StrEnum):
    """An object that does not name a DICOM series."""

    NIFTI = "nifti"
    CONTAINER = "container"
    """An archive file, such as a zip."""
    OUTSIDE = "outside"
    """A link that leads out of the archive."""
    UNREADABLE = "unreadable"
    """Claims to be DICOM and has no readable header."""
    VANISHED = "vanished"
    """Is gone since it was listed; it may have been a slice."""
    UNREAD = "unread"
    """Could not be read; it may be a slice."""
    IGNORED = "ignored"


# Kinds of objects that may be slices of a series of their folder.
NOT_READ = (ObjectKind.VANISHED, ObjectKind.UNREAD)
Kind = SeriesIdentity | ObjectKind


def find_kinds(
    objects: Iterable[ObjectInfo], read_header: ReadHeader, identify: Identify
) -> Iterator[tuple[ObjectInfo, Kind]]:
    """Yield each object with its series or its kind.

    Raises:
        AccessError, UnreachableError: no object can be read.
    """
    remaining = iter(objects)
    while group := list(islice(remaining, HEADERS_AT_A_TIME)):
        kinds = _kinds_of_group(group, read_header, identify)
        for item in group:
            yield item, kinds[item]


def _kinds_of_group(
    group: list[ObjectInfo], read_header: ReadHeader, identify: Identify
) -> dict[ObjectInfo, Kind]:
    kinds: dict[ObjectInfo, Kind] = {}
    headers: dict[ObjectInfo, bytes] = {}
    for item in group:
        kind, header = _kind_by_name(item, read_header)
        if kind is None:
            headers[item] = header
        else:
            kinds[item] = kind
    # One call for the group: the headers go to the sandbox together.
    identities = identify(list(headers.values()), HEADER_BYTES)
    longer: list[ObjectInfo] = []
    for (item, header), identity in zip(headers.items(), identities, strict=True):
        kinds[item] = identity or _kind_without_identity(item, header)
        if identity is None and (item.num_bytes or 0) > HEADER_BYTES:  # the UIDs may come later
            longer.append(item)
    for start in range(0, len(longer), LONG_HEADERS_AT_A_TIME):
        batch = longer[start : start + LONG_HEADERS_AT_A_TIME]
        kinds.update(_kinds_by_long_header(batch, read_header, identify))
    return kinds


def _kind_by_name(item: ObjectInfo, read_header: ReadHeader) -> tuple[ObjectKind | None, bytes]:
    """Return an object's kind by its name and magic number.

    None, and the first bytes, if the header must be parsed.
    """
    name = item.path.rsplit("/", 1)[-1].lower()
    is_debris = is_debris_name(item.path)
    if item.version == OUTSIDE:  # before the name: the target of the link is never read
        return ObjectKind.OUTSIDE, b""
    if name.endswith(NIFTI_SUFFIXES) and not is_debris:
        return ObjectKind.NIFTI, b""
    if name.endswith(CONTAINER_SUFFIXES) and not is_debris:
        return ObjectKind.CONTAINER, b""
    try:
        header = read_header(item.path, HEADER_BYTES)
    except OSError as error:
        kind = _kind_of_unread(error)
        return (ObjectKind.IGNORED if is_debris else kind), b""
    if is_debris_content(item.path, header):
        return ObjectKind.IGNORED, b""
    if looks_like_dicom(header):
        return None, header
    if is_debris:  # by its name, but a NIfTI file by its content
        return ObjectKind.NIFTI, b""
    # An object that claims to be DICOM gets a row, so that no series is lost silently.
    is_claimed = name.endswith(DICOM_SUFFIXES)
    return (ObjectKind.UNREADABLE if is_claimed else ObjectKind.IGNORED), b""


def _kind_of_unread(error: OSError) -> ObjectKind:
    if isinstance(error, AccessError | UnreachableError):  # of every object, not of this one
        raise error
    return ObjectKind.VANISHED if isinstance(error, FileNotFoundError) else ObjectKind.UNREAD


def is_debris_name(path: str) -> bool:
    """Return whether a path is that of a DICOMDIR or of an AppleDouble file."""
    *folders, name = path.lower().split("/")
    is_apple = name.startswith(APPLE_PREFIX) or not APPLE_FOLDERS.isdisjoint(folders)
    return is_apple or DIRECTORY_NAME.fullmatch(name) is not None


def is_debris_content(path: str, header: bytes) -> bool:
    """Return whether an object is debris by its first bytes or, if they say nothing, by its name.

    A DICOM object or NIfTI file of a Mac's name is not debris; the name DICOMDIR always is.
    """
    name = path.rsplit("/", 1)[-1].lower()
    if header.startswith(APPLE_DOUBLE) or is_directory(header) or DIRECTORY_NAME.fullmatch(name):
        return True
    is_nifti = name.endswith(NIFTI_SUFFIXES) and looks_like_nifti(header)
    return is_debris_name(path) and not (is_nifti or looks_like_dicom(header))


def looks_like_nifti(header: bytes) -> bool:
    """Return whether an object begins as a NIfTI file does, or with gzip, which may hold one."""
    return header.startswith((GZIP_MAGIC, *NIFTI_SIZES))


def _kind_without_identity(item: ObjectInfo, header: bytes) -> ObjectKind:
    """Return the kind of an object that begins as DICOM does and names no series.

    It is a row of the manifest only if it claims to be DICOM.
    """
    is_claimed = has_magic(header) or item.path.lower().endswith(DICOM_SUFFIXES)
    return ObjectKind.UNREADABLE if is_claimed else ObjectKind.IGNORED


def _kinds_by_long_header(
    items: list[ObjectInfo], read_header: ReadHeader, identify: Identify
) -> dict[ObjectInfo, Kind]:
    kinds: dict[ObjectInfo, Kind] = {}
    headers: dict[ObjectInfo, bytes] = {}
    for item in items:
        try:
            headers[item] = read_header(item.path, LONG_HEADER_BYTES)
        except OSError as error:
            kinds[item] = _kind_of_unread(error)
    identities = identify(list(headers.values()), LONG_HEADER_BYTES)
    for (item, header), identity in zip(headers.items(), identities, strict=True):
        kinds[item] = identity or _kind_without_identity(item, header)
    return kinds
