"""The endpoint's half of make faults: kills, floods, slow and hostile callers against a real endpoint."""

import contextlib
import http.client
import json
import secrets
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlflow
import psutil
import requests
import torch
from endpoint import SERVE_ENVIRONMENT, Endpoint, start_endpoint, write_config
from mlflow.tracking import MlflowClient
from services import free_ports
from slow import SlowDoor

from covtanet import storage, tracking
from covtanet.ct import nifti
from covtanet.model.checkpoint import SavedModel, save_model
from covtanet.model.covtanet import SIZES, CovTANet
from covtanet.model.description import Capabilities, Preprocessing
from covtanet.phantoms import bombs
from covtanet.phantoms.encodings import dicom_objects, nifti_grid
from covtanet.phantoms.phantom import make_phantom
from covtanet.phantoms.sampling import configs

RELOAD_EVERY_S, UPLOAD_TIMEOUT_S, REQUEST_TIMEOUT_S = 2.0, 4.0, 30.0
NUM_CALLERS, NUM_HANG_UPS = 8, 10
SLOW_BYTES_PER_S = 100e3  # of one connection; eight are read at a time
SLOW_STUDY, LEDGER = "s3://bucket/slow/study", "s3://bucket/ledger"
BACK_WITHIN_S = 30.0
NOT_COMPARED = (
    "screened_at",
    "decode_s",
    "predict_s",
    "source_version",
)  # the last is of an upload's time on disk
API, SEGMENTER, CONTROLLER = (
    "ServeReplica:default:Api",
    "ServeReplica:default:Segmenter",
    "ServeController",
)


@dataclass
class Serving:
    """An endpoint with a registry, a sound study, and what an undisturbed request answers."""

    folder: Path
    environment: dict[str, str]
    study: bytes = b""
    expected: float = 0.0
    started: Endpoint | None = None
    door: SlowDoor | None = None
    others: dict[int, tuple[bytes, Any]] = field(default_factory=dict)

    @property
    def endpoint(self) -> Endpoint:
        """The endpoint, which ``fill`` starts."""
        assert self.started is not None
        return self.started

    def post(self, body: bytes, headers: dict[str, str] | None = None) -> tuple[int, Any, float]:
        """Status, answer and Retry-After of a study that is posted; status 0 where the connection breaks."""
        try:
            status, answer, found = self.endpoint.ask("POST", "/v1/studies", body, headers)
        except requests.RequestException:
            return 0, {}, 0
        return status, answer, float(found.get("Retry-After") or 0)

    def is_right(self) -> bool:
        """Whether the sound study is answered as ever."""
        status, answer, _ = self.post(self.study)
        return status == 200 and abs(answer["series"][0]["p_infected"] - self.expected) < 1e-4

    def back_after(self) -> float:
        """Seconds until the sound study is answered as ever.

        Raises:
            AssertionError: where that takes too long.
        """
        started = time.monotonic()
        while not self.is_right():
            assert time.monotonic() - started < 2 * BACK_WITHIN_S, "it does not come back"
            time.sleep(0.3)
        return time.monotonic() - started

    def post_slow(self) -> http.client.HTTPConnection:
        """Ask for the study that lies in the slow store, and do not wait for the answer."""
        body = json.dumps({"uri": SLOW_STUDY}).encode()
        headers = {
            "Authorization": f"Bearer {self.endpoint.token}",
            "Content-Type": "application/json",
        }
        connection = self.endpoint.announce(len(body), "/v1/studies:by-uri", headers)
        connection.send(body)
        return connection

    @contextlib.contextmanager
    def slow_store(self, bytes_per_s: float) -> Iterator[None]:
        """The object store answers slowly."""
        assert self.door is not None
        self.door.bytes_per_s = bytes_per_s
        try:
            yield
        finally:
            self.door.bytes_per_s = 0.0

    def processes(self, part: str) -> list[psutil.Process]:
        """The processes of this endpoint's Ray whose command line holds a text."""
        return processes_of(self.environment, part)

    def children(self) -> list[psutil.Process]:
        """The decoders' child processes of this endpoint."""
        found = []
        for process in self.processes(API):
            with contextlib.suppress(psutil.Error):
                children = process.children(recursive=True)
                found += [
                    child for child in children if "sandbox_child" in " ".join(child.cmdline())
                ]
        return found

    def versions(self) -> set[str]:
        """Versions of the model that answer now."""
        return {each["version"] for each in self.endpoint.ask("GET", "/v1/models")[1]}


