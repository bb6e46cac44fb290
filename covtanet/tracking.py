"""MLflow: runs, the registry, aliases and digests; the one place that imports mlflow.

A registered version is a folder of plain files. It is read by downloading two of them by name, checking the digest in
the version's tags, and loading them ourselves: MLflow's own loaders run code that comes with a model.

The files are fetched from where the version's run keeps its artifacts, or from below COVTANET_MODEL_SOURCES, whatever
else the registry says: a place in S3, behind the tracking server (mlflow-artifacts:/), or, of a registry on this
machine, a folder. No other kind of place is followed.
"""

import json
import logging
import os
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

from covtanet import storage
from covtanet.errors import CheckpointError, ConfigError
from covtanet.model.checkpoint import DESCRIPTION, MODEL_FILES, model_digest

# MLflow reports usage as soon as it is imported, unless this is set before.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

import mlflow
from mlflow.entities import Metric, Param
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.mlflow_artifacts_repo import MlflowArtifactsRepository
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.tracking import MlflowClient
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID
from mlflow.utils.rest_utils import http_request

logger = logging.getLogger(__name__)

MODEL_NAME = "covtanet"
DIGEST_TAG = "covtanet.model_digest"
UNKNOWN = (
    "RESOURCE_DOES_NOT_EXIST",
    "INVALID_PARAMETER_VALUE",
)  # the latter for an alias that was never set
RUN_KEY_TAG = "covtanet.run_key"
ARTIFACT = "model"
# Where a version's folder, which MLflow lays out, holds our files.
FILES_IN_VERSION = f"artifacts/{ARTIFACT}"
MODEL_SOURCES = "COVTANET_MODEL_SOURCES"
PROXIED = "mlflow-artifacts:"
LOCAL_REGISTRIES = ("sqlite", "file", "")
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
        CheckpointError: the model is missing, too large or outside the allowed locations, or its digest differs from
            the registry's.
    """
    if not ref.startswith("models:"):
        if storage.is_s3(ref):
            with _as_checkpoint_error(ref):
                storage.download_files(storage.absolute(ref), MODEL_FILES, folder)
        else:
            folder = Path(storage.absolute(ref))
        digest = model_digest(folder)
        return ModelRef(
            folder=folder, name=Path(ref.rstrip("/")).name, version="unregistered", digest=digest
        )
    registered = _registered(ref)
    source = _source_of(registered, ref)
    with _as_checkpoint_error(ref):
        if source.startswith(PROXIED):
            _download_proxied(storage.join(source, FILES_IN_VERSION), folder)
        else:
            storage.download_files(storage.join(source, FILES_IN_VERSION), MODEL_FILES, folder)
    digest = model_digest(folder)
    if digest != registered.tags.get(DIGEST_TAG):
        raise CheckpointError(f"{ref}: the files differ from the digest in the registry")
    return ModelRef(
        folder=folder, name=registered.name, version=str(registered.version), digest=digest
    )


@contextmanager
def _as_checkpoint_error(ref: str) -> Iterator[None]:
    """Tell a model that is missing or too large from a store that does not answer, which stays an OSError."""
    try:
        yield
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{ref} has no {DESCRIPTION} or weights, expected a saved model"
        ) from error
    except storage.TooLargeError as error:
        raise CheckpointError(f"{ref}: {error}") from error
    except MlflowException as error:
        raise OSError(f"the tracking server does not answer: {error.error_code}") from error


def _source_of(registered: ModelVersion, ref: str) -> str:
    """Return the folder of a registered version if it lies in an allowed location.

    Who may write into the registry may write any source there; with our credentials it would be fetched.

    Raises:
        CheckpointError: it lies neither with the version's run nor below a place of COVTANET_MODEL_SOURCES.
    """
    named = os.environ.get(MODEL_SOURCES, "").split()
    if named:
        roots = [_place(root, MODEL_SOURCES) for root in named]
    elif registered.run_id:
        roots = [_place(_artifacts_of(registered.run_id), ref)]
    else:
        raise CheckpointError(
            f"{ref} belongs to no run; allow the location of its files by {MODEL_SOURCES}"
        )
    source = _place(registered.source, ref)
    is_local_registry = urlsplit(tracking_uri()).scheme in LOCAL_REGISTRIES
    if source.startswith("/") and not named and not is_local_registry:
        raise CheckpointError(
            f"{ref} lies on a disk and the registry does not; allow the folder by {MODEL_SOURCES}"
        )
    if not any(f"{source}/".startswith(f"{root.rstrip('/')}/") for root in roots):
        allowed = MODEL_SOURCES if named else "its run's artifacts"
        raise CheckpointError(
            f"{ref} lies outside of {allowed}, the only allowed location of models"
        )
    return source


def _artifacts_of(run_id: str) -> str:
    """Return the location of a run's artifacts.

    Raises:
        CheckpointError: the run does not exist.
        OSError: the registry does not answer.
    """
    try:
        return str(MlflowClient().get_run(run_id).info.artifact_uri)
    except MlflowException as error:
        if error.error_code in UNKNOWN:
            raise CheckpointError("the run of the registered version is gone") from error
        raise OSError(f"the registry does not answer: {error.error_code}") from error


def _place(uri: str, what: str) -> str:
    """Return a place of model files in the one form that is compared: a real path, s3://, or mlflow-artifacts:/.

    Raises:
        ConfigError, CheckpointError: another kind of place, or one that is not plain.
    """
    parts = urlsplit(uri)
    if uri.startswith("/") or parts.scheme == "file":
        path = uri if uri.startswith("/") else unquote(parts.path)
        if not path.startswith("/") or parts.netloc not in ("", "localhost"):
            raise CheckpointError(
                f"{what}: a file:// URI of a model names another machine or a relative path"
            )
        return str(Path(path).resolve())
    if storage.is_s3(uri):
        return storage.absolute(uri)
    if uri.startswith(PROXIED):
        # The server unquotes what we send, so no '%'. Only the registry's own server is trusted.
        if parts.netloc not in ("", urlsplit(tracking_uri()).netloc) or set("%?#\\") & set(uri):
            raise CheckpointError(
                f"{what}: expected mlflow-artifacts:/PATH of the registry's own server"
            )
        if ".." in parts.path.split("/"):
            raise CheckpointError(f"{what}: a place of a model holds '..'")
        return f"{PROXIED}{parts.path.rstrip('/')}"
    scheme = parts.scheme or "a relative path"
    raise CheckpointError(
        f"{what}: models are not fetched by {scheme}, expected s3://, {PROXIED}/ or a folder"
    )


def _download_proxied(uri: str, folder: Path) -> None:
    """Fetch a model's files through the tracking server, as many bytes as they may have."""
    folder.mkdir(parents=True, exist_ok=True)
    root = MlflowArtifactsRepository.resolve_uri(uri, tracking_uri())
    for name, max_bytes in MODEL_FILES.items():
        answer = http_request(
            get_default_host_creds(root), f"/{name}", "GET", stream=True, allow_redirects=False
        )
        if answer.status_code == 404:
            raise FileNotFoundError("the tracking server has no such file")
        if answer.status_code != 200:
            raise OSError(f"the tracking server answered {answer.status_code} to a file of a model")
        storage.save_chunks(
            answer.iter_content(storage.CHUNK_BYTES), storage.local_path(folder, name), max_bytes
        )


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
    return str(
        client.create_experiment(address.experiment, artifact_location=address.artifacts or None)
    )


