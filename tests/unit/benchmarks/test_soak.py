"""Checks of the soak: a ledger that does not hold what it should, and an archive that changes."""

import random
from pathlib import Path
from typing import Any

import pytest

from benchmarks.soak.archive import Identity, LivingArchive, Master
from benchmarks.soak.check import Expected, by_identity, check_night, check_view

ARCHIVE = "s3://archive/ct"


def master(name: str, reason: str | None = None, suffix: str = ".nii") -> Master:
    status = "rejected" if reason else "screened"
    uid = name if suffix == "/" else ""
    files = {"IM0": b"x", "IM1": b"x"} if suffix == "/" else {"": b"x"}
    return Master(
        name=name, files=files, suffix=suffix, series_uid=uid, status=status, reason=reason
    )


SOUND, BAD = master("sound"), master("bad", "no_lung")
PRESENT: dict[Identity, Master] = {("a", ""): SOUND, ("b", ""): BAD, ("c", ""): SOUND}


def row(path: str, **changes: Any) -> dict[str, Any]:
    of = PRESENT.get((path, ""), SOUND)
    numbers = dict.fromkeys(("lesion_volume_ml", "lung_volume_ml", "involvement", "p_infected"))
    if of is SOUND:
        numbers |= dict.fromkeys(numbers, 0.5)
    return {
        "source_uri": f"{ARCHIVE}/{path}", "series_uid": None, "status": of.status,
        "reason": of.reason, "p_severe": None, **numbers, **changes,
    }  # fmt: skip


@pytest.fixture
def expected() -> Expected:
    rows, _ = by_identity([row("a"), row("b")], ARCHIVE)
    found = Expected()
    found.learn(rows, PRESENT)
    return found


def check(expected: Expected, *rows: dict[str, Any], may: bool = False) -> list[str]:
    found, twice = by_identity(rows, ARCHIVE)
    due = {("b", ""), ("c", "")}
    return twice + check_night(found, due, PRESENT, expected, may_fail=may, may_repeat=may)


def test_right_rows_have_no_fault(expected: Expected) -> None:
    assert check(expected, row("b"), row("c")) == []
    # Less than a thousandth: another order of additions.
    assert check(expected, row("b"), row("c", involvement=0.5002)) == []


@pytest.mark.parametrize(
    ("rows", "fault"),
    [
        ([row("b")], "c: no row"),
        ([row("b"), row("c"), row("c")], "c: 2 rows"),
        ([row("a"), row("b"), row("c")], "a: a row that was not due"),
        ([row("b"), row("c", involvement=0.51)], "c: involvement is 0.51, the first night had 0.5"),
        ([row("b"), row("c", p_infected=None)], "c: p_infected is None, the first night had 0.5"),
        ([row("b", reason="truncated"), row("c")], "b: ('rejected', 'truncated'), right is "),
        ([row("b"), row("c", status="rejected", reason="truncated")], "c: ('rejected', "),
        ([row("b"), row("c", status="failed", reason="storage")], "c: failed, storage"),
    ],
)
def test_wrong_rows_are_told(expected: Expected, rows: list[dict[str, Any]], fault: str) -> None:
    (found,) = check(expected, *rows)
    assert found.startswith(fault)


def test_disturbed_night_may_fail_and_repeat_series_but_not_invent(expected: Expected) -> None:
    changed = row("c", status="failed", reason="changed")
    assert check(expected, row("a"), row("b"), changed, may=True) == []
    internal = row("c", status="failed", reason="internal_error")
    assert check(expected, row("b"), internal, may=True) == ["c: failed, internal_error"]
    unknown = check(expected, row("b"), row("c"), row("x"), may=True)
    assert unknown == ["x: a row that was not due"]


def test_view_keeps_removed_series_and_no_others(expected: Expected) -> None:
    gone = {("g", ""): SOUND}
    view, _ = by_identity([row(path) for path in "abcg"], ARCHIVE)
    assert check_view(view, PRESENT, gone, expected) == []
    del view["g", ""]
    assert check_view(view, PRESENT, gone, expected) == ["g: not in the view"]
    view["x", ""] = row("x")
    assert check_view(view, PRESENT, {}, expected) == ["x: in the view only"]


def test_living_archive_grows_changes_and_shrinks(tmp_path: Path) -> None:
    masters = [master(name, suffix=suffix) for name in "abcd" for suffix in (".nii", "/")]
    archive = LivingArchive(str(tmp_path), masters, random.Random(3))
    archive.fill()
    assert len(archive.present) == len(masters)
    for _ in range(40):
        known = {*archive.present, *archive.gone}
        archive.pass_a_day()
        assert archive.present.keys() - known <= archive.fresh <= archive.present.keys()
    assert archive.gone
    assert not archive.gone.keys() & archive.present.keys()
    stored = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert stored == {
        f"{path}{name}" for (path, _), each in archive.present.items() for name in each.files
    }
