"""Checkpoints of a phase in storage: written by rank 0, read to continue and at the end.

A checkpoint is a folder that Ray Train names and deletes. The best weights, which change in few
epochs, lie beside the folders under a name with their digest, and are written only when they
changed.
"""

import contextlib
import logging
import re
import tempfile
from pathlib import Path

from covtanet import storage
from covtanet.errors import CheckpointError
from covtanet.training.checkpoint import (
    BEST,
    MAX_PART_BYTES,
    MAX_STATE_BYTES,
    PARTS,
    STATE,
    best_digest,
    file_name,
    load_progress,
    save_progress,
)
from covtanet.training.loop import Progress, State

logger = logging.getLogger(__name__)

CHECKPOINT = re.compile(r"checkpoint_[\d_.-]+")
# The newest one and, should it be damaged, the one before.
NUM_CHECKPOINTS = 2
# All files of a checkpoint's folder; the description comes last, and a checkpoint without it is not
# whole.
FOLDER_FILES = (*(file_name(part) for part in PARTS if part != BEST), STATE)


class CheckpointWriter:
    """Writes the checkpoints of a phase, one after the other."""

    def __init__(self, checkpoints_uri: str) -> None:
        self.checkpoints_uri = checkpoints_uri
        # The best weights that were written last, and the digests that the checkpoints name.
        self._best: State | None = None
        self._digests: list[str] = []

    def write(self, progress: Progress, name: str) -> None:
        """Write a checkpoint under its name; delete best weights that no checkpoint names."""
        is_stored = progress.best is self._best
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            digest = save_progress(folder, progress, self._digests[-1] if is_stored else None)
            # Before the folder that names it.
            if not is_stored:
                storage.upload(folder / file_name(BEST), _best_uri(self.checkpoints_uri, digest))
            for file in FOLDER_FILES:
                storage.upload(folder / file, storage.join(self.checkpoints_uri, name, file))
        self._best = progress.best
        self._digests.append(digest)
        self._delete_unused()

    def _delete_unused(self) -> None:
        # One more: Ray Train deletes an old checkpoint only after it has heard of the new one.
        used = self._digests[-NUM_CHECKPOINTS - 1 :]
        for digest in set(self._digests) - set(used):
            storage.delete(_best_uri(self.checkpoints_uri, digest))
        self._digests = used


def newest_progress(checkpoints_uri: str) -> Progress:
    """Return the newest checkpoint that is whole; an empty progress without a checkpoint.

    Checkpoints are listed rather than read from Ray's own snapshot, which a crash may leave torn.

    Raises:
        OSError: storage does not answer.
    """
    names = storage.list_names(checkpoints_uri)
    # They are named by time, so the last one is the newest.
    for name in reversed([name for name in names if CHECKPOINT.fullmatch(name)]):
        try:
            return _download(checkpoints_uri, name)
        except CheckpointError as error:
            logger.warning("a checkpoint is left out: %s", error)
    return Progress()


def _download(checkpoints_uri: str, name: str) -> Progress:
    """Read one checkpoint.

    Raises:
        CheckpointError: a file is missing, cut or changed.
    """
    sizes = {file: MAX_STATE_BYTES if file == STATE else MAX_PART_BYTES for file in FOLDER_FILES}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        # A checkpoint that is being deleted; missing files show when it is loaded.
        with contextlib.suppress(FileNotFoundError):
            storage.download_files(storage.join(checkpoints_uri, name), sizes, folder)
            best = _best_name(best_digest(folder))
            storage.download_files(checkpoints_uri, {best: MAX_PART_BYTES}, folder)
            (folder / best).rename(folder / file_name(BEST))
        return load_progress(folder)


def _best_uri(checkpoints_uri: str, digest: str) -> str:
    return storage.join(checkpoints_uri, _best_name(digest))


def _best_name(digest: str) -> str:
    # 64 bits of the digest are enough for the few files of one phase.
    return f"best_{digest[:16]}.safetensors"
