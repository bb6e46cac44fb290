"""Series of a DICOMweb server in the terms of the manifest: found by QIDO-RS, fetched by WADO-RS.

A series of CT images is a row. Series of other modalities, series without an image of CT, and
localizers are ignored, but counted.
"""

import hashlib
import logging
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice

from covtanet.archive.manifest import Series
from covtanet.ct.dicom_headers import instance_uid
from covtanet.ct.dicom_image_type import is_localizer_type
from covtanet.errors import (
    AccessError,
    ConfigError,
    ObjectChangedError,
    Reason,
    StudyError,
    StudyTimeoutError,
    UnreachableError,
)
from covtanet.storage import ObjectInfo, dicomweb
from covtanet.storage.dicomweb_server import Query
from covtanet.storage.multipart import Part

logger = logging.getLogger(__name__)

CT = "CT"
# A code string (PS3.5, 6.2) without blanks.
MODALITY = re.compile(r"[A-Z0-9_]{1,16}")
MODALITIES_IN_STUDY = "ModalitiesInStudy"
# CT, Enhanced CT and Legacy Converted Enhanced CT Image Storage (PS3.6).
CT_CLASSES = {
    "1.2.840.10008.5.1.4.1.1.2",
    "1.2.840.10008.5.1.4.1.1.2.1",
    "1.2.840.10008.5.1.4.1.1.2.2",
}
# Searches at a time: the PACS serves people as well.
NUM_SEARCH_THREADS = 4
STUDIES_AT_A_TIME = 64
MAX_ATTEMPTS = 5
# Before a series that broke off is asked for again; the pause doubles with each attempt.
FIRST_PAUSE_S = 0.25
# Half of the time after which a watchdog ends the worker, which would tell less.
SERIES_TIMEOUT_S = 900.0
# The file meta with the UID of an instance comes first.
HEAD_BYTES = 4096


@dataclass(frozen=True, kw_only=True)
class IgnoredSeries:
    """A series that is no chest CT to screen. kind: its modality, or why it is not."""

    path: str
    kind: str


def find_archive(root: str, query: str) -> Iterator[Series | IgnoredSeries]:
    """Yield the series of a server that match the query of its URI.

    Raises:
        ConfigError: the query cannot be read.
        OSError: a search fails.
    """
    filters = list(dicomweb.parse_filters(query))
    if MODALITIES_IN_STUDY not in {name for name, _ in filters}:
        filters.append((MODALITIES_IN_STUDY, CT))
    studies = dicomweb.find_studies(root, filters)
    with ThreadPoolExecutor(NUM_SEARCH_THREADS) as pool:
        # Groups bound what is read ahead of the reader.
        while group := list(islice(studies, STUDIES_AT_A_TIME)):
            for series, ignored in pool.map(partial(_series_of_study, root), group):
                yield from ignored
                yield from series


def find_study(uri: str) -> tuple[str, list[Series]]:
    """Return the server's root, and the CT series that the URI of a study or one series names.

    Raises:
        ConfigError: it names neither.
        OSError: a search fails.
    """
    root, study_uid, series_uid = dicomweb.split_path(uri)
    if not study_uid:
        raise ConfigError("expected ROOT/studies/UID or ROOT/studies/UID/series/UID")
    filters = [("SeriesInstanceUID", series_uid)] if series_uid else []
    series, _ = _series_of_study(root, study_uid, filters)
    return root, [one for one in series if not series_uid or one.series_uid == series_uid]


def _series_of_study(
    root: str, study_uid: str, filters: Query = ()
) -> tuple[list[Series], list[IgnoredSeries]]:
    """Return the CT series of a study, and those that are left out."""
    series: list[Series] = []
    ignored: list[IgnoredSeries] = []
    for found in dicomweb.find_series(root, study_uid, filters):
        is_ct = found.modality == CT
        instances = _instances_of(root, found) if is_ct else []
        kind = _kind_to_ignore(instances) if is_ct else _modality_name(found)
        if kind:
            ignored.append(IgnoredSeries(path=f"{found.path}/", kind=kind))
        else:
            series.append(_as_series(found, instances))
    return series, ignored


def _modality_name(found: dicomweb.FoundSeries) -> str:
    """Return the modality of a series for logs, into which no other text of the server may come."""
    return found.modality if MODALITY.fullmatch(found.modality) else "of no known modality"


def _instances_of(root: str, found: dicomweb.FoundSeries) -> list[dicomweb.FoundInstance]:
    """Return the instances of a series; none if the search fails for this series alone.

    Such a series has a row all the same, which fails when it is fetched.
    """
    try:
        return dicomweb.find_instances(root, found.path, found.num_instances)
    except (AccessError, UnreachableError):
        raise
    except OSError as error:
        logger.warning("the instances of a series cannot be listed: %s", error)
        return []


def _kind_to_ignore(instances: list[dicomweb.FoundInstance]) -> str:
    """Return why a series is no image of the chest to screen; empty if it may be one."""
    if not instances:
        return ""
    classes = {instance.sop_class for instance in instances}
    if all(classes) and not classes & CT_CLASSES:
        return "CT, but no CT images"
    if all(is_localizer_type(instance.image_type) for instance in instances):
        return "CT localizer"
    return ""


def _as_series(found: dicomweb.FoundSeries, instances: list[dicomweb.FoundInstance]) -> Series:
    folder = f"{found.path}/"
    # Sorted, so that the order of the answer changes no digest.
    ordered = sorted(instances, key=lambda instance: instance.uid)
    return Series(
        source_path=folder,
        source_format="dicom",
        objects=tuple(
            ObjectInfo(f"{folder}instances/{instance.uid}", None, instance.created_at)
            for instance in ordered
        ),
        study_uid=found.study_uid,
        series_uid=found.series_uid,
    )


