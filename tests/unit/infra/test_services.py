"""Services on loopback: none listens on another address without authentication."""

from pathlib import Path

import pytest

from infra.local.services import LOOPBACK_SECRET, check_token, start_mlflow, start_ray, start_s3


def test_s3_with_known_secret_refuses_public_address(tmp_path: Path) -> None:
    for secret in (LOOPBACK_SECRET, ""):
        with pytest.raises(PermissionError, match=r"S3 would answer anybody on 0\.0\.0\.0"):
            start_s3(tmp_path, tmp_path / "log", secret=secret, host="0.0.0.0")


def test_mlflow_refuses_public_address(tmp_path: Path) -> None:
    with pytest.raises(PermissionError, match="MLflow would answer anybody"):
        start_mlflow(tmp_path, 5000, host="10.0.0.1")


@pytest.mark.parametrize(("mode", "text"), [(0o644, "secret"), (0o640, "secret"), (0o600, "")])
def test_ray_refuses_readable_or_empty_token(tmp_path: Path, mode: int, text: str) -> None:
    token = tmp_path / "token"
    token.write_text(text)
    token.chmod(mode)
    with pytest.raises(PermissionError, match=f"mode {mode:04o}, expected 0600"):
        start_ray(tmp_path / "log", {}, token, tmp_path)
    token.write_text("secret")
    token.chmod(0o600)
    check_token(token)
