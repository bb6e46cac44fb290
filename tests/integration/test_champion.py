"""What holds the model behind the endpoint: it follows the registry's alias, there and back, and
answers meanwhile.
"""

import asyncio
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
from numpy.typing import NDArray
from ray.serve import context, multiplex
from ray.serve._private.common import DeploymentID, ReplicaID
from ray.serve._private.config import DeploymentConfig
from ray.serve.schema import ReplicaRank
from saved_models import rewrite_as_version_1, small_model

from covtanet import tracking
from covtanet.errors import CheckpointError
from covtanet.inference.chunks import SliceChunk
from covtanet.inference.engine import build_engine
from covtanet.inference.float_engine import FloatEngine
from covtanet.model.model_files import model_digest
from covtanet.model.saved_model import save_model
from covtanet.screening.config import ScreeningConfig
from covtanet.tracking import models
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
        uri=registry,
        experiment="champions",
        name=f"model {key}",
        key=key,
        artifacts=str(folder / "artifacts"),
    )
    return tracking.register_model(address, folder / f"model{seed}", {})


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.Runner]:
    """One event loop for all tests: Serve's batches belong to the first one that they see."""
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture
def _in_a_replica(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let this process pass for a replica of Serve, which multiplexing asks for."""
    # It would start a Ray to tell a controller which versions are loaded.
    monkeypatch.setattr(multiplex._ModelMultiplexWrapper, "_push_model_ids_info", lambda _: None)
    replica_id = ReplicaID("test", DeploymentID("Segmenter"))
    context._set_internal_replica_context(
        replica_id=replica_id,
        servable_object=None,
        _deployment_config=DeploymentConfig(),
        rank=ReplicaRank(rank=0, node_rank=0, local_rank=0),
        world_size=1,
    )
    yield
    context._INTERNAL_REPLICA_CONTEXT = None


async def started(ref: str = "models:/covtanet@champion") -> Any:
    """Return a model replica as Serve starts it; it follows the alias by ``reload`` alone."""
    cls = Segmenter.func_or_class  # type: ignore[attr-defined]
    segmenter = cls.__new__(cls)
    await segmenter.__init__(ref, 3600.0, ScreeningConfig(engine="eager"), 1)
    return segmenter


def chunk() -> SliceChunk:
    slices = np.random.default_rng(0).integers(0, 1 << 16, (2, 1, 128, 128), dtype=np.uint16)
    return SliceChunk(slices, [0])


@pytest.mark.usefixtures("_in_a_replica")
def test_segmenter_follows_the_alias_back_to_a_previous_champion(
    loop: asyncio.Runner, registry: str, tmp_path: Path
) -> None:
    async def scenario() -> list[str]:
        segmenter = await started()
        answering = []
        for version in (second, first, second):
            tracking.promote(version, {})
            await segmenter.reload()
            answering.append(segmenter.describe()["version"])
        return answering

    first, second = (register(registry, tmp_path, seed) for seed in (0, 1))
    tracking.promote(first, {})
    assert loop.run(scenario()) == [second, first, second]


@pytest.mark.usefixtures("_in_a_replica")
def test_replica_loads_a_version_that_another_replica_noticed_first(
    loop: asyncio.Runner, registry: str, tmp_path: Path
) -> None:
    """Two replicas, one of which has reloaded: both answer studies of either version alike."""

    async def scenario() -> tuple[list[NDArray[np.uint8]], list[str]]:
        early, late = await started(), await started()
        tracking.promote(second, {})
        await early.reload()
        levels = [
            (await replica.segment(described["model_id"], chunk())).lesion_levels
            for described in (early.describe(), late.describe())
            for replica in (early, late)
        ]
        return levels, [replica.describe()["version"] for replica in (early, late)]

    first, second = (register(registry, tmp_path, seed) for seed in (0, 1))
    tracking.promote(first, {})
    (new, new_by_late, old, old_by_late), newest = loop.run(scenario())
    assert newest == [second, first]
    assert np.array_equal(new, new_by_late)
    assert np.array_equal(old, old_by_late)
    assert not np.array_equal(new, old)


@pytest.mark.usefixtures("_in_a_replica")
def test_version_that_was_dropped_is_loaded_again_for_its_study(
    loop: asyncio.Runner, registry: str, tmp_path: Path
) -> None:
    """A third champion while a study of the first one is read."""

    async def scenario() -> Any:
        segmenter = await started()
        model_id = segmenter.describe()["model_id"]
        expected = await segmenter.segment(model_id, chunk())
        for version in others:
            tracking.promote(version, {})
            await segmenter.reload()
        return expected, await segmenter.segment(model_id, chunk())

    first, *others = (register(registry, tmp_path, seed) for seed in (0, 1, 2))
    tracking.promote(first, {})
    expected, found = loop.run(scenario())
    assert np.array_equal(found.lesion_levels, expected.lesion_levels)


@pytest.mark.usefixtures("_in_a_replica")
def test_newest_version_answers_although_others_took_its_place_and_the_registry_is_away(
    loop: asyncio.Runner, registry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> Any:
        others = []
        for version in versions:
            tracking.promote(version, {})
            others.append((await started()).describe()["model_id"])
        segmenter = await started()
        for model_id in others[:-1]:  # as many as stay loaded
            assert await segmenter.segment(model_id, chunk()) is not None
        monkeypatch.setattr(tracking, "resolve_model", away)
        return await segmenter.segment(segmenter.describe()["model_id"], chunk())

    def away(ref: str, folder: Path) -> Any:
        raise OSError("the registry does not answer")

    versions = [register(registry, tmp_path, seed) for seed in (0, 1, 2)]
    assert loop.run(scenario()) is not None


@pytest.mark.usefixtures("_in_a_replica")
def test_folder_that_changed_after_the_start_is_no_version_in_use(
    loop: asyncio.Runner, tmp_path: Path
) -> None:
    async def scenario() -> Any:
        segmenter = await started(str(tmp_path / "model"))
        model_id = segmenter.describe()["model_id"]
        shutil.rmtree(tmp_path / "model")
        save_model(tmp_path / "model", small_model(1))
        other = await started(str(tmp_path / "model"))
        return await other.segment(model_id, chunk())

    save_model(tmp_path / "model", small_model(0))
    assert loop.run(scenario()) is None


@pytest.mark.usefixtures("_in_a_replica")
def test_health_check_infers_only_if_no_caller_was_answered(
    loop: asyncio.Runner, registry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> list[int]:
        segmenter = await started()
        counts = []
        inferences: list[int] = []
        infer = segmenter._infer

        def counted() -> None:
            inferences.append(1)
            infer()

        monkeypatch.setattr(segmenter, "_infer", counted)
        for num_requests in (0, 1, 0):
            for _ in range(num_requests):
                await segmenter.segment(segmenter.describe()["model_id"], chunk())
            await segmenter.check_health()
            counts.append(len(inferences))
        return counts

    tracking.promote(register(registry, tmp_path, 0), {})
    assert loop.run(scenario()) == [1, 1, 2]


def test_versions_of_one_run_keep_their_own_files(registry: str, tmp_path: Path) -> None:
    """As of two networks that were trained in one experiment."""
    versions = [register(registry, tmp_path, seed, run="both") for seed in (0, 1)]
    digests = [
        tracking.resolve_model(f"models:/covtanet/{each}", tmp_path / each).digest
        for each in versions
    ]
    assert digests == [model_digest(tmp_path / f"model{seed}") for seed in (0, 1)]


@pytest.mark.usefixtures("_in_a_replica")
def test_changed_files_of_a_champion_are_not_loaded(
    loop: asyncio.Runner, registry: str, tmp_path: Path
) -> None:
    async def scenario() -> Any:
        segmenter = await started()
        tracking.promote(second, {})
        await segmenter.reload()
        return segmenter.describe()["version"]

    first, second = (register(registry, tmp_path, seed) for seed in (0, 1))
    tracking.promote(first, {})
    source = Path(
        mlflow.MlflowClient().get_model_version("covtanet", second).source.removeprefix("file://")
    )
    (weights,) = source.rglob("weights.safetensors")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert loop.run(scenario()) == first


@pytest.mark.parametrize("name", ["eager", "openvino"])
def test_engine_gives_the_same_result_to_concurrent_threads(name: str) -> None:
    """The endpoint asks the model how it is while it works on studies."""
    engine = build_engine(small_model().network, 128, name, 1)
    assert isinstance(engine, FloatEngine)
    slices = np.random.default_rng(0).random((8, 1, 128, 128), dtype=np.float32)
    parts = [slices, slices[:1], slices[3:6]]
    expected = [engine.run(part)[0] for part in parts]
    with ThreadPoolExecutor(4) as pool:
        for index, (found, _) in enumerate(pool.map(engine.run, parts * 8)):
            assert np.abs(found - expected[index % 3]).max() < 1e-6


@pytest.mark.parametrize(
    ("preprocessing", "error"),
    [
        ({}, "CheckpointError"),
        ({"window": {"side": 1}}, "CheckpointError"),
        ({"window": 7}, "CheckpointError"),
    ],
)
@pytest.mark.usefixtures("_in_a_replica")
def test_champion_without_window_leaves_the_old_model_answering(
    loop: asyncio.Runner,
    registry: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    preprocessing: dict[str, Any],
    error: str,
) -> None:
    async def scenario() -> Any:
        segmenter = await started()
        tracking.promote(odd, {})
        for _ in range(3):
            await segmenter.reload()
        return segmenter.describe()["version"]

    first = register(registry, tmp_path, 0)
    tracking.promote(first, {})
    save_model(tmp_path / "model1", small_model(1))
    rewrite_as_version_1(tmp_path / "model1", preprocessing)
    address = tracking.RunAddress(uri=registry, experiment="champions", name="odd", key="odd")
    odd = tracking.register_model(address, tmp_path / "model1", {})
    assert loop.run(scenario()) == first
    told = [
        record.getMessage() for record in caplog.records if "stays as it is" in record.getMessage()
    ]
    assert told == [f"the model stays as it is, another one cannot be loaded: {error}"] * 3


@pytest.mark.usefixtures("_in_a_replica")
def test_unexpected_registry_error_leaves_the_old_model_answering(
    loop: asyncio.Runner,
    registry: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def scenario() -> None:
        segmenter = await started()
        monkeypatch.setattr(tracking, "pinned", fail)
        await segmenter.reload()
        assert await segmenter.segment(segmenter.describe()["model_id"], chunk())

    def fail(ref: str) -> str:
        raise KeyError("Doe^Jane")

    tracking.promote(register(registry, tmp_path, 0), {})
    loop.run(scenario())
    assert "another one cannot be loaded: KeyError" in caplog.text
    assert "Doe" not in caplog.text


def moved(registry: str, folder: Path, source: str) -> str:
    """A version of the registry whose files are said to lie elsewhere."""
    version = register(registry, folder, 0)
    known = mlflow.MlflowClient().get_model_version("covtanet", version)
    tags = {tracking.DIGEST_TAG: known.tags[tracking.DIGEST_TAG]}
    client = mlflow.MlflowClient()
    return str(
        client.create_model_version(
            "covtanet", source or known.source, known.run_id, tags=tags
        ).version
    )


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("http://169.254.169.254/latest", "models are not fetched by http"),
        ("https://models.example/x", "models are not fetched by https"),
        ("file:///etc", "outside of its run's artifacts"),
        ("/etc", "outside of its run's artifacts"),
        ("s3://another/x", "outside of its run's artifacts"),
        ("mlflow-artifacts://elsewhere:5000/1/a", "registry's own server"),
    ],
)
def test_source_beyond_the_runs_artifacts_is_not_followed(
    registry: str, tmp_path: Path, source: str, message: str
) -> None:
    version = moved(registry, tmp_path, source)
    with pytest.raises(CheckpointError, match=message):
        tracking.resolve_model(f"models:/covtanet/{version}", tmp_path / "found")
    assert not list(tmp_path.glob("found/*"))


def test_source_through_a_link_out_of_the_runs_artifacts_is_not_followed(
    registry: str, tmp_path: Path
) -> None:
    version = register(registry, tmp_path, 0)
    source = Path(mlflow.MlflowClient().get_model_version("covtanet", version).source)
    (source.parents[1] / "link").symlink_to(tmp_path)
    with pytest.raises(CheckpointError, match="outside of its run's artifacts"):
        tracking.resolve_model(
            f"models:/covtanet/{moved_to(version, source.parents[1] / 'link')}", tmp_path / "found"
        )


def moved_to(version: str, source: Path) -> str:
    client = mlflow.MlflowClient()
    known = client.get_model_version("covtanet", version)
    return str(
        client.create_model_version("covtanet", str(source), known.run_id, tags=known.tags).version
    )


def test_named_sources_replace_the_runs_artifacts(
    registry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = register(registry, tmp_path, 0)
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(
        Path(mlflow.MlflowClient().get_model_version("covtanet", version).source), elsewhere
    )
    copied = moved_to(version, elsewhere)
    monkeypatch.setenv("COVTANET_MODEL_SOURCES", f"s3://models/x {elsewhere}")
    assert (
        tracking.resolve_model(f"models:/covtanet/{copied}", tmp_path / "found").version == copied
    )
    with pytest.raises(CheckpointError, match="outside of COVTANET_MODEL_SOURCES"):
        tracking.resolve_model(f"models:/covtanet/{version}", tmp_path / "other")


def test_disk_source_of_a_registry_behind_http_needs_a_setting(
    registry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = register(registry, tmp_path, 0)
    monkeypatch.setattr(models, "tracking_uri", lambda: "https://mlflow.hospital")
    with pytest.raises(CheckpointError, match="allow the folder by COVTANET_MODEL_SOURCES"):
        tracking.resolve_model(f"models:/covtanet/{version}", tmp_path / "found")


@pytest.mark.parametrize(
    "uri", ["mlflow-artifacts:/1/%2e%2e/x", "mlflow-artifacts:/1/../x", "file://host/x"]
)
def test_model_location_with_escape_or_dots_is_refused(registry: str, uri: str) -> None:
    with pytest.raises(
        CheckpointError, match=r"expected mlflow-artifacts|holds '\.\.'|another machine"
    ):
        models._location(uri, "models:/covtanet/1")
