"""Middleware of all routes: security headers, a log line per request, errors without their text."""

import logging
import time
from typing import Any

from ray.util.metrics import Counter
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from covtanet.errors import error_location

logger = logging.getLogger("ray.serve")

# Scripts, styles and pictures of this origin alone; no frame, no other base, no form to other
# hosts.
CSP = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob: data:",
        "connect-src 'self' blob:",
        "frame-ancestors 'none'",
        "base-uri 'none'",
        "form-action 'self'",
    ]
)
SECURITY_HEADERS = {
    "Content-Security-Policy": CSP,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    # Rows name studies, and a picture in the cache of a shared workstation opens without a token.
    "Cache-Control": "no-store",
}
# Probes come every few seconds.
QUIET_ROUTES = {"/healthz", "/readyz"}
HSTS = "max-age=31536000; includeSubDomains"


class SecurityHeaders:
    """Adds the security headers to every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        forwarded = Headers(scope=scope).get("x-forwarded-proto", "")
        is_tls = scope.get("scheme") == "https" or forwarded == "https"

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(SECURITY_HEADERS)
                if is_tls:
                    headers["Strict-Transport-Security"] = HSTS
            await send(message)

        await self.app(scope, receive, send_with_headers)


class Audit:
    """Logs and counts every request, and turns uncaught errors into 500.

    Ray Serve would log an error that is raised further with its text, which may quote a study.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._requests: Counter | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        status = 0
        started = time.monotonic()

        async def send_and_record(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, send_and_record)
        except ClientDisconnect:
            status = 499  # nginx's code for a caller who has hung up
        except Exception as error:
            logger.error("internal error, %s", error_location(error))
            if status == 0:
                problem = {"reason": "internal_error", "message": "a fault of this software"}
                await JSONResponse(problem, 500)(scope, receive, send_and_record)
        finally:
            self._record(scope, state, status or 499, time.monotonic() - started)

    def _record(self, scope: Scope, state: dict[str, Any], status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "none")
        if route in QUIET_ROUTES:
            return
        caller = state.get("caller", "none")
        logger.info(
            "request caller=%s method=%s route=%s status=%d seconds=%.2f series=%s",
            caller,
            scope["method"],
            route,
            status,
            seconds,
            ",".join(state.get("series_keys", [])) or "none",
        )
        if self._requests is None:
            self._requests = Counter(
                "covtanet_http_requests", "Requests by caller.", ("caller", "route", "status")
            )
        self._requests.inc(tags={"caller": str(caller), "route": route, "status": str(status)})
