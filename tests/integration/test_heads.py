"""Headers read in a child process: one that kills its reader costs one row."""

from collections.abc import Iterator
from functools import partial

import psutil
import pytest
from hostile import bomb_of_items, deflated, slices

from covtanet.archive.manifest import HEAD_BYTES, Series, scan_folder
from covtanet.ct import dicom_head
from covtanet.decoding import child_process
from covtanet.decoding import headers as heads
from covtanet.decoding.child_process import HEADER_READER, Child, Limits
from covtanet.errors import DecoderStartError, SandboxClosedError
from covtanet.storage import ObjectInfo

# The child's reader as it would be with a fault that some header sets off.
FAULTY = (
    "import os, sys; sys.path.insert(0, sys.argv[1]); from covtanet.ct import dicom_head; "
    "from covtanet.decoding import header_child; read = dicom_head.read_identity; "
    "dicom_head.read_identity = lambda head, is_whole=False: "
    "os._exit(9) if b'KILLER' in head else read(head, is_whole=is_whole); header_child.main()"
)


@pytest.fixture
def child() -> Iterator[Child]:
    found = Child(HEADER_READER, Limits(memory_mib=256, timeout_s=20))
    yield found
    found.kill()


def scan(objects: dict[str, bytes], child: Child) -> list[Series]:
    infos = [ObjectInfo(name, len(data), "v1") for name, data in objects.items()]
    identify = partial(heads.read_identities, child)
    return scan_folder("", infos, lambda path, num_bytes: objects[path][:num_bytes], identify)[0]


def folder(killer: bytes) -> dict[str, bytes]:
    """A sound series of a hundred objects with one among them."""
    objects = {f"{k:03d}.dcm": slices()[k % 12] for k in range(100)}
    return dict(sorted({**objects, "042a.dcm": killer}.items()))


def check_one_row_lost(found: list[Series]) -> None:
    assert [(each.source_path, each.reason) for each in found] == [
        ("042a.dcm", "unreadable"),
        ("", None),
    ]
    assert len(found[1].objects) == 100


def test_identities_from_the_child_are_those_of_this_process(child: Child) -> None:
    contents = [data[:HEAD_BYTES] for data in (*slices(), b"", b"no DICOM", *deflated().values())]
    expected = dicom_head.read_identities(contents, HEAD_BYTES)
    assert heads.read_identities(child, contents, HEAD_BYTES) == expected
    assert expected[12:14] == [None, None]
    assert heads.read_identities(child, [], HEAD_BYTES) == []


def test_bomb_of_items_is_one_unreadable_row(child: Child) -> None:
    process = psutil.Process(child.warm().pid)
    before = process.memory_info().rss
    check_one_row_lost(scan(folder(bomb_of_items()), child))
    assert process.memory_info().rss < before + (50 << 20)


def test_header_that_kills_its_reader_is_one_unreadable_row(
    child: Child, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of the 64 heads that were sent together the others are read all the same."""
    monkeypatch.setattr(child_process, "CODE", FAULTY)
    check_one_row_lost(scan(folder(b"KILLER".ljust(128) + slices()[3][128:]), child))
    assert "the object counts as unreadable" in caplog.text


def test_header_that_needs_more_memory_than_allowed_is_one_unreadable_row() -> None:
    """No fault of the reader: it inflates 4 MiB, and may have 2."""
    bomb = next(iter(deflated(bomb=8).values()))
    child = Child(HEADER_READER, Limits(memory_mib=2, timeout_s=20))
    try:
        check_one_row_lost(scan(folder(bomb), child))
    finally:
        child.kill()


def test_child_that_does_not_start_makes_no_header_unreadable(
    child: Child, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child_process, "CODE", "import sys; sys.exit(3)")
    with pytest.raises(DecoderStartError, match="does not start"):
        heads.read_identities(child, [slices()[0]], HEAD_BYTES)


def test_kill_ends_a_scan(child: Child) -> None:
    child.kill()
    with pytest.raises(SandboxClosedError, match="closed"):
        heads.read_identities(child, [slices()[0]], HEAD_BYTES)
