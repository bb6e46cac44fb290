"""An object changed since listing fails its series; storage that refuses all ends the job."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hostile import named, plain_nifti, slices
from stage_rows import manifest_rows, prepare

from covtanet import storage
from covtanet.errors import StudyError, UnavailableError, WeakSandboxError
from covtanet.screening import stages


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"more")


def of_the_same_size(path: Path) -> None:
    """Other bytes, as many, a second later."""
    status = path.stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))


def replaced(path: Path) -> None:
    """Another file in its place, with another time of change."""
    other = path.with_suffix(".new")
    other.write_bytes(path.read_bytes())
    os.utime(other, ns=(0, 10**9))
    other.rename(path)


@pytest.mark.parametrize("change", [longer, of_the_same_size, replaced])
@pytest.mark.parametrize("name", ["a.nii", "IM0003.dcm"])
def test_object_changed_since_listing_fails_as_changed(
    name: str,
    change: Callable[[Path], None],
    tmp_path: Path,
) -> None:
    objects = {"a.nii": plain_nifti()} if name == "a.nii" else named(slices())
    for each, data in objects.items():
        (tmp_path / each).write_bytes(data)
    (row,) = manifest_rows(tmp_path)
    change(tmp_path / name)
    prepared = prepare(row, tmp_path)
    record = json.loads(prepared["record"])
    assert (record["status"], record.get("reason")) == ("failed", "changed")
    assert (record["source_digest"], len(prepared["slices"])) == (None, 0)


def test_object_that_did_not_change_is_screened(tmp_path: Path) -> None:
    (tmp_path / "a.nii").write_bytes(plain_nifti())
    (row,) = manifest_rows(tmp_path)
    assert json.loads(prepare(row, tmp_path)["record"])["status"] == "screened"


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (StudyError("not_hu", "no HU"), "rejected", "not_hu"),
        (FileNotFoundError("gone"), "failed", "vanished"),
        (storage.ObjectChangedError("another"), "failed", "changed"),
        (PermissionError("this one"), "failed", "storage"),
        (OSError("no answer"), "failed", "storage"),
        (RuntimeError("ours"), "failed", "internal_error"),
    ],
)
def test_error_of_one_series_becomes_its_row(error: Exception, status: str, reason: str) -> None:
    record: dict[str, Any] = {"series_key": "k"}

    def work() -> dict[str, Any]:
        raise error

    assert stages.at_boundary(record, work) == {}
    assert (record["status"], record["reason"]) == (status, reason)


@pytest.mark.parametrize(
    "error",
    [
        storage.AccessError("expired"),
        UnavailableError("no replica"),
        WeakSandboxError("no seccomp"),
    ],
)
def test_error_of_all_series_is_no_row_of_one(error: Exception) -> None:
    """Expired credentials would fail all series that are left: the job ends and can go on later."""
    record: dict[str, Any] = {"series_key": "k", "status": "screened"}

    def work() -> dict[str, Any]:
        raise error

    with pytest.raises(type(error)):
        stages.at_boundary(record, work)
    assert record == {"series_key": "k", "status": "screened"}