def register(serving: Serving, seed: int) -> str:
    """Register an untrained model; returns its version."""
    torch.manual_seed(seed)
    folder = serving.folder / f"model{seed}"
    save_model(
        folder,
        SavedModel(
            network=CovTANet(SIZES["small"]).eval(),
            preprocessing=Preprocessing(size_px=128),
            capabilities=Capabilities(segments=True, diagnoses=True),
        ),
    )
    address = tracking.RunAddress(
        uri=serving.environment["MLFLOW_TRACKING_URI"], experiment="faults", name=f"model {seed}", key=str(seed),
        artifacts=str(serving.folder / "artifacts"),
    )  # fmt: skip
    return tracking.register_model(address, folder, {})


def fill(serving: Serving) -> None:
    """Register a champion, start the endpoint, and ask it once."""
    mlflow.set_tracking_uri(serving.environment["MLFLOW_TRACKING_URI"])
    tracking.promote(register(serving, 0), {})
    token, (port,) = secrets.token_urlsafe(32), free_ports(1)
    write_config(
        serving.folder / "serve.toml", token, model="models:/covtanet@champion", ledger=LEDGER, places=("s3://bucket/slow",),
        reload_every_s=RELOAD_EVERY_S, max_waiting=2, upload_timeout_s=UPLOAD_TIMEOUT_S,
        request_timeout_s=REQUEST_TIMEOUT_S,
    )  # fmt: skip
    serving.started = start_endpoint(serving.environment, port, serving.folder / "serve.log", token)
    (config,) = list(configs(2, 31, 256, 60))[1:]
    phantom = make_phantom(config)
    serving.study = nifti.write(phantom.hu, nifti_grid(phantom))
    status, answer, _ = serving.post(serving.study)
    assert status == 200, answer
    serving.expected = answer["series"][0]["p_infected"]
    slow, *others = configs(1 + NUM_CALLERS, 47, 128, 24)
    for index, data in enumerate(
        dicom_objects(make_phantom(replace(slow, size_px=256, num_slices=60)), 47)
    ):
        storage.write_bytes(f"{SLOW_STUDY}/{index:04d}.dcm", data)
    for index, config in enumerate(others):
        phantom = make_phantom(config)
        body = nifti.write(phantom.hu, nifti_grid(phantom))
        status, answer, _ = serving.post(body)
        assert status == 200, answer
        serving.others[index] = body, compared(answer)


def compared(answer: Any) -> list[dict[str, Any]]:
    """What two answers about one study have in common, whoever asks beside it."""
    return [
        {name: value for name, value in row.items() if name not in NOT_COMPARED}
        for row in answer["series"]
    ]


def processes_of(environment: dict[str, str], part: str) -> list[psutil.Process]:
    """The processes of the Ray of this environment whose command line holds a text."""
    token, found = environment["RAY_AUTH_TOKEN_PATH"], []
    for process in psutil.process_iter(["cmdline"]):
        with contextlib.suppress(psutil.Error):
            is_part = part in " ".join(process.info["cmdline"] or ())
            if is_part and process.environ().get("RAY_AUTH_TOKEN_PATH") == token:
                found.append(process)
    return found


def kill(environment: dict[str, str], part: str) -> None:
    """Kill a process of the Ray of this environment as a crash would."""
    found = processes_of(environment, part)
    assert found, f"no {part} runs"
    found[0].kill()


def tokens(serving: Serving) -> str:
    """Nobody's, a wrong and the right token."""
    seen = [
        serving.post(serving.study, {"Authorization": each})[0] for each in ("", "Bearer wrong")
    ]
    seen.append(serving.post(serving.study)[0])
    assert seen == [401, 403, 200], seen
    return "401, 403, 200"


