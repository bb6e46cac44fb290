"""A real endpoint under kills, floods, slow and hostile callers, and a store that is
slow or down."""

import contextlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import bombs
import pytest
from mlflow.tracking import MlflowClient
from serving_callers import Callers, suspended
from serving_runs import (
    API,
    BACK_WITHIN_S,
    CONTROLLER,
    NUM_CALLERS,
    RELOAD_EVERY_S,
    REQUEST_TIMEOUT_S,
    SEGMENTER,
    UPLOAD_TIMEOUT_S,
    Serving,
    environment_of,
    hang_up,
    kill,
    register,
    start_serving,
)
from slow_proxy import SlowDoor

from covtanet import tracking
from infra.local.services import LOOPBACK, start_s3

# A scenario runs several jobs one after the other; each alone may take 500 s.
pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]


NUM_HANG_UPS = 10


SLOW_BYTES_PER_S = 100e3  # of one connection; eight are read at a time


@pytest.fixture(scope="module")
def serving(
    own_ray: Callable[..., dict[str, str]],
    module_environment: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Serving]:
    """An endpoint on a Ray for this suite alone, whose S3 server stands behind a slow door."""
    folder = tmp_path_factory.mktemp("serving-faults")
    (folder / "s3" / "bucket").mkdir(parents=True)
    s3 = start_s3(folder / "s3", folder / "s3.log")
    with contextlib.ExitStack() as stack:
        stack.callback(s3.stop)
        door = stack.enter_context(
            contextlib.closing(SlowDoor(urlsplit(s3.environment["AWS_ENDPOINT_URL"]).port or 0))
        )
        module_environment.update(s3.environment)
        variables = environment_of(folder) | s3.environment
        variables["AWS_ENDPOINT_URL"] = f"http://{LOOPBACK}:{door.port}"
        serving = start_serving(folder, own_ray(variables), door)
        stack.callback(serving.endpoint.service.stop)
        yield serving


def test_missing_token_returns_401_and_wrong_token_403(
    serving: Serving, seen: Callable[[str], None]
) -> None:
    statuses = []
    for header in ("", "Bearer wrong"):
        statuses.append(serving.post(serving.study, {"Authorization": header})[0])
    statuses.append(serving.post(serving.study)[0])
    assert statuses == [401, 403, 200], statuses
    seen("401, 403, 200")


@pytest.mark.parametrize("process", [API, SEGMENTER, CONTROLLER])
def test_killed_process_costs_its_own_requests_alone(
    serving: Serving, seen: Callable[[str], None], process: str
) -> None:
    """Its callers get 503 with Retry-After at most; the endpoint is right again in 30 s."""
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(serving.post, serving.study) for _ in range(2)]
        time.sleep(0.4)
        kill(serving.environment, process)
        answers = [future.result() for future in waiting]
    back_s = serving.back_after()
    statuses = []
    for status, _, retry_after_s in answers:
        assert status == 200 or (status == 503 and retry_after_s > 0), (status, retry_after_s)
        statuses.append(status)
    assert back_s <= BACK_WITHIN_S, f"back after {back_s:.0f} s"
    seen(f"its requests {statuses}; right again after {back_s:.0f} s")


def test_forty_studies_at_once_return_200_or_503(
    serving: Serving, seen: Callable[[str], None]
) -> None:
    with ThreadPoolExecutor(40) as pool:
        answers = list(pool.map(lambda _: serving.post(serving.study), range(40)))
    statuses = Counter(status for status, *_ in answers)
    assert set(statuses) == {200, 503}, statuses
    refused = [retry_after_s for status, _, retry_after_s in answers if status == 503]
    assert min(refused) > 0, "a 503 without Retry-After"
    assert serving.is_right()
    seen(f"{statuses[200]} answered, {statuses[503]} told to come again")


def test_body_of_2_gib_returns_413_before_it_is_read(
    serving: Serving, seen: Callable[[str], None]
) -> None:
    connection = serving.endpoint.announce(2 << 30)
    with contextlib.closing(connection), connection.getresponse() as answer:
        assert answer.status == 413, answer.status
    assert serving.is_right()
    seen("413 before a byte was sent")


def test_stalled_upload_returns_408(serving: Serving, seen: Callable[[str], None]) -> None:
    connection = serving.endpoint.announce(len(serving.study))
    connection.send(serving.study[:1000])
    started = time.monotonic()
    with contextlib.closing(connection), connection.getresponse() as answer:
        assert answer.status == 408, answer.status
    spent_s = time.monotonic() - started
    assert spent_s < UPLOAD_TIMEOUT_S + 5, spent_s
    seen(f"408 after {spent_s:.0f} s")


