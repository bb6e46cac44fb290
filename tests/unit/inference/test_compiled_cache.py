"""Compiled networks on disk: a private folder, whole entries, damage counts as missing."""

import logging
import os
from pathlib import Path

import pytest

from covtanet.inference import compiled_cache
from covtanet.inference.compiled_cache import cache_folder, entry_name, read_entry, write_entry


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COVTANET_CACHE", str(tmp_path / "cache"))
    folder = cache_folder()
    assert folder == tmp_path / "cache"
    return folder


def test_folder_is_private_and_below_the_user_s_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COVTANET_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    folder = cache_folder()
    assert folder == tmp_path / "xdg" / "covtanet"
    assert folder.stat().st_mode & 0o777 == 0o700


def test_empty_variable_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COVTANET_CACHE", "")
    assert cache_folder() is None


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o755])
def test_folder_that_others_reach_is_refused(
    folder: Path, mode: int, caplog: pytest.LogCaptureFixture
) -> None:
    folder.chmod(mode)
    with caplog.at_level(logging.WARNING):
        assert cache_folder() is None
    assert "others can change the cache folder" in caplog.text


def test_folder_in_a_folder_that_others_write_is_refused(folder: Path) -> None:
    folder.parent.chmod(0o777)
    assert cache_folder() is None
    folder.parent.chmod(0o1777)  # as /tmp: names cannot be taken away
    assert cache_folder() == folder


def test_link_to_a_folder_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.setenv("COVTANET_CACHE", str(tmp_path / "link"))
    assert cache_folder() is None


def test_folder_that_cannot_be_made_keeps_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("COVTANET_CACHE", str(tmp_path / "file" / "cache"))
    assert cache_folder() is None


def test_entry_comes_back_and_another_one_does_not(folder: Path) -> None:
    name = entry_name("model", "openvino", 2)
    assert read_entry(folder, name) is None
    write_entry(folder, name, b"network")
    assert read_entry(folder, name) == b"network"
    assert (folder / name).stat().st_mode & 0o777 == 0o600
    assert read_entry(folder, entry_name("model", "openvino", 1)) is None


@pytest.mark.parametrize("damage", ["cut", "changed", "empty"])
def test_damaged_entry_counts_as_missing(
    folder: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    write_entry(folder, "a.compiled", bytes(1000))
    content = bytearray((folder / "a.compiled").read_bytes())
    content[500] ^= 1
    data = {"cut": content[:-1], "changed": content, "empty": bytearray()}[damage]
    (folder / "a.compiled").write_bytes(data)
    assert read_entry(folder, "a.compiled") is None
    assert "damaged" in caplog.text


def test_link_in_place_of_an_entry_is_not_followed(folder: Path, tmp_path: Path) -> None:
    write_entry(folder, "a.compiled", b"network")
    (folder / "a.compiled").rename(tmp_path / "outside")
    (folder / "a.compiled").symlink_to(tmp_path / "outside")
    assert read_entry(folder, "a.compiled") is None


def test_oldest_entries_are_dropped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_cache, "MAX_ENTRIES", 2)
    for index, name in enumerate(("a", "b", "c")):
        write_entry(folder, f"{name}.compiled", b"network")
        os.utime(folder / f"{name}.compiled", (index, index))
    write_entry(folder, "d.compiled", b"network")
    assert sorted(path.name for path in folder.iterdir()) == ["c.compiled", "d.compiled"]


def test_writer_that_fails_leaves_nothing_behind(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "a.compiled").mkdir()
    (folder / "a.compiled" / "x").write_text("")
    write_entry(folder, "a.compiled", b"network")
    assert "could not be kept" in caplog.text
    assert [path.name for path in folder.iterdir()] == ["a.compiled"]