def killed_in_a_request(part: str) -> Callable[[Serving], str]:
    """A process dies while a study is read."""

    def scenario(serving: Serving) -> str:
        with ThreadPoolExecutor(2) as pool:
            waiting = [pool.submit(serving.post, serving.study) for _ in range(2)]
            time.sleep(0.4)
            kill(serving.environment, part)
            found = [(status, wait_s) for status, _, wait_s in (each.result() for each in waiting)]
        back_s = serving.back_after()
        assert all(status == 200 or (status == 503 and wait_s > 0) for status, wait_s in found), (
            found
        )
        assert back_s <= BACK_WITHIN_S, f"back after {back_s:.0f} s"
        return f"its requests {[status for status, _ in found]}; right again after {back_s:.0f} s"

    return scenario


def flood(serving: Serving) -> str:
    """Forty studies at once."""
    with ThreadPoolExecutor(40) as pool:
        found = list(pool.map(lambda _: serving.post(serving.study), range(40)))
    statuses = Counter(status for status, *_ in found)
    assert set(statuses) == {200, 503}, statuses
    assert all(wait_s > 0 for status, _, wait_s in found if status == 503), (
        "a 503 without Retry-After"
    )
    assert serving.is_right()
    return f"{statuses[200]} answered, {statuses[503]} told to come again"


def too_large(serving: Serving) -> str:
    """A body of two gigabytes is announced."""
    connection = serving.endpoint.announce(2 << 30)
    with contextlib.closing(connection), connection.getresponse() as answer:
        assert answer.status == 413, answer.status
    assert serving.is_right()
    return "413 before a byte was sent"


def slow_upload(serving: Serving) -> str:
    """A body that does not come."""
    connection = serving.endpoint.announce(len(serving.study))
    connection.send(serving.study[:1000])
    started = time.monotonic()
    with contextlib.closing(connection), connection.getresponse() as answer:
        assert answer.status == 408, answer.status
    spent_s = time.monotonic() - started
    assert spent_s < UPLOAD_TIMEOUT_S + 5, spent_s
    return f"408 after {spent_s:.0f} s"


