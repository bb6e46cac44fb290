"""Every exception of the package, and the codes that the ledger promises.

CovtanetError
├── ConfigError      the run cannot start as asked: configuration, arguments, resources
│   ├── NoSeriesError    the input holds no series
│   ├── LedgerVersionError  a ledger was written by a version of this software with another schema
│   ├── EngineUnavailableError  the model or the processor cannot give an inference engine
│   └── WeakSandboxError  the kernel cannot confine the decoder's child process
├── AlreadyCommittedError  another driver of the run was first
├── CheckpointError  a saved model is missing, damaged or differs from its digest
├── TrainingError    a training cannot go on; its finished work is kept
├── StudyError       one series cannot be screened, by its own fault
├── StudyTimeoutError  one series takes longer than it may
├── UploadError      an upload is no study or exceeds a limit
├── UnavailableError  the model is unavailable for now; try again
├── SandboxClosedError  another thread closed the sandbox under a request
└── DecoderError     a fault of this software, found in the decoder's child process
    └── DecoderStartError  the child process does not start

Failures of storage are ``OSError``, as everywhere in Python:

OSError
├── AccessError         the store refuses the credentials for every object: this stops a job
├── UnreachableError    the store answers no request, after retries: this stops a job
├── ObjectChangedError  an object differs from its entry in the listing
├── TooManyObjectsError a tree holds more objects than allowed
└── TooLargeError       an object has more bytes than allowed
"""

import traceback
from enum import StrEnum
from pathlib import Path

# Not resolved: the frames of a traceback name files as they were imported, through a link too.
PACKAGE = Path(__file__).parent


class Status(StrEnum):
    """Outcome of a series in the ledger."""

    SCREENED = "screened"
    """Measured; diagnosis and flags say how far its numbers may be used."""
    REJECTED = "rejected"
    """Cannot be screened, by the input's fault."""
    FAILED = "failed"
    """Not screened, by a fault of storage, node or software; another run may screen it."""


class Reason(StrEnum):
    """Why a series is rejected or failed. Codes are added, never renamed."""

    UNREADABLE = "unreadable"
    CONTAINER = "container"
    LABEL_MAP = "label_map"
    NOT_CT = "not_ct"
    PROJECTION = "projection"
    UNSUPPORTED_SYNTAX = "unsupported_syntax"
    TRUNCATED = "truncated"
    UNDECODABLE = "undecodable"
    DECODE_CRASH = "decode_crash"
    MIXED_PATIENTS = "mixed_patients"
    MIXED_ACQUISITIONS = "mixed_acquisitions"
    MISSING_POSITION = "missing_position"
    IMPLAUSIBLE_SPACING = "implausible_spacing"
    ORIENTATION_CONFLICT = "orientation_conflict"
    MISSING_RESCALE = "missing_rescale"
    MIXED_ORIENTATION = "mixed_orientation"
    GANTRY_TILT = "gantry_tilt"
    DUPLICATE_SLICE = "duplicate_slice"
    MISSING_SLICES = "missing_slices"
    IRREGULAR_SPACING = "irregular_spacing"
    NOT_HU = "not_hu"
    TOO_FEW_SLICES = "too_few_slices"
    TOO_LARGE = "too_large"
    NO_LUNG = "no_lung"
    # Failures.
    STORAGE = "storage"
    VANISHED = "vanished"
    CHANGED = "changed"
    TIMEOUT = "timeout"
    WORKER_DIED = "worker_died"
    INTERNAL_ERROR = "internal_error"
    # Of labelled volumes alone; training also reads 8-bit grey values.
    NOT_GREY8 = "not_grey8"
    MASK_UNREADABLE = "mask_unreadable"
    MASK_MISMATCH = "mask_mismatch"
    EMPTY_LUNG_MASK = "empty_lung_mask"
    UNLABELLED = "unlabelled"


FAILURE_REASONS = (
    Reason.STORAGE, Reason.VANISHED, Reason.CHANGED, Reason.TIMEOUT, Reason.WORKER_DIED,
    Reason.INTERNAL_ERROR,
)  # fmt: skip
LABEL_REASONS = (
    Reason.NOT_GREY8, Reason.MASK_UNREADABLE, Reason.MASK_MISMATCH, Reason.EMPTY_LUNG_MASK,
    Reason.UNLABELLED,
)  # fmt: skip
# Of several reasons that hold, the first in this order is given; limits of size and the container
# are checked before anything is decoded.
REJECTION_REASONS = tuple(
    reason for reason in Reason if reason not in (*FAILURE_REASONS, *LABEL_REASONS)
)


