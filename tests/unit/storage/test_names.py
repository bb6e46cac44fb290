"""Names of objects and folders in storage."""

import os
from pathlib import Path

import pytest

from covtanet import storage
from covtanet.errors import ConfigError


@pytest.mark.parametrize(
    "uri", ["http://host/archive", "s3://user:secret@host/x", "s3://bucket/../x", "gs://b/x"]
)
def test_places_beyond_paths_and_s3_are_refused(uri: str) -> None:
    with pytest.raises(ConfigError, match="expected"):
        storage.absolute(uri)


def test_a_file_name_that_is_no_utf8_is_listed_and_found_again(tmp_path: Path) -> None:
    Path(os.fsdecode(bytes(tmp_path) + b"/d\xff")).mkdir()
    Path(os.fsdecode(bytes(tmp_path) + b"/d\xff/a\xe9.nii")).write_bytes(b"here")
    ((folder, objects),) = storage.walk(str(tmp_path))
    assert objects[0].path == "d\uf7ff/a\uf7e9.nii"
    objects[0].path.encode()  # it is valid Unicode
    assert b"".join(storage.read_chunks(f"{tmp_path}/{objects[0].path}", objects[0])) == b"here"
    assert folder == "d\uf7ff/"


@pytest.mark.parametrize("name", ["/tmp/x", "../x", "a/../../x", "link/x"])
def test_name_that_leads_out_of_a_local_folder_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "link").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="leads out of the folder"):
        storage.download_files(str(tmp_path), {name: 10}, tmp_path / "target")
