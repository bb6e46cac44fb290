"""JSON bodies of requests, read by the route itself after the token was checked."""

import asyncio
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError

from serve.handlers import describe_invalid
from serve.refusals import RefusedError

Body = TypeVar("Body", bound=BaseModel)

MAX_JSON_BYTES = 64 << 10


def describe_json_body(kind: type[BaseModel]) -> dict[str, Any]:
    """Return the OpenAPI description of a JSON body, which a raw request does not show."""
    content = {"application/json": {"schema": kind.model_json_schema()}}
    return {"requestBody": {"required": True, "content": content}}


async def read_json(request: Request, kind: type[Body], timeout_s: float) -> Body:
    """Read and check a small JSON body.

    Raises:
        RefusedError: 408, the body takes too long; 413, it is too large; 422, it is invalid.
    """
    try:
        async with asyncio.timeout(timeout_s):
            data = await _read_bytes(request)
    except TimeoutError:
        raise RefusedError(408, "slow_upload", f"the body took over {timeout_s:g} s") from None
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        raise RefusedError(422, "invalid_request", describe_invalid(error.errors()[0])) from None


async def _read_bytes(request: Request) -> bytes:
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > MAX_JSON_BYTES:
            message = f"expected at most {MAX_JSON_BYTES} bytes of JSON"
            raise RefusedError(413, "too_large", message)
    return bytes(data)
