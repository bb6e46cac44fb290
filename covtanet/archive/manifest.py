"""The manifest of an archive: one row per series, without pixels.

A NIfTI object is a series. DICOM objects of one folder with one SeriesInstanceUID are a series,
whatever their names, with a preamble or without. An object that should be DICOM but has no readable
header, and an archive file such as a zip, are separate rows. All other objects are ignored, but
counted. The series of a PACS come from ``archive.dicomweb_series``.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pyarrow as pa

from covtanet.archive.object_kinds import NOT_READ, Identify, ObjectKind, ReadHeader, find_kinds
from covtanet.ct.dicom_headers import SeriesIdentity
from covtanet.errors import QcFlag, Reason
from covtanet.storage import ObjectInfo, version_digest

# Hexadecimal: 128 bits of the digest.
KEY_DIGITS = 32

OBJECT_TYPE = pa.struct([
    pa.field("path", pa.string()),
    pa.field("num_bytes", pa.int64()),
    pa.field("version", pa.string()),
])  # fmt: skip
MANIFEST_SCHEMA = pa.schema([
    pa.field("series_key", pa.string(), nullable=False),
    pa.field("source_path", pa.string(), nullable=False),
    pa.field("source_format", pa.string(), nullable=False),
    pa.field("source_version", pa.string(), nullable=False),
    pa.field("num_objects", pa.int32(), nullable=False),
    # Null before the series is read, if the server tells no size.
    pa.field("num_bytes", pa.int64()),
    pa.field("study_uid", pa.string()),
    pa.field("series_uid", pa.string()),
    pa.field("reason", pa.string()),
    pa.field("qc_flags", pa.list_(pa.string()), nullable=False),
    pa.field("objects", pa.list_(OBJECT_TYPE), nullable=False),
])  # fmt: skip
IGNORED_SCHEMA = pa.schema([
    pa.field("path", pa.string(), nullable=False),
    pa.field("num_bytes", pa.int64()),
    # Of a series at a DICOMweb server: its modality, or why it is no CT to screen.
    pa.field("kind", pa.string()),
])  # fmt: skip
# Format and reason of the row of a single object. One that was not read may be a slice: its row
# fails, also if it can be read later, so that the next night reads its folder again.
SINGLE_OBJECT_ROWS: dict[ObjectKind, tuple[str, Reason | None]] = {
    ObjectKind.NIFTI: ("nifti", None),
    ObjectKind.CONTAINER: ("other", Reason.CONTAINER),
    ObjectKind.OUTSIDE: ("other", Reason.UNREADABLE),
    ObjectKind.UNREADABLE: ("dicom", Reason.UNREADABLE),
    ObjectKind.VANISHED: ("other", Reason.VANISHED),
    ObjectKind.UNREAD: ("other", Reason.STORAGE),
}


@dataclass(frozen=True, kw_only=True)
class Series:
    """One row of the manifest.

    source_path: the NIfTI object, or the folder of a DICOM series with a trailing slash. reason:
    set if listing or header refuse the series already.
    """

    source_path: str
    source_format: str
    objects: tuple[ObjectInfo, ...]
    study_uid: str | None = None
    series_uid: str | None = None
    reason: Reason | None = None
    qc_flags: tuple[QcFlag, ...] = field(default=())

    @property
    def num_bytes(self) -> int | None:
        """Bytes of all objects as they are stored; None if the server does not tell."""
        sizes = [item.num_bytes for item in self.objects if item.num_bytes is not None]
        is_known = sizes and len(sizes) == len(self.objects)
        return sum(sizes) if is_known else None

    @property
    def series_key(self) -> str:
        """First 32 hex digits of SHA-256 over the path in the archive and the series UID."""
        identity = f"{self.source_path}\n{self.series_uid or ''}".encode("utf-8", "surrogateescape")
        return hashlib.sha256(identity).hexdigest()[:KEY_DIGITS]

    def to_row(self) -> dict[str, Any]:
        """Return the row of MANIFEST_SCHEMA."""
        return {
            "series_key": self.series_key,
            "source_path": self.source_path,
            "source_format": self.source_format,
            "source_version": version_digest(list(self.objects)),
            "num_objects": len(self.objects),
            "num_bytes": self.num_bytes,
            "study_uid": self.study_uid,
            "series_uid": self.series_uid,
            "reason": self.reason,
            "qc_flags": list(self.qc_flags),
            "objects": [asdict(item) for item in self.objects],
        }


def series_from_row(row: dict[str, Any]) -> Series:
    """Reverse ``Series.to_row``."""
    return Series(
        source_path=row["source_path"],
        source_format=row["source_format"],
        objects=tuple(ObjectInfo(**item) for item in row["objects"]),
        study_uid=row["study_uid"],
        series_uid=row["series_uid"],
        reason=Reason(row["reason"]) if row["reason"] else None,
        qc_flags=tuple(QcFlag(flag) for flag in row["qc_flags"]),
    )


def scan_folder(
    folder: str,
    objects: Iterable[ObjectInfo],
    read_header: ReadHeader,
    identify: Identify,
) -> tuple[list[Series], list[ObjectInfo]]:
    """Sort the objects of one folder into series and ignored objects.

    read_header: (path, number of bytes) -> the first bytes of an object. identify: parses these
    bytes; those of strangers belong in a sandbox.

    A bad object raises nothing. If one was not read, the series of its folder may lack slices: they
    carry ``unread_objects``.

    Raises:
        AccessError, UnreachableError: no object can be read.
    """
    series: list[Series] = []
    ignored: list[ObjectInfo] = []
    members: dict[SeriesIdentity, list[ObjectInfo]] = defaultdict(list)
    qc_flags: tuple[QcFlag, ...] = ()
    # An object is a series of its own, a member of a DICOM series, or ignored with a record.
    for item, kind in find_kinds(objects, read_header, identify):
        if isinstance(kind, SeriesIdentity):
            members[kind].append(item)
        elif kind == ObjectKind.IGNORED:
            ignored.append(item)
        else:
            series.append(_single_object_series(item, kind))
            if kind in NOT_READ:
                qc_flags = (QcFlag.UNREAD_OBJECTS,)
    for identity, items in _join_studies(members).items():
        series.append(_dicom_series(folder, identity, items, qc_flags))
    return series, ignored


def _single_object_series(item: ObjectInfo, kind: ObjectKind) -> Series:
    source_format, reason = SINGLE_OBJECT_ROWS[kind]
    return Series(
        source_path=item.path, source_format=source_format, objects=(item,), reason=reason
    )


def _dicom_series(
    folder: str,
    identity: SeriesIdentity,
    items: list[ObjectInfo],
    qc_flags: tuple[QcFlag, ...],
) -> Series:
    return Series(
        source_path=folder,
        source_format="dicom",
        # Sorted by path, so that the order of a listing changes no digest.
        objects=tuple(sorted(items, key=lambda item: item.path)),
        study_uid=identity.study_uid,
        series_uid=identity.series_uid,
        qc_flags=qc_flags,
    )


def _join_studies(
    members: dict[SeriesIdentity, list[ObjectInfo]],
) -> dict[SeriesIdentity, list[ObjectInfo]]:
    """Join objects that share a series UID, whatever study they name; the first study counts.

    The reader refuses such a series as ``mixed_patients``.
    """
    joined: dict[str, tuple[SeriesIdentity, list[ObjectInfo]]] = {}
    for identity, items in members.items():
        # The first study that is listed gives the identity.
        joined.setdefault(identity.series_uid, (identity, []))[1].extend(items)
    return dict(joined.values())


def flag_repeated(rows: Iterable[dict[str, Any]], counts: Counter[str]) -> Iterator[dict[str, Any]]:
    """Add ``series_uid_repeated`` to rows with a series UID that stands in more than one folder.

    counts: number of rows by series UID.
    """
    for row in rows:
        if row["series_uid"] and counts[row["series_uid"]] > 1:
            row = {**row, "qc_flags": [*row["qc_flags"], QcFlag.SERIES_UID_REPEATED]}
        yield row


def join_by_uid(rows: Iterable[dict[str, Any]], counts: Counter[str]) -> Iterator[dict[str, Any]]:
    """Join the rows of one series UID, at the first of their folders.

    counts: number of rows by series UID. Only rows that repeat are held in memory.
    """
    repeated: dict[str, list[Series]] = defaultdict(list)
    for row in rows:
        uid = row["series_uid"]
        if uid and counts[uid] > 1:
            repeated[uid].append(series_from_row(row))
        else:
            yield row
    for parts in repeated.values():
        # The first path gives the key, whichever folder was read first.
        first = min(parts, key=lambda part: part.source_path)
        objects = [item for part in parts for item in part.objects]
        objects.sort(key=lambda item: item.path)
        qc_flags = dict.fromkeys(flag for part in parts for flag in part.qc_flags)
        yield replace(first, objects=tuple(objects), qc_flags=tuple(qc_flags)).to_row()
