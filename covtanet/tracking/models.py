"""Fetching a model's files by its name in the registry.

A registered version is a folder of plain files. Those of ours are downloaded by name, their digest
is compared with the version's tags, and our own loader reads them: MLflow's loaders run code that
comes with a model.

The files are fetched from where the version's run keeps its artifacts, or from below
COVTANET_MODEL_SOURCES, whatever else the registry says: an S3 prefix, the tracking server
(mlflow-artifacts:/), or, of a registry on this machine, a folder. No other kind of location is
followed.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit

from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.mlflow_artifacts_repo import MlflowArtifactsRepository
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.rest_utils import http_request

from covtanet import storage
from covtanet.errors import CheckpointError
from covtanet.model.model_files import fetch_model, model_digest
from covtanet.tracking.registry import (
    DIGEST_TAG,
    FILES_IN_VERSION,
    artifacts_of,
    registered_version,
)
from covtanet.tracking.resolve import ModelRef, as_checkpoint_error
from covtanet.tracking.runs import tracking_uri

MODEL_SOURCES = "COVTANET_MODEL_SOURCES"
PROXIED = "mlflow-artifacts:"
LOCAL_REGISTRIES = ("sqlite", "file", "")


def resolve_registered(ref: str, folder: Path) -> ModelRef:
    """Fetch a model of the registry; see ``resolve_model``.

    ref: ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION``.
    """
    registered = registered_version(ref)
    uri = storage.join(_source_of(registered, ref), FILES_IN_VERSION)
    with as_checkpoint_error(ref), _as_os_error():
        if uri.startswith(PROXIED):
            fetch = partial(_download_proxied, uri, folder)
        else:
            fetch = partial(storage.download_files, uri, target=folder)
        fetch_model(folder, fetch)
    digest = model_digest(folder)
    if digest != registered.tags.get(DIGEST_TAG):
        raise CheckpointError(f"{ref}: the files differ from the digest in the registry")
    return ModelRef(
        folder=folder, name=registered.name, version=str(registered.version), digest=digest
    )


@contextmanager
def _as_os_error() -> Iterator[None]:
    """Raise OSError if the tracking server does not answer."""
    try:
        yield
    except MlflowException as error:
        raise OSError(f"the tracking server does not answer: {error.error_code}") from error


def _source_of(registered: ModelVersion, ref: str) -> str:
    """Return the folder of a registered version if it lies in an allowed location.

    A caller that may write into the registry may write any source there, and it would be fetched
    with our credentials.

    Raises:
        CheckpointError: it lies neither with the version's run nor below COVTANET_MODEL_SOURCES.
    """
    named = os.environ.get(MODEL_SOURCES, "").split()
    if named:
        roots = [_location(root, MODEL_SOURCES) for root in named]
    elif registered.run_id:
        roots = [_location(artifacts_of(registered.run_id), ref)]
    else:
        raise CheckpointError(
            f"{ref} belongs to no run; allow the location of its files by {MODEL_SOURCES}"
        )
    source = _location(registered.source, ref)
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


def _location(uri: str, subject: str) -> str:
    """Return a location of model files in the form that is compared.

    That is a real path, s3://, or mlflow-artifacts:/. subject: named by the errors.

    Raises:
        ConfigError, CheckpointError: another kind of location, or one with '..' or an escape.
    """
    parts = urlsplit(uri)
    if uri.startswith("/"):
        return str(Path(uri).resolve())
    if parts.scheme == "file":
        return _local_location(parts, subject)
    if storage.is_s3(uri):
        return storage.absolute(uri)
    if uri.startswith(PROXIED):
        return _proxied_location(uri, parts, subject)
    scheme = parts.scheme or "a relative path"
    raise CheckpointError(
        f"{subject}: models are not fetched by {scheme}, expected s3://, {PROXIED}/ or a folder"
    )


def _local_location(parts: SplitResult, subject: str) -> str:
    path = unquote(parts.path)
    if not path.startswith("/") or parts.netloc not in ("", "localhost"):
        raise CheckpointError(
            f"{subject}: a file:// URI of a model names another machine or a relative path"
        )
    return str(Path(path).resolve())


def _proxied_location(uri: str, parts: SplitResult, subject: str) -> str:
    # The server unquotes what we send, so no '%'. Only the registry's own server is trusted.
    if parts.netloc not in ("", urlsplit(tracking_uri()).netloc) or set("%?#\\") & set(uri):
        raise CheckpointError(
            f"{subject}: expected mlflow-artifacts:/PATH of the registry's own server"
        )
    if ".." in parts.path.split("/"):
        raise CheckpointError(f"{subject}: the location of a model holds '..'")
    return f"{PROXIED}{parts.path.rstrip('/')}"


def _download_proxied(uri: str, folder: Path, sizes: Mapping[str, int]) -> None:
    """Fetch files of a model through the tracking server, as many bytes as they may have."""
    folder.mkdir(parents=True, exist_ok=True)
    root = MlflowArtifactsRepository.resolve_uri(uri, tracking_uri())
    for name, max_bytes in sizes.items():
        response = http_request(
            get_default_host_creds(root), f"/{name}", "GET", stream=True, allow_redirects=False
        )
        if response.status_code == 404:
            raise FileNotFoundError("the tracking server has no such file")
        if response.status_code != 200:
            raise OSError(
                f"the tracking server answered {response.status_code} to a file of a model"
            )
        chunks = response.iter_content(storage.CHUNK_BYTES)
        storage.save_chunks(chunks, storage.local_path(folder, name), max_bytes)