def log_history(run_id: str, history: Sequence[Mapping[str, float]], uri: str) -> None:
    """Log the epochs that the run does not have yet, each in one call, from any process."""
    client = MlflowClient(tracking_uri=uri)
    logged = {metric.step for metric in client.get_metric_history(run_id, "epoch")}
    now = int(time.time() * 1000)
    for metrics in history:
        step = int(metrics["epoch"])
        if step not in logged:
            client.log_batch(
                run_id, [Metric(name, value, now, step) for name, value in metrics.items()]
            )


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
    missing = {
        key: str(value)[:500]
        for key, value in flatten(parameters or {}).items()
        if key not in known.params
    }
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
        logger.warning(
            "the tracking store does not take %s (%s); goes on without", what, type(error).__name__
        )


@contextmanager
def system_metrics(address: RunAddress) -> Iterator[None]:
    """Log processor, memory, disk, network and GPU of the driver's machine to a run, as far as the store answers."""
    monitor = None
    with tolerated("system metrics"):
        monitor = SystemMetricsMonitor(
            open_run(address), resume_logging=True, tracking_uri=address.uri
        )
        monitor.start()
    try:
        yield
    finally:
        if monitor is not None:
            monitor.finish()


def register_model(
    address: RunAddress, folder: Path, tags: Mapping[str, str], alias: str = ""
) -> str:
    """Store a saved model with its run and register it, once per run and digest; returns the version.

    alias: moved to a version that is new, never back to an older one.

    Beside our files the version holds MLflow's pyfunc flavour, code included, for those who trust their registry.
    """
    client, run_id, digest = (
        MlflowClient(tracking_uri=address.uri),
        open_run(address),
        model_digest(folder),
    )
    for known in client.search_model_versions(f"name='{MODEL_NAME}' and run_id='{run_id}'"):
        if known.tags.get(DIGEST_TAG) == digest:
            return str(known.version)
    place = f"{ARTIFACT}/{digest[:12]}"  # networks of one experiment share the run
    with tempfile.TemporaryDirectory() as temporary:
        target, files = Path(temporary) / "version", Path(temporary) / ARTIFACT
        storage.download_files(
            str(folder), MODEL_FILES, files
        )  # MLflow names its copy as this folder
        mlflow.pyfunc.save_model(
            target,
            python_model=PYFUNC_CODE,
            artifacts={"model": str(files)},
            pip_requirements=[f"covtanet=={version('covtanet')}"],
        )
        client.log_artifacts(run_id, str(target), place)
    if not client.search_registered_models(f"name='{MODEL_NAME}'"):
        client.create_registered_model(MODEL_NAME)
    source = f"{client.get_run(run_id).info.artifact_uri}/{place}"
    registered = client.create_model_version(
        MODEL_NAME, source, run_id, tags={DIGEST_TAG: digest, **tags}
    )
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
            [
                "git",
                "-C",
                place,
                "describe",
                "--always",
                "--dirty",
                "--abbrev=12",
                "--exclude",
                "*",
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        if described.returncode == 0:
            return f"{base}+g{described.stdout.strip().replace('-', '.')}"
    return base
