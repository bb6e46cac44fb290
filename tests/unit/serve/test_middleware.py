"""Middleware: security headers on every answer, a log line per request, no text of an error."""

import asyncio
import logging
from typing import Any

import pytest
from starlette.responses import PlainTextResponse
from starlette.types import Message, Receive, Scope, Send

from serve.app import api
from serve.middleware import SECURITY_HEADERS, Audit, SecurityHeaders
from serve.proxy import middlewares

CANARY = "Doe^Jane"


def ask(
    app: Any, headers: tuple[tuple[bytes, bytes], ...] = (), path: str = "/"
) -> tuple[int, dict[str, str], bytes]:
    """Return status, headers and body of the answer to a GET."""
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "GET",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": headers,
        "scheme": "http",
        "http_version": "1.1",
    }
    asyncio.run(app(scope, receive, send))
    received = {name.decode().lower(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], received, b"".join(message.get("body", b"") for message in sent[1:])


async def failing(scope: Scope, receive: Receive, send: Send) -> None:
    raise KeyError(CANARY)


def test_uncaught_error_returns_500_without_its_text(caplog: pytest.LogCaptureFixture) -> None:
    """It is not raised further: Ray Serve would log it with its text."""
    with caplog.at_level(logging.INFO):
        status, _, body = ask(Audit(failing))
    assert (status, CANARY in body.decode()) == (500, False)
    assert "KeyError at" in caplog.text
    assert CANARY not in caplog.text


def test_request_logs_one_line_with_caller_route_status_and_series(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"].update(caller="ann", series_keys=["1f", "2e"])
        await PlainTextResponse("ok", 202)(scope, receive, send)

    with caplog.at_level(logging.INFO, logger="ray.serve"):
        ask(Audit(app))
    (line,) = [
        record.getMessage()
        for record in caplog.records
        if record.getMessage().startswith("request")
    ]
    assert "caller=ann method=GET route=none status=202" in line
    assert line.endswith("series=1f,2e")


def test_every_answer_has_the_security_headers() -> None:
    """Also 404 of an unknown route; and HSTS behind TLS."""
    app = SecurityHeaders(PlainTextResponse("ok"))
    for headers, has_hsts in (((), False), (((b"x-forwarded-proto", b"https"),), True)):
        _, received, _ = ask(app, headers)
        assert {name: received[name.lower()] for name in SECURITY_HEADERS} == SECURITY_HEADERS
        assert ("strict-transport-security" in received) == has_hsts
    assert (
        "frame-ancestors 'none'; base-uri 'none'; form-action 'self'"
        in SECURITY_HEADERS["Content-Security-Policy"]
    )
    status, received, body = ask(api, path="/nowhere")
    assert (status, received["cache-control"]) == (404, "no-store")
    assert b'"no_such_route"' in body
    outermost: object = middlewares()[0].cls
    assert outermost is SecurityHeaders


@pytest.mark.parametrize("path", ["/docs", "/redoc", "/docs/oauth2-redirect"])
def test_documentation_pages_of_fastapi_return_404(path: str) -> None:
    """They load scripts from other hosts, on the origin whose page holds the token."""
    assert ask(api, path=path)[0] == 404