def test_callers_who_hang_up_free_their_slots(
    serving: Serving, seen: Callable[[str], None]
) -> None:
    """More callers than there are slots send half a study."""
    for _ in range(6):
        connection = serving.endpoint.announce(len(serving.study))
        connection.send(serving.study[: len(serving.study) // 2])
        hang_up(connection)
    back_s = serving.back_after()
    assert back_s < UPLOAD_TIMEOUT_S + 5, back_s
    seen(f"their slots were free after {back_s:.0f} s")


def test_hostile_body_returns_4xx_with_reason(
    serving: Serving, seen: Callable[[str], None]
) -> None:
    """Bytes that are no study, a cut study, and a zip of zeros; the next study is right."""
    bodies = {
        "no study": b"nothing",
        "cut": serving.study[:-2000],
        "zip": b"PK\x03\x04" + bytes(500),
    }
    summary = []
    for name, body in bodies.items():
        status, answer, _ = serving.post(body)
        assert status in (413, 415, 422), (name, status, answer)
        assert answer["reason"], name
        summary.append(f"{name}: {status} {answer['reason']}")
    assert serving.is_right()
    seen(", ".join(summary))


def test_champion_moves_without_restart(serving: Serving, seen: Callable[[str], None]) -> None:
    """The alias moves while studies are read, then back; no answer mixes two versions."""
    before = tracking.version_of("champion")
    version = register(serving.folder, serving.environment["MLFLOW_TRACKING_URI"], 1)
    digests: set[str] = set()
    is_over = threading.Event()

    def ask() -> None:
        while not is_over.is_set():
            status, answer, _ = serving.post(serving.study)
            if status == 200:
                rows = {row["model_digest"] for row in answer["series"]}
                assert rows == {answer["model"]["digest"]}, "one answer names two versions"
                digests.add(answer["model"]["digest"])

    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(ask)
        started = time.monotonic()
        tracking.promote(version, {})
        while serving.versions() != {version}:
            assert time.monotonic() - started < 60, "the new champion is not taken up"
            time.sleep(0.3)
        spent_s = time.monotonic() - started
        time.sleep(1)
        is_over.set()
        asking.result()
    tracking.promote(before, {})
    while serving.versions() != {before}:
        time.sleep(0.3)
    assert len(digests) == 2, digests
    seen(f"taken up after {spent_s:.0f} s; each answer names one of two digests")


def test_champion_of_another_digest_is_not_served(
    serving: Serving, seen: Callable[[str], None]
) -> None:
    """The alias moves to a version whose files differ from the digest in the registry."""
    before = tracking.version_of("champion")
    version = register(serving.folder, serving.environment["MLFLOW_TRACKING_URI"], 2)
    registered = MlflowClient().get_model_version(tracking.MODEL_NAME, version)
    source = Path(registered.source.removeprefix("file://"))
    (weights,) = source.rglob("weights.safetensors")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    tracking.promote(version, {})
    time.sleep(4 * RELOAD_EVERY_S + 6)
    assert serving.versions() == {before}
    assert serving.is_right()
    tracking.promote(before, {})
    seen(f"version {before} goes on answering")


def test_hang_up_during_decoding_changes_no_other_answer(
    serving: Serving, seen: Callable[[str], None]
) -> None:
    """Callers hang up while a slow store gives their study, beside eight other callers."""
    callers = Callers(serving)
    with serving.slow_store(SLOW_BYTES_PER_S), ThreadPoolExecutor(NUM_CALLERS) as pool:
        asking = [pool.submit(callers.post, index) for index in range(NUM_CALLERS)]
        for _ in range(NUM_HANG_UPS):
            connection = serving.post_slow()
            time.sleep(1.5)
            hang_up(connection)
            time.sleep(0.5)
        callers.is_over.set()
        for future in asking:
            future.result()
    wrong, statuses = callers.wrong, callers.statuses
    assert not wrong, f"{len(wrong)} wrong answers, the first: {wrong[0]}"
    assert statuses[200] > NUM_CALLERS, statuses
    back_s = serving.back_after()
    seen(
        f"{statuses[200]} answers of others as without, {statuses[503]} told to come again; "
        f"right after {back_s:.0f} s"
    )


def test_timeout_in_storage_returns_504_and_in_queue_503(
    serving: Serving, seen: Callable[[str], None]
) -> None:
    with serving.slow_store(8e3):
        slow = [serving.post_slow() for _ in range(4)]  # two are read, two wait for a decoder
        time.sleep(1.0)
        status, *_ = serving.post(serving.study)
        assert status == 503, status
        answers = []
        for connection in slow:
            with contextlib.closing(connection), connection.getresponse() as answer:
                answers.append((answer.status, json.loads(answer.read())["reason"]))
    assert Counter(answers) == {(504, "deadline"): 2, (503, "busy"): 2}, answers
    seen(f"504 and 503; right after {serving.back_after():.0f} s")


@pytest.mark.parametrize("process", ["decoder", "model"])
def test_timeout_in_decoder_or_model_returns_503_or_504(
    serving: Serving, seen: Callable[[str], None], process: str
) -> None:
    processes = {"decoder": serving.children, "model": lambda: serving.processes(SEGMENTER)}
    with suspended(processes[process]):
        started = time.monotonic()
        status, answer, retry_after_s = serving.post(serving.study)
        spent_s = time.monotonic() - started
    # Ray may replace a model's replica that stands still by another one in time.
    if process == "model" and status == 200:
        assert answer["series"][0]["p_infected"] == serving.expected
    else:
        assert status == 504 or (status == 503 and retry_after_s), (status, retry_after_s)
    assert spent_s < REQUEST_TIMEOUT_S + 10, spent_s
    seen(f"{status} after {spent_s:.0f} s, right {serving.back_after():.0f} s later")


BOMBS: dict[str, Callable[[], bytes]] = {
    "zip": lambda: bombs.directory_bomb(500_000),
    "lying zip": lambda: bombs.directory_bomb(500_000, 1),
    "headers": lambda: bombs.header_bombs(16, 500_000),
    "mask": lambda: bombs.mask_bomb(1024, 1000),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bomb_returns_413_or_422_in_little_memory(
    serving: Serving, seen: Callable[[str], None], name: str
) -> None:
    """A zip's directory, headers and a mask that grow when they are read, beside a sound study."""
    body = BOMBS[name]()
    (replica,) = serving.processes(API)[:1]
    before = replica.memory_info().rss
    started = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        bomb = pool.submit(serving.post, body)
        sound = pool.submit(serving.is_right)
        status, answer, _ = bomb.result()
        spent_s = time.monotonic() - started
        assert sound.result(), "a sound study beside the bomb was not answered as without it"
    grown_mib = (replica.memory_info().rss - before) / (1 << 20)
    assert status in (413, 422), (status, answer)
    assert grown_mib < 200, grown_mib
    assert serving.is_right()
    seen(f"{status} {answer['reason']} after {spent_s:.1f} s")


def test_store_that_is_down_returns_503_storage(
    serving: Serving, seen: Callable[[str], None]
) -> None:
    """On every route that asks the store; studies that are posted are answered meanwhile."""
    archive = json.dumps({"archive": "s3://bucket/slow"}).encode()
    batch = f"/v1/batches/{'0' * 16}"
    routes = (
        ("GET", "/v1/batches", None),
        ("POST", "/v1/batches", archive),
        ("GET", batch, None),
        ("GET", f"{batch}/ledger", None),
        ("GET", f"{batch}/worklist", None),
        ("POST", f"{batch}:cancel", None),
    )
    serving.door.is_shut = True
    try:
        for method, path, body in routes:
            status, answer, headers = serving.endpoint.ask(
                method, path, body, {"Content-Type": "application/json"}
            )
            assert (status, answer.get("reason")) == (503, "storage"), (method, path)
            assert headers.get("Retry-After"), (method, path)
            assert serving.is_right()
    finally:
        serving.door.is_shut = False
    status, answer, _ = serving.endpoint.ask("GET", "/v1/batches")
    assert (status, answer) == (200, []), answer
    seen(f"503 storage on {len(routes)} routes, posted studies answered meanwhile")


def test_slow_uploads_leave_a_fast_caller_its_time(
    serving: Serving, seen: Callable[[str], None]
) -> None:
    """Two bodies stall and end with 408; a caller who does not stall waits no longer than alone."""
    started = time.monotonic()
    assert serving.is_right()
    usual_s = time.monotonic() - started
    slow = [serving.endpoint.announce(len(serving.study)) for _ in range(2)]
    for connection in slow:
        connection.send(serving.study[:1000])
    time.sleep(0.5)
    started = time.monotonic()
    assert serving.is_right()
    spent_s = time.monotonic() - started
    assert spent_s < usual_s + UPLOAD_TIMEOUT_S / 2, (usual_s, spent_s)
    for connection in slow:
        with contextlib.closing(connection), connection.getresponse() as answer:
            assert answer.status == 408, answer.status
    seen(f"answered in {spent_s:.1f} s, {usual_s:.1f} s without them")
