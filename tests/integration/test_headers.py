"""Headers read in a child process: a header that kills its reader costs one row."""

from collections.abc import Iterator
from functools import partial

import psutil
import pytest
from hostile_dicom import bomb_of_items, deflated
from sound_input import slices

from covtanet.archive.manifest import Series, scan_folder
from covtanet.archive.object_kinds import HEADER_BYTES
from covtanet.ct import dicom_headers
from covtanet.decoding import headers, process
from covtanet.decoding.child_process import HEADER_READER, Child
from covtanet.decoding.process import Limits
from covtanet.errors import DecoderStartError, SandboxClosedError
from covtanet.storage import ObjectInfo

# The child's reader as it would be with a fault that some header sets off.
FAULTY = (
    "import os, sys; sys.path.insert(0, sys.argv[1]); from covtanet.ct import dicom_headers; "
    "from covtanet.decoding import header_child; read = dicom_headers.read_identity; "
    "dicom_headers.read_identity = lambda header, is_whole=False: "
    "os._exit(9) if b'KILLER' in header else read(header, is_whole=is_whole); header_child.main()"
)


@pytest.fixture
def child() -> Iterator[Child]:
    reader = Child(HEADER_READER, Limits(memory_mib=256, timeout_s=20))
    yield reader
    reader.kill()


def scan(objects: dict[str, bytes], child: Child) -> list[Series]:
    infos = [ObjectInfo(name, len(data), "v1") for name, data in objects.items()]
    identify = partial(headers.read_identities, child)
    return scan_folder("", infos, lambda path, num_bytes: objects[path][:num_bytes], identify)[0]


def folder(killer: bytes) -> dict[str, bytes]:
    """A sound series of a hundred objects with one among them."""
    objects = {f"{k:03d}.dcm": slices()[k % 12] for k in range(100)}
    return dict(sorted({**objects, "042a.dcm": killer}.items()))


def check_one_row_lost(series: list[Series]) -> None:
    assert [(row.source_path, row.reason) for row in series] == [
        ("042a.dcm", "unreadable"),
        ("", None),
    ]
    assert len(series[1].objects) == 100


def test_identities_from_the_child_equal_those_of_this_process(child: Child) -> None:
    contents = [data[:HEADER_BYTES] for data in (*slices(), b"", b"no DICOM", *deflated().values())]
    expected = dicom_headers.read_identities(contents, HEADER_BYTES)
    assert headers.read_identities(child, contents, HEADER_BYTES) == expected
    assert expected[12:14] == [None, None]
    assert headers.read_identities(child, [], HEADER_BYTES) == []


def test_bomb_of_items_is_one_unreadable_row(child: Child) -> None:
    process = psutil.Process(child.warm().pid)
    before = process.memory_info().rss
    check_one_row_lost(scan(folder(bomb_of_items()), child))
    assert process.memory_info().rss < before + (50 << 20)


def test_header_that_kills_its_reader_is_one_unreadable_row(
    child: Child, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The other 63 headers that were sent together are read all the same."""
    monkeypatch.setattr(process, "CODE", FAULTY)
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
    monkeypatch.setattr(process, "CODE", "import sys; sys.exit(3)")
    with pytest.raises(DecoderStartError, match="does not start"):
        headers.read_identities(child, [slices()[0]], HEADER_BYTES)


def test_kill_ends_a_scan(child: Child) -> None:
    child.kill()
    with pytest.raises(SandboxClosedError, match="closed"):
        headers.read_identities(child, [slices()[0]], HEADER_BYTES)
