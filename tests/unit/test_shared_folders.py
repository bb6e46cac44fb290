"""Folders that only some nodes have; tests/cluster/test_nodes.py has real nodes."""

import re
from pathlib import Path

import pytest

from covtanet import shared_folders
from covtanet.errors import ConfigError

ADDRESSES = {"a": "10.0.0.1", "b": "10.0.0.2", "c": "10.0.0.3"}
CANARY = "Doe^Jane"


def test_folder_with_the_same_names_is_seen(tmp_path: Path) -> None:
    (tmp_path / CANARY).mkdir()
    names = shared_folders._names_of(str(tmp_path))
    assert names == [str(tmp_path), str(tmp_path / CANARY)]
    assert shared_folders._misses([names, [str(tmp_path)]]) == [[], []]


@pytest.mark.parametrize("is_removed", [False, True], ids=["another folder", "no folder"])
def test_folder_without_a_name_is_missed(tmp_path: Path, is_removed: bool) -> None:
    (tmp_path / "one").mkdir()
    names = shared_folders._names_of(str(tmp_path))
    (tmp_path / "one").rmdir()
    if is_removed:
        tmp_path.rmdir()
    missed = [str(tmp_path), str(tmp_path / "one")] if is_removed else [str(tmp_path / "one")]
    assert shared_folders._misses([names, []]) == [missed, []]


def test_name_that_is_gone_here_too_is_not_missed(tmp_path: Path) -> None:
    """Something was renamed while the nodes were asked."""
    (tmp_path / "one.part").touch()
    (tmp_path / "two").touch()
    _, *names = shared_folders._names_of(str(tmp_path))
    (tmp_path / "one.part").rename(tmp_path / "one")
    assert shared_folders._are_here(names)
    assert not shared_folders._are_here([str(tmp_path / "one.part")])


def test_dangling_link_is_seen(tmp_path: Path) -> None:
    """It would be a row of its own, and not a folder that is not shared."""
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    assert shared_folders._misses([shared_folders._names_of(str(tmp_path))]) == [[]]


def test_names_of_a_large_folder_are_bounded(tmp_path: Path) -> None:
    for number in range(2 * shared_folders.NUM_NAMES):
        (tmp_path / str(number)).touch()
    assert len(shared_folders._names_of(str(tmp_path))) == shared_folders.NUM_NAMES + 1


def test_missing_folder_has_no_names(tmp_path: Path) -> None:
    assert shared_folders._names_of(str(tmp_path / "missing")) == []


@pytest.mark.parametrize(
    ("uri", "is_local"),
    [
        ("/data", True),
        ("s3://bucket/data", False),
        ("dicomweb+https://pacs/dicom-web", False),
        ("", False),
    ],
)
def test_only_paths_are_tried(uri: str, is_local: bool) -> None:
    assert shared_folders._is_local(uri) is is_local


def test_refusal_names_nodes_and_options() -> None:
    missing = {"--ledger": ["10.0.0.2", "10.0.0.3"], "--archive": ["10.0.0.2"]}
    message = (
        "10.0.0.2, 10.0.0.3 does not see --ledger; 10.0.0.2 does not see --archive: "
        "expected s3:// or a folder that all 3 nodes with workers share"
    )
    with pytest.raises(ConfigError, match=re.escape(message)):
        shared_folders._refuse_missing(ADDRESSES, missing)


def test_shared_locations_are_not_refused() -> None:
    shared_folders._refuse_missing(ADDRESSES, {})
