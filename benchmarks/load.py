"""A thousand studies in a closed loop, hostile ones among them, while the champion changes."""

import io
import os
import secrets
import shutil
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import numpy as np

from benchmarks.measure import WORK, Result, say
from benchmarks.screening_runs import Memory, model_folder
from benchmarks.serving import (
    MeasuredEndpoint,
    hostile_bodies,
    post_until_answered,
    running_endpoint,
)
from covtanet import tracking
from covtanet.ct import nifti
from covtanet.phantoms.damage import DICOM_DAMAGE, OTHER_DAMAGE
from covtanet.phantoms.encodings import dicom_objects, nifti_grid
from covtanet.phantoms.phantom import make_phantom
from covtanet.phantoms.sampling import configs

NUM_POSTS, NUM_CALLERS, NUM_SOUND = 1000, 32, 12
HOSTILE_EVERY = 8
SIZE_PX, NUM_SLICES = 128, 24
NUM_API_REPLICAS = NUM_MODEL_REPLICAS = 2
RELOAD_EVERY_S = 5.0
PERCENTILES = (50, 95, 99)
TOLERANCE = 1e-5
PART = "l"

# Status of the answer and, for each series, what the ledger says of it.
Outcome = tuple[int, tuple[tuple[Any, ...], ...]]
# The outcome of each body by each version of the model.
Expected = dict[str, list[Outcome]]


@dataclass(frozen=True, kw_only=True)
class Post:
    """A study that was posted until it was answered."""

    body: int
    """Index of the body."""
    statuses: tuple[int, ...]
    """Of every try; all but the last told to come again."""
    version: str
    """Version of the model that answered; empty if the study was refused."""
    outcome: Outcome
    answered_s: float
    """Seconds of the try that was answered."""
    total_s: float
    """Seconds of all tries, and of the waits between them."""


def measure() -> list[Result]:
    """(l) answers by status, each against the same study alone; latency; memory."""
    folder = WORK / "load"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    registry = f"sqlite:///{folder}/mlflow.db"
    versions = _register_versions(folder, registry)
    bodies = make_bodies()
    other_load = os.getloadavg()[0]
    with running_endpoint(
        folder / "endpoint", "models:/covtanet@champion", {"MLFLOW_TRACKING_URI": registry},
        reload_every_s=RELOAD_EVERY_S, num_api_replicas=NUM_API_REPLICAS,
        num_model_replicas=NUM_MODEL_REPLICAS,
    ) as endpoint:  # fmt: skip
        say("each study alone")
        expected = {versions[0]: post_alone(endpoint, bodies)}
        say(f"{NUM_POSTS} studies by {NUM_CALLERS} callers")
        with Memory(endpoint.pid) as memory:
            started = time.time()
            posts = post_all(endpoint, bodies, lambda: tracking.promote(versions[1], {}))
            ended = time.time()
        say("each study alone, by the second version")
        time.sleep(3 * RELOAD_EVERY_S)
        expected[versions[1]] = post_alone(endpoint, bodies)
    half = (started + ended) / 2
    growth = memory.peak_bytes(half, ended) / memory.peak_bytes(started, half)
    return [
        *results_of(posts, expected),
        Result(PART, "peak memory, second half over first half", f"{growth:.2f} x", "<= 1.1 x"),
        *latencies(posts),
        Result(PART, "load average of the machine before, by other work", f"{other_load:.1f}"),
    ]


def _register_versions(folder: Path, registry: str) -> list[str]:
    """Register two untrained models, the first as the champion."""
    mlflow.set_tracking_uri(registry)
    versions = []
    for seed in (0, 1):
        address = tracking.RunAddress(
            uri=registry,
            experiment="load",
            name=f"model {seed}",
            key=secrets.token_hex(4),
            artifacts=str(folder / "artifacts"),
        )
        versions.append(tracking.register_model(address, model_folder(seed), {}))
    tracking.promote(versions[0], {})
    return versions


def make_bodies() -> list[bytes]:
    """Return sound phantoms, as NIfTI and as zips of DICOM in turn, then the hostile bodies."""
    sick, *phantoms = map(make_phantom, configs(NUM_SOUND + 1, 71, SIZE_PX, NUM_SLICES))
    bodies = []
    for index, phantom in enumerate(phantoms):
        if index % 2:
            bodies.append(_as_zip(dicom_objects(phantom, index)))
        else:
            bodies.append(nifti.write(phantom.hu, nifti_grid(phantom)))
    bodies += hostile_bodies(bodies[0])
    objects = dicom_objects(sick, 99)
    bodies += [_as_zip(damage(objects)) for damage in DICOM_DAMAGE.values()]
    return bodies + [damage(sick)[1] for damage in OTHER_DAMAGE.values()]


