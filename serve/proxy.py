"""What we add to Ray Serve's HTTP proxy, which finds it by RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH."""

from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.middleware import SecurityHeaders
from serve.schemas import Problem

RETRY_AFTER_S = 10


class RetryHint:
    """Answers in the place of a replica that died in a request: the proxy alone would say 500 and no more."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on; 503 with Retry-After where nobody began to answer it."""
        has_begun = scope["type"] != "http"

        async def watched(message: Message) -> None:
            nonlocal has_begun
            has_begun = has_begun or message["type"] == "http.response.start"
            await send(message)

        await self.app(scope, receive, watched)
        if not has_begun:
            problem = Problem(
                reason="replica_died", message="what answered this request died; send it again"
            )
            answer = JSONResponse(
                problem.model_dump(), 503, headers={"Retry-After": str(RETRY_AFTER_S)}
            )
            await answer(scope, receive, send)


def middlewares() -> list[Middleware]:
    """Return what the proxy puts around every application; the outermost first.

    The headers stand here too, for what the proxy answers itself.
    """
    return [Middleware(SecurityHeaders), Middleware(RetryHint)]
