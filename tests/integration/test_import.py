"""Import of the package."""

import subprocess
import sys

CODE = """
import os, sys
before = dict(os.environ)
import covtanet
assert dict(os.environ) == before
print([name for name in ("numpy", "torch", "ray", "mlflow", "pyarrow") if name in sys.modules])
"""


def test_import_loads_no_library_and_sets_no_variable() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"


def test_screening_driver_starts_without_torch_and_mlflow() -> None:
    code = (
        "import sys; import covtanet.commands.screen; "
        "print([name for name in ('torch', 'mlflow', 's3fs') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"
