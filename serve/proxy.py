"""Additions to Ray Serve's HTTP proxy.

Ray Serve finds them by the environment variable RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH.
"""

from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.middleware import SecurityHeaders
from serve.schemas import Problem

RETRY_AFTER_S = 10


class RetryHint:
    """Answers for a replica that died in a request; the proxy alone would send a bare 500."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on; answer 503 with Retry-After if no replica began to answer it."""
        has_begun = scope["type"] != "http"

        async def send_and_record(message: Message) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                has_begun = True
            await send(message)

        await self.app(scope, receive, send_and_record)
        if not has_begun:
            message = "the replica that answered this request died; send it again"
            problem = Problem(reason="replica_died", message=message)
            headers = {"Retry-After": str(RETRY_AFTER_S)}
            answer = JSONResponse(problem.model_dump(), 503, headers=headers)
            await answer(scope, receive, send)


def middlewares() -> list[Middleware]:
    """Return the middleware of the proxy, the outermost first.

    It has the security headers too, for answers of the proxy itself.
    """
    return [Middleware(SecurityHeaders), Middleware(RetryHint)]
