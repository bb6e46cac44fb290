"""MLflow: runs, the registry, aliases and digests; the one place that imports mlflow.

A registered version is a folder of plain files. It is read by downloading the files, checking the digest in the
version's tags, and loading them ourselves: MLflow's own loaders run code that comes with a model.
"""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from covtanet import storage
from covtanet.errors import CheckpointError, ConfigError
from covtanet.model.checkpoint import model_digest

MODEL_NAME = "covtanet"
DIGEST_TAG = "covtanet.model_digest"
ARTIFACT = "model"
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
    match = REGISTERED.fullmatch(ref)
    if not match:
        raise ConfigError(f"model {ref}, expected models:/NAME@ALIAS or models:/NAME/VERSION")
    client = MlflowClient()
    try:
        if match["alias"]:
            registered = client.get_model_version_by_alias(match["name"], match["alias"])
        else:
            registered = client.get_model_version(match["name"], match["version"])
    except MlflowException as error:
        raise CheckpointError(f"{ref} is not in the registry") from error
    try:
        mlflow.artifacts.download_artifacts(artifact_uri=registered.source, dst_path=str(folder))
    except (MlflowException, OSError) as error:
        raise CheckpointError(f"the files of {ref} are not where the registry says") from error
    found = next((path.parent for path in sorted(folder.rglob("model.json"))), folder)
    digest = model_digest(found)
    if digest != registered.tags.get(DIGEST_TAG):
        raise CheckpointError(f"{ref}: the files differ from the digest in the registry")
    return ModelRef(folder=found, name=registered.name, version=str(registered.version), digest=digest)


@contextmanager
def training_run(experiment: str, name: str, artifacts: str, parameters: Mapping[str, Any]) -> Iterator[str]:
    """A tracked run with the resolved configuration; yields its id. artifacts: where a new experiment's files go."""
    if mlflow.get_experiment_by_name(experiment) is None:
        MlflowClient().create_experiment(experiment, artifact_location=artifacts or None)
    mlflow.set_experiment(experiment)
    with mlflow.start_run(run_name=name) as run:
        mlflow.log_params({key: str(value)[:500] for key, value in flatten(parameters).items()})
        mlflow.log_text(json.dumps(parameters, indent=2, sort_keys=True, default=str), "config.json")
        mlflow.set_tag("covtanet.software_version", software_version())
        yield run.info.run_id


def log_metrics(run_id: str, metrics: Mapping[str, float], step: int, uri: str) -> None:
    """Log one epoch's metrics to a run from any process; uri: the tracking store, which a worker does not inherit."""
    client = MlflowClient(tracking_uri=uri)
    for name, value in metrics.items():
        client.log_metric(run_id, name, float(value), step=step)


def register_model(run_id: str, folder: Path, tags: Mapping[str, str]) -> str:
    """Store a saved model with its run and register it; returns the version."""
    client = MlflowClient()
    client.log_artifacts(run_id, str(folder), ARTIFACT)
    if not client.search_registered_models(f"name='{MODEL_NAME}'"):
        client.create_registered_model(MODEL_NAME)
    source = f"{client.get_run(run_id).info.artifact_uri}/{ARTIFACT}"
    registered = client.create_model_version(
        MODEL_NAME, source, run_id, tags={DIGEST_TAG: model_digest(folder), **tags}
    )
    return str(registered.version)


def set_alias(model_version: str, alias: str) -> None:
    """Point an alias at a version."""
    MlflowClient().set_registered_model_alias(MODEL_NAME, alias, model_version)


def champion_version() -> str:
    """The version that the alias champion points at.

    Raises:
        CheckpointError: where there is none.
    """
    try:
        return str(MlflowClient().get_model_version_by_alias(MODEL_NAME, "champion").version)
    except MlflowException as error:
        raise CheckpointError(f"no champion of {MODEL_NAME} in the registry") from error


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
