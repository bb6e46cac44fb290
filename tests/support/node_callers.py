"""Callers of an endpoint on several nodes, who know from which node an answer came."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests
from nodes import Node, network_of, processes
from serving_runs import API, SEGMENTER, compared

from infra.local.services import is_healthy

PORT = 8000
NUM_CALLERS = 8
# Answers of a node that are waited for.
NUM_ANSWERS = 12
CONNECT_TIMEOUT_S, ANSWER_TIMEOUT_S = 10.0, 180.0
# For a machine that is busy with other work; the times seen are printed.
PATIENCE_S = 300.0


@dataclass(frozen=True, kw_only=True)
class Answer:
    """An answer of a node's proxy; status 0 if the connection was refused or broke."""

    address: str
    status: int
    retry_after_s: float = 0.0
    is_right: bool = False
    took_s: float
    at: float


@dataclass
class Callers:
    """Callers who post studies to nodes again and again, from the head."""

    head: Node
    token: str
    bodies: list[bytes]
    expected: list[Any] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    is_over: threading.Event = field(default_factory=threading.Event)

    def ask(self, session: requests.Session, address: str, index: int) -> tuple[int, Any, float]:
        """Post a study; return status, answer and Retry-After."""
        received = session.post(
            f"http://{address}:{PORT}/v1/studies",
            data=self.bodies[index],
            headers={"Authorization": f"Bearer {self.token}"},
            timeout=(CONNECT_TIMEOUT_S, ANSWER_TIMEOUT_S),
        )
        is_json = "application/json" in received.headers.get("Content-Type", "")
        answer = received.json() if is_json else received.text
        return received.status_code, answer, float(received.headers.get("Retry-After") or 0)

    def ask_alone(self, address: str) -> None:
        """Ask about every study once, and expect these answers from now on."""
        with self.session() as session:
            for index in range(len(self.bodies)):
                status, answer, _ = self.ask(session, address, index)
                assert status == 200, (status, answer)
                self.expected.append(compared(answer["series"]))

    @contextmanager
    def session(self) -> Iterator[requests.Session]:
        """Connect from the head, and not by a proxy that the environment names."""
        with network_of(self.head), requests.Session() as session:
            session.trust_env = False
            yield session

    def post(self, address: str, index: int) -> None:
        """Post a study to a node until it is over."""
        while not self.is_over.is_set():
            # Anew for each study, since a load balancer's connections would outlive a node.
            with self.session() as session:
                answer = self._answer(session, address, index)
            self.answers.append(answer)
            if answer.status != 200:
                self.is_over.wait(0.5)

    def _answer(self, session: requests.Session, address: str, index: int) -> Answer:
        started = time.monotonic()
        status, is_right, retry_after_s = 0, False, 0.0
        with suppress(requests.ConnectionError, requests.Timeout):
            status, answer, retry_after_s = self.ask(session, address, index)
            is_right = status == 200 and compared(answer["series"]) == self.expected[index]
        at = time.monotonic()
        return Answer(
            address=address,
            status=status,
            retry_after_s=retry_after_s,
            is_right=is_right,
            took_s=at - started,
            at=at,
        )

    @contextmanager
    def posting(self, *addresses: str) -> Iterator[Callable[[str], None]]:
        """Post from as many callers to each node; yield a function that adds those of a node."""
        callers: list[Future[None]] = []
        with ThreadPoolExecutor(2 * NUM_CALLERS) as pool:

            def add(address: str) -> None:
                for caller in range(NUM_CALLERS // 2):
                    callers.append(pool.submit(self.post, address, caller % len(self.bodies)))

            try:
                for address in addresses:
                    add(address)
                yield add
            finally:
                self.is_over.set()
        for future in callers:
            future.result()

    def answered(self, address: str, since: float = 0.0) -> list[Answer]:
        """Return the answers 200 of a node, in their order."""
        return [
            answer
            for answer in self.answers
            if (answer.address, answer.status) == (address, 200) and answer.at > since
        ]

    def wait_for_answers(self, address: str) -> None:
        """Wait until a node has given enough further answers."""
        since = time.monotonic()
        wait_until(lambda: len(self.answered(address, since)) >= NUM_ANSWERS, address)

    def check(self, dead: str = "") -> None:
        """Check that there are only right answers, honest refusals, and broken connections to the
        dead node.
        """
        for answer in self.answers:
            if answer.status == 200:
                assert answer.is_right, answer
            elif answer.status == 503:
                assert answer.retry_after_s > 0, answer
            else:
                assert (answer.status, answer.address) == (0, dead), answer


def wait_until(is_true: Callable[[], bool], what: str) -> None:
    """Wait for a long time, since other work runs on the machine."""
    deadline = time.monotonic() + PATIENCE_S
    while not is_true():
        assert time.monotonic() < deadline, what
        time.sleep(0.5)


def wait_until_ready(node: Node, head: Node) -> None:
    """Wait until a node has a replica of each kind, and a proxy that answers the head."""
    wait_until(lambda: num_replicas(node) == [1, 1], f"{node.address} has no replicas")
    with network_of(head):
        url = f"http://{node.address}:{PORT}/readyz"
        wait_until(lambda: is_healthy(url), f"{node.address} has no proxy")


def num_replicas(node: Node) -> list[int]:
    """Return how many replicas of API and model run on a node."""
    running = processes(node)
    return [running.count(name) for name in (API, SEGMENTER)]


def num_answered(node: Node, data: Path) -> list[int]:
    """Return how many studies a node's replica of the API answered, and how many chunks of slices
    its replica of the model, by the access logs of Serve.
    """
    logs = data / "ray" / "session_latest" / "logs" / "serve"
    counts = []
    for name, line in (("Api", "POST /v1/studies 200"), ("Segmenter", "CALL segment OK")):
        log = node.run("sh", "-c", f"cat {logs}/replica_default_{name}_*.log")
        counts.append(log.count(line))
    return counts