def client_gone(serving: Serving) -> str:
    """More callers than places send half a study and hang up."""
    for _ in range(6):
        connection = serving.endpoint.announce(len(serving.study))
        connection.send(serving.study[: len(serving.study) // 2])
        assert connection.sock is not None
        connection.sock.shutdown(socket.SHUT_RDWR)
        connection.close()
    back_s = serving.back_after()
    assert back_s < UPLOAD_TIMEOUT_S + 5, back_s
    return f"their places were free after {back_s:.0f} s"


def hostile(serving: Serving) -> str:
    """Bytes that are no study, cut, or a bomb."""
    bodies = {
        "no study": b"nothing",
        "cut": serving.study[:-2000],
        "zip": b"PK\x03\x04" + bytes(500),
    }
    seen = {name: serving.post(body) for name, body in bodies.items()}
    assert all(
        status in (413, 415, 422) and answer["reason"] for status, answer, _ in seen.values()
    ), seen
    assert serving.is_right()
    return ", ".join(
        f"{name}: {status} {answer['reason']}" for name, (status, answer, _) in seen.items()
    )


def another_champion(serving: Serving) -> str:
    """The alias moves while studies are read; then it moves back."""
    before, version = tracking.version_of("champion"), register(serving, 1)
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
    return f"taken up after {spent_s:.0f} s without a restart; each answer names one of two digests"


def wrong_digest(serving: Serving) -> str:
    """The alias moves to a version whose files are not what the registry says."""
    before, version = tracking.version_of("champion"), register(serving, 2)
    source = (
        MlflowClient()
        .get_model_version(tracking.MODEL_NAME, version)
        .source.removeprefix("file://")
    )
    (weights,) = Path(source).rglob("weights.safetensors")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    tracking.promote(version, {})
    time.sleep(4 * RELOAD_EVERY_S + 6)
    assert serving.versions() == {before}
    assert serving.is_right()
    tracking.promote(before, {})
    return f"version {before} goes on answering"


def shut_down(serving: Serving) -> None:
    """End the endpoint and its way to storage."""
    if serving.started is not None:
        serving.started.service.stop()
    if serving.door is not None:
        serving.door.close()


def hang_up_during_decoding(serving: Serving) -> str:
    """Callers hang up while their study comes from a slow store and is decoded, beside eight other callers."""
    is_over, seen = threading.Event(), Counter[int]()
    wrong: list[str] = []

    def ask(index: int) -> None:
        body, expected = serving.others[index]
        while not is_over.is_set():
            status, answer, wait_s = serving.post(body)
            seen[status] += 1
            if status == 200 and compared(answer) != expected:
                names = ("status", "num_slices", "lesion_volume_ml", "series_uid")
                got, due = (
                    [[row[name] for name in names] for row in rows]
                    for rows in (answer["series"], expected)
                )
                wrong.append(f"caller {index} got {got}, expected {due}")
            if status not in (200, 503) or (status == 503 and not wait_s):
                wrong.append(f"caller {index} got {status} {answer}")
            time.sleep(0.05 + (0.3 if status == 503 else 0))

    with serving.slow_store(SLOW_BYTES_PER_S), ThreadPoolExecutor(NUM_CALLERS) as pool:
        asking = [pool.submit(ask, index) for index in range(NUM_CALLERS)]
        for _ in range(NUM_HANG_UPS):
            connection = serving.post_slow()
            time.sleep(1.5)
            assert connection.sock is not None
            connection.sock.shutdown(socket.SHUT_RDWR)
            connection.close()
            time.sleep(0.5)
        is_over.set()
        for each in asking:
            each.result()
    assert not wrong, f"{len(wrong)} wrong answers, the first: {wrong[0]}"
    assert seen[200] > NUM_CALLERS, seen
    back_s = serving.back_after()
    return f"{seen[200]} rows of others as without, {seen[503]} told to come again; right after {back_s:.0f} s"


@contextlib.contextmanager
def kept_still(find: Callable[[], list[psutil.Process]]) -> Iterator[None]:
    """Suspend processes, those too that are started meanwhile, and let them go on at the end."""
    is_over, still = threading.Event(), set[psutil.Process]()

    def suspend_all() -> None:
        while not is_over.wait(0.05):
            for process in set(find()) - still:
                with contextlib.suppress(psutil.Error):
                    process.suspend()
                    still.add(process)

    thread = threading.Thread(target=suspend_all)
    thread.start()
    time.sleep(1)  # what runs now stands still before anything is asked of it
    try:
        yield
    finally:
        is_over.set()
        thread.join()
        for process in still:
            with contextlib.suppress(psutil.Error):
                process.resume()


def timeouts(serving: Serving) -> str:
    """Time runs out in the wait for a decoder, in storage, in the decoder and in the model."""
    seen = {}
    with serving.slow_store(8e3):
        slow = [serving.post_slow() for _ in range(4)]  # two are read, two wait
        time.sleep(1.0)
        assert (status := serving.post(serving.study)[0]) == 503, status
        answers = []
        for connection in slow:
            with contextlib.closing(connection), connection.getresponse() as answer:
                answers.append((answer.status, json.loads(answer.read())["reason"]))
        assert Counter(answers) == {(504, "deadline"): 2, (503, "busy"): 2}, answers
        seen["storage and the wait for a decoder"] = "504 and 503"
    seen["back after"] = f"{serving.back_after():.0f} s"
    for name, stopped in (
        ("decoder", serving.children),
        ("model", lambda: serving.processes(SEGMENTER)),
    ):
        with kept_still(stopped):
            started = time.monotonic()
            status, answer, wait_s = serving.post(serving.study)
            spent_s = time.monotonic() - started
        # A model that stands still may be replaced by another replica in time.
        is_right = (
            name == "model"
            and status == 200
            and answer["series"][0]["p_infected"] == serving.expected
        )
        assert is_right or status == 504 or (status == 503 and wait_s), (name, status)
        assert spent_s < REQUEST_TIMEOUT_S + 10, (name, spent_s)
        seen[name] = f"{status} after {spent_s:.0f} s, right {serving.back_after():.0f} s later"
    return ", ".join(f"{name}: {what}" for name, what in seen.items())


def bombs_of_three_kinds(serving: Serving) -> str:
    """A zip's directory, headers and a mask that grow when they are read, each beside a sound study."""
    (replica,) = serving.processes(API)[:1]
    seen = {}
    for name, body in (
        ("zip", bombs.directory_bomb(500_000)),
        ("lying zip", bombs.directory_bomb(500_000, 1)),
        ("headers", bombs.header_bombs(16, 500_000)),
        ("mask", bombs.mask_bomb(1024, 1000)),
    ):
        before = replica.memory_info().rss
        started = time.monotonic()
        with ThreadPoolExecutor(2) as pool:
            bomb, sound = pool.submit(serving.post, body), pool.submit(serving.is_right)
            status, answer, _ = bomb.result()
            spent_s = time.monotonic() - started
            assert sound.result(), f"a sound study beside the {name} bomb was not answered as ever"
        grown_mib = (replica.memory_info().rss - before) / (1 << 20)
        assert status in (413, 422), (name, status, answer)
        assert grown_mib < 200, (name, grown_mib)
        seen[name] = f"{status} {answer['reason']} after {spent_s:.1f} s"
    assert serving.is_right()
    return ", ".join(f"{name}: {what}" for name, what in seen.items())


def store_is_down(serving: Serving) -> str:
    """The object store lets nobody in: every route that asks it says so, and studies that are posted are answered."""
    assert serving.door is not None
    asked = json.dumps({"archive": "s3://bucket/slow"}).encode()
    batch = f"/v1/batches/{'0' * 16}"
    serving.door.is_shut = True
    try:
        seen = {}
        for method, path, body in (
            ("GET", "/v1/batches", None), ("POST", "/v1/batches", asked), ("GET", batch, None),
            ("GET", f"{batch}/ledger", None), ("GET", f"{batch}/worklist", None), ("POST", f"{batch}:cancel", None),
        ):  # fmt: skip
            status, answer, headers = serving.endpoint.ask(
                method, path, body, {"Content-Type": "application/json"}
            )
            seen[f"{method} {path}"] = (
                status,
                answer.get("reason"),
                bool(headers.get("Retry-After")),
            )
            assert serving.is_right()
        assert set(seen.values()) == {(503, "storage", True)}, seen
    finally:
        serving.door.is_shut = False
    status, answer, _ = serving.endpoint.ask("GET", "/v1/batches")
    assert (status, answer) == (200, []), answer
    return f"503 storage on {len(seen)} routes, posted studies answered meanwhile"


def slow_beside_fast(serving: Serving) -> str:
    """Two bodies that stall, and a caller who does not."""
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
    return f"answered in {spent_s:.1f} s, {usual_s:.1f} s without them"


Scenario = Callable[[Serving], str]
KILLED = "its own requests at most, told to come again; right within 30 s"
SERVING: dict[str, tuple[Scenario, str]] = {
    "no, wrong and right token": (tokens, "401, 403, 200"),
    "replica of the API killed in a request": (killed_in_a_request(API), KILLED),
    "replica of the model killed in a request": (killed_in_a_request(SEGMENTER), KILLED),
    "controller killed": (killed_in_a_request(CONTROLLER), KILLED),
    "forty studies at once": (flood, "200, or 503 with Retry-After"),
    "body too large": (too_large, "413 before it is read"),
    "slow upload": (slow_upload, "408"),
    "callers gone": (client_gone, "their places are free again"),
    "callers hang up during decoding": (hang_up_during_decoding, "every other caller's rows as without; 503 at most"),
    "time runs out at each stage": (timeouts, "503 or 504; right again"),
    "bombs": (bombs_of_three_kinds, "413 or 422, little memory; a study beside it is right"),
    "the object store is down": (store_is_down, "503 storage with Retry-After on every route that asks it"),
    "slow uploads beside a fast caller": (slow_beside_fast, "408 for them, the usual time for the other"),
    "hostile bodies": (hostile, "a 4xx with a reason; the next is right"),
    "another champion": (another_champion, "taken up; no answer of two versions"),
    "files of another digest": (wrong_digest, "the version before goes on answering"),
}  # fmt: skip


def environment_of(folder: Path) -> dict[str, str]:
    """What this endpoint's Ray needs beside the usual."""
    return {
        "COVTANET_SERVE_CONFIG": str(folder / "serve.toml"),
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
        **SERVE_ENVIRONMENT,
    }
