"""What an archive holds: one manifest row per series, never pixels.

A NIfTI object is a series. DICOM objects of one folder with one SeriesInstanceUID are a series, whatever their names,
with a preamble or without. An object that should be DICOM but has no readable header, and an archive file such as a
zip, are rows of their own. Everything else is ignored, but counted, as are DICOMDIR and what a Mac leaves beside files.
"""

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from typing import Any

import pyarrow as pa

from covtanet.ct.dicom_head import (
    SeriesIdentity,
    has_magic,
    is_directory,
    looks_like_dicom,
    read_identities,
)
from covtanet.errors import QcFlag, Reason
from covtanet.storage import OUTSIDE, ObjectInfo, version_digest

NIFTI_SUFFIXES = (".nii", ".nii.gz")
DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
CONTAINER_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".7z")
# A name as on a CD, whose names may end with a version.
DIRECTORY_NAME = re.compile(r"dicomdir(\.dcm|\.dicom|\.ima)?\.?(;\d+)?")
# A Mac keeps what other file systems have no place for in AppleDouble files: ._NAME beside NAME, or NAME in a folder.
APPLE_DOUBLE, APPLE_PREFIX, APPLE_FOLDERS = b"\x00\x05\x16\x07", "._", {"__macosx", ".appledouble"}
GZIP = b"\x1f\x8b"
# A NIfTI header gives its size first.
NIFTI_SIZES = tuple(size.to_bytes(4, order) for size in (348, 540) for order in ("little", "big"))
HEAD_BYTES, LONG_HEAD_BYTES = 16 << 10, 4 << 20
# Heads in memory at a time: 1 MiB of them, or 16 MiB of long ones.
HEADS_AT_A_TIME, LONG_HEADS_AT_A_TIME = 64, 4
KEY_DIGITS = 32

# (first bytes of objects, how many were asked for) -> their UIDs, None for an object without.
Identify = Callable[[list[bytes], int], list[SeriesIdentity | None]]
ReadHead = Callable[[str, int], bytes]

OBJECT_TYPE = pa.struct([
    pa.field("path", pa.string()), pa.field("num_bytes", pa.int64()), pa.field("version", pa.string())
])  # fmt: skip
MANIFEST_SCHEMA = pa.schema([
    pa.field("series_key", pa.string(), nullable=False),
    pa.field("source_path", pa.string(), nullable=False),
    pa.field("source_format", pa.string(), nullable=False),
    pa.field("source_version", pa.string(), nullable=False),
    pa.field("num_objects", pa.int32(), nullable=False),
    pa.field("num_bytes", pa.int64(), nullable=False),
    pa.field("study_uid", pa.string()),
    pa.field("series_uid", pa.string()),
    pa.field("reason", pa.string()),
    pa.field("qc_flags", pa.list_(pa.string()), nullable=False),
    pa.field("objects", pa.list_(OBJECT_TYPE), nullable=False),
])  # fmt: skip
IGNORED_SCHEMA = pa.schema([
    pa.field("path", pa.string(), nullable=False), pa.field("num_bytes", pa.int64(), nullable=False)
])  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Series:
    """One manifest row. source_path: the NIfTI object, or the folder of a DICOM series with a trailing slash.

    reason: set where listing and header already refuse it (``container``, ``unreadable``).
    """

    source_path: str
    source_format: str
    objects: tuple[ObjectInfo, ...]
    study_uid: str | None = None
    series_uid: str | None = None
    reason: str | None = None
    qc_flags: tuple[str, ...] = field(default=())

    @property
    def series_key(self) -> str:
        """First 32 hex digits of SHA-256 over the path relative to the archive and the series UID."""
        identity = f"{self.source_path}\n{self.series_uid or ''}".encode("utf-8", "surrogateescape")
        return hashlib.sha256(identity).hexdigest()[:KEY_DIGITS]

    def to_row(self) -> dict[str, Any]:
        """The row of MANIFEST_SCHEMA."""
        return {
            "series_key": self.series_key,
            "source_path": self.source_path,
            "source_format": self.source_format,
            "source_version": version_digest(list(self.objects)),
            "num_objects": len(self.objects),
            "num_bytes": sum(item.num_bytes for item in self.objects),
            "study_uid": self.study_uid,
            "series_uid": self.series_uid,
            "reason": self.reason,
            "qc_flags": list(self.qc_flags),
            "objects": [asdict(item) for item in self.objects],
        }


