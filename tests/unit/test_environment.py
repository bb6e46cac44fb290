"""Services listen on loopback or with authentication, and keys never travel in clear text."""

from pathlib import Path

import pytest
from services import LOOPBACK_SECRET, check_token, start_mlflow, start_ray, start_s3

from covtanet.environment import ALLOW_PLAIN_HTTP, ENDPOINTS, check_endpoints
from covtanet.errors import ConfigError
from covtanet.runtime import check_tracking


def test_s3_with_the_secret_that_stands_in_the_source_stays_on_loopback(tmp_path: Path) -> None:
    for secret in (LOOPBACK_SECRET, ""):
        with pytest.raises(PermissionError, match=r"S3 would answer anybody on 0\.0\.0\.0"):
            start_s3(tmp_path, tmp_path / "log", secret=secret, host="0.0.0.0")


def test_mlflow_stays_on_loopback(tmp_path: Path) -> None:
    with pytest.raises(PermissionError, match="MLflow would answer anybody"):
        start_mlflow(tmp_path, 5000, host="10.0.0.1")


@pytest.mark.parametrize(("mode", "text"), [(0o644, "secret"), (0o640, "secret"), (0o600, "")])
def test_ray_wants_a_token_that_is_secret(tmp_path: Path, mode: int, text: str) -> None:
    token = tmp_path / "token"
    token.write_text(text)
    token.chmod(mode)
    with pytest.raises(PermissionError, match=f"mode {mode:04o}, expected 0600"):
        start_ray(tmp_path / "log", {}, token, tmp_path)
    token.write_text("secret")
    token.chmod(0o600)
    check_token(token)


SAFE = [
    "",
    "https://s3.eu-central-1.amazonaws.com",
    "HTTPS://mlflow.hospital.example",
    "http://127.0.0.1:9000",
    "http://[::1]:5000",
    "http://localhost:5000",
    "http://minio:9000",
    "http://minio.storage.svc",
    "http://MINIO.storage.SVC.:9000",
    "http://mlflow.storage.svc.cluster.local:5000",
    "sqlite:////data/mlflow.db",
    "file:///data/mlruns",
    "/data/mlruns",
    "databricks",
]
PRIVATE = [
    "http://10.0.0.7:9000",
    "http://192.168.1.5",
    "http://[fd00::7]:9000",
    "http://minio.hospital.local",
    "http://minio.corp.internal",
]
PUBLIC = [
    "http://s3.amazonaws.com",
    "http://8.8.8.8",
    "http://mlflow.hospital.example:5000",
    "HTTP://mlflow.hospital.example",
    "http://[2001:4860:4860::8888]",
    "http://evil.example/minio.svc",
    "http://127.0.0.1:x@evil.example/",
    "http://minio.svc@evil.example",
    "http://minio.svc.evil.example",
    "http://evilsvc.example",
    "http://notcluster.local.example",
]
ODD = [  # an integer, hexadecimal, short forms, unspecified, the cloud's metadata service, no host
    "http://134744072",
    "http://0x08080808",
    "http://8.8",
    "http://127.1",
    "http://0.0.0.0",
    "http://[::]",
    "http://169.254.169.254",
    "http://[::ffff:8.8.8.8]",
    "http://",
    "http:///bucket",
    "http://[::1",
    "http:minio",
    "http://.svc",
    "http://a..svc",
    "http://a b.svc",
]


@pytest.mark.parametrize("name", ENDPOINTS)
@pytest.mark.parametrize("uri", SAFE)
def test_encrypted_or_near_endpoint_is_accepted(name: str, uri: str) -> None:
    check_endpoints({name: uri})


@pytest.mark.parametrize("name", ENDPOINTS)
def test_plain_http_to_a_public_host_is_refused_even_with_the_switch(name: str) -> None:
    for uri in (*PUBLIC, *ODD):
        for switch in ({}, {ALLOW_PLAIN_HTTP: "1"}):
            with pytest.raises(ConfigError, match=f"^{name} is plain http"):
                check_endpoints({name: uri, **switch})


@pytest.mark.parametrize("uri", PRIVATE)
def test_plain_http_in_a_private_network_needs_the_switch(uri: str) -> None:
    for value in ("", "0", "true"):
        with pytest.raises(ConfigError, match=f"{ALLOW_PLAIN_HTTP}=1"):
            check_endpoints({"AWS_ENDPOINT_URL": uri, ALLOW_PLAIN_HTTP: value})
    check_endpoints({"AWS_ENDPOINT_URL": uri, ALLOW_PLAIN_HTTP: "1"})


def test_refusal_names_the_host_without_password() -> None:
    with pytest.raises(ConfigError, match=r"mlflow\.hospital\.example") as caught:
        check_endpoints(
            {"MLFLOW_TRACKING_URI": "http://user:swordfish@mlflow.hospital.example/x?key=swordfish"}
        )
    assert "swordfish" not in str(caught.value)


def test_jobs_refuse_plain_http_endpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.hospital.example:5000")
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_URI is plain http"):
        check_tracking()
