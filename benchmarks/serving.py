"""The endpoint under load, beside the same work in one process and in the screening job."""

import gzip
import os
import secrets
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure import CORES, WORK, Result, say, seconds, side_by_side
from benchmarks.screening_runs import archive, held_bytes, model_folder, run_job
from covtanet.ct import nifti
from covtanet.inference.predictor import Predictor
from covtanet.model.saved_model import load_model
from covtanet.phantoms.encodings import nifti_grid
from covtanet.phantoms.phantom import make_phantom
from covtanet.phantoms.sampling import configs
from covtanet.screening.config import ScreeningConfig, for_model
from covtanet.screening.study import Screener
from infra.local.endpoint import SERVE_ENVIRONMENT, Endpoint, start_endpoint, write_config
from infra.local.services import free_ports, start_ray, write_private

NUM_REQUESTS, NUM_CLIENTS, HOSTILE_EVERY = 200, 16, 20
NUM_CALLERS = 8
MAX_TRIES = 200


@dataclass(frozen=True, kw_only=True)
class MeasuredEndpoint:
    """An endpoint under measurement. pid: of the Ray that it runs on."""

    endpoint: Endpoint
    pid: int

    def post(self, body: bytes) -> tuple[int, Any, float]:
        """Return status, answer and the seconds to wait before another try."""
        status, answer, headers = self.endpoint.ask("POST", "/v1/studies", body)
        return status, answer, float(headers.get("Retry-After") or 0)

    def post_until_answered(self, body: bytes) -> tuple[list[int], Any]:
        """See ``post_until_answered``."""
        return post_until_answered(self.post, body)


def post_until_answered(
    post: Callable[[bytes], tuple[int, Any, float]], body: bytes
) -> tuple[list[int], Any]:
    """Return every status up to the first that is no back-pressure, and its answer."""
    statuses = []
    for _ in range(MAX_TRIES):
        status, answer, retry_after_s = post(body)
        statuses.append(status)
        if status != 503 or not retry_after_s:
            return statuses, answer
        time.sleep(min(retry_after_s, 1))
    raise RuntimeError("never answered")


@contextmanager
def running_endpoint(
    folder: Path, model: str, variables: Mapping[str, str] | None = None, **settings: Any
) -> Iterator[MeasuredEndpoint]:
    """Run an endpoint on a Ray that serves nothing else.

    model: its location or its name in the registry. variables: of Ray's nodes. settings: those of
    ``write_config`` that differ from its defaults.
    """
    folder.mkdir(parents=True, exist_ok=True)
    token = secrets.token_urlsafe(32)
    ray_token = folder / "ray_token"
    (port,) = free_ports(1)
    write_private(ray_token, secrets.token_hex(32))
    write_config(folder / "serve.toml", token, model=model, ledger="", places=(), **settings)
    variables = {
        "COVTANET_SERVE_CONFIG": str(folder / "serve.toml"),
        **SERVE_ENVIRONMENT,
        **(variables or {}),
    }
    with tempfile.TemporaryDirectory(prefix="cov") as short:
        head = start_ray(folder / "ray.log", variables, ray_token, Path(short))
        try:
            environment = {**os.environ, **head.environment}
            endpoint = start_endpoint(environment, port, folder / "serve.log", token)
            try:
                yield MeasuredEndpoint(endpoint=endpoint, pid=head.process.pid)
            finally:
                endpoint.service.stop()
        finally:
            head.stop()


def measure() -> list[Result]:
    """(h) one caller, eight callers, and load with hostile requests among the sound ones."""
    model = model_folder()
    folder = archive(24 + 17, 256, 105)
    sound = [path.read_bytes() for path in sorted((folder / "nifti").glob("*.nii.gz"))][:8]
    hostile = hostile_bodies(sound[0])
    bodies = sound * 12
    with running_endpoint(WORK / "serving", str(model)) as endpoint:
        say("one caller")
        one_caller = measure_one_caller(endpoint, model)
        say("eight callers")
        eight_s = seconds(lambda: post_all(endpoint, bodies))
        say("load")
        load = measure_load(endpoint, sound, hostile)
    say("the job over the same studies")
    job_s = run_job(_as_folder(bodies)).spent_s
    name = "studies a second at 8 callers over the job's"
    return [one_caller, Result("h", name, f"{job_s / eight_s:.2f} x", ">= 0.8 x"), *load]


def hostile_bodies(sound: bytes) -> list[bytes]:
    """Return bodies that are no study: text, a cut file, a bomb, and a broken zip."""
    return [
        b"no study",
        sound[:-5000],
        gzip.compress(bytes(200 << 20), 1),
        b"PK\x03\x04" + bytes(1000),
    ]


