"""Folders of this repository, and its scripts as modules."""

import importlib.util
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
SUPPORT = ROOT / "tests" / "support"
# CT of patients, which may not be published; tests of it are skipped if the folder is missing.
REAL_DATA = ROOT.parent / "shared" / "data"


def load_job(name: str) -> ModuleType:
    """Import ``jobs/NAME.py`` under a name that no other module has."""
    spec = importlib.util.spec_from_file_location(f"jobs_{name}", ROOT / "jobs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
