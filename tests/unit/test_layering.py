"""The directions of import that the layout promises."""

import ast
from pathlib import Path

import pytest

from covtanet.errors import REJECTION_REASONS, Reason

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "covtanet"

# The packages of covtanet that each package may import, apart from itself and errors. A module
# named with its package is the only one of that package that may be imported.
ALLOWED = {
    "errors": set(),
    "environment": set(),
    "machine": set(),
    "runtime": {"environment", "machine", "storage"},
    "cluster": set(),
    "ray_data": {"storage"},
    "shared_folders": {"cluster", "storage"},
    "storage": {"environment"},
    "ct": set(),
    "model": set(),
    "drawing": {"ct", "decoding.stored_masks"},
    "archive": {"ct", "storage"},
    "decoding": {"ct"},
    "inference": {"ct", "model"},
    "ledger": {"archive", "storage"},
    "data": {"ct", "storage"},
    "phantoms": {"ct", "data", "report.summary", "storage"},
    "report": {
        "archive",
        "ct",
        "data",
        "decoding",
        "drawing",
        "ledger",
        "model.table_i",
        "storage",
    },
    "tracking": {"model.model_files", "storage"},
    "training": {"cluster", "ct", "data", "machine", "model", "ray_data", "storage", "tracking"},
    "evaluation": {
        "ct",
        "data",
        "decoding.prepare",
        "drawing",
        "inference",
        "machine",
        "model",
        "ray_data",
        "report",
        "storage",
    },
    "experiments": {
        "ct",
        "data",
        "decoding.prepare",
        "evaluation",
        "cluster",
        "inference",
        "model",
        "ray_data",
        "report",
        "runtime",
        "storage",
        "tracking",
        "training",
    },
    "screening": {
        "archive",
        "ct",
        "decoding",
        "drawing",
        "cluster",
        "inference",
        "ledger",
        "machine",
        "model",
        "ray_data",
        "runtime",
        "shared_folders",
        "storage",
        "tracking",
    },
    "config": {"run_config", "screening.config"},
    "run_config": {"screening.config", "training.config"},
    "alerts": set(),
    "api": {"ct", "inference", "ledger", "model", "screening"},
    "commands": {
        "alerts",
        "config",
        "data",
        "evaluation",
        "experiments",
        "cluster",
        "ledger",
        "machine",
        "model",
        "report",
        "runtime",
        "screening",
        "shared_folders",
        "storage",
        "tracking",
        "training",
    },
    "__main__": {"commands", "runtime"},
}
RAY_PLACES = {
    "runtime.py",
    "cluster.py",
    "ray_data.py",
    "shared_folders.py",
    "training/worker.py",
    "training/trainer.py",
    "training/torch_backend.py",
    "training/callbacks.py",
    "training/phase_data.py",
    "experiments/preparation.py",
    "experiments/parallel.py",
    "screening/node_watch.py",
    "screening/assembly.py",
    "screening/pipeline.py",
    "screening/attempt_counter.py",
    "screening/metrics.py",
    "commands/export.py",
    "evaluation/pipeline.py",
}
MLFLOW_PLACES = {
    "tracking/runs.py",
    "tracking/registry.py",
    "tracking/models.py",
    "screening/pyfunc.py",
}


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def imports(path: Path, at_run_time: bool = True) -> set[str]:
    """Modules that a file imports; those under TYPE_CHECKING only where asked."""
    tree = ast.parse(path.read_text())
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        if (
            at_run_time
            and isinstance(node, ast.If)
            and getattr(node.test, "id", "") == "TYPE_CHECKING"
        ):
            skipped.update(inner for child in node.body for inner in ast.walk(child))
    found: set[str] = set()
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    part = part_of(path)
    allowed = ALLOWED[part] | {part, "errors"}
    ours = {
        name.removeprefix("covtanet.") for name in imports(path) if name.startswith("covtanet.")
    }
    wrong = {
        name
        for name in ours
        if not any(name == each or name.startswith(f"{each}.") for each in allowed)
    }
    assert not wrong


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_libraries_stay_in_their_places(path: Path) -> None:
    relative = path.relative_to(PACKAGE).as_posix()
    tops = {name.split(".")[0] for name in imports(path)}
    assert "ray" not in tops or relative in RAY_PLACES
    assert "mlflow" not in tops or relative in MLFLOW_PLACES
    assert not tops & {"boto3", "botocore", "s3fs"} or relative == "storage/s3.py"
    assert "torch" not in tops or part_of(path) not in {"ct", "data", "report"}


def test_every_part_of_the_package_is_known() -> None:
    assert {part_of(path) for path in modules()} == set(ALLOWED)


def test_nothing_loads_pickles() -> None:
    for path in modules():
        tree = ast.parse(path.read_text())
        calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        assert not calls & {
            "torch.load",
            "pickle.load",
            "pickle.loads",
            "eval",
            "exec",
            "mlflow.pyfunc.load_model",
        }


def test_reasons_raised_are_reasons_promised() -> None:
    raised = set()
    for path in (PACKAGE / "ct").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "StudyError":
                raised.add(Reason[ast.unparse(node.args[0]).removeprefix("Reason.")])
    assert raised - set(REJECTION_REASONS) == {Reason.NOT_GREY8}  # only training reads grey values
    # The listing and the sandbox reject with these.
    assert set(REJECTION_REASONS) - raised == {Reason.CONTAINER, Reason.DECODE_CRASH}
