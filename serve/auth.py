"""Authentication by bearer token, as a dependency of every closed router.

FastAPI resolves the dependencies of a router before anything else of a request, and routes with a
body take the raw request. So no byte of a body is read for a caller without a token.
"""

from typing import Annotated

from fastapi import Depends, Request

from serve.refusals import RefusedError
from serve.settings import Caller
from serve.state import State


async def authenticated(request: Request, state: State) -> Caller:
    """Return the caller with the request's token, and record the name for the log.

    Raises:
        RefusedError: 401, the request has no bearer token; 403, no caller has this token.
    """
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not token:
        raise RefusedError(401, "no_token", "expected Authorization: Bearer TOKEN")
    caller = state.settings.caller_of(token)
    if caller is None:
        raise RefusedError(403, "wrong_token", "unknown token")
    request.state.caller = caller.name
    return caller


AuthenticatedCaller = Annotated[Caller, Depends(authenticated)]
