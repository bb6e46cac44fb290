"""The series that DICOM objects belong to, read from their first bytes in a child process."""

import json
import logging
from typing import IO, Any

from covtanet.ct.dicom_headers import INVALID_UID_TEXT, UID_TEXT, SeriesIdentity
from covtanet.decoding.child_process import Child
from covtanet.decoding.framing import read_exactly
from covtanet.errors import DecoderError, DecoderStartError, Reason, StudyError, StudyTimeoutError

logger = logging.getLogger(__name__)

Identities = list[SeriesIdentity | None]
MAX_TRIES = 2
# Two UIDs of 64 characters in JSON.
BYTES_PER_IDENTITY = 256


def read_identities(child: Child, headers: list[bytes], header_bytes: int) -> Identities:
    """Return the UIDs of objects from their first bytes; None for an object without UIDs.

    header_bytes: how many bytes were read of each object; fewer are a whole object.

    If the child dies of these headers, it gets each by itself, as often as a series is decoded: the
    header that kills it has no UIDs, and all others keep theirs.

    Raises:
        SandboxClosedError, DecoderStartError, WeakSandboxError: as ``Child.ask``.
    """
    if not headers:
        return []
    identities = _try(child, headers, header_bytes)
    if identities is not None:
        return identities
    return [_read_single(child, header, header_bytes) for header in headers]


def _read_single(child: Child, header: bytes, header_bytes: int) -> SeriesIdentity | None:
    for _ in range(MAX_TRIES):
        identities = _try(child, [header], header_bytes)
        if identities is not None:
            return identities[0]
    logger.warning("the header of an object ends its reader; the object counts as unreadable")
    return None


def _try(child: Child, headers: list[bytes], header_bytes: int) -> Identities | None:
    """Return the UIDs, or None if the child dies, times out or sends an impossible answer."""

    def read(answer: dict[str, Any], pipe: IO[bytes]) -> Identities:
        return _read_answer(answer, pipe, len(headers))

    request = {"kind": "headers", "header_bytes": header_bytes}
    try:
        return child.ask(request, [[header] for header in headers], read)
    except DecoderStartError:
        raise
    except (StudyError, StudyTimeoutError, DecoderError):
        return None


def _read_answer(answer: dict[str, Any], pipe: IO[bytes], count: int) -> Identities:
    """Read an answer and check that it has the UIDs of as many objects as were sent.

    Raises:
        StudyError: ``decode_crash`` if it has anything else.
    """
    num_bytes = answer.get("num_bytes")
    if not isinstance(num_bytes, int) or not 0 < num_bytes <= count * BYTES_PER_IDENTITY:
        raise StudyError(Reason.DECODE_CRASH, "the decoder's answer is impossible: num_bytes")
    try:
        rows = json.loads(read_exactly(pipe, num_bytes))
    except (ValueError, RecursionError):
        rows = None
    if not isinstance(rows, list) or len(rows) != count or not all(map(_is_sound, rows)):
        raise StudyError(Reason.DECODE_CRASH, "the decoder's answer is impossible: identities")
    return [None if row is None else SeriesIdentity(*row) for row in rows]


def _is_sound(row: object) -> bool:
    if row is None:
        return True
    if not isinstance(row, list) or len(row) != 2:
        return False
    study_uid, series_uid = row
    return (study_uid is None or _is_uid(study_uid)) and _is_uid(series_uid)


def _is_uid(text: object) -> bool:
    if not isinstance(text, str):
        return False
    return bool(UID_TEXT.fullmatch(text) or INVALID_UID_TEXT.fullmatch(text))
