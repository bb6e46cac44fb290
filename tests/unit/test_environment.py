"""Endpoints in plain HTTP are refused beyond this machine and its cluster."""

import pytest

from covtanet.environment import ALLOW_PLAIN_HTTP, ENDPOINTS, check_endpoints
from covtanet.errors import ConfigError
from covtanet.runtime import check_tracking

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
def test_encrypted_or_local_endpoint_is_accepted(name: str, uri: str) -> None:
    check_endpoints({name: uri})


@pytest.mark.parametrize("name", ENDPOINTS)
def test_plain_http_to_public_host_is_always_refused(name: str) -> None:
    for uri in (*PUBLIC, *ODD):
        for switch in ({}, {ALLOW_PLAIN_HTTP: "1"}):
            with pytest.raises(ConfigError, match=f"^{name} is plain http"):
                check_endpoints({name: uri, **switch})


@pytest.mark.parametrize("uri", PRIVATE)
def test_plain_http_in_private_network_needs_the_variable(uri: str) -> None:
    for value in ("", "0", "true"):
        with pytest.raises(ConfigError, match=f"{ALLOW_PLAIN_HTTP}=1"):
            check_endpoints({"AWS_ENDPOINT_URL": uri, ALLOW_PLAIN_HTTP: value})
    check_endpoints({"AWS_ENDPOINT_URL": uri, ALLOW_PLAIN_HTTP: "1"})


def test_refused_endpoint_names_host_without_password() -> None:
    with pytest.raises(ConfigError, match=r"mlflow\.hospital\.example") as caught:
        check_endpoints(
            {"MLFLOW_TRACKING_URI": "http://user:swordfish@mlflow.hospital.example/x?key=swordfish"}
        )
    assert "swordfish" not in str(caught.value)


def test_jobs_refuse_plain_http_endpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.hospital.example:5000")
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_URI is plain http"):
        check_tracking()
