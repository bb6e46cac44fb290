"""Export parses only bytes that were screened: what has changed since is refused before a parser sees it."""

import json
import os
from pathlib import Path
from typing import Any

import pydicom
import pytest
from export import parsed, source_headers
from hostile import deflated, slices
from test_stages import CONFIG, WINDOW, manifest_rows

from covtanet.errors import StudyError
from covtanet.screening import stages
from covtanet.storage import ObjectChangedError


@pytest.fixture
def screened(tmp_path: Path) -> tuple[dict[str, Any], Path]:
    """A ledger row of a series two folders below its archive's root, and the folder."""
    folder = tmp_path / "patient" / "scan"
    folder.mkdir(parents=True)
    for index, data in enumerate(slices()):
        (folder / f"{index:02d}.dcm").write_bytes(data)
    (row,) = manifest_rows(tmp_path)
    decoder = stages.in_process(WINDOW, CONFIG)
    prepared = stages.decode_and_prepare(row, archive=str(tmp_path), window=WINDOW, config=CONFIG, decoder=decoder)
    record = json.loads(prepared["record"])
    assert record["source_digest"] is not None
    return record, folder


@pytest.fixture
def bomb() -> bytes:
    return next(iter(deflated(bomb=8).values()))


@pytest.fixture
def no_parser(screened: object, bomb: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on: what comes before it has been parsed."""

    def parse(*arguments: object, **named: object) -> None:
        raise AssertionError("bytes that were not screened reached the parser")

    monkeypatch.setattr(pydicom, "dcmread", parse)


def test_series_as_it_was_screened_is_parsed(screened: tuple[dict[str, Any], Path]) -> None:
    headers = source_headers(screened[0])
    assert len(headers) == 12
    assert all("PixelData" not in header for header in headers)


@pytest.mark.usefixtures("no_parser")
def test_replaced_series_is_refused_by_its_content(
    screened: tuple[dict[str, Any], Path],
) -> None:
    """Same name, size and time, as a copying tool can leave them."""
    row, folder = screened
    path = folder / "03.dcm"
    times = path.stat()
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(ObjectChangedError, match="by its content"):
        source_headers(row)


@pytest.mark.usefixtures("no_parser")
def test_deflated_object_is_refused_before_it_is_parsed(bomb: bytes) -> None:
    with pytest.raises(StudyError, match="a deflated object") as error:
        parsed(bomb)
    assert error.value.reason == "unsupported_syntax"
    with pytest.raises(StudyError, match="no end of its file meta"):
        parsed(slices()[0][:132] + b"\x02\x00\x03\x00UI\0\0" * 5000)
