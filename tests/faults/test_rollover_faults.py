"""Champions that change while many callers post, with several replicas of API and model."""

import contextlib
import secrets
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlflow
import pytest
from saved_models import model_of_distinct_involvement
from serving_runs import LEDGER, SEGMENTER, environment_of, register

from covtanet import tracking
from covtanet.ct import nifti
from covtanet.phantoms.encodings import nifti_grid
from covtanet.phantoms.phantom import make_phantom
from covtanet.phantoms.sampling import configs
from infra.local.endpoint import Endpoint, start_endpoint, write_config
from infra.local.ray_processes import ray_processes
from infra.local.services import free_ports, start_s3

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]

NUM_CALLERS, NUM_STUDIES, NUM_REPLICAS = 32, 4, 2
RELOAD_EVERY_S = 2.0
# Two reloads, of the model's replicas and of the API's, and some studies by the new version.
CHANGE_EVERY_S = 15.0


@pytest.fixture(scope="module")
def environment(
    own_ray: Callable[..., dict[str, str]],
    module_environment: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dict[str, str]]:
    """Variables of a Ray for this suite alone, with the folder of its settings and registry."""
    folder = tmp_path_factory.mktemp("rollover")
    (folder / "s3" / "bucket").mkdir(parents=True)
    with contextlib.ExitStack() as stack:
        s3 = start_s3(folder / "s3", folder / "s3.log")
        stack.callback(s3.stop)
        module_environment.update(s3.environment)
        yield {**own_ray(environment_of(folder) | s3.environment), "FOLDER": str(folder)}


@pytest.fixture(scope="module")
def versions(environment: dict[str, str]) -> list[str]:
    """Three versions in the registry, the first of which is the champion."""
    uri = environment["MLFLOW_TRACKING_URI"]
    mlflow.set_tracking_uri(uri)
    folder = Path(environment["FOLDER"])
    registered = [
        register(folder, uri, number, model_of_distinct_involvement(0.2 * number))
        for number in range(3)
    ]
    tracking.promote(registered[0], {})
    return registered


@pytest.fixture(scope="module")
def endpoint(environment: dict[str, str], versions: list[str]) -> Iterator[Endpoint]:
    """An endpoint whose replicas have room for all callers, so that none is told to wait."""
    folder = Path(environment["FOLDER"])
    token = secrets.token_urlsafe(32)
    write_config(
        folder / "serve.toml", token, model="models:/covtanet@champion", ledger=LEDGER, places=(),
        reload_every_s=RELOAD_EVERY_S, max_waiting=NUM_CALLERS, max_uploads=NUM_CALLERS,
        max_uploads_per_caller=NUM_CALLERS, num_api_replicas=NUM_REPLICAS,
        num_model_replicas=NUM_REPLICAS,
    )  # fmt: skip
    started = start_endpoint(environment, free_ports(1)[0], folder / "serve.log", token)
    yield started
    started.service.stop()


def studies() -> list[bytes]:
    """Small phantoms."""
    bodies = []
    for config in list(configs(NUM_STUDIES + 1, 53, 128, 24))[1:]:
        phantom = make_phantom(config)
        bodies.append(nifti.write(phantom.hu, nifti_grid(phantom)))
    return bodies


class Posts:
    """Callers that post studies again and again, and what they were answered."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint, self.bodies = endpoint, studies()
        self.is_over = threading.Event()
        self.statuses: Counter[tuple[int, str]] = Counter()
        self.involvements: dict[tuple[str, int], list[Any]] = defaultdict(list)

    def post(self, caller: int) -> None:
        """Post until it is over."""
        index = caller % NUM_STUDIES
        while not self.is_over.is_set():
            status, answer, _ = self.endpoint.ask("POST", "/v1/studies", self.bodies[index])
            self.statuses[status, answer.get("reason") or ""] += 1
            if status == 200:
                (row,) = answer["series"]
                assert row["model_digest"] == answer["model"]["digest"]
                key = (answer["model"]["version"], index)
                self.involvements[key].append((row["involvement"], row["p_infected"]))


def test_no_request_fails_while_the_champion_changes(
    endpoint: Endpoint,
    environment: dict[str, str],
    versions: list[str],
    seen: Callable[[str], None],
) -> None:
    """Forth to two other versions and back: 32 callers, two replicas of API and model each."""
    assert len(list(ray_processes(environment, SEGMENTER))) == NUM_REPLICAS
    posts = Posts(endpoint)
    with ThreadPoolExecutor(NUM_CALLERS) as pool:
        callers = [pool.submit(posts.post, caller) for caller in range(NUM_CALLERS)]
        for version in (*versions[1:], versions[0]):
            time.sleep(CHANGE_EVERY_S)
            tracking.promote(version, {})
        time.sleep(CHANGE_EVERY_S)
        posts.is_over.set()
        for caller in callers:
            caller.result()
    assert set(posts.statuses) == {(200, "")}, posts.statuses
    assert {version for version, _ in posts.involvements} == set(versions)
    for key, values in posts.involvements.items():
        spread = max(abs(one - values[0][1]) for _, one in values)
        assert spread < 1e-5, f"{key}: answers of one version differ by {spread:g}"
        assert len({involvement for involvement, _ in values}) == 1, key
    # So that an answer of another study or version would have been seen.
    answers = sorted(values[0][0] for values in posts.involvements.values())
    assert min(after - before for before, after in pairwise(answers)) > 1e-5, answers
    seen(f"{posts.statuses[200, '']} answers 200, none else, by {len(versions)} versions")
