"""jobs/train.py: a configuration that is refused is one line, a fault of this software keeps its traceback."""

from pathlib import Path
from typing import Any

import pytest
from repository import load_job

from covtanet.errors import CheckpointError, ConfigError, TrainingError

train = load_job("train")


def start(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["train.py", *arguments])
    code: int = train.main()
    return code


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("[training]\nlow_hu = 400.0\nhigh_hu = -1000.0\n", (), "window 400..-1000 HU is empty"),
        ("[training]\nsize_px = 100\n", (), "size_px is 100"),
        ("[training]\n", ("--fold", "9"), "folds are [9], expected some of 0 .. 4"),
        ("[training]\nnot_a_setting = 1\n", (), "not_a_setting"),
        ("[training\n", (), "is no TOML"),
        ("[training]\n", (), "--data and --storage are needed"),
    ],
)
def test_configuration_that_is_refused_ends_with_3_in_one_line(
    text: str, arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    places = (
        ()
        if "needed" in message
        else ("--data", str(tmp_path), "--storage", str(tmp_path / "kept"))
    )
    assert start(monkeypatch, "--config", str(path), *places, *arguments) == 3
    logged = caplog.text + capsys.readouterr().err
    assert message in logged
    assert "Traceback" not in logged


def test_value_error_of_this_software_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter then prints it and ends with 1."""

    def broken(arguments: Any) -> int:
        return int("not a number")

    monkeypatch.setattr(train, "run", broken)
    with pytest.raises(ValueError, match="invalid literal"):
        start(monkeypatch, "--config", "recipe.toml")


def test_fault_of_one_fold_is_logged_with_its_traceback(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The other folds go on; an actor's answer would lose it."""
    config = train.TrainingConfig()
    current = train.experiment.Experiment(
        config=config,
        uri="",
        prepared_uri="",
        key="",
        run=None,
        volumes={},
        folds={},
        data_digest="",
    )

    def fault(*arguments: Any) -> None:
        raise ValueError("operands could not be broadcast")

    monkeypatch.setattr(train.experiment, "train_fold", fault)
    _, fold, error = train.train_one(current, 2, None)
    assert (fold, type(error)) == (2, ValueError)
    assert "Traceback" in caplog.text
    assert "in fault" in caplog.text


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("no data"), 3),
        (CheckpointError("damaged"), 3),
        (FloatingPointError("loss is NaN"), 4),
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
    assert start(monkeypatch, "--config", "recipe.toml") == code
