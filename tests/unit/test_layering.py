"""The directions of import that the layout promises."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "covtanet"

EVALUATION_OF_SCREENING = ("screening.decode", "screening.predictor", "screening.records")
# What each part may import of covtanet, beside itself and errors.
ALLOWED = {
    "errors": set(),
    "doors": set(),
    "ray_data": set(),
    "storage": set(),
    "ct": set(),
    "model": set(),
    "data": {"ct", "storage"},
    "report": {"ct", "data", "storage"},
    "tracking": {"model.checkpoint", "storage"},
    "training": {"ct", "data", "evaluation", "model", "ray_data", "report", "storage", "tracking"},
    "evaluation": {
        "ct.lung_box",
        "ct.window",
        "data",
        "model",
        "ray_data",
        "report",
        "screening.decode",
        "screening.predictor",
        "screening.records",
        "storage",
    },
    "screening": {"ct", "model", "data.manifest", "ray_data", "storage", "report"},
    "config": {"screening.stages", "training.config"},
}
RAY_PLACES = {
    "ray_data.py",
    "training/worker.py",
    "training/distributed.py",
    "screening/pipeline.py",
    "evaluation/pipeline.py",
}
MLFLOW_PLACES = {"tracking.py", "screening/pyfunc.py"}


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def imports(path: Path, at_run_time: bool = True) -> set[str]:
    """Modules that a file imports; those under TYPE_CHECKING only where asked."""
    tree = ast.parse(path.read_text())
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        if at_run_time and isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
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
    ours = {name.removeprefix("covtanet.") for name in imports(path) if name.startswith("covtanet.")}
    wrong = {name for name in ours if not any(name == each or name.startswith(f"{each}.") for each in allowed)}
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
        assert not calls & {"torch.load", "pickle.load", "pickle.loads", "eval", "exec", "mlflow.pyfunc.load_model"}


def test_reasons_raised_are_reasons_promised() -> None:
    from covtanet.screening.records import REASONS

    raised = set()
    for path in (PACKAGE / "ct").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "StudyError":
                raised.add(ast.literal_eval(node.args[0]))
    assert raised - set(REASONS) == {"not_grey8"}  # only training reads grey values
    assert set(REASONS) - raised == {"container", "decode_crash"}  # of the listing and of the sandbox