def measure_one_caller(endpoint: MeasuredEndpoint, model: Path) -> Result:
    """Compare a large study by HTTP with the same study in this process."""
    saved = load_model(model)
    predictor = Predictor(saved, num_threads=CORES)
    config = for_model(ScreeningConfig(), saved.preprocessing, saved.readout)
    screener = Screener(predictor, predictor.window, config, saved.digest)
    path = _large_study()
    body = path.read_bytes()
    spent = side_by_side(
        {"http": lambda: endpoint.post(body), "process": lambda: list(screener(str(path)))}
    )
    screener.close()
    alone_s = spent["process"]
    name = f"one caller over one process, a study of {alone_s:.1f} s"
    return Result("h", name, f"{spent['http'] / alone_s:.2f} x", "<= 1.15 x")


def _large_study() -> Path:
    path = WORK / "large" / "ct.nii.gz"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        (config,) = list(configs(2, 7, 512, 200))[1:]
        phantom = make_phantom(config)
        path.write_bytes(nifti.write(phantom.hu, nifti_grid(phantom)))
    return path


def _as_folder(bodies: list[bytes]) -> Path:
    folder = WORK / "posted"
    if not folder.exists():
        for index, body in enumerate(bodies):
            study = folder / f"{index:03d}"
            study.mkdir(parents=True)
            (study / "ct.nii.gz").write_bytes(body)
    return folder


def post_all(endpoint: MeasuredEndpoint, bodies: list[bytes]) -> None:
    """Let ``NUM_CALLERS`` callers post all bodies.

    Raises:
        RuntimeError: if a study is not answered with 200.
    """
    with ThreadPoolExecutor(NUM_CALLERS) as pool:
        answers = list(pool.map(endpoint.post_until_answered, bodies))
    last_statuses = Counter(statuses[-1] for statuses, _ in answers)
    if set(last_statuses) != {200}:
        raise RuntimeError(f"statuses {dict(last_statuses)}, expected 200 alone")


def measure_load(
    endpoint: MeasuredEndpoint, sound: list[bytes], hostile: list[bytes]
) -> list[Result]:
    """Post many bodies from many clients, every twentieth of them hostile."""
    expected = []
    for body in sound:
        _, answer = endpoint.post_until_answered(body)
        expected.append(answer["series"][0]["p_infected"])
    requests: list[tuple[float | None, bytes]] = []
    for number in range(NUM_REQUESTS):
        if number % HOSTILE_EVERY:
            index = number % len(sound)
            requests.append((expected[index], sound[index]))
        else:
            requests.append((None, hostile[number // HOSTILE_EVERY % len(hostile)]))
    answers, samples = _post_and_watch(endpoint, [body for _, body in requests])
    num_right = 0
    statuses: Counter[int] = Counter()
    for (right, _), (tried, answer) in zip(requests, answers, strict=True):
        num_right += _is_right(right, tried[-1], answer)
        statuses.update(tried)
    num_errors = statuses.total() - sum(
        count for status, count in statuses.items() if status < 500 or status == 503
    )
    half = len(samples) // 2
    growth = max(samples[half:]) / max(samples[:half])
    num_hostile = NUM_REQUESTS // HOSTILE_EVERY
    name = f"{NUM_REQUESTS} requests, {NUM_CLIENTS} clients, {num_hostile} hostile: answered right"
    return [
        Result("h", name, f"{num_right}", f"{NUM_REQUESTS}"),
        Result("h", "answers of 5xx that are no back-pressure", f"{num_errors}", "0"),
        Result("h", "told to come again (503 with Retry-After)", f"{statuses[503]}"),
        Result("h", "peak memory, second half over first half", f"{growth:.2f} x", "<= 1.1 x"),
    ]


def _post_and_watch(
    endpoint: MeasuredEndpoint, bodies: list[bytes]
) -> tuple[list[tuple[list[int], Any]], list[int]]:
    """Post all bodies; return the answers, and the endpoint's memory once a second."""
    samples: list[int] = []
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(1):
            samples.append(held_bytes(endpoint.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    with ThreadPoolExecutor(NUM_CLIENTS) as pool:
        answers = list(pool.map(endpoint.post_until_answered, bodies))
    is_over.set()
    watcher.join()
    return answers, samples


def _is_right(expected: float | None, status: int, answer: Any) -> bool:
    """Whether a sound study has its number, or a hostile one (expected: None) is refused."""
    if expected is None:
        return status in (413, 415, 422)
    return status == 200 and abs(answer["series"][0]["p_infected"] - expected) < 1e-5