def series_from_row(row: dict[str, Any]) -> Series:
    """The inverse of ``Series.to_row``."""
    return Series(
        source_path=row["source_path"],
        source_format=row["source_format"],
        objects=tuple(ObjectInfo(**item) for item in row["objects"]),
        study_uid=row["study_uid"],
        series_uid=row["series_uid"],
        reason=row["reason"],
        qc_flags=tuple(row["qc_flags"]),
    )


def scan_folder(
    folder: str,
    objects: Iterable[ObjectInfo],
    read_head: ReadHead,
    identify: Identify = read_identities,
) -> tuple[list[Series], list[ObjectInfo]]:
    """Sort the objects of one folder into series and what is ignored.

    read_head: (path, number of bytes) -> the first bytes of an object. identify: parses these
    bytes, in this process by default; screening gives one that parses them in a sandbox. One bad object makes it
    raise nothing.
    """
    found: list[Series] = []
    ignored: list[ObjectInfo] = []
    members: dict[SeriesIdentity, list[ObjectInfo]] = defaultdict(list)
    for item, kind in _kinds(objects, read_head, identify):
        if isinstance(kind, SeriesIdentity):
            members[kind].append(item)
        elif kind == "nifti":
            found.append(Series(source_path=item.path, source_format="nifti", objects=(item,)))
        elif kind == "container":
            found.append(
                Series(source_path=item.path, source_format="other", objects=(item,), reason=kind)
            )
        elif kind == "outside":
            found.append(
                Series(
                    source_path=item.path,
                    source_format="other",
                    objects=(item,),
                    reason=Reason.UNREADABLE,
                )
            )
        elif kind == "unreadable":
            found.append(
                Series(source_path=item.path, source_format="dicom", objects=(item,), reason=kind)
            )
        elif (
            kind == "vanished"
        ):  # it may be a slice: a row of its own, which fails when it is fetched
            found.append(Series(source_path=item.path, source_format="other", objects=(item,)))
        else:
            ignored.append(item)
    for identity, items in _one_study_per_series(members).items():
        found.append(
            Series(
                source_path=folder,
                source_format="dicom",
                objects=tuple(sorted(items, key=lambda item: item.path)),
                study_uid=identity.study_uid,
                series_uid=identity.series_uid,
            )
        )
    return found, ignored


def _kinds(
    objects: Iterable[ObjectInfo], read_head: ReadHead, identify: Identify
) -> Iterator[tuple[ObjectInfo, SeriesIdentity | str]]:
    """Yield each object with its series or its kind: nifti, container, outside, unreadable, vanished or ignored."""
    waiting = iter(objects)
    while group := list(islice(waiting, HEADS_AT_A_TIME)):
        kinds: dict[ObjectInfo, SeriesIdentity | str] = {}
        unsure: list[ObjectInfo] = []
        heads: list[bytes] = []
        for item in group:
            kind, head = _kind_by_name(item, read_head)
            if kind is None:
                unsure.append(item)
                heads.append(head)
            else:
                kinds[item] = kind
        longer: list[ObjectInfo] = []
        for item, head, identity in zip(unsure, heads, identify(heads, HEAD_BYTES), strict=True):
            kinds[item] = identity or _kind_without_identity(item, head)
            if identity is None and item.num_bytes > HEAD_BYTES:  # a long header before the UIDs
                longer.append(item)
        for start in range(0, len(longer), LONG_HEADS_AT_A_TIME):
            kinds.update(
                _kinds_by_long_head(
                    longer[start : start + LONG_HEADS_AT_A_TIME], read_head, identify
                )
            )
        for item in group:
            yield item, kinds[item]


def _kind_by_name(item: ObjectInfo, read_head: ReadHead) -> tuple[str | None, bytes]:
    """Return the kind of an object by its name and magic number; None and its head if the header must be read."""
    name = item.path.rsplit("/", 1)[-1].lower()
    is_debris = is_debris_name(item.path)
    if item.version == OUTSIDE:  # a row whatever its name: the link's target is never read
        return "outside", b""
    if name.endswith(NIFTI_SUFFIXES) and not is_debris:
        return "nifti", b""
    if name.endswith(CONTAINER_SUFFIXES) and not is_debris:
        return "container", b""
    try:
        head = read_head(item.path, HEAD_BYTES)
    except OSError:
        return ("ignored" if is_debris else "vanished"), b""
    if is_debris_content(item.path, head):
        return "ignored", b""
    if looks_like_dicom(head):
        return None, head
    if is_debris:
        return "nifti", b""
    return ("unreadable" if name.endswith(DICOM_SUFFIXES) else "ignored"), b""


