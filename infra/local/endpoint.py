"""make serve: S3, MLflow, Ray and the endpoint on loopback, with the demo's model; Ctrl-C or ``make stop`` ends all.

It makes the demo first where there is no model yet. Under .serve/ it leaves what a first request needs: ``env``
(COVTANET_URL and COVTANET_TOKEN, mode 0600), a NIfTI file and a zip of DICOM objects.
"""

import argparse
import hashlib
import http.client
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import requests
from services import (
    LOOPBACK,
    ROOT,
    Service,
    free_ports,
    is_healthy,
    start_mlflow,
    start_ray,
    start_s3,
    wait_for,
    write_private,
)

DEMO, HERE = ROOT / ".demo", ROOT / ".serve"
PLACES = ("s3://demo",)
LEDGER = "s3://demo/served-ledger"
# What every node of a Ray that serves needs in its environment, beside COVTANET_SERVE_CONFIG.
SERVE_ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve.proxy:middlewares",
}
ANSWER_TIMEOUT_S = 300
CONFIG = """\
model = "{model}"
ledger = "{ledger}"
reload_every_s = {reload_every_s}
upload_timeout_s = {upload_timeout_s}
request_timeout_s = {request_timeout_s}
max_waiting = {max_waiting}
max_uploads_per_caller = {max_uploads_per_caller}
cpus_per_decoder = 0.25
reserves_memory = false
driver_cpus = 0.5
driver_memory_mib = 0
config = "{config}"

[[callers]]
name = "local"
token_sha256 = "{digest}"
places = [{places}]
"""


def write_config(
    path: Path, token: str, *, model: str, ledger: str, places: tuple[str, ...], reload_every_s: float = 30,
    max_waiting: int = 8, config: str = "", upload_timeout_s: float = 120, request_timeout_s: float = 300,
    max_uploads_per_caller: int = 16,
) -> None:  # fmt: skip
    """The endpoint's settings with one caller; the token itself is not in them.

    The shares of processors are those of ``NUM_LOGICAL_CPUS``: beside the endpoint and a batch's driver three are left
    for the batch.
    """
    path.write_text(
        CONFIG.format(
            model=model, ledger=ledger, reload_every_s=reload_every_s, max_waiting=max_waiting, config=config,
            upload_timeout_s=upload_timeout_s, request_timeout_s=request_timeout_s,
            max_uploads_per_caller=max_uploads_per_caller,
            digest=hashlib.sha256(token.encode()).hexdigest(), places=", ".join(f'"{place}"' for place in places),
        )
    )  # fmt: skip


