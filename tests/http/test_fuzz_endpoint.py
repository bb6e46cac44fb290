"""The endpoint against its own description: no request gets 5xx or an undescribed answer.

Requests are drawn from ``app.openapi()``, valid and invalid ones: a few per route in ``make test``,
many in ``make test-all``.
"""

import contextlib
import json
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from infra.local.endpoint import Endpoint

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
TIMEOUT_S = 60


def fuzz(endpoint: Endpoint, batch: str, num_examples: int) -> dict[str, set[int]]:
    """Send requests to every route; return the statuses of each."""
    status, described, _ = endpoint.ask("GET", "/openapi.json")
    assert status == 200
    seen: dict[str, set[int]] = {}
    for result in schemathesis.openapi.from_dict(described).get_all_operations():
        operation = result.ok()  # type: ignore[union-attr]
        statuses = seen.setdefault(f"{operation.method.upper()} {operation.path}", set())
        for mode in GenerationMode:
            with contextlib.suppress(
                Unsatisfiable
            ):  # a route without parameters can only be asked as described
                ask_operation(
                    endpoint,
                    operation.as_strategy(generation_mode=mode),
                    num_examples,
                    statuses,
                    {},
                )
        if "{batch_id}" in operation.path:
            committed = {"batch_id": batch}
            ask_operation(endpoint, operation.as_strategy(), num_examples, statuses, committed)
    return seen


def ask_operation(
    endpoint: Endpoint,
    strategy: Any,
    num_examples: int,
    seen: set[int],
    path_parameters: dict[str, str],
) -> None:
    """Send requests to one route. path_parameters: replace those that are drawn."""

    @settings(
        max_examples=num_examples,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=strategy)
    def ask(case: Case[Any]) -> None:
        case.path_parameters.update(path_parameters)
        headers = {"Authorization": f"Bearer {endpoint.token}"}
        answer = case.call(base_url=endpoint.url, headers=headers, timeout=TIMEOUT_S)
        seen.add(answer.status_code)
        case.validate_response(answer, checks=CHECKS)

    ask()


@pytest.mark.parametrize("num_examples", [6, pytest.param(150, marks=pytest.mark.slow)])
def test_every_answer_matches_openapi_and_is_not_5xx(
    endpoint: Endpoint, batch: str, num_examples: int
) -> None:
    seen = fuzz(endpoint, batch, num_examples)
    assert len(seen) == 16
    assert not [statuses for statuses in seen.values() if max(statuses) >= 500], seen
    answered = {
        "GET /v1/batches",
        "GET /v1/batches/{batch_id}/ledger",
        "GET /v1/batches/{batch_id}/worklist",
    }
    assert all(200 in seen[route] for route in answered), seen


@settings(max_examples=25, deadline=None, database=None, derandomize=True)
@given(name=st.text(max_size=40), body=st.binary(max_size=400))
def test_any_uri_and_any_body_return_4xx(endpoint: Endpoint, name: str, body: bytes) -> None:
    """The URI is under an allowed location, so that storage is asked."""
    uri = json.dumps({"uri": f"s3://bucket/archive/{name}"}).encode()
    for path, data in (("/v1/studies:by-uri", uri), ("/v1/studies", body)):
        status, answer, _ = endpoint.ask("POST", path, data, {"Content-Type": "application/json"})
        assert 400 <= status < 500, (path, status, answer)
        assert answer["reason"], answer
