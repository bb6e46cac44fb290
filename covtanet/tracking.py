"""MLflow: runs, the registry, aliases and digests; the one place that imports mlflow.

A registered version is a folder of plain files. It is read by downloading the files, checking the digest in the
version's tags, and loading them ourselves: MLflow's own loaders run code that comes with a model.
"""

import json
import logging
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import mlflow
from mlflow.entities import Metric, Param
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from covtanet import storage
from covtanet.errors import CheckpointError, ConfigError
from covtanet.model.checkpoint import model_digest

logger = logging.getLogger(__name__)

MODEL_NAME = "covtanet"
DIGEST_TAG = "covtanet.model_digest"
UNKNOWN = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # the latter for an alias that was never set
RUN_KEY_TAG = "covtanet.run_key"
ARTIFACT = "model"
PYFUNC_CODE = Path(__file__).parent / "screening" / "pyfunc.py"
REGISTERED = re.compile(r"models:/(?P<name>[^/@]+)(@(?P<alias>[^/@]+)|/(?P<version>\d+))")


@dataclass(frozen=True, kw_only=True)
class ModelRef:
    """A resolved model: its files in a local folder, and what to write into the ledger."""

    folder: Path
    name: str
    version: str
    digest: str


def resolve_model(ref: str, folder: Path) -> ModelRef:
    """Fetch a model once per run. ref: ``models:/NAME@ALIAS``, ``models:/NAME/VERSION``, a path or an s3:// URI.

    folder: an empty local folder for the files.

    Raises:
        CheckpointError: where there is no such model or its digest differs from the registry's.
    """
    if not ref.startswith("models:"):
        if storage.is_s3(ref):
            storage.download_folder(ref, folder)
        else:
            folder = Path(storage.absolute(ref))
        digest = model_digest(folder)
        return ModelRef(folder=folder, name=Path(ref.rstrip("/")).name, version="unregistered", digest=digest)
    registered = _registered(ref)
    try:
        mlflow.artifacts.download_artifacts(artifact_uri=registered.source, dst_path=str(folder))
    except (MlflowException, OSError) as error:
        raise CheckpointError(f"the files of {ref} are not where the registry says") from error
    found = next((path.parent for path in sorted(folder.rglob("model.json"))), folder)
    digest = model_digest(found)
    if digest != registered.tags.get(DIGEST_TAG):
        raise CheckpointError(f"{ref}: the files differ from the digest in the registry")
    return ModelRef(folder=found, name=registered.name, version=str(registered.version), digest=digest)


def _registered(ref: str) -> ModelVersion:
    match, client = REGISTERED.fullmatch(ref), MlflowClient()
    if not match:
        raise ConfigError(f"model {ref}, expected models:/NAME@ALIAS or models:/NAME/VERSION")
    try:
        if match["alias"]:
            return client.get_model_version_by_alias(match["name"], match["alias"])
        return client.get_model_version(match["name"], match["version"])
    except MlflowException as error:
        if error.error_code in UNKNOWN:
            raise CheckpointError(f"{ref} is not in the registry") from error
        raise OSError(f"the registry does not answer: {error.error_code}") from error


def digest_of(ref: str) -> str:
    """The digest of what a name in the registry leads to now, without fetching it.

    Raises:
        ConfigError: for another form than ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION``.
        CheckpointError: where there is no such model.
        OSError: where the registry does not answer.
    """
    return str(_registered(ref).tags.get(DIGEST_TAG))


@dataclass(frozen=True, kw_only=True)
class RunAddress:
    """Where a run is logged. uri: the tracking store. key: its identity, by which a restart finds it again.

    artifacts: where a new experiment keeps its files; empty for the store's default.
    """

    uri: str
    experiment: str
    name: str
    key: str
    artifacts: str = ""
    parent: "RunAddress | None" = None


def open_run(address: RunAddress) -> str:
    """The id of a run, found by its key or created, under its parent."""
    client = MlflowClient(tracking_uri=address.uri)
    experiment_id = _experiment(client, address)
    wanted = f"tags.`{RUN_KEY_TAG}` = '{address.key}'"
    if found := client.search_runs([experiment_id], wanted, max_results=1):
        return str(found[0].info.run_id)
    tags = {RUN_KEY_TAG: address.key, "covtanet.software_version": software_version()}
    if address.parent is not None:
        tags[MLFLOW_PARENT_RUN_ID] = open_run(address.parent)
    return str(client.create_run(experiment_id, run_name=address.name, tags=tags).info.run_id)


def _experiment(client: MlflowClient, address: RunAddress) -> str:
    found = client.get_experiment_by_name(address.experiment)
    if found is not None:
        return str(found.experiment_id)
    return str(client.create_experiment(address.experiment, artifact_location=address.artifacts or None))


def log_history(run_id: str, history: Sequence[Mapping[str, float]], uri: str) -> None:
    """Log the epochs that the run does not have yet, each in one call, from any process."""
    client = MlflowClient(tracking_uri=uri)
    logged = {metric.step for metric in client.get_metric_history(run_id, "epoch")}
    now = int(time.time() * 1000)
    for metrics in history:
        step = int(metrics["epoch"])
        if step not in logged:
            client.log_batch(run_id, [Metric(name, value, now, step) for name, value in metrics.items()])


