"""The training loop in an interpreter that has torch and nothing else."""

import subprocess
import sys

from repository import SUPPORT


def test_training_loop_needs_torch_only() -> None:
    """Neither Ray nor MLflow nor an imaging library: a fresh interpreter that refuses them trains
    both phases.
    """
    code = """
import sys
REFUSED = {
    'ray', 'mlflow', 'PIL', 'nibabel', 'pydicom', 'pyarrow', 'boto3', 'scipy', 'monai',
}
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in REFUSED:
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
from training import train
assert len(train(1).history) == len(train(2).history) == 3
"""
    folder = SUPPORT
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
