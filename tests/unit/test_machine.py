"""Cores that this process may use."""

import ast
import os
from pathlib import Path

import pytest

from covtanet.machine import num_cores

ROOT = Path(__file__).resolve().parents[2]
# Names that count the cores of the machine, whatever this process may use of them.
COUNTS = ("cpu_count", "sched_getaffinity")
SOURCES = [
    path
    for folder in ("covtanet", "serve", "jobs", "infra", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
]


def test_cores_follow_the_affinity() -> None:
    whole = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(whole)})
        assert num_cores() == 1
    finally:
        os.sched_setaffinity(0, whole)


def test_cores_follow_the_quota_of_the_cgroup(monkeypatch: pytest.MonkeyPatch) -> None:
    from joblib.externals.loky.backend import context

    monkeypatch.setattr(context, "_cpu_count_cgroup", lambda cores: 1)
    assert num_cores() == 1


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_cores_are_counted_in_one_place(path: Path) -> None:
    tree = ast.walk(ast.parse(path.read_text()))
    named = {node.attr for node in tree if isinstance(node, ast.Attribute)}
    assert named.isdisjoint(COUNTS)
