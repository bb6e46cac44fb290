"""Checks of Ray's environment before a job joins a cluster."""

from pathlib import Path

import pytest

from covtanet import runtime
from covtanet.commands import screen
from covtanet.environment import check_ray_environment
from covtanet.errors import ConfigError


@pytest.mark.parametrize(
    "address", ["", "local", "127.0.0.1:6379", "localhost:6379", "[::1]:6379", "ray://127.0.0.1:1"]
)
def test_local_ray_is_joined_without_token(address: str) -> None:
    check_ray_environment({"RAY_ADDRESS": address})


@pytest.mark.parametrize(
    "address", ["10.0.0.5:6379", "head:6379", "ray://head:10001", "auto", "127.0.0.1.evil:1", "]["]
)
def test_ray_on_the_network_needs_token_mode(address: str) -> None:
    for mode in ({}, {"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": ""}):
        with pytest.raises(ConfigError, match="expected RAY_AUTH_MODE=token"):
            check_ray_environment({"RAY_ADDRESS": address, **mode})
    check_ray_environment({"RAY_ADDRESS": address, "RAY_AUTH_MODE": "token"})


@pytest.mark.parametrize(
    "name",
    [
        "RAY_DATA_AUTOLOAD_PYEXTENSIONTYPE",
        "RAY_DATA_AUTOLOAD_PICKLE_OBJECT_SCALAR",
        "RAY_DATA_AUTOLOAD_CLOUDPICKLE_TENSOR_METADATA",
    ],
)
def test_ray_data_with_unpickling_switch_is_refused(name: str) -> None:
    for value in ("1", "true", "True", "yes"):
        with pytest.raises(ConfigError, match=f"{name} is set, expected unset"):
            check_ray_environment({name: value})
    for value in ("", "0", "false", "False"):
        check_ray_environment({name: value})


def test_screening_does_not_join_an_open_cluster(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.5:6379")
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    (tmp_path / "archive").mkdir()
    arguments = ["--archive", str(tmp_path / "archive"), "--ledger", str(tmp_path / "ledger")]
    monkeypatch.setattr("sys.argv", ["screen.py", *arguments, "--model", str(model_folder)])
    assert screen.main() == 3


def test_token_file_that_others_can_read_gets_mode_0600(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    token = tmp_path / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("secret")
    token.chmod(0o644)
    runtime._write_private_token()
    assert token.stat().st_mode & 0o777 == 0o600
    assert token.read_text() == "secret"
    assert "could be read by others" in caplog.text
