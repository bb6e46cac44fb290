"""The routes of the endpoint without Ray Serve: authentication and the API's description."""

import asyncio
import json
import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, get_args

import pytest
from fastapi.routing import APIRoute
from starlette.types import Message

from covtanet.ledger.schema import LEDGER_SCHEMA
from covtanet.report.page_file import PAGE
from serve.app import api
from serve.routes.page import PageFile
from serve.schemas import EXAMPLE_ROW, SeriesRow, StudyAnswer
from serve.settings import Caller, ServeConfig
from serve.state import current_state

# Probes, and the page that asks for the token itself.
OPEN_ROUTES = {"/healthz", "/readyz", "/", "/worklist/{name}"}
PARAMETERS = {
    "batch_id": "0" * 16,
    "series_key": "0" * 32,
    "name": "preview.png",
    "index": "0",
}


def routes_of(router: Any) -> Iterator[APIRoute]:
    """Yield all routes of the application, those of included routers too."""
    for route in router.routes:
        if isinstance(route, APIRoute):
            yield route
        else:
            yield from routes_of(route.original_router)


@pytest.fixture(autouse=True)
def _state_without_replica() -> Iterator[None]:
    """State with settings alone: a route that goes on after authentication fails."""
    settings = ServeConfig(callers=(Caller(name="ann", token_sha256="0" * 64),))
    api.dependency_overrides[current_state] = lambda: SimpleNamespace(settings=settings)
    yield
    api.dependency_overrides.clear()


def closed_routes() -> list[tuple[str, str]]:
    """Return method and path of every route that requires a token."""
    closed = [route for route in routes_of(api) if route.path not in OPEN_ROUTES]
    return [(method, route.path) for route in closed for method in sorted(route.methods or ())]


def ask(method: str, path: str, authorization: str = "", query: str = "") -> tuple[int, Any]:
    """Return status and body of the answer to a request whose body is never sent."""
    sent: list[Message] = []

    async def receive() -> Message:
        raise AssertionError("the body is read before the token is checked")

    async def send(message: Message) -> None:
        sent.append(message)

    headers = [(b"authorization", authorization.encode())] if authorization else []
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "headers": headers,
        "scheme": "http",
        "http_version": "1.1",
        "root_path": "",
    }
    asyncio.run(api(scope, receive, send))
    return sent[0]["status"], json.loads(b"".join(message.get("body", b"") for message in sent[1:]))


def test_page_route_serves_every_file_of_the_page() -> None:
    files = {path.name for path in PAGE.iterdir()} - {"index.html"}
    assert set(get_args(PageFile)) == files


def test_application_has_the_routes_of_these_tests() -> None:
    paths = {path for _, path in closed_routes()}
    assert {"/v1/studies", "/v1/batches", "/v1/models", "/metrics", "/openapi.json"} <= paths
    assert set(PARAMETERS) >= {name for path in paths for name in re.findall(r"{(\w+)}", path)}


@pytest.mark.parametrize(("method", "path"), closed_routes())
def test_route_without_a_token_returns_401(method: str, path: str) -> None:
    """The application lists the routes, so a new route without authentication fails here."""
    for authorization in ("", "Basic dXNlcjpwYXNz", "Bearer "):
        status, answer = ask(method, path.format(**PARAMETERS), authorization)
        assert (status, answer.get("reason")) == (401, "no_token")
    status, answer = ask(method, path.format(**PARAMETERS), "Bearer wrong")
    assert (status, answer["reason"]) == (403, "wrong_token")


@pytest.mark.parametrize(
    ("path", "query"),
    [
        ("/v1/batches/not-an-id", ""),
        ("/v1/batches", "limit=0"),
        ("/v1/batches/x/worklist", "sort=y"),
    ],
)
def test_invalid_request_without_a_token_returns_401(path: str, query: str) -> None:
    """The token is checked before the parameters are."""
    assert ask("GET", path, query=query)[0] == 401


def test_openapi_describes_the_digests_of_a_row() -> None:
    described = api.openapi()["components"]["schemas"]
    row = described["SeriesRow"]
    for name in ("config_digest", "software_version", "model_digest"):
        assert row["properties"][name]["description"]
        assert name in row["required"]
    assert described["StudyAnswer"]["properties"]["series"]["items"] == {
        "$ref": "#/components/schemas/SeriesRow"
    }
    SeriesRow.model_validate(EXAMPLE_ROW)


def test_answer_keeps_every_column_of_the_ledger() -> None:
    row = {**dict.fromkeys(LEDGER_SCHEMA.names), **EXAMPLE_ROW, "spacing_z_mm": 2.5}
    answer = StudyAnswer(model={"name": "m", "version": "1", "digest": "d"}, series=[row])  # type: ignore[arg-type,list-item]
    assert answer.model_dump(mode="json")["series"] == [row]
