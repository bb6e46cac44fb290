"""Fetching a model's files by its reference: a folder, an S3 prefix, or a name of the registry.

MLflow is imported for a name of the registry alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from covtanet import storage
from covtanet.errors import CheckpointError
from covtanet.model.model_files import DESCRIPTION, fetch_model, model_digest


@dataclass(frozen=True, kw_only=True)
class ModelRef:
    """A resolved model: its files in a local folder, and its name for the ledger."""

    folder: Path
    name: str
    version: str
    digest: str


def resolve_model(ref: str, folder: Path) -> ModelRef:
    """Fetch a model once per run.

    ref: ``models:/NAME@ALIAS``, ``models:/NAME/VERSION``, a path or an s3:// URI.
    folder: an empty local folder for the files.

    Raises:
        CheckpointError: the model is missing, too large or outside the allowed locations, or its
            digest differs from the registry's.
    """
    if ref.startswith("models:"):
        from covtanet.tracking.models import resolve_registered

        return resolve_registered(ref, folder)
    if storage.is_s3(ref):
        with as_checkpoint_error(ref):
            uri = storage.absolute(ref)
            fetch_model(folder, partial(storage.download_files, uri, target=folder))
    else:
        folder = Path(storage.absolute(ref))
    name = Path(ref.rstrip("/")).name
    return ModelRef(folder=folder, name=name, version="unregistered", digest=model_digest(folder))


@contextmanager
def as_checkpoint_error(ref: str) -> Iterator[None]:
    """Raise CheckpointError for a model that is missing or too large.

    A store that does not answer stays an OSError.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{ref} has no {DESCRIPTION} or weights, expected a saved model"
        ) from error
    except storage.TooLargeError as error:
        raise CheckpointError(f"{ref}: {error}") from error
