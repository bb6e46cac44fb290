"""The train command: exit codes, refused configurations, traceback of a fault of this software."""

from pathlib import Path
from typing import Any

import pytest
from repository import load_job

from covtanet import tracking
from covtanet.commands import train
from covtanet.data.datasets import DataSource
from covtanet.errors import CheckpointError, ConfigError, TrainingError
from covtanet.experiments import parallel
from covtanet.experiments.experiment import Experiment
from covtanet.training.config import TrainingConfig


def start(*arguments: str) -> int:
    return train.main(arguments)


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("[training]\nlow_hu = 400.0\nhigh_hu = -1000.0\n", (), "window 400..-1000 HU is empty"),
        ("[training]\nsize_px = 100\n", (), "size_px is 100"),
        ("[training]\n", ("--fold", "9"), "folds are [9], expected some of 0 .. 4"),
        ("[training]\nnot_a_setting = 1\n", (), "not_a_setting"),
        ("[training\n", (), "not TOML"),
        ("[training]\n", (), "--data and --storage are needed"),
    ],
)
def test_configuration_that_is_refused_ends_with_3_in_one_line(
    text: str, arguments: tuple[str, ...], message: str, tmp_path: Path,
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    locations: tuple[str, ...] = ()
    if "needed" not in message:
        locations = ("--data", str(tmp_path), "--storage", str(tmp_path / "kept"))
    assert start("--config", str(path), *locations, *arguments) == 3
    logged = caplog.text + capsys.readouterr().err
    assert message in logged
    assert "Traceback" not in logged


def test_value_error_of_this_software_ends_with_1_and_keeps_its_frames(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(arguments: Any) -> int:
        return int("not a number")

    monkeypatch.setattr(train, "run", broken)
    assert start("--config", "recipe.toml") == 1
    logged = capsys.readouterr().err
    assert "internal error, ValueError" in logged
    assert "in broken" in logged


def test_fault_of_one_fold_is_logged_with_its_traceback(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The other folds go on; an actor's answer would lose it."""
    experiment = Experiment(
        config=TrainingConfig(),
        uri="",
        prepared_uri="",
        key="",
        run=tracking.RunAddress(uri="", experiment="", name="", key=""),
        source=DataSource(name="manifest", volumes=(), root=""),
        volumes={},
        folds={},
        data_digest="",
    )

    def fault(*arguments: Any) -> None:
        raise ValueError("operands could not be broadcast")

    monkeypatch.setattr(parallel, "train_fold", fault)
    _, fold, error = parallel.train_one(experiment, 2, None)
    assert (fold, type(error)) == (2, ValueError)
    assert "Traceback" in caplog.text
    assert "in fault" in caplog.text


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("no data"), 3),
        (CheckpointError("damaged"), 3),
        (FloatingPointError("loss is NaN"), 1),
        (TrainingError("a worker died"), 1),
        (OSError("s3"), 1),
    ],
)
def test_errors_have_their_exit_codes(
    error: Exception, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(arguments: Any) -> int:
        raise error

    monkeypatch.setattr(train, "run", fail)
    assert start("--config", "recipe.toml") == code


@pytest.mark.parametrize("name", ["train", "evaluate", "promote"])
def test_job_scripts_call_the_commands(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        load_job(name).main()
    assert f"usage: covtanet {name}" in capsys.readouterr().out


def test_variants_of_the_command_line_are_the_papers_networks() -> None:
    parsed = train.parse(["--config", "x.toml", "--network", "all"])
    assert parsed.network == ["all"]
    assert train.parse(["--config", "x.toml", "--ablation", "V3"]).ablation == "V3"
