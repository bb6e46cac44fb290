"""The model registry: versions, their digests, and the aliases challenger and champion."""

import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path

import mlflow
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from covtanet import storage
from covtanet.errors import CheckpointError, ConfigError
from covtanet.model.model_files import fetch_model, model_digest
from covtanet.tracking.runs import RunAddress, open_run

MODEL_NAME = "covtanet"
DIGEST_TAG = "covtanet.model_digest"
# MLflow gives the second one for an alias that was never set.
UNKNOWN = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
ARTIFACT = "model"
# Folder of our files within a version, whose layout is MLflow's.
FILES_IN_VERSION = f"artifacts/{ARTIFACT}"
PYFUNC_CODE = Path(__file__).parents[1] / "screening" / "pyfunc.py"
REGISTERED = re.compile(r"models:/(?P<name>[^/@]+)(@(?P<alias>[^/@]+)|/(?P<version>\d+))")


def registered_version(ref: str) -> ModelVersion:
    """Return the version that ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION`` names.

    Raises:
        ConfigError: another form.
        CheckpointError: the registry has no such model.
        OSError: the registry does not answer.
    """
    match = REGISTERED.fullmatch(ref)
    if not match:
        raise ConfigError(f"model {ref}, expected models:/NAME@ALIAS or models:/NAME/VERSION")
    client = MlflowClient()
    with as_os_error(f"{ref} is not in the registry"):
        if match["alias"]:
            return client.get_model_version_by_alias(match["name"], match["alias"])
        return client.get_model_version(match["name"], match["version"])


def pinned(ref: str) -> tuple[str, str]:
    """Return ``models:/NAME/VERSION`` of the model that a name leads to now, and its digest.

    Nothing is fetched.

    Raises:
        ConfigError, CheckpointError, OSError: see ``registered_version``.
    """
    registered = registered_version(ref)
    digest = str(registered.tags.get(DIGEST_TAG))
    return f"models:/{registered.name}/{registered.version}", digest


def version_of(alias: str) -> str:
    """Return the version that an alias points at.

    Raises:
        CheckpointError: the alias is not set.
        OSError: the registry does not answer.
    """
    with as_os_error(f"no {alias} of {MODEL_NAME} in the registry"):
        return str(MlflowClient().get_model_version_by_alias(MODEL_NAME, alias).version)


def artifacts_of(run_id: str) -> str:
    """Return the location of a run's artifacts.

    Raises:
        CheckpointError: the run does not exist.
        OSError: the registry does not answer.
    """
    with as_os_error("the run of the registered version is gone"):
        return str(MlflowClient().get_run(run_id).info.artifact_uri)


def tag_version(model_version: str, tags: Mapping[str, str]) -> None:
    """Write tags on a registered version.

    Raises:
        OSError: the registry does not answer.
    """
    with as_os_error():
        client = MlflowClient()
        for name, value in tags.items():
            client.set_model_version_tag(MODEL_NAME, model_version, name, value)


def promote(model_version: str, tags: Mapping[str, str]) -> None:
    """Write tags on a registered version and point the alias champion at it.

    Raises:
        OSError: the registry does not answer.
    """
    # The alias moves last: a champion without its tags would hide why it was promoted.
    tag_version(model_version, tags)
    with as_os_error():
        MlflowClient().set_registered_model_alias(MODEL_NAME, "champion", model_version)


def register_model(
    address: RunAddress, folder: Path, tags: Mapping[str, str], alias: str = ""
) -> str:
    """Store a saved model with its run and register it, once per run and digest.

    Returns the version. alias: moved to a version that is new, never back to an older one.
    """
    client = MlflowClient(tracking_uri=address.uri)
    run_id = open_run(address)
    digest = model_digest(folder)
    for registered in client.search_model_versions(f"name='{MODEL_NAME}' and run_id='{run_id}'"):
        # A restart finds the version that it registered before.
        if registered.tags.get(DIGEST_TAG) == digest:
            return str(registered.version)
    # Networks of one experiment share the run, so each model has a folder named by its digest.
    artifact = f"{ARTIFACT}/{digest[:12]}"
    _log_model(client, run_id, folder, artifact)
    # A model that is created twice is an error in MLflow.
    if not client.search_registered_models(f"name='{MODEL_NAME}'"):
        client.create_registered_model(MODEL_NAME)
    source = f"{client.get_run(run_id).info.artifact_uri}/{artifact}"
    created = client.create_model_version(
        MODEL_NAME, source, run_id, tags={DIGEST_TAG: digest, **tags}
    )
    # Last: an alias never names a version that is incomplete.
    if alias:
        client.set_registered_model_alias(MODEL_NAME, alias, created.version)
    return str(created.version)


def _log_model(client: MlflowClient, run_id: str, folder: Path, artifact: str) -> None:
    """Store a model's files within MLflow's pyfunc flavour, code included.

    The flavour is for those who trust their registry; our own commands read the files alone.
    """
    with tempfile.TemporaryDirectory() as temporary:
        # MLflow names its copy of the files as their folder is named.
        files = Path(temporary) / ARTIFACT
        fetch_model(files, partial(storage.download_files, str(folder), target=files))
        target = Path(temporary) / "version"
        mlflow.pyfunc.save_model(
            target,
            python_model=PYFUNC_CODE,
            artifacts={"model": str(files)},
            pip_requirements=[f"covtanet=={version('covtanet')}"],
        )
        client.log_artifacts(run_id, str(target), artifact)


@contextmanager
def as_os_error(if_unknown: str = "") -> Iterator[None]:
    """Turn MLflow's errors into OSError.

    if_unknown: message of the CheckpointError raised if the registry answers that it does not
    know the entry; without it that is an OSError too.
    """
    try:
        yield
    except MlflowException as error:
        if if_unknown and error.error_code in UNKNOWN:
            raise CheckpointError(if_unknown) from error
        raise OSError(f"the registry does not answer: {error.error_code}") from error
