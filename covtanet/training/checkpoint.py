"""A training's checkpoint as a folder of files: weights, best weights, optimizer state, history.

Tensors are safetensors; ``state.json`` comes last and holds their digests, by which a torn or cut
checkpoint is recognized. Nothing is unpickled. Location and number of checkpoints are left to Ray
Train.
"""

import hashlib
import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from covtanet.errors import CheckpointError
from covtanet.training.loop import Progress

STATE = "state.json"
PARTS = ("weights", "best", "optimizer")
# All files of a checkpoint, each with the most bytes that it may have; the optimizer keeps two
# values per weight, and a third for the average.
FILES = {STATE: 64 << 20, **{f"{part}.safetensors": 8 << 30 for part in PARTS}}


def save_progress(folder: Path, progress: Progress) -> None:
    """Write a checkpoint into an empty folder."""
    digests = {}
    for part in PARTS:
        path = folder / f"{part}.safetensors"
        save_file(getattr(progress, part), path)
        digests[part] = _sha256(path)
    state = {"history": progress.history, "sha256": digests}
    # Last: it holds the digests of the other files, so that a checkpoint that was cut short is
    # refused.
    (folder / STATE).write_text(json.dumps(state, indent=1) + "\n")


def load_progress(folder: Path) -> Progress:
    """Read a checkpoint.

    Raises:
        CheckpointError: a file is missing, cut or changed.
    """
    try:
        state = json.loads((folder / STATE).read_text())
        parts = {}
        for part in PARTS:
            path = folder / f"{part}.safetensors"
            # Compared before the file is parsed.
            if _sha256(path) != state["sha256"][part]:
                raise CheckpointError(f"{path.name} differs from the digest in {STATE}")
            parts[part] = dict(load_file(path))
        return Progress(history=state["history"], **parts)
    except (FileNotFoundError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"the checkpoint cannot be read: {type(error).__name__}") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