def _as_zip(objects: Sequence[bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for index, data in enumerate(objects):
            archive.writestr(f"series/{index:04d}.dcm", data)
    return buffer.getvalue()


def post_alone(endpoint: MeasuredEndpoint, bodies: list[bytes]) -> list[Outcome]:
    """Return the outcome of each body when nothing else is asked."""
    return [post(endpoint, index, body).outcome for index, body in enumerate(bodies)]


def post(endpoint: MeasuredEndpoint, index: int, body: bytes) -> Post:
    """Post a body until the endpoint does not tell its caller to come again."""
    started = time.perf_counter()
    spent: list[float] = []

    def try_once(content: bytes) -> tuple[int, Any, float]:
        began = time.perf_counter()
        tried = endpoint.post(content)
        spent.append(time.perf_counter() - began)
        return tried

    statuses, answered = post_until_answered(try_once, body)
    # Serve itself answers with text.
    answer = answered if isinstance(answered, dict) else {}
    model = answer.get("model") or {}
    return Post(
        body=index,
        statuses=tuple(statuses),
        version=model.get("version", ""),
        outcome=(statuses[-1], _series_of(answer)),
        answered_s=spent[-1],
        total_s=time.perf_counter() - started,
    )


def _series_of(answer: dict[str, Any]) -> tuple[tuple[Any, ...], ...]:
    names = ("status", "reason", "diagnosis", "involvement", "p_infected")
    rows = [tuple(row[name] for name in names) for row in answer.get("series", ())]
    return tuple(rows) or ((answer.get("reason"),),)


def post_all(
    endpoint: MeasuredEndpoint, bodies: list[bytes], change: Callable[[], object]
) -> list[Post]:
    """Let all callers post one study after the other; change the champion half way."""
    order = np.random.default_rng(0).permutation(NUM_POSTS)
    num_posted = 0
    lock = threading.Lock()

    def post_one(number: int) -> Post:
        nonlocal num_posted
        with lock:
            num_posted += 1
            is_half_way = num_posted == NUM_POSTS // 2
        if is_half_way:
            change()
        index = body_of(number, len(bodies))
        return post(endpoint, index, bodies[index])

    with ThreadPoolExecutor(NUM_CALLERS) as pool:
        return list(pool.map(post_one, order.tolist()))


def body_of(number: int, num_bodies: int) -> int:
    """Return the index of a request's body: every eighth request is hostile."""
    if number % HOSTILE_EVERY:
        return number % NUM_SOUND
    return NUM_SOUND + number // HOSTILE_EVERY % (num_bodies - NUM_SOUND)


def results_of(posts: list[Post], expected: Expected) -> list[Result]:
    """Count answers by status, and compare each with the same study alone."""
    statuses = Counter(status for each in posts for status in each.statuses)
    num_errors = sum(count for status, count in statuses.items() if status >= 500) - statuses[503]
    # A 503 that ends the tries has no Retry-After.
    num_errors += sum(each.statuses[-1] == 503 for each in posts)
    num_right = sum(is_right(each, expected) for each in posts)
    versions = Counter(each.version for each in posts if each.version)
    by_version = ", ".join(f"{count} by version {name}" for name, count in versions.items())
    by_status = ", ".join(f"{count} x {status}" for status, count in sorted(statuses.items()))
    num_hostile = sum(each.body >= NUM_SOUND for each in posts)
    load = f"{len(posts)} studies, {num_hostile} of them hostile, {NUM_CALLERS} callers"
    return [
        Result(PART, f"{load}: answered as alone", f"{num_right}", f"{len(posts)}"),
        Result(PART, "answers by status", by_status),
        Result(PART, "answers of 5xx but 503 with Retry-After", f"{num_errors}", "0"),
        Result(PART, "answers that name a version", by_version),
    ]


def is_right(each: Post, expected: Expected) -> bool:
    """Return whether an answer is that of the same study alone, by the version that it names.

    An answer that names none, as that to a body that is no study, is the same by all versions.
    """
    candidates = [expected[each.version]] if each.version else list(expected.values())
    status, rows = each.outcome
    for outcomes in candidates:
        right_status, right_rows = outcomes[each.body]
        if status != right_status or not _are_close(rows, right_rows):
            return False
    return True


def _are_close(rows: tuple[tuple[Any, ...], ...], right: tuple[tuple[Any, ...], ...]) -> bool:
    values = [value for row in rows for value in row]
    expected = [value for row in right for value in row]
    if len(values) != len(expected):
        return False
    for value, other in zip(values, expected, strict=True):
        if isinstance(value, float) and isinstance(other, float):
            if abs(value - other) > TOLERANCE:
                return False
        elif value != other:
            return False
    return True


def latencies(posts: list[Post]) -> list[Result]:
    """Return percentiles of the seconds of sound studies."""
    sound = [each for each in posts if each.body < NUM_SOUND]
    lines = {
        "the try that was answered": [each.answered_s for each in sound],
        "with the waits after 503": [each.total_s for each in sound],
    }
    names = " / ".join(f"{percent} %" for percent in PERCENTILES)
    results = []
    for name, values in lines.items():
        spent = " / ".join(f"{value:.1f} s" for value in np.percentile(values, PERCENTILES))
        results.append(Result(PART, f"latency at {names}, {name}", spent))
    return results
