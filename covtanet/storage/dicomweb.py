"""Searching, reading and storing at a DICOMweb server (PS3.18): QIDO-RS, WADO-RS, STOW-RS.

Paths are ``studies/UID/series/UID/instances/UID`` below the server's root. UIDs that a server sends
become parts of paths and keys, so they are checked first; a study, series or instance without a
valid UID is an error of the server.
"""

import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

from covtanet.errors import ConfigError
from covtanet.storage.dicomweb_server import (
    Attributes,
    DicomwebServer,
    Query,
    check_status,
    dicomweb_server,
    parse_json,
    read_answer,
)
from covtanet.storage.multipart import Part, boundary_of, read_parts
from covtanet.storage.uri import absolute, is_dicomweb

PAGE = 500
UID_CHARACTERS = frozenset("0123456789.")
MAX_UID = 64
# As the objects are stored, whatever their transfer syntax.
ACCEPT_STORED = 'multipart/related; type="application/dicom"; transfer-syntax=*'
STORE_TYPE = 'multipart/related; type="application/dicom"; boundary='
STORE_ANSWER_BYTES = 4 << 20

# Tags of PS3.6.
IMAGE_TYPE, CREATION_DATE, CREATION_TIME = "00080008", "00080012", "00080013"
SOP_CLASS, SOP_UID, MODALITY = "00080016", "00080018", "00080060"
STUDY_UID, SERIES_UID, NUM_INSTANCES = "0020000D", "0020000E", "00201209"
FAILED_SOPS = "00081198"
REFERENCED_UID, FAILURE_REASON = "00081155", "00081197"


@dataclass(frozen=True, kw_only=True)
class FoundSeries:
    """A series as QIDO-RS describes it."""

    study_uid: str
    series_uid: str
    modality: str
    num_instances: int | None
    """None if the server does not tell."""

    @property
    def path(self) -> str:
        """Path below the server's root."""
        return series_path(self.study_uid, self.series_uid)


@dataclass(frozen=True, kw_only=True)
class FoundInstance:
    """An instance as QIDO-RS describes it; texts are empty if the server does not tell."""

    uid: str
    sop_class: str
    created_at: str
    image_type: tuple[str, ...]


def series_path(study_uid: str, series_uid: str) -> str:
    """Return the path of a series."""
    return f"studies/{study_uid}/series/{series_uid}"


def split_path(uri: str) -> tuple[str, str, str]:
    """Return root, study UID and series UID of the URI of a study or series; empty if missing.

    Raises:
        ConfigError: it names something else below ``studies/``.
    """
    root, marker, path = uri.rstrip("/").partition("/studies/")
    if not marker:
        return root, "", ""
    study_uid, slash, rest = path.partition("/")
    series_uid = rest.removeprefix("series/")
    is_sound = is_uid(study_uid) and (not slash or is_uid(series_uid))
    if not is_sound or (slash and not rest.startswith("series/")):
        raise ConfigError("expected ROOT/studies/UID or ROOT/studies/UID/series/UID")
    return root, study_uid, series_uid


def server_root(uri: str) -> str:
    """Return the root of a server that a user names.

    Raises:
        ConfigError: the URI names none, or the server's credentials cannot be read.
    """
    root = absolute(uri)
    if not is_dicomweb(root) or split_path(root)[1]:
        raise ConfigError("expected the server as dicomweb+https://HOST/PATH")
    # Now, and not when the first object is sent.
    dicomweb_server(root)
    return root


def is_uid(text: str) -> bool:
    """Return whether a text is a UID (PS3.5, 9.1), and hence safe within a path."""
    return 0 < len(text) <= MAX_UID and set(text) <= UID_CHARACTERS and ".." not in text


def parse_filters(query: str) -> Query:
    """Return the attributes of a URI's query, such as ``StudyDate=20260101-20260131``.

    Raises:
        ConfigError: it is no list of NAME=VALUE, or names a parameter of the paging.
    """
    try:
        filters = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
    except ValueError:
        raise ConfigError("the query of the archive is not NAME=VALUE&NAME=VALUE") from None
    reserved = {"limit", "offset", "includefield"} & {name.lower() for name, _ in filters}
    if reserved:
        raise ConfigError(f"the query of the archive has {min(reserved)}, expected attributes")
    return filters


def find_studies(root: str, filters: Query) -> Iterator[str]:
    """Yield the UIDs of the studies that match, page by page."""
    for study in _search(dicomweb_server(root), "studies", STUDY_UID, filters):
        yield checked_uid(study, STUDY_UID)


def find_series(root: str, study_uid: str, filters: Query = ()) -> list[FoundSeries]:
    """Return the series of a study."""
    query = [*filters, ("includefield", NUM_INSTANCES)]
    found = _search(dicomweb_server(root), f"studies/{study_uid}/series", SERIES_UID, query)
    return [
        FoundSeries(
            study_uid=study_uid,
            series_uid=checked_uid(series, SERIES_UID),
            modality=text_of(series, MODALITY),
            num_instances=_count(series, NUM_INSTANCES),
        )
        for series in found
    ]


