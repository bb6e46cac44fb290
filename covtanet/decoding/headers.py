"""The series that DICOM objects belong to, read from their first bytes in a child process."""

import json
import logging
from typing import IO, Any

from covtanet.ct.dicom_head import INVALID_UID_TEXT, UID_TEXT, SeriesIdentity
from covtanet.decoding.child_process import Child, read_exactly
from covtanet.errors import DecoderError, DecoderStartError, Reason, StudyError, StudyTimeoutError

logger = logging.getLogger(__name__)

Identities = list[SeriesIdentity | None]
MAX_TRIES = 2
# Two UIDs of 64 characters in JSON.
BYTES_PER_IDENTITY = 256


def read_identities(child: Child, heads: list[bytes], head_bytes: int) -> Identities:
    """Return the UIDs of objects, None for one without.

    If the child dies of these heads it gets them once more, each alone and as often as a series is decoded: the head
    that kills it has no UIDs, and the others keep theirs. head_bytes: a head of fewer bytes is a whole object.

    Raises:
        SandboxClosedError, DecoderStartError, WeakSandboxError: as ``Child.ask``.
    """
    if not heads:
        return []
    found = _tried(child, heads, head_bytes)
    if found is not None:
        return found
    return [_alone(child, head, head_bytes) for head in heads]


def _alone(child: Child, head: bytes, head_bytes: int) -> SeriesIdentity | None:
    for _ in range(MAX_TRIES):
        found = _tried(child, [head], head_bytes)
        if found is not None:
            return found[0]
    logger.warning("the header of an object ends its reader; the object counts as unreadable")
    return None


def _tried(child: Child, heads: list[bytes], head_bytes: int) -> Identities | None:
    """The UIDs, or None if the child dies of these heads, answers nonsense or takes too long."""

    def read(header: dict[str, Any], pipe: IO[bytes]) -> Identities:
        return _checked(header, pipe, len(heads))

    try:
        return child.ask(
            {"kind": "heads", "head_bytes": head_bytes}, [[head] for head in heads], read
        )
    except DecoderStartError:
        raise
    except (StudyError, StudyTimeoutError, DecoderError):
        return None


def _checked(header: dict[str, Any], pipe: IO[bytes], count: int) -> Identities:
    """The answer, once it has been found to be as many UIDs as heads were sent.

    Raises:
        StudyError: ``decode_crash`` if it is anything else.
    """
    num_bytes = header.get("num_bytes")
    if not isinstance(num_bytes, int) or not 0 < num_bytes <= count * BYTES_PER_IDENTITY:
        raise StudyError(Reason.DECODE_CRASH, "the decoder's answer cannot be: num_bytes")
    try:
        rows = json.loads(read_exactly(pipe, num_bytes))
    except (ValueError, RecursionError):
        rows = None
    if not isinstance(rows, list) or len(rows) != count or not all(_is_sound(row) for row in rows):
        raise StudyError(Reason.DECODE_CRASH, "the decoder's answer cannot be: identities")
    return [None if row is None else SeriesIdentity(*row) for row in rows]


def _is_sound(row: object) -> bool:
    if row is None:
        return True
    if not isinstance(row, list) or len(row) != 2:
        return False
    study_uid, series_uid = row
    return (study_uid is None or _is_uid(study_uid)) and _is_uid(series_uid)


def _is_uid(text: object) -> bool:
    return isinstance(text, str) and bool(
        UID_TEXT.fullmatch(text) or INVALID_UID_TEXT.fullmatch(text)
    )
