"""Every exception of the package.

CovtanetError
├── ConfigError      the run cannot start as asked: configuration, arguments, resources
├── CheckpointError  a saved model is missing, damaged or not what its digest says
├── TrainingError    a training cannot go on; what it has done so far is kept
└── StudyError       one series cannot be screened, by its own fault

Trouble with storage is an ``OSError``, as everywhere in Python.
"""


class CovtanetError(Exception):
    """Base of all errors that this package raises on purpose."""


class ConfigError(CovtanetError):
    """The run cannot start as asked; the message says found, expected and where."""


class CheckpointError(CovtanetError):
    """A saved model is missing, damaged, or differs from its digest."""


class TrainingError(CovtanetError):
    """A training cannot go on; what it has done so far is kept."""


class StudyError(CovtanetError):
    """One series is refused.

    ``reason`` is a stable code of ``covtanet.screening.records.REASONS``; the message says found, expected and where
    without any text of the input, since it goes into logs and the ledger.
    """

    def __init__(self, reason: str, message: str, *, series_uid: str = "") -> None:
        super().__init__(message)
        self.reason = reason
        self.series_uid = series_uid

    def __reduce__(self) -> tuple[object, ...]:
        """Keep the fields when the error travels between processes."""
        return (_study_error, (self.reason, str(self), self.series_uid))


def _study_error(reason: str, message: str, series_uid: str) -> StudyError:
    return StudyError(reason, message, series_uid=series_uid)
