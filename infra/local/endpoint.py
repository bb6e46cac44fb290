"""Start the endpoint on a running Ray, and send it requests."""

import hashlib
import http.client
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

from covtanet.machine import num_cores
from infra.local.services import (
    LOOPBACK,
    ROOT,
    START_TIMEOUT_S,
    Service,
    is_healthy,
    wait_for,
)

# Variables of every node of a Ray that serves, beside COVTANET_SERVE_CONFIG.
SERVE_ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve.proxy:middlewares",
}
ANSWER_TIMEOUT_S = 300
# The shares of processors fit services.NUM_LOGICAL_CPUS: beside the endpoint and the driver of a
# batch, three logical CPUs are left for the batch. The network has all cores of the machine, since
# batches and single studies are rare at the same moment on a laptop.
CONFIG = """\
model = "{model}"
ledger = "{ledger}"
reload_every_s = {reload_every_s}
upload_timeout_s = {upload_timeout_s}
request_timeout_s = {request_timeout_s}
max_waiting = {max_waiting}
max_uploads = {max_uploads}
max_uploads_per_caller = {max_uploads_per_caller}
num_api_replicas = {num_api_replicas}
cpus_per_decoder = 0.25
reserves_memory = false
num_model_replicas = {num_model_replicas}
max_model_replicas_per_node = {max_model_replicas_per_node}
model_cpus = {model_cpus}
model_threads = {model_threads}
model_gpus = {model_gpus}
driver_cpus = 0.5
driver_memory_mib = 0
config = "{config}"

[[callers]]
name = "local"
token_sha256 = "{digest}"
places = [{places}]
may_store = {may_store}
"""


def write_config(
    path: Path,
    token: str,
    *,
    model: str,
    ledger: str,
    places: tuple[str, ...],
    reload_every_s: float = 30,
    max_waiting: int = 8,
    config: str = "",
    upload_timeout_s: float = 120,
    request_timeout_s: float = 300,
    max_uploads: int = 16,
    max_uploads_per_caller: int = 16,
    may_store: bool = False,
    num_api_replicas: int = 1,
    num_model_replicas: int = 1,
    max_model_replicas_per_node: int | None = None,
    model_gpus: float = 0.0,
) -> None:
    """Write the endpoint's settings with one caller, who may read ``places``.

    Model replicas share one logical CPU and the cores of the machine. The file holds the token's
    digest, not the token. max_model_replicas_per_node: None for as many as there are.
    """
    text = CONFIG.format(
        model=model,
        ledger=ledger,
        reload_every_s=reload_every_s,
        max_waiting=max_waiting,
        config=config,
        upload_timeout_s=upload_timeout_s,
        request_timeout_s=request_timeout_s,
        max_uploads=max_uploads,
        max_uploads_per_caller=max_uploads_per_caller,
        may_store=json.dumps(may_store),
        num_api_replicas=num_api_replicas,
        num_model_replicas=num_model_replicas,
        max_model_replicas_per_node=max_model_replicas_per_node or num_model_replicas,
        model_cpus=1 / num_model_replicas,
        model_threads=max(1, num_cores() // num_model_replicas),
        model_gpus=model_gpus,
        digest=hashlib.sha256(token.encode()).hexdigest(),
        places=", ".join(f'"{uri}"' for uri in places),
    )
    path.write_text(text)


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """A running endpoint and the token of its caller."""

    service: Service
    token: str

    @property
    def url(self) -> str:
        """Return the URL without a slash at its end."""
        return self.service.environment["COVTANET_URL"]

    def ask(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[int, Any, Mapping[str, str]]:
        """Send a request; return status, body and headers.

        headers: added to the token, or in its place. The body is parsed if it is JSON, else bytes.
        """
        answer = requests.request(
            method,
            f"{self.url}{path}",
            data=body,
            headers={"Authorization": f"Bearer {self.token}", **(headers or {})},
            timeout=ANSWER_TIMEOUT_S,
        )
        is_json = "application/json" in answer.headers.get("Content-Type", "")
        content = answer.json() if is_json else answer.content
        return answer.status_code, content, answer.headers

    def announce(
        self, num_bytes: int, path: str = "/v1/studies", headers: Mapping[str, str] | None = None
    ) -> http.client.HTTPConnection:
        """Send the head of a request and nothing of its body. headers: in place of the token."""
        if headers is None:
            headers = {"Authorization": f"Bearer {self.token}"}
        address = self.url.removeprefix("http://")
        connection = http.client.HTTPConnection(address, timeout=ANSWER_TIMEOUT_S)
        connection.putrequest("POST", path)
        connection.putheader("Content-Length", str(num_bytes))
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.endheaders()
        return connection


def start_endpoint(
    environment: dict[str, str],
    port: int,
    log: Path,
    token: str,
    *,
    host: str = LOOPBACK,
    inside: tuple[str, ...] = (),
    timeout_s: float = START_TIMEOUT_S,
) -> Endpoint:
    """Deploy the application on the environment's Ray, and wait until its model answers.

    token: of the caller in its settings. host: the address on which the proxy of every node
    listens. inside: a command that runs another, such as on one of several nodes.
    """
    code = (
        "from ray import serve; from serve.app import app; "
        f"serve.start(http_options={{'host': '{host}', 'port': {port}}}); "
        "serve.run(app({}), blocking=True)"
    )
    with log.open("ab") as out:
        process = subprocess.Popen(
            [*inside, sys.executable, "-c", code],
            stdout=out,
            stderr=out,
            start_new_session=True,
            env=environment,
            cwd=ROOT,
        )
    service = Service(process, {"COVTANET_URL": f"http://{LOOPBACK}:{port}"}, log)
    wait_for(service, lambda: is_healthy(f"http://{LOOPBACK}:{port}/readyz"), timeout_s)
    return Endpoint(service=service, token=token)