def fetch_instances(
    series: Series, root: str, max_bytes: int | None = None
) -> Iterator[tuple[str, Iterator[bytes]]]:
    """Yield UID and chunks of each instance of a series, in the order in which they come.

    The series comes in one answer. If that breaks off, the instances that are missing are asked
    for one by one, and one that was read in part goes on behind the bytes that were read. An object
    must be read before the next one is asked for.

    Raises:
        StudyError: ``too_large``, the instances have more than ``max_bytes``.
        StudyTimeoutError: the server takes too long.
        FileNotFoundError: the server does not have the series any more.
        ObjectChangedError: it has other instances than were listed.
        OSError: it does not answer as it should.
    """
    fetch = _Fetch(series, root, max_bytes)
    yield from fetch.whole_series()
    for uid in sorted(fetch.missing):
        yield uid, fetch.instance(uid)
    fetch.check_complete()


class _Fetch:
    """The instances of one series, as far as they have come."""

    def __init__(self, series: Series, root: str, max_bytes: int | None) -> None:
        self.path = series.source_path.rstrip("/")
        self.root = root
        self.missing = {item.path.rpartition("/")[2] for item in series.objects}
        self.num_listed = len(self.missing)
        self.num_unknown = 0
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.deadline = time.monotonic() + SERIES_TIMEOUT_S

    def whole_series(self) -> Iterator[tuple[str, Iterator[bytes]]]:
        """Yield what comes in the answer for the series; it may break off."""
        try:
            with dicomweb.retrieve(self.root, self.path) as parts:
                for part in parts:
                    uid, chunks = _identify(part)
                    if uid not in self.missing:  # another's header, or a new instance
                        self.num_unknown += 1
                        continue
                    self.missing.discard(uid)
                    yield uid, self._resumed(uid, chunks)
        except (AccessError, UnreachableError, FileNotFoundError, ObjectChangedError):
            raise
        except OSError as error:
            logger.warning("a series is fetched instance by instance: %s", error)

    def instance(self, uid: str) -> Iterator[bytes]:
        """Yield the chunks of one instance by a request of its own."""
        self.missing.discard(uid)
        yield from self._resumed(uid, None)

    def check_complete(self) -> None:
        """Raise ObjectChangedError if the server sent an instance that was not listed."""
        if self.num_unknown:
            message = f"{self.num_unknown} instances beside the {self.num_listed} listed ones"
            raise ObjectChangedError(message)

    def _resumed(self, uid: str, chunks: Iterator[bytes] | None) -> Iterator[bytes]:
        """Yield the chunks of an instance; ask again for what a broken answer left out.

        chunks: of an answer that is open; None asks for the instance.
        """
        num_read = 0
        digest = hashlib.sha256()
        for attempt in range(MAX_ATTEMPTS):
            self._check_time()
            source = self._request(uid, num_read, digest.digest()) if chunks is None else chunks
            try:
                for chunk in source:
                    digest.update(chunk)
                    num_read += len(chunk)
                    self._count(len(chunk))
                    yield chunk
                return
            except (AccessError, UnreachableError, FileNotFoundError, ObjectChangedError):
                raise
            except OSError:
                if attempt == MAX_ATTEMPTS - 1:
                    raise
            chunks = None
            time.sleep(FIRST_PAUSE_S * 2**attempt)

    def _request(self, uid: str, num_read: int, digest: bytes) -> Iterator[bytes]:
        """Yield an instance behind its first bytes, which must be those that were read before."""
        with dicomweb.retrieve(self.root, f"{self.path}/instances/{uid}") as parts:
            for part in parts:
                yield from _behind(part.read(), num_read, digest)
                return
        raise FileNotFoundError("the DICOMweb server sent no instance")

    def _check_time(self) -> None:
        if time.monotonic() > self.deadline:
            message = f"fetching the series takes longer than {SERIES_TIMEOUT_S:g} s"
            raise StudyTimeoutError(message)

    def _count(self, num_bytes: int) -> None:
        self._check_time()
        self.num_bytes += num_bytes
        if self.max_bytes is not None and self.num_bytes > self.max_bytes:
            message = f"more than {self.max_bytes >> 20} MiB, the most for a series"
            raise StudyError(Reason.TOO_LARGE, message)


def _identify(part: Part) -> tuple[str, Iterator[bytes]]:
    """Return the UID of an instance by its file meta, and its chunks; empty if it has none."""
    chunks = part.read()
    head = b""
    for chunk in chunks:
        head += chunk
        if len(head) >= HEAD_BYTES:
            break

    def whole() -> Iterator[bytes]:
        yield head
        yield from chunks

    return instance_uid(head), whole()


def _behind(chunks: Iterator[bytes], num_bytes: int, digest: bytes) -> Iterator[bytes]:
    """Yield what comes after the first bytes, whose SHA-256 must be ``digest``.

    Raises:
        ObjectChangedError: they are others, or there are fewer.
    """
    skipped = hashlib.sha256()
    for chunk in chunks:
        head, rest = chunk[:num_bytes], chunk[num_bytes:]
        skipped.update(head)
        num_bytes -= len(head)
        if head and not num_bytes and skipped.digest() != digest:
            raise ObjectChangedError("an instance changed while it was read")
        if rest:
            yield rest
    if num_bytes:
        raise ObjectChangedError("an instance became shorter while it was read")
