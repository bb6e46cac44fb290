"""The log that a machine reads: one JSON object a line, with the run's id and the series' key as
fields.
"""

import json
import logging

import pytest

from covtanet import runtime


@pytest.fixture(autouse=True)
def _own_handlers() -> object:
    root = logging.getLogger()
    kept, level = root.handlers[:], root.level
    yield
    root.handlers[:] = kept
    root.setLevel(level)


def test_json_lines_carry_the_run_and_the_series(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COVTANET_LOG", "json")
    runtime.start_logging()
    logging.getLogger("covtanet").info("%d series", 3)
    runtime.start_logging(run_id="r1")
    logging.getLogger("covtanet").warning("series %s failed", "k1", extra={"series_key": "k1"})
    first, second = map(json.loads, capsys.readouterr().err.splitlines())
    assert (first["level"], first["logger"], first["message"]) == ("INFO", "covtanet", "3 series")
    assert "run_id" not in first
    assert (second["run_id"], second["series_key"], second["message"]) == (
        "r1",
        "k1",
        "series k1 failed",
    )
    assert second["time"]


def test_without_the_setting_lines_are_for_people(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("COVTANET_LOG", raising=False)
    runtime.start_logging(run_id="r1")
    logging.getLogger("covtanet").warning("two lines")
    line = capsys.readouterr().err
    assert line.endswith(" WARNING covtanet: two lines\n")
    assert line[2] == ":"
