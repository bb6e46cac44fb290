"""What surrounds the routes: headers on every answer, one line a request, no error's text."""

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
    """Status, headers and body of a GET."""
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {
        "type": "http", "method": "GET", "path": path, "raw_path": path.encode(), "query_string": b"",
        "headers": headers, "scheme": "http", "http_version": "1.1",
    }  # fmt: skip
    asyncio.run(app(scope, receive, send))
    found = {name.decode().lower(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], found, b"".join(message.get("body", b"") for message in sent[1:])


async def failing(scope: Scope, receive: Receive, send: Send) -> None:
    raise KeyError(CANARY)


def test_error_that_nobody_caught_is_500_without_its_text(caplog: pytest.LogCaptureFixture) -> None:
    """It is not raised further either: Ray Serve would log it with its text."""
    with caplog.at_level(logging.INFO):
        status, _, body = ask(Audit(failing))
    assert (status, CANARY in body.decode()) == (500, False)
    assert "KeyError at" in caplog.text
    assert CANARY not in caplog.text


def test_request_leaves_one_line_with_caller_route_status_and_series(
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


def test_every_answer_carries_the_security_headers() -> None:
    """Of a route of the API that does not exist, too, and behind TLS with HSTS."""
    app = SecurityHeaders(PlainTextResponse("ok"))
    for headers, has_hsts in (((), False), (((b"x-forwarded-proto", b"https"),), True)):
        _, found, _ = ask(app, headers)
        assert {name: found[name.lower()] for name in SECURITY_HEADERS} == SECURITY_HEADERS
        assert ("strict-transport-security" in found) == has_hsts
    assert (
        "frame-ancestors 'none'; base-uri 'none'; form-action 'self'"
        in SECURITY_HEADERS["Content-Security-Policy"]
    )
    status, found, body = ask(api, path="/nowhere")
    assert (status, found["cache-control"]) == (404, "no-store")
    assert b'"no_such_route"' in body
    outermost: object = middlewares()[0].cls
    assert outermost is SecurityHeaders


@pytest.mark.parametrize("path", ["/docs", "/redoc", "/docs/oauth2-redirect"])
def test_pages_of_fastapi_are_off(path: str) -> None:
    """They load scripts from elsewhere, on the origin whose page holds the token."""
    assert ask(api, path=path)[0] == 404