class QcFlag(StrEnum):
    """A doubt about a number of a screened series."""

    PARTIAL_LUNGS = "partial_lungs"
    SERIES_UID_REPEATED = "series_uid_repeated"
    OBLIQUE = "oblique"
    TWO_ORIENTATIONS = "two_orientations"
    CONTRAST = "contrast"
    PADDING = "padding"
    NO_DIAGNOSIS = "no_diagnosis"
    DIAGNOSIS_BY_BURDEN = "diagnosis_by_burden"
    REFORMATTED = "reformatted"
    IMPLAUSIBLE_LUNGS = "implausible_lungs"
    UNKNOWN_SPACING = "unknown_spacing"
    BLANK_SLICES = "blank_slices"
    LOCALIZER_DROPPED = "localizer_dropped"
    DUPLICATE_OBJECTS = "duplicate_objects"
    UNREAD_OBJECTS = "unread_objects"


class CovtanetError(Exception):
    """Base of all errors that this package raises on purpose."""


class ConfigError(CovtanetError):
    """The run cannot start as asked; the message says found, expected and where."""


class NoSeriesError(ConfigError):
    """The input holds no series."""


class LedgerVersionError(ConfigError):
    """A ledger was written by a version of this software with another schema."""


class EngineUnavailableError(ConfigError):
    """The model, the processor or a library cannot give an inference engine."""


class WeakSandboxError(ConfigError):
    """The decoder's child process cannot be confined as it should; nothing is decoded."""


class AlreadyCommittedError(CovtanetError):
    """Another driver of the same run committed first; its ledger stands."""


class CheckpointError(CovtanetError):
    """A saved model is missing, damaged, or differs from its digest."""


class TrainingError(CovtanetError):
    """A training cannot go on; its finished work is kept."""


class NodesLostError(CovtanetError):
    """Nodes of the cluster were lost; a new plan for those that are left continues the run."""


class StudyError(CovtanetError):
    """One series is refused; named after the study, of which a series is a part.

    The message says found, expected and where without any text of the input, since it goes into
    logs and the ledger.
    """

    def __init__(self, reason: Reason, message: str, *, series_uid: str = "") -> None:
        super().__init__(message)
        self.reason = reason
        self.series_uid = series_uid

    def __reduce__(self) -> tuple[object, ...]:
        """Keep the fields when the error travels between processes."""
        return (_study_error, (self.reason, str(self), self.series_uid))


def _study_error(reason: Reason, message: str, series_uid: str) -> StudyError:
    return StudyError(reason, message, series_uid=series_uid)


class StudyTimeoutError(CovtanetError):
    """One series takes longer than it may."""


class DecoderError(CovtanetError):
    """A fault of this software in the decoder's child process; the message is type and place."""


class DecoderStartError(DecoderError):
    """The decoder's child process does not start; no input is to blame."""


class SandboxClosedError(CovtanetError, RuntimeError):
    """The sandbox was closed, perhaps by another thread while it worked; its request ends."""


class UploadError(CovtanetError):
    """A caller's upload is refused.

    ``reason`` is a stable code; the message holds no text of the caller.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class AccessError(OSError):
    """The store refuses the credentials, so that no object can be read or written."""


class UnreachableError(OSError):
    """The store answers no request, so that no object can be read or written."""


class ObjectChangedError(OSError):
    """An object differs from its entry in the listing."""


class TooManyObjectsError(OSError):
    """A tree holds more objects than allowed."""


class TooLargeError(OSError):
    """An object has more bytes than allowed."""


class UnavailableError(CovtanetError):
    """The model is missing or overloaded for the moment; the same request may be tried again."""


def error_location(error: BaseException) -> str:
    """Return an error's type and the last line of this package that it passed through.

    Its text is left out, since it may quote the input.
    """
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if PACKAGE in Path(frame.filename).parents]
    if not ours:
        return f"{type(error).__name__} at no line of covtanet"
    last = ours[-1]
    return f"{type(error).__name__} at {Path(last.filename).relative_to(PACKAGE)}:{last.lineno}"
