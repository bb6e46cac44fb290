"""Outcomes of finished phases in storage: the best epoch's weights, the metrics of all epochs."""

import hashlib
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from covtanet import storage
from covtanet.errors import CheckpointError
from covtanet.experiments.experiment import Experiment, write_json
from covtanet.training.loop import Progress, State

WEIGHTS = "weights.safetensors"
OUTCOME = "phase.json"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A finished phase."""

    weights: State
    """Of the best epoch."""
    history: list[dict[str, float]]
    """Metrics of every epoch."""
    digest: str
    """SHA-256 of the weights."""
    phase1_digest: str | None = None
    """Of the phase 1 that phase 2 was trained on; null for phase 1, or without a phase 1."""


def keep_outcome(
    experiment: Experiment,
    fold: int,
    phase: int,
    progress: Progress,
    phase1_digest: str | None = None,
) -> Outcome:
    """Write a finished phase and delete its checkpoints."""
    uri = experiment.phase_uri(fold, phase)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / WEIGHTS
        save_file(progress.best, path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        storage.upload(path, storage.join(uri, WEIGHTS))
    # After the weights: this file says that the phase is finished. Checkpoints go last.
    described = {"history": progress.history, "sha256": digest, "phase1_sha256": phase1_digest}
    write_json(storage.join(uri, OUTCOME), described)
    storage.delete_folder(experiment.phase_run(fold, phase).checkpoints_uri)
    return Outcome(
        weights=progress.best, history=progress.history, digest=digest, phase1_digest=phase1_digest
    )


def read_outcome(experiment: Experiment, fold: int, phase: int) -> Outcome | None:
    """Return a finished phase; null if it is not finished.

    Raises:
        CheckpointError: the weights differ from their digest.
    """
    described = describe_outcome(experiment, fold, phase)
    if described is None:
        return None
    uri = experiment.phase_uri(fold, phase)
    data = storage.read_bytes(storage.join(uri, WEIGHTS))
    if hashlib.sha256(data).hexdigest() != described["sha256"]:
        raise CheckpointError(
            f"the weights of phase {phase} differ from their digest; delete {uri} to train it again"
        )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / WEIGHTS
        path.write_bytes(data)
        weights = dict(load_file(path))
    return Outcome(
        weights=weights,
        history=described["history"],
        digest=described["sha256"],
        phase1_digest=described["phase1_sha256"],
    )


def describe_outcome(experiment: Experiment, fold: int, phase: int) -> dict[str, Any] | None:
    """Return the description of a finished phase, without its weights; null if not finished."""
    uri = storage.join(experiment.phase_uri(fold, phase), OUTCOME)
    return dict(json.loads(storage.read_bytes(uri))) if storage.exists(uri) else None
