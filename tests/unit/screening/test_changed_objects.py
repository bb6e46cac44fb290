"""An object changed since listing fails its series; storage that refuses all ends the job."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from sound_input import named, plain_nifti, slices
from stage_rows import manifest_rows, prepare

from covtanet import storage
from covtanet.errors import Reason, StudyError, UnavailableError, WeakSandboxError
from covtanet.ledger.record import Refusal
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
    record = prepared.record
    assert (record.status, record.reason) == ("failed", "changed")
    assert (record.source_digest, len(prepared.slices)) == (None, 0)


def test_unchanged_object_is_prepared(tmp_path: Path) -> None:
    (tmp_path / "a.nii").write_bytes(plain_nifti())
    (row,) = manifest_rows(tmp_path)
    prepared = prepare(row, tmp_path)
    assert prepared.record.reason is None
    assert len(prepared.slices)


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (StudyError(Reason.NOT_HU, "no HU"), "rejected", "not_hu"),
        (FileNotFoundError("gone"), "failed", "vanished"),
        (storage.ObjectChangedError("another"), "failed", "changed"),
        (PermissionError("this one"), "failed", "storage"),
        (OSError("no answer"), "failed", "storage"),
        (RuntimeError("ours"), "failed", "internal_error"),
    ],
)
def test_error_of_one_series_becomes_its_row(error: Exception, status: str, reason: str) -> None:
    def work() -> None:
        raise error

    refusal = stages.refuse_on_error("k", work)
    assert isinstance(refusal, Refusal)
    assert (refusal.status, refusal.reason) == (status, reason)


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

    def work() -> None:
        raise error

    with pytest.raises(type(error), match=str(error)):
        stages.refuse_on_error("k", work)
