"""Jobs that loop over series: one that fails has an outcome, the others go on, the end has a count
and an exit code.
"""

import argparse
import logging
from collections import Counter
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from worklist_rows import ledger, row

from covtanet import storage, tracking
from covtanet.commands import evaluate, promote, report
from covtanet.commands import ledger as ledger_command
from covtanet.ct.window import WindowConfig
from covtanet.data import prepared, prepared_file
from covtanet.data.labels import LabelledVolume
from covtanet.data.prepared import PreparedVolume
from covtanet.errors import ConfigError
from covtanet.evaluation.pipeline import Evaluated, guarded
from covtanet.evaluation.promotion import Comparison
from covtanet.evaluation.rows import EVALUATION_SCHEMA
from covtanet.experiments.model_evaluation import count_outcomes
from covtanet.experiments.preparation import prepare_row
from covtanet.ledger.schema import LEDGER_SCHEMA
from covtanet.report import night_report
from covtanet.report.comparison import compare
from covtanet.storage import AccessError

RUN_ID = "0123456789abcdef"
CANARY = "Doe^Jane"
WINDOW = WindowConfig(size_px=64)


def committed(folder: Path, table: pa.Table) -> Path:
    path = folder / "date=2026-11-23" / f"{RUN_ID}.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(table, path)
    return folder


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A committed run of six series; of the four screened one has a picture, one has one that
    cannot be read.
    """
    folder = committed(tmp_path / "ledger", ledger()) / "_results" / RUN_ID
    picture = BytesIO()
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(picture, "png")
    (folder / ("b" * 32)).mkdir(parents=True)
    (folder / ("b" * 32) / "preview.png").write_bytes(picture.getvalue())
    (folder / ("c" * 32) / "preview.png").mkdir(parents=True)  # reading it is an OSError
    return tmp_path / "ledger"


def run(job: Any, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["job.py", *arguments])
    code: int = job.main()
    return code


def test_report_goes_on_without_a_picture_that_cannot_be_read(
    pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target, outcomes = night_report.make_report(str(pictures), "", "")
    assert outcomes == Counter(without_picture=2, shown=1, storage=1)
    assert Path(target).read_text().count("data:image/png") == 1
    assert run(report, monkeypatch, "--ledger", str(pictures)) == 4
    assert "1 shown, 1 storage, 2 without_picture" in capsys.readouterr().err
    (pictures / "_results" / RUN_ID / ("c" * 32) / "preview.png").rmdir()
    assert run(report, monkeypatch, "--ledger", str(pictures)) == 0
    assert run(report, monkeypatch, "--ledger", str(pictures / "none")) == 3


def test_report_ends_if_credentials_are_refused(
    pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_bytes = storage.read_bytes

    def refuse(uri: str, *arguments: Any) -> bytes:
        if uri.endswith(".png"):
            raise AccessError(CANARY)
        return read_bytes(uri, *arguments)

    monkeypatch.setattr(storage, "read_bytes", refuse)
    assert run(report, monkeypatch, "--ledger", str(pictures)) == 1


def odd() -> pa.Table:
    """A ledger whose probabilities are text: no series that has one can be compared."""
    place = LEDGER_SCHEMA.get_field_index("p_infected")
    return ledger().set_column(place, "p_infected", ledger()["p_infected"].cast(pa.string()))


def test_comparison_goes_on_after_a_series_that_fails() -> None:
    after = pa.Table.from_pylist(
        [row("b", p_infected=0.4, diagnosis="normal"), row("e")], LEDGER_SCHEMA
    )
    found = compare(odd(), after)
    assert list(found.failures) == ["b" * 32]
    assert found.statuses == {("screened", "screened"): 1}
    assert found.grades == {}
    assert "not compared, see the log" in found.as_table("title")


def test_compare_job_counts_series_that_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before, after = committed(tmp_path / "before", odd()), committed(tmp_path / "after", ledger())
    arguments = (str(before), "diff", "--flips", "--with", str(after))
    assert run(ledger_command, monkeypatch, *arguments) == 4
    logged = capsys.readouterr().err
    assert f"series {'b' * 32}: internal error, TypeError at report/comparison.py" in logged
    same = (str(after), "diff", "--flips", "--with", str(after))
    assert run(ledger_command, monkeypatch, *same) == 0
    none = (str(tmp_path / "none"), "diff", "--flips", "--with", str(after))
    assert run(ledger_command, monkeypatch, *none) == 3


def volume(key: str = "k") -> PreparedVolume:
    return PreparedVolume(
        key=key, volume_path="a.nii.gz", patient=CANARY, intensity="hu", source_digest="d"
    )


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        (ValueError(CANARY), "internal error, ValueError at"),
        (MemoryError(CANARY), "internal error, MemoryError at"),
        (OSError(CANARY), "storage: OSError"),
    ],
)
def test_volume_that_fails_is_a_row_without_its_text(error: Exception, failure: str) -> None:
    def fail(volume: PreparedVolume) -> dict[str, Any]:
        raise error

    found = guarded(volume(), fail)
    assert found.pop("failure").startswith(failure)
    assert found == {**dict.fromkeys(EVALUATION_SCHEMA.names), "volume": "k"}
    assert guarded(volume(), lambda _: {"volume": "k"}) == {"volume": "k", "failure": None}


def test_evaluation_ends_if_credentials_are_refused() -> None:
    def refuse(volume: PreparedVolume) -> dict[str, Any]:
        raise AccessError("denied")

    with pytest.raises(AccessError, match="denied"):
        guarded(volume(), refuse)


def test_evaluation_counts_outcomes_and_ends_with_4_if_volumes_are_lacking(
    caplog: pytest.LogCaptureFixture,
) -> None:
    refused = [
        prepared.refused(
            LabelledVolume(volume_path="a", patient="p"), "a", WINDOW, "mask_mismatch", ""
        )
    ]
    failures = {"b": "internal error, ValueError at x:1", "c": "storage: OSError"}
    found = count_outcomes(refused, Evaluated(rows=[{}, {}], failures=failures))
    assert found == Counter(evaluated=2, mask_mismatch=1, internal_error=1, storage=1)
    with caplog.at_level(logging.INFO):
        assert evaluate.conclude(found) == 4
    assert "2 evaluated, 1 internal_error, 1 mask_mismatch, 1 storage" in caplog.text
    assert evaluate.conclude(count_outcomes(refused, Evaluated(rows=[{}], failures={}))) == 0


@pytest.mark.parametrize(
    ("intensity", "message"),
    [
        ("grey", "intensity grey, expected hu, grey8, auto or grey8:LOW:HIGH"),
        ("grey8:250:-1250", "intensity grey8:250:-1250, expected LOW below HIGH"),
    ],
)
def test_evaluation_of_images_with_an_unknown_intensity_is_refused(
    intensity: str, message: str, tmp_path: Path
) -> None:
    folder = str(tmp_path)
    options = ("--images", folder, "--masks", folder, "--intensity", intensity)
    arguments = evaluate.parse(["--model", "m", "--out", folder, *options])
    with pytest.raises(ConfigError, match=message):
        evaluate.open_source(arguments)


def test_volume_that_storage_does_not_give_is_refused_in_an_evaluation_alone(
    tmp_path: Path,
) -> None:
    """The folds of a training would be others the next time, so it ends."""
    (tmp_path / "data" / "a.nii.gz").mkdir(parents=True)  # reading it is an OSError
    labelled = {"key": "k", **vars(LabelledVolume(volume_path="a.nii.gz", patient="p"))}
    how: dict[str, Any] = {
        "data_uri": str(tmp_path / "data"),
        "prepared_uri": str(tmp_path / "out"),
        "window": WINDOW,
    }
    found = prepared_file.from_json(
        prepare_row(labelled, **how, slice_step_mm=2.5, refuses_unread=True)["description"]
    )
    assert found.reason == "storage"
    assert not (tmp_path / "out").exists()  # it is tried again the next time
    with pytest.raises(OSError, match="volume k: storage: IsADirectoryError"):
        prepare_row(labelled, **how, slice_step_mm=2.5, refuses_unread=False)


@pytest.mark.parametrize(
    ("challenger", "failures", "code"),
    [(0.9, Counter(), 0), (0.9, Counter(internal_error=1), 4), (0.1, Counter(internal_error=1), 4)],
)
def test_promotion_with_missing_volumes_ends_with_4(
    challenger: float, failures: Counter[str], code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = [Comparison(metric="dice", challenger=challenger, champion=0.8, margin=0.01)]
    promoted: list[str] = []
    monkeypatch.setattr(tracking, "version_of", {"challenger": "2", "champion": "1"}.__getitem__)
    monkeypatch.setattr(tracking, "promote", lambda version, tags: promoted.append(version))
    tagged: list[dict[str, str]] = []
    monkeypatch.setattr(tracking, "tag_version", lambda version, tags: tagged.append(tags))
    monkeypatch.setattr(promote, "_load", lambda version: version)
    monkeypatch.setattr(promote, "evaluate_both", lambda arguments, models: (compared, failures))
    assert promote.run(argparse.Namespace(version=None, force="")) == code
    assert promoted == (["2"] if code == 0 else [])
    if code:
        assert tagged[0]["covtanet.compared_dice"] == str(compared[0])
