"""A training's checkpoint as a folder of files: weights, best weights, optimizer state, history.

Tensors are safetensors; ``state.json`` comes last and holds their digests, by which a torn or cut
checkpoint is recognized. Nothing is unpickled. ``checkpoint_store`` keeps checkpoints in storage.
"""

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from covtanet.errors import CheckpointError
from covtanet.model.model_files import file_sha256
from covtanet.training.loop import Progress

STATE = "state.json"
BEST = "best"
PARTS = ("weights", BEST, "optimizer")
# Most bytes of the description, and of each other file: the optimizer keeps two values per weight,
# and a third for the average.
MAX_STATE_BYTES = 64 << 20
MAX_PART_BYTES = 8 << 30


def save_progress(folder: Path, progress: Progress, best_sha256: str | None = None) -> str:
    """Write a checkpoint into an empty folder; return the digest of its best weights.

    best_sha256: digest of the best weights if they are stored already; they are not written then.
    """
    digests = {} if best_sha256 is None else {BEST: best_sha256}
    for part in PARTS:
        if part not in digests:
            path = folder / file_name(part)
            save_file(getattr(progress, part), path)
            digests[part] = file_sha256(path)
    state = {"history": progress.history, "sha256": digests}
    # Last: it holds the digests of the other files, so that a checkpoint that was cut short is
    # refused.
    (folder / STATE).write_text(json.dumps(state, indent=1) + "\n")
    return digests[BEST]


def file_name(part: str) -> str:
    """Return the name of the file with one part of a checkpoint."""
    return f"{part}.safetensors"


def best_digest(folder: Path) -> str:
    """Return the digest of the best weights that belong to a checkpoint.

    Raises:
        CheckpointError: the checkpoint's description is missing or damaged.
    """
    try:
        state = json.loads((folder / STATE).read_text())
        return str(state["sha256"][BEST])
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"the checkpoint cannot be read: {type(error).__name__}") from error


def load_progress(folder: Path) -> Progress:
    """Read a checkpoint.

    Raises:
        CheckpointError: a file is missing, cut or changed.
    """
    try:
        state = json.loads((folder / STATE).read_text())
        parts = {}
        for part in PARTS:
            path = folder / file_name(part)
            # Compared before the file is parsed.
            if file_sha256(path) != state["sha256"][part]:
                raise CheckpointError(f"{path.name} differs from the digest in {STATE}")
            parts[part] = dict(load_file(path))
        return Progress(history=state["history"], **parts)
    except (FileNotFoundError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"the checkpoint cannot be read: {type(error).__name__}") from error
