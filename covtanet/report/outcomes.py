"""The outcome of a series whose results are made or sent, which names nobody."""

from collections.abc import Callable
from typing import Any

from covtanet.errors import (
    AccessError,
    ObjectChangedError,
    Reason,
    SandboxClosedError,
    StudyError,
    StudyTimeoutError,
    UnreachableError,
    WeakSandboxError,
    error_location,
)
from covtanet.report.source_series import NotExportedError


def outcome_of(series_key: str, outcome: str, detail: str = "") -> dict[str, Any]:
    """Return the outcome of a series as plain values. detail: for the log alone."""
    return {"series_key": series_key, "outcome": str(outcome), "detail": detail}


def outcome_of_work(series_key: str, work: Callable[[], tuple[str, str]]) -> dict[str, Any]:
    """Do the work on one series; return its outcome and detail, or those of its error.

    Raises:
        AccessError, UnreachableError, SandboxClosedError, WeakSandboxError: errors that concern
            every series.
    """
    try:
        return outcome_of(series_key, *work())
    except StudyError as error:
        return outcome_of(series_key, error.reason, str(error))
    except StudyTimeoutError as error:
        return outcome_of(series_key, Reason.TIMEOUT, str(error))
    except NotExportedError as error:
        return outcome_of(series_key, str(error))
    except (AccessError, UnreachableError, SandboxClosedError, WeakSandboxError):
        raise
    # Before OSError, of which it is a kind.
    except ObjectChangedError:
        return outcome_of(series_key, Reason.CHANGED)
    except OSError as error:
        return outcome_of(series_key, Reason.STORAGE, type(error).__name__)
    except Exception as error:  # its text may quote the source
        return outcome_of(series_key, Reason.INTERNAL_ERROR, error_location(error))
