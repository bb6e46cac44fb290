"""The endpoint under load, beside the same work in one process and in the screening job."""

import os
import secrets
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "infra" / "local")]

from endpoint import SERVE_ENVIRONMENT, Endpoint, start_endpoint, write_config  # noqa: E402
from services import free_ports, start_ray, write_private  # noqa: E402

NUM_REQUESTS, NUM_CLIENTS, HOSTILE_EVERY = 200, 16, 20
NUM_CALLERS = 8
MAX_TRIES = 200


@dataclass(frozen=True, kw_only=True)
class Measured:
    """An endpoint under measurement. pid: of the Ray that it runs on."""

    endpoint: Endpoint
    pid: int

    def post(self, body: bytes) -> tuple[int, Any, float]:
        """Status, answer and the seconds to wait before another try."""
        status, answer, headers = self.endpoint.ask("POST", "/v1/studies", body)
        return status, answer, float(headers.get("Retry-After") or 0)

    def post_until_answered(self, body: bytes) -> tuple[list[int], Any]:
        """Every status on the way to an answer that is no back-pressure."""
        statuses = []
        for _ in range(MAX_TRIES):
            status, answer, wait_s = self.post(body)
            statuses.append(status)
            if status != 503 or not wait_s:
                return statuses, answer
            time.sleep(min(wait_s, 1))
        raise RuntimeError("never answered")


@contextmanager
def serving(folder: Path, model: Path) -> Iterator[Measured]:
    """An endpoint on a Ray of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    token, ray_token, (port,) = secrets.token_urlsafe(32), folder / "ray_token", free_ports(1)
    write_private(ray_token, secrets.token_hex(32))
    write_config(folder / "serve.toml", token, model=str(model), ledger="", places=())
    environment = {"COVTANET_SERVE_CONFIG": str(folder / "serve.toml"), **SERVE_ENVIRONMENT}
    with tempfile.TemporaryDirectory(prefix="cov") as short:
        head = start_ray(folder / "ray.log", environment, ray_token, Path(short))
        try:
            endpoint = start_endpoint(
                {**os.environ, **head.environment}, port, folder / "serve.log", token
            )
            try:
                yield Measured(endpoint=endpoint, pid=head.process.pid)
            finally:
                endpoint.service.stop()
        finally:
            head.stop()


def held_bytes(pid: int) -> int:
    """What a process and all below it hold."""
    total = 0
    for each in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        try:
            total += each.memory_full_info().pss
        except psutil.Error:
            continue
    return total


def measure_one_caller(
    endpoint: Measured, body: bytes, in_process: Callable[[], object], rounds: int = 5
) -> list[float]:
    """Medians of seconds by HTTP and in this process, which take turns."""
    spent: list[list[float]] = [[], []]
    endpoint.post(body)
    in_process()
    for _ in range(rounds):
        for kept, work in zip(spent, (lambda: endpoint.post(body), in_process), strict=True):
            started = time.perf_counter()
            work()
            kept.append(time.perf_counter() - started)
    return [statistics.median(each) for each in spent]


def measure_throughput(endpoint: Measured, bodies: list[bytes]) -> float:
    """Seconds that ``NUM_CALLERS`` callers take for all bodies."""
    started = time.perf_counter()
    with ThreadPoolExecutor(NUM_CALLERS) as pool:
        found = list(pool.map(endpoint.post_until_answered, bodies))
    assert all(statuses[-1] == 200 for statuses, _ in found), Counter(each[0][-1] for each in found)
    return time.perf_counter() - started


def measure_load(
    endpoint: Measured, sound: list[bytes], hostile: list[bytes]
) -> list[tuple[str, str, str]]:
    """Many requests from many clients, some hostile: rows of what, value, wanted."""
    expected = [endpoint.post_until_answered(body)[1]["series"][0]["p_infected"] for body in sound]
    bodies: list[tuple[int | None, bytes]] = [
        (k % len(sound), sound[k % len(sound)])
        if k % HOSTILE_EVERY
        else (None, hostile[k // HOSTILE_EVERY % len(hostile)])
        for k in range(NUM_REQUESTS)
    ]
    samples: list[int] = []
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(1):
            samples.append(held_bytes(endpoint.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    with ThreadPoolExecutor(NUM_CLIENTS) as pool:
        found = list(pool.map(lambda each: endpoint.post_until_answered(each[1]), bodies))
    is_over.set()
    watcher.join()
    statuses = Counter(status for tried, _ in found for status in tried)
    right = 0
    for (which, _), (tried, answer) in zip(bodies, found, strict=True):
        if which is None:
            right += tried[-1] in (413, 415, 422)
        else:
            right += (
                tried[-1] == 200 and abs(answer["series"][0]["p_infected"] - expected[which]) < 1e-5
            )
    half = len(samples) // 2
    other = {status: count for status, count in statuses.items() if status >= 500 and status != 503}
    what = f"{NUM_REQUESTS} requests, {NUM_CLIENTS} clients, {NUM_REQUESTS // HOSTILE_EVERY} hostile: answered right"
    return [
        (what, f"{right}", f"{NUM_REQUESTS}"),
        ("answers of 5xx that are no back-pressure", f"{sum(other.values())}", "0"),
        ("told to come again (503 with Retry-After)", f"{statuses[503]}", ""),
        (
            "peak memory, second half over first half",
            f"{max(samples[half:]) / max(samples[:half]):.2f} x",
            "<= 1.1 x",
        ),
    ]