def describe_run(
    address: RunAddress,
    *,
    parameters: Mapping[str, Any] | None = None,
    metrics: Mapping[str, float] | None = None,
    files: Mapping[str, bytes] | None = None,
    tags: Mapping[str, str] | None = None,
    is_finished: bool = False,
) -> str:
    """Complete a run: parameters, final metrics, artifacts by path, tags. Saying the same twice changes nothing."""
    client, run_id = MlflowClient(tracking_uri=address.uri), open_run(address)
    known = client.get_run(run_id).data
    missing = {key: str(value)[:500] for key, value in flatten(parameters or {}).items() if key not in known.params}
    client.log_batch(run_id, params=[Param(key, value) for key, value in missing.items()])
    now = int(time.time() * 1000)
    finite = {name: value for name, value in (metrics or {}).items() if name not in known.metrics}
    client.log_batch(run_id, [Metric(name, value, now, 0) for name, value in finite.items()])
    for name, value in (tags or {}).items():
        client.set_tag(run_id, name, value)
    with tempfile.TemporaryDirectory() as folder:
        for path, data in (files or {}).items():
            target = Path(folder) / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
        if files:
            client.log_artifacts(run_id, folder)
    if is_finished:
        client.set_terminated(run_id)
    return run_id


@contextmanager
def tolerated(what: str) -> Iterator[None]:
    """Go on where the tracking store does not answer, with a warning; what was not logged has to be logged later.

    Any error: what a dead store raises depends on the store (databases, object stores and HTTP each have their own).
    """
    try:
        yield
    except Exception as error:
        logger.warning("the tracking store does not take %s (%s); goes on without", what, type(error).__name__)


@contextmanager
def system_metrics(address: RunAddress) -> Iterator[None]:
    """Log processor, memory, disk, network and GPU of the driver's machine to a run, as far as the store answers."""
    monitor = None
    with tolerated("system metrics"):
        monitor = SystemMetricsMonitor(open_run(address), resume_logging=True, tracking_uri=address.uri)
        monitor.start()
    try:
        yield
    finally:
        if monitor is not None:
            monitor.finish()


def register_model(address: RunAddress, folder: Path, tags: Mapping[str, str], alias: str = "") -> str:
    """Store a saved model with its run and register it, once per run and digest; returns the version.

    alias: moved to a version that is new, never back to an older one.

    Beside our files the version holds MLflow's pyfunc flavour, code included, for those who trust their registry.
    """
    client, run_id, digest = MlflowClient(tracking_uri=address.uri), open_run(address), model_digest(folder)
    for known in client.search_model_versions(f"name='{MODEL_NAME}' and run_id='{run_id}'"):
        if known.tags.get(DIGEST_TAG) == digest:
            return str(known.version)
    place = f"{ARTIFACT}/{digest[:12]}"  # networks of one experiment share the run
    with tempfile.TemporaryDirectory() as temporary:
        target = Path(temporary) / ARTIFACT
        mlflow.pyfunc.save_model(
            target,
            python_model=PYFUNC_CODE,
            artifacts={"model": str(folder)},
            pip_requirements=[f"covtanet=={version('covtanet')}"],
        )
        client.log_artifacts(run_id, str(target), place)
    if not client.search_registered_models(f"name='{MODEL_NAME}'"):
        client.create_registered_model(MODEL_NAME)
    source = f"{client.get_run(run_id).info.artifact_uri}/{place}"
    registered = client.create_model_version(MODEL_NAME, source, run_id, tags={DIGEST_TAG: digest, **tags})
    if alias:
        client.set_registered_model_alias(MODEL_NAME, alias, registered.version)
    return str(registered.version)


def promote(model_version: str, tags: Mapping[str, str]) -> None:
    """Write tags on a registered version and point champion at it.

    Raises:
        OSError: where the registry does not answer.
    """
    with _as_os_error():
        client = MlflowClient()
        for name, value in tags.items():
            client.set_model_version_tag(MODEL_NAME, model_version, name, value)
        client.set_registered_model_alias(MODEL_NAME, "champion", model_version)


def version_of(alias: str) -> str:
    """The version that an alias points at.

    Raises:
        CheckpointError: where there is none.
        OSError: where the registry does not answer.
    """
    with _as_os_error():
        try:
            return str(MlflowClient().get_model_version_by_alias(MODEL_NAME, alias).version)
        except MlflowException as error:
            if error.error_code in UNKNOWN:
                raise CheckpointError(f"no {alias} of {MODEL_NAME} in the registry") from error
            raise


@contextmanager
def _as_os_error() -> Iterator[None]:
    try:
        yield
    except MlflowException as error:
        raise OSError(f"the tracking store does not answer: {error.error_code}") from error


def tracking_uri() -> str:
    """Where runs and models are kept."""
    return str(mlflow.get_tracking_uri())


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted names."""
    out: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            out |= flatten(value, f"{prefix}{name}.")
        else:
            out[f"{prefix}{name}"] = value
    return out


def software_version() -> str:
    """The package's version with the commit it runs from, where there is a checkout."""
    try:
        base, direct = version("covtanet"), distribution("covtanet").read_text("direct_url.json")
    except PackageNotFoundError:
        base, direct = "0", None
    if shutil.which("git") is None:
        return base
    places = [Path(__file__).parent]
    if direct and (url := urlsplit(json.loads(direct)["url"])).scheme == "file":
        places.append(Path(unquote(url.path)))
    for place in places:
        described = subprocess.run(
            ["git", "-C", place, "describe", "--always", "--dirty", "--abbrev=12", "--exclude", "*"],
            capture_output=True,
            text=True,
            check=False,
        )
        if described.returncode == 0:
            return f"{base}+g{described.stdout.strip().replace('-', '.')}"
    return base