def _count(attributes: Attributes, tag: str) -> int | None:
    text = text_of(attributes, tag)
    return int(text) if text.isdecimal() else None


def find_instances(root: str, path: str, expected: int | None = None) -> list[FoundInstance]:
    """Return the instances of a series.

    path: of the series. expected: their number, which saves the search for more.
    """
    query = [("includefield", tag) for tag in (IMAGE_TYPE, CREATION_DATE, CREATION_TIME)]
    return [
        FoundInstance(
            uid=checked_uid(instance, SOP_UID),
            sop_class=text_of(instance, SOP_CLASS),
            created_at=text_of(instance, CREATION_DATE) + text_of(instance, CREATION_TIME),
            image_type=tuple(map(str, values_of(instance, IMAGE_TYPE))),
        )
        for instance in _search(
            dicomweb_server(root), f"{path}/instances", SOP_UID, query, expected
        )
    ]


def _search(
    server: DicomwebServer, path: str, uid_tag: str, query: Query, expected: int | None = None
) -> Iterator[Attributes]:
    """Yield each match of a search once, page by page.

    Pages shift if objects come or go meanwhile, and a server may have a smaller page of its own:
    the search ends with a page that holds nothing new, or with the expected number of matches.
    After a full page that is not believed: Orthanc 1.10 counts skipped matches of a search by
    ModalitiesInStudy against the limit, so that its second page is always empty. Everything is
    then asked for again from the first match on, with a limit that grows.
    """
    seen: set[str] = set()
    has_offset = True
    while expected is None or len(seen) < expected:
        offset, limit = (len(seen), PAGE) if has_offset else (0, 2 * len(seen))
        page = server.get_json(path, [*query, ("limit", str(limit)), ("offset", str(offset))])
        num_new = 0
        for match in page:
            uid = text_of(match, uid_tag)
            if uid not in seen:
                seen.add(uid)
                num_new += 1
                yield match
        if not num_new and (not has_offset or len(seen) < PAGE):
            return
        has_offset = has_offset and num_new > 0


def checked_uid(attributes: Attributes, tag: str) -> str:
    """Return a UID of a match.

    Raises:
        OSError: it is missing or invalid.
    """
    uid = text_of(attributes, tag)
    if not is_uid(uid):
        raise OSError(f"the DICOMweb server sent an invalid UID in {tag}")
    return uid


def text_of(attributes: Attributes, tag: str) -> str:
    """Return the first value of an element as text; empty if it is missing."""
    values = values_of(attributes, tag)
    return str(values[0]) if values and isinstance(values[0], str | int | float) else ""


def values_of(attributes: Attributes, tag: str) -> list[Any]:
    """Return the values of an element; empty if it is missing."""
    element = attributes.get(tag)
    values = element.get("Value") if isinstance(element, dict) else None
    return values if isinstance(values, list) else []


@contextmanager
def retrieve(root: str, path: str) -> Iterator[Iterator[Part]]:
    """Open the objects of a series or an instance, as they are stored, in one streamed answer."""
    with dicomweb_server(root).get(path, ACCEPT_STORED) as response:
        boundary = boundary_of(response.headers.get("Content-Type", ""))
        yield read_parts(read_answer(response), boundary)


def stored_uids(root: str, path: str) -> set[str]:
    """Return the UIDs of the instances of a series that are there. path: of the series."""
    try:
        return {instance.uid for instance in find_instances(root, path)}
    except FileNotFoundError:  # some servers answer 404 to a search in a series they do not have
        return set()


def store(root: str, study_uid: str, objects: Sequence[bytes]) -> dict[str, int]:
    """Send DICOM objects of one study by STOW-RS, in one request.

    Returns the failure reason (PS3.18, table 10.5.3-1) of each refused object by its UID; empty if
    all are stored. The same objects may be sent again.
    """
    boundary = secrets.token_hex(16)
    body = b"".join(
        b"--%b\r\nContent-Type: application/dicom\r\n\r\n%b\r\n" % (boundary.encode(), content)
        for content in objects
    )
    body += b"--%b--\r\n" % boundary.encode()
    server = dicomweb_server(root)
    with server.post(f"studies/{study_uid}", STORE_TYPE + boundary, body) as response:
        content = b"".join(read_answer(response))[:STORE_ANSWER_BYTES]
        status = response.status_code
    failures = _refused_objects(content)
    # 409: none is stored; the answer names them.
    if not failures:
        check_status(status)
    return failures


def _refused_objects(content: bytes) -> dict[str, int]:
    try:
        answers = parse_json(content)
    except OSError:  # a server may answer nothing, or in XML
        return {}
    return {
        text_of(item, REFERENCED_UID): int(text_of(item, FAILURE_REASON) or 0)
        for answer in answers
        for item in values_of(answer, FAILED_SOPS)
        if isinstance(item, dict)
    }
