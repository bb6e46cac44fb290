"""What holds the model behind the endpoint: it follows the registry's alias, there and back, and answers meanwhile."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
from conftest import small_model

from covtanet import tracking
from covtanet.model.checkpoint import model_digest, save_model
from covtanet.screening.engine import build_engine
from covtanet.screening.stages import ScreeningConfig
from serve.deployments import Segmenter


@pytest.fixture
def registry(tmp_path: Path) -> str:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    mlflow.set_tracking_uri(uri)
    return uri


def register(registry: str, folder: Path, seed: int, run: str = "") -> str:
    save_model(folder / f"model{seed}", small_model(seed))
    key = run or str(seed)
    address = tracking.RunAddress(
        uri=registry, experiment="champions", name=f"model {key}", key=key, artifacts=str(folder / "artifacts")
    )
    return tracking.register_model(address, folder / f"model{seed}", {})


def test_a_champion_that_is_taken_back_answers_again(registry: str, tmp_path: Path) -> None:
    first, second = (register(registry, tmp_path, seed) for seed in (0, 1))
    tracking.promote(first, {})
    segmenter: Any = Segmenter.func_or_class("models:/covtanet@champion", 0.0, ScreeningConfig(engine="eager"))
    for version in (second, first, second):
        tracking.promote(version, {})
        asyncio.run(segmenter.check_health())
        assert segmenter.describe()["version"] == version


def test_versions_of_one_run_keep_their_own_files(registry: str, tmp_path: Path) -> None:
    """As of two networks that were trained in one experiment."""
    versions = [register(registry, tmp_path, seed, run="both") for seed in (0, 1)]
    digests = [tracking.resolve_model(f"models:/covtanet/{each}", tmp_path / each).digest for each in versions]
    assert digests == [model_digest(tmp_path / f"model{seed}") for seed in (0, 1)]


def test_files_that_are_not_the_registered_ones_are_not_taken_up(registry: str, tmp_path: Path) -> None:
    first, second = (register(registry, tmp_path, seed) for seed in (0, 1))
    tracking.promote(first, {})
    segmenter: Any = Segmenter.func_or_class("models:/covtanet@champion", 0.0, ScreeningConfig(engine="eager"))
    source = Path(mlflow.MlflowClient().get_model_version("covtanet", second).source.removeprefix("file://"))
    (weights,) = source.rglob("weights.safetensors")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    tracking.promote(second, {})
    asyncio.run(segmenter.check_health())
    assert segmenter.describe()["version"] == first


@pytest.mark.parametrize("name", ["eager", "openvino"])
def test_an_engine_answers_several_threads_at_once(name: str) -> None:
    """The endpoint asks the model how it is while it works on studies."""
    engine = build_engine(small_model().network, 128, name, 1)
    slices = np.random.default_rng(0).random((8, 1, 128, 128), dtype=np.float32)
    parts = [slices, slices[:1], slices[3:6]]
    expected = [engine.segment(part)[0] for part in parts]
    with ThreadPoolExecutor(4) as pool:
        for index, (found, _) in enumerate(pool.map(engine.segment, parts * 8)):
            assert np.abs(found - expected[index % 3]).max() < 1e-6