def is_debris_name(path: str) -> bool:
    """Whether a path is that of a DICOMDIR or of what a Mac leaves beside a file."""
    *folders, name = path.lower().split("/")
    is_apple = name.startswith(APPLE_PREFIX) or not APPLE_FOLDERS.isdisjoint(folders)
    return is_apple or DIRECTORY_NAME.fullmatch(name) is not None


def is_debris_content(path: str, head: bytes) -> bool:
    """Whether an object is a DICOMDIR or an AppleDouble file, by its first bytes and, if they say nothing, by its name.

    A DICOM object or NIfTI file of such a name is none of the two; only the name DICOMDIR counts whatever it holds.
    """
    name = path.rsplit("/", 1)[-1].lower()
    if head.startswith(APPLE_DOUBLE) or is_directory(head) or DIRECTORY_NAME.fullmatch(name):
        return True
    is_series = looks_like_dicom(head) or (name.endswith(NIFTI_SUFFIXES) and looks_like_nifti(head))
    return is_debris_name(path) and not is_series


def looks_like_nifti(head: bytes) -> bool:
    """Whether an object begins as a NIfTI file does, or with gzip, in which it may be."""
    return head.startswith((GZIP, *NIFTI_SIZES))


def _kind_without_identity(item: ObjectInfo, head: bytes) -> str:
    """The kind of an object that begins as DICOM does and names no series: a row only if it claims to be DICOM."""
    is_claimed = has_magic(head) or item.path.lower().endswith(DICOM_SUFFIXES)
    return "unreadable" if is_claimed else "ignored"


def _kinds_by_long_head(
    items: list[ObjectInfo], read_head: ReadHead, identify: Identify
) -> dict[ObjectInfo, SeriesIdentity | str]:
    kinds: dict[ObjectInfo, SeriesIdentity | str] = {}
    heads: dict[ObjectInfo, bytes] = {}
    for item in items:
        try:
            heads[item] = read_head(item.path, LONG_HEAD_BYTES)
        except OSError:
            kinds[item] = "vanished"
    for item, identity in zip(heads, identify(list(heads.values()), LONG_HEAD_BYTES), strict=True):
        kinds[item] = identity or _kind_without_identity(item, heads[item])
    return kinds


def _one_study_per_series(
    members: dict[SeriesIdentity, list[ObjectInfo]],
) -> dict[SeriesIdentity, list[ObjectInfo]]:
    """Join objects that share a series UID but not their study UID: they are one series, of the first study."""
    joined: dict[str, tuple[SeriesIdentity, list[ObjectInfo]]] = {}
    for identity, items in members.items():
        joined.setdefault(identity.series_uid, (identity, []))[1].extend(items)
    return dict(joined.values())


def flag_repeated(rows: Iterable[dict[str, Any]], counts: Counter[str]) -> Iterator[dict[str, Any]]:
    """Add ``series_uid_repeated`` to rows whose series UID stands in more than one folder."""
    for row in rows:
        if row["series_uid"] and counts[row["series_uid"]] > 1:
            row = {**row, "qc_flags": [*row["qc_flags"], QcFlag.SERIES_UID_REPEATED]}
        yield row


def join_by_uid(rows: Iterable[dict[str, Any]], counts: Counter[str]) -> Iterator[dict[str, Any]]:
    """Join the rows of one series UID into one, at the first of their folders; holds only rows that repeat."""
    waiting: dict[str, list[Series]] = defaultdict(list)
    for row in rows:
        uid = row["series_uid"]
        if uid and counts[uid] > 1:
            waiting[uid].append(series_from_row(row))
        else:
            yield row
    for parts in waiting.values():
        first = min(parts, key=lambda part: part.source_path)
        objects = sorted(
            (item for part in parts for item in part.objects), key=lambda item: item.path
        )
        yield replace(first, objects=tuple(objects)).to_row()
