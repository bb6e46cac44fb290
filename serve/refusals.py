"""Refused requests: the error that a route raises, and its description for OpenAPI."""

from typing import Any

from serve.schemas import Problem, StudyAnswer

Responses = dict[int | str, dict[str, Any]]
_PROBLEM = {"model": Problem}
_PROBLEM_OR_STUDY = {"model": Problem | StudyAnswer}

PROBLEMS: Responses = dict.fromkeys((401, 403, 404, 405, 422, 500, 503), _PROBLEM)
BODY_PROBLEMS: Responses = {**PROBLEMS, 408: _PROBLEM, 413: _PROBLEM}
PACS_PROBLEMS: Responses = {**PROBLEMS, 502: _PROBLEM}
BATCH_PROBLEMS: Responses = {**BODY_PROBLEMS, 429: _PROBLEM}
# If no series of a study was screened, the answer has its rows under the status of a problem.
STUDY_PROBLEMS: Responses = {
    **BODY_PROBLEMS,
    415: _PROBLEM,
    504: _PROBLEM,
    422: _PROBLEM_OR_STUDY,
    500: _PROBLEM_OR_STUDY,
    503: _PROBLEM_OR_STUDY,
}


class RefusedError(Exception):
    """A request is refused with a status, a reason code and a sentence.

    retry_after_s: sent as ``Retry-After``; 0 sends no such header.
    """

    def __init__(self, status: int, reason: str, message: str, retry_after_s: int = 0) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
        self.message = message
        self.retry_after_s = retry_after_s


def busy(retry_after_s: int, message: str = "all decoders are busy") -> RefusedError:
    """Return the refusal of a request that finds every worker and every waiting slot taken."""
    return RefusedError(503, "busy", message, retry_after_s)
