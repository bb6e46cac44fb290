"""The routes of the endpoint, asked without Ray Serve: tokens, and what the description promises."""

import asyncio
import inspect
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.routing import APIRoute
from starlette.types import Message

from covtanet.ledger.schema import LEDGER_SCHEMA
from serve.app import Api, api
from serve.schemas import EXAMPLE_ROW, SeriesRow, StudyAnswer
from serve.settings import Caller, ServeConfig

# Probes, and the page that asks for the token itself.
OPEN_ROUTES = {"/healthz", "/readyz", "/", "/worklist/{name}"}
PARAMETERS = {
    "batch_id": "0" * 16,
    "series_key": "0" * 32,
    "name": "preview.png",
}


def routes_of(router: Any) -> Iterator[APIRoute]:
    """All routes of the application, those of included routers too: Ray Serve moves a class's routes into one."""
    for route in router.routes:
        if isinstance(route, APIRoute):
            yield route
        else:
            yield from routes_of(route.original_router)


@pytest.fixture(autouse=True)
def _unserved() -> Iterator[None]:
    """The routes' object, which Ray Serve passes to each, with callers alone: who passes the token's check fails."""
    unserved = object.__new__(Api.func_or_class.__bases__[0])  # type: ignore[attr-defined]
    unserved.settings = ServeConfig(callers=(Caller(name="ann", token_sha256="0" * 64),))
    for route in routes_of(api):
        passed = inspect.signature(route.endpoint).parameters["self"].default
        api.dependency_overrides[passed.dependency] = lambda: unserved
    yield
    api.dependency_overrides.clear()


def closed_routes() -> list[tuple[str, str]]:
    """Method and path of every route that the application has, but the open ones."""
    found = []
    for route in routes_of(api):
        found += [
            (method, route.path)
            for method in sorted(route.methods or ())
            if route.path not in OPEN_ROUTES
        ]
    return found


def ask(method: str, path: str, authorization: str = "") -> tuple[int, Any]:
    """Status and body of a request whose own body is never sent."""
    sent: list[Message] = []

    async def receive() -> Message:
        raise AssertionError("the body is read before the token")

    async def send(message: Message) -> None:
        sent.append(message)

    headers = [(b"authorization", authorization.encode())] if authorization else []
    scope = {
        "type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b"",
        "headers": headers, "scheme": "http", "http_version": "1.1", "root_path": "",
    }  # fmt: skip
    asyncio.run(api(scope, receive, send))
    return sent[0]["status"], json.loads(b"".join(message.get("body", b"") for message in sent[1:]))


def test_application_has_the_routes_that_are_asked() -> None:
    paths = {path for _, path in closed_routes()}
    assert {"/v1/studies", "/v1/batches", "/v1/models", "/metrics", "/openapi.json"} <= paths
    assert set(PARAMETERS) >= {name for path in paths for name in re.findall(r"{(\w+)}", path)}


@pytest.mark.parametrize(("method", "path"), closed_routes())
def test_route_without_a_token_returns_401(method: str, path: str) -> None:
    """Listed from the application: a route that is added later, without the check, fails here."""
    for authorization in ("", "Basic dXNlcjpwYXNz", "Bearer "):
        status, answer = ask(method, path.format(**PARAMETERS), authorization)
        assert (status, answer.get("reason")) == (401, "no_token")
    status, answer = ask(method, path.format(**PARAMETERS), "Bearer wrong")
    assert (status, answer["reason"]) == (403, "wrong_token")


def test_description_names_what_traces_a_row() -> None:
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
