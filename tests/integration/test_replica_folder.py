"""Folders of the endpoint's replicas, one of which is killed."""

import subprocess
import sys
from pathlib import Path

from repository import ROOT

from serve.uploads import ReplicaFolder


def test_only_folders_of_killed_replicas_are_removed(
    tmp_path: Path,
) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; "
        "from serve.uploads import ReplicaFolder; "
        "folder = ReplicaFolder(Path(sys.argv[1])); (folder.path / 'study').write_bytes(b'image'); "
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path], check=False, cwd=ROOT)
    (left,) = tmp_path.iterdir()
    assert (left / "study").read_bytes() == b"image"
    living = ReplicaFolder(tmp_path)
    assert not left.exists()
    another = ReplicaFolder(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {living.path.name, another.path.name}
