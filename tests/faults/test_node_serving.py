"""An endpoint on several nodes, one of which is killed while callers post to both.

Each node has its own network, processes and disks; they share an S3 server alone. The callers are
on the head, which runs no replica.
"""

import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
from node_callers import (
    NUM_CALLERS,
    PATIENCE_S,
    PORT,
    Callers,
    num_answered,
    num_replicas,
    wait_until_ready,
)
from nodes import Node, Nodes, network_of, reason_to_skip, started_nodes
from saved_models import model_of_distinct_involvement

from covtanet.ct import nifti
from covtanet.model.saved_model import save_model
from covtanet.phantoms.encodings import nifti_grid
from covtanet.phantoms.phantom import make_phantom
from covtanet.phantoms.sampling import configs
from infra.local.endpoint import SERVE_ENVIRONMENT, Endpoint, start_endpoint, write_config

pytestmark = [
    pytest.mark.faults,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(bool(reason_to_skip()), reason=reason_to_skip()),
]

# Room for one replica of the API and one of the model, which ask for half a CPU each.
CPUS_PER_NODE = 1
NUM_STUDIES, NUM_REPLICAS = 4, 2


@dataclass(frozen=True, kw_only=True)
class Serving:
    """Nodes with an endpoint, and what the first of them answered alone."""

    nodes: Nodes
    endpoint: Endpoint
    bodies: list[bytes]
    expected: list[Any]

    def callers(self) -> Callers:
        """Return callers who expect the answers of one node."""
        return Callers(self.nodes.head, self.endpoint.token, self.bodies, self.expected)

    def add_node(self) -> tuple[Node, float]:
        """Add a node; return it and the seconds until it has both replicas."""
        started = time.monotonic()
        node = self.nodes.add_worker(CPUS_PER_NODE)
        wait_until_ready(node, self.nodes.head)
        return node, time.monotonic() - started

    def workers(self) -> list[Node]:
        """Return the worker nodes that live."""
        return [node for node in self.nodes.nodes[1:] if node.is_alive()]


def studies() -> list[bytes]:
    """Return small phantoms."""
    bodies = []
    for config in list(configs(NUM_STUDIES + 1, 53, 128, 24))[1:]:
        phantom = make_phantom(config)
        bodies.append(nifti.write(phantom.hu, nifti_grid(phantom)))
    return bodies


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """An endpoint that answers on one node alone, before a second one is added.

    It wants two replicas of each kind from the start; those without room wait for the second node.
    """
    folder = tmp_path_factory.mktemp("node-serving")
    save_model(folder / "s3" / "bucket" / "model", model_of_distinct_involvement())
    token = secrets.token_urlsafe(32)
    write_config(
        folder / "serve.toml", token, model="s3://bucket/model", ledger="", places=(),
        max_waiting=2 * NUM_CALLERS, max_uploads=2 * NUM_CALLERS,
        max_uploads_per_caller=2 * NUM_CALLERS, num_api_replicas=NUM_REPLICAS,
        num_model_replicas=NUM_REPLICAS, max_model_replicas_per_node=1,
    )  # fmt: skip
    variables = {**SERVE_ENVIRONMENT, "COVTANET_SERVE_CONFIG": str(folder / "serve.toml")}
    with started_nodes(folder, folder / "s3", 0, CPUS_PER_NODE, variables=variables) as nodes:
        with network_of(nodes.head):
            endpoint = start_endpoint(
                nodes.environment, PORT, folder / "serve.log", token,
                host="0.0.0.0", inside=nodes.head.inside, timeout_s=PATIENCE_S,
            )  # fmt: skip
        try:
            alone = Callers(nodes.head, token, studies())
            (first,) = nodes.nodes[1:]
            wait_until_ready(first, nodes.head)
            alone.ask_alone(first.address)
            yield Serving(
                nodes=nodes, endpoint=endpoint, bodies=alone.bodies, expected=alone.expected
            )
        finally:
            endpoint.service.stop()


def test_every_node_answers_as_one_node_alone(
    serving: Serving, seen: Callable[[str], None]
) -> None:
    _, added_s = serving.add_node()
    addresses = [node.address for node in serving.workers()]
    callers = serving.callers()
    with callers.posting(*addresses):
        for address in addresses:
            callers.wait_for_answers(address)
    callers.check()
    assert num_replicas(serving.nodes.head) == [0, 0]
    data = serving.nodes.data
    answered = [num_answered(node, data) for node in serving.workers()]
    assert all(min(counts) > 0 for counts in answered), answered
    num_right = [len(callers.answered(address)) for address in addresses]
    seen(
        f"replicas on the second node after {added_s:.0f} s; {num_right} equal answers; studies "
        f"and chunks by the replicas of each node: {answered}"
    )


def test_killed_node_costs_requests_in_flight_alone_and_another_takes_its_place(
    serving: Serving, seen: Callable[[str], None]
) -> None:
    """Its callers find no connection; those of the other node get right answers, or are told to
    come again.
    """
    left, lost = serving.workers()
    callers = serving.callers()
    with callers.posting(left.address, lost.address) as add:
        for node in (left, lost):
            callers.wait_for_answers(node.address)
        killed_at = time.monotonic()
        lost.kill()
        callers.wait_for_answers(left.address)
        time.sleep(30)
        node, added_s = serving.add_node()
        add(node.address)
        callers.wait_for_answers(node.address)
        callers.wait_for_answers(left.address)
    callers.check(lost.address)
    seen(f"{describe(callers, left.address, killed_at)}; replaced after {added_s:.0f} s")


def describe(callers: Callers, left: str, killed_at: float) -> str:
    """Return counts and times of the answers after the kill."""
    since = [answer for answer in callers.answers if answer.at > killed_at]
    statuses = Counter(answer.status for answer in since if answer.address == left)
    num_broken = sum(answer.status == 0 for answer in since)
    times = [killed_at, *(answer.at for answer in callers.answered(left, killed_at))]
    return (
        f"answers of the node left by status: {dict(statuses)}, longest pause between answers 200 "
        f"{max(after - before for before, after in pairwise(times)):.1f} s, longest answer "
        f"{max(answer.took_s for answer in since):.1f} s; {num_broken} broken connections to the "
        "other node"
    )
