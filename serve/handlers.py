"""Answers to errors: a status and a stable reason code, never the text of the error."""

import errno
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from covtanet import storage
from covtanet.errors import LedgerVersionError, UploadError, error_location
from serve.batches import JobsUnavailableError
from serve.refusals import RefusedError

logger = logging.getLogger("ray.serve")

UPLOAD_STATUS = {"too_large": 413, "unsupported_media": 415, "bad_zip": 422}
HTTP_REASONS = {404: "no_such_route", 405: "method_not_allowed"}
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
RETRY_STORAGE_S = 10


def problem(
    status: int, reason: str, message: str, headers: dict[str, str] | None = None
) -> JSONResponse:
    """Return the answer to a request that is refused."""
    return JSONResponse({"reason": reason, "message": message}, status, headers)


def describe_invalid(error: Any) -> str:
    """Return the name of the invalid field and the kind of its error, never its value.

    error: one entry of ``ValidationError.errors()``.
    """
    names = [part for part in error["loc"] if isinstance(part, str)]
    return f"{'.'.join(names)}: {error['type']}"


async def answer_refused(request: Request, error: RefusedError) -> JSONResponse:
    """Answer a request that a route refused."""
    headers = {}
    if error.retry_after_s:
        headers["Retry-After"] = str(error.retry_after_s)
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return problem(error.status, error.reason, error.message, headers)


async def answer_invalid(request: Request, error: RequestValidationError) -> JSONResponse:
    """Answer a request with an invalid parameter."""
    return problem(422, "invalid_request", describe_invalid(error.errors()[0]))


async def answer_no_route(request: Request, error: HTTPException) -> JSONResponse:
    """Answer a request for a path or method that no route has."""
    reason = HTTP_REASONS.get(error.status_code, "invalid_request")
    headers = dict(error.headers or {})
    return problem(error.status_code, reason, "see /openapi.json", headers)


async def answer_bad_upload(request: Request, error: UploadError) -> JSONResponse:
    """Answer an upload that holds no study."""
    return problem(UPLOAD_STATUS[error.reason], error.reason, str(error))


async def answer_other_version(request: Request, error: LedgerVersionError) -> JSONResponse:
    """Answer a request for a ledger with another schema version."""
    return problem(422, "other_version", "the ledger has another schema version")


async def answer_os_error(request: Request, error: OSError) -> JSONResponse:
    """Answer a fault of storage, of Ray's job server or of the disk.

    All are worth another try, except storage that denies access.
    """
    logger.error("a request met %s", error_location(error))
    headers = {"Retry-After": str(RETRY_STORAGE_S)}
    if isinstance(error, storage.AccessError):
        return problem(403, "storage_refuses", "the object store denies this endpoint access")
    if isinstance(error, JobsUnavailableError):
        return problem(503, "jobs_unavailable", "Ray's job server does not answer", headers)
    if error.errno in DISK_FULL:
        return problem(503, "no_space", "the disk of this endpoint is full", headers)
    return problem(503, "storage", "storage does not answer", headers)


Handler = Callable[[Request, Any], Coroutine[Any, Any, Response]]
HANDLERS: dict[int | type[Exception], Handler] = {
    RefusedError: answer_refused,
    RequestValidationError: answer_invalid,
    HTTPException: answer_no_route,
    UploadError: answer_bad_upload,
    LedgerVersionError: answer_other_version,
    OSError: answer_os_error,
}