def write_examples(folder: Path) -> None:
    """A phantom as a NIfTI file and as a zip of DICOM objects."""
    from covtanet.ct import nifti
    from covtanet.phantoms.encodings import dicom_objects, nifti_grid
    from covtanet.phantoms.phantom import make_phantom
    from covtanet.phantoms.sampling import configs

    (config,) = list(configs(3, 99))[1:2]
    phantom = make_phantom(config)
    (folder / "example.nii.gz").write_bytes(nifti.write(phantom.hu, nifti_grid(phantom)))
    with zipfile.ZipFile(folder / "example-dicom.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for index, data in enumerate(dicom_objects(phantom, 99)):
            archive.writestr(f"series/{index:04d}.dcm", data)


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """An endpoint that runs here, as its caller sees it."""

    service: Service
    token: str

    @property
    def url(self) -> str:
        """Where it answers."""
        return self.service.environment["COVTANET_URL"]

    def ask(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[int, Any, Mapping[str, str]]:
        """Status, body (JSON parsed, else bytes) and headers of one request; headers may replace the token."""
        own = {"Authorization": f"Bearer {self.token}", **(headers or {})}
        answer = requests.request(
            method, f"{self.url}{path}", data=body, headers=own, timeout=ANSWER_TIMEOUT_S
        )
        is_json = "application/json" in answer.headers.get("Content-Type", "")
        return answer.status_code, answer.json() if is_json else answer.content, answer.headers

    def announce(
        self, num_bytes: int, path: str = "/v1/studies", headers: Mapping[str, str] | None = None
    ) -> http.client.HTTPConnection:
        """Send the head of a request and none of its body. headers: in place of the token."""
        connection = http.client.HTTPConnection(
            self.url.removeprefix("http://"), timeout=ANSWER_TIMEOUT_S
        )
        connection.putrequest("POST", path)
        connection.putheader("Content-Length", str(num_bytes))
        for name, value in (
            {"Authorization": f"Bearer {self.token}"} if headers is None else headers
        ).items():
            connection.putheader(name, value)
        connection.endheaders()
        return connection


def start_endpoint(environment: dict[str, str], port: int, log: Path, token: str) -> Endpoint:
    """Deploy the application on the Ray that the environment names and wait until its model answers.

    token: of the caller in its configuration.
    """
    command = [
        sys.executable, "-c",
        "from ray import serve; from serve.app import app; "
        f"serve.start(http_options={{'host': '{LOOPBACK}', 'port': {port}}}); serve.run(app({{}}), blocking=True)",
    ]  # fmt: skip
    with log.open("ab") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, start_new_session=True, env=environment, cwd=ROOT
        )
    service = Service(process, {"COVTANET_URL": f"http://{LOOPBACK}:{port}"}, log)
    wait_for(service, lambda: is_healthy(f"http://{LOOPBACK}:{port}/readyz"))
    return Endpoint(service=service, token=token)


def main() -> int:
    """Start everything, say where it is, and wait."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--port", type=int, default=8000)
    options.add_argument("--stop", action="store_true", help="end the one that runs")
    arguments = options.parse_args()
    other = running()
    if arguments.stop:
        return stop(other)
    if other is not None:
        return refuse(other)
    if not (DEMO / "mlflow.db").exists():
        print("There is no model yet: making the demo first (10 minutes).", flush=True)
        if subprocess.run(
            [sys.executable, ROOT / "infra" / "local" / "demo.py"], check=False
        ).returncode:
            print("The demo did not end as it should; its model is used all the same.", flush=True)
    shutil.rmtree(HERE, ignore_errors=True)
    HERE.mkdir()
    (HERE / "pid").write_text(str(os.getpid()))
    for ending in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, lambda *_: sys.exit(143))
    services: list[Service] = []
    with tempfile.TemporaryDirectory(prefix="cov") as short:
        try:
            run(services, arguments.port, Path(short))
        except KeyboardInterrupt:
            print("stopping")
        finally:
            for service in reversed(services):
                service.stop()
            (HERE / "pid").unlink(missing_ok=True)
    return 0


def running() -> psutil.Process | None:
    """The process of another ``make serve`` of this folder."""
    try:
        process = psutil.Process(int((HERE / "pid").read_text()))
        return process if Path(__file__).name in " ".join(process.cmdline()) else None
    except (OSError, ValueError, psutil.Error):
        return None


def stop(process: psutil.Process | None) -> int:
    """End it and all that it started."""
    if process is None:
        print("nothing runs")
        return 0
    process.terminate()
    process.wait()
    print("stopped")
    return 0


def refuse(process: psutil.Process) -> int:
    """Say that it runs already."""
    print(f"it runs already, as process {process.pid}; `make stop` ends it", file=sys.stderr)
    return 3


def run(services: list[Service], port: int, short: Path) -> None:
    """Start the services one by one and wait until one of them ends."""
    s3 = start_s3(DEMO / "s3", HERE / "s3.log")
    services.append(s3)
    tracker = start_mlflow(DEMO, free_ports(1)[0])
    services.append(tracker)
    token, ray_token = secrets.token_urlsafe(32), HERE / "ray_token"
    write_private(ray_token, secrets.token_hex(32))
    write_config(
        HERE / "config.toml", token, model="models:/covtanet@champion", ledger=LEDGER, places=PLACES
    )
    environment = {
        **s3.environment,
        **tracker.environment,
        "COVTANET_SERVE_CONFIG": str(HERE / "config.toml"),
        **SERVE_ENVIRONMENT,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    print("starting Ray", flush=True)
    ray = start_ray(HERE / "ray.log", environment, ray_token, temp_folder=short)
    services.append(ray)
    print("starting the endpoint", flush=True)
    endpoint = start_endpoint(
        {**os.environ, **ray.environment}, port or free_ports(1)[0], HERE / "serve.log", token
    )
    services.append(endpoint.service)
    os.environ.update(s3.environment)
    write_examples(HERE)
    url = endpoint.url
    write_private(
        HERE / "env",
        f"export COVTANET_URL={shlex.quote(url)}\nexport COVTANET_TOKEN={shlex.quote(token)}\n",
    )
    print(f"ready     {url}  (the token is in {HERE / 'env'})")
    print(f"page      {url}/")
    print(f"API       {url}/openapi.json  (with the token)")
    print(f"registry  {tracker.environment['MLFLOW_TRACKING_URI']}")
    print("Research use only, not a medical device. Ctrl-C ends it.", flush=True)
    while all(service.process.poll() is None for service in services):
        time.sleep(1)
    raise SystemExit(f"one of the services ended, see {HERE}/*.log")


if __name__ == "__main__":
    sys.exit(main())
