"""Serve the demo's model on loopback: S3, MLflow, Ray, the endpoint and the worklist.

python -m infra.local.serve [--port PORT]     until Ctrl-C; makes the demo first if there is none
python -m infra.local.serve --stop            end the one that runs

Under .serve/ it leaves the files that a first request needs: ``env`` (COVTANET_URL and
COVTANET_TOKEN, mode 0600), a NIfTI file and a zip of DICOM objects.
"""

import argparse
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
from pathlib import Path

import psutil

from covtanet.ct import nifti
from covtanet.phantoms.encodings import dicom_objects, nifti_grid
from covtanet.phantoms.phantom import make_phantom
from covtanet.phantoms.sampling import configs
from infra.local.endpoint import SERVE_ENVIRONMENT, Endpoint, start_endpoint, write_config
from infra.local.services import (
    ROOT,
    Service,
    free_ports,
    start_mlflow,
    start_ray,
    start_s3,
    write_private,
)

DEMO = ROOT / ".demo"
FOLDER = ROOT / ".serve"
PLACES = ("s3://demo",)
LEDGER = "s3://demo/served-ledger"
MODULE = "infra.local.serve"


def main() -> int:
    """Start everything, print its addresses, and wait."""
    options = argparse.ArgumentParser(
        prog=MODULE, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--port", type=int, default=8000)
    options.add_argument("--stop", action="store_true", help="end the one that runs")
    arguments = options.parse_args()
    process = running()
    if arguments.stop:
        return stop(process)
    if process is not None:
        print(f"already running as process {process.pid}; end it by `make stop`", file=sys.stderr)
        return 3
    if not (DEMO / "mlflow.db").exists():
        make_demo()
    return serve(arguments.port)


def running() -> psutil.Process | None:
    """Return the process of another ``make serve`` of this checkout."""
    try:
        process = psutil.Process(int((FOLDER / "pid").read_text()))
        # The system may have given the id of an ended one to another program.
        is_ours = MODULE in process.cmdline()
    except (OSError, ValueError, psutil.Error):
        return None
    return process if is_ours else None


def stop(process: psutil.Process | None) -> int:
    """End a ``make serve`` and everything that it started."""
    if process is None:
        print("nothing runs")
        return 0
    process.terminate()
    process.wait()
    print("stopped")
    return 0


def make_demo() -> None:
    """Run the demo, which leaves a model in its registry even if its ledger is wrong."""
    print("There is no model yet: making the demo first (10 minutes).", flush=True)
    demo = subprocess.run([sys.executable, "-m", "infra.local.demo"], check=False, cwd=ROOT)
    if demo.returncode:
        print("The demo failed; its model is used all the same.", flush=True)


def serve(port: int) -> int:
    """Run the services until Ctrl-C, SIGTERM or the end of one of them, then stop all."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    (FOLDER / "pid").write_text(str(os.getpid()))
    for ending in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, lambda *_: sys.exit(143))
    services: list[Service] = []
    with tempfile.TemporaryDirectory(prefix="cov") as short:
        try:
            start(services, port, Path(short))
            while all(service.process.poll() is None for service in services):
                time.sleep(1)
            raise SystemExit(f"a service ended, see {FOLDER}/*.log")
        except KeyboardInterrupt:
            print("stopping")
        finally:
            for service in reversed(services):
                service.stop()
            (FOLDER / "pid").unlink(missing_ok=True)
    return 0


def start(services: list[Service], port: int, short: Path) -> None:
    """Start the services one by one, each appended to ``services`` once it runs."""
    s3 = start_s3(DEMO / "s3", FOLDER / "s3.log")
    services.append(s3)
    tracker = start_mlflow(DEMO, free_ports(1)[0])
    services.append(tracker)
    token = secrets.token_urlsafe(32)
    ray_token = FOLDER / "ray_token"
    write_private(ray_token, secrets.token_hex(32))
    write_config(
        FOLDER / "config.toml",
        token,
        model="models:/covtanet@champion",
        ledger=LEDGER,
        places=PLACES,
    )
    environment = {
        **s3.environment,
        **tracker.environment,
        "COVTANET_SERVE_CONFIG": str(FOLDER / "config.toml"),
        **SERVE_ENVIRONMENT,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    print("starting Ray", flush=True)
    ray = start_ray(FOLDER / "ray.log", environment, ray_token, temp_folder=short)
    services.append(ray)
    print("starting the endpoint", flush=True)
    variables = {**os.environ, **ray.environment}
    endpoint = start_endpoint(variables, port or free_ports(1)[0], FOLDER / "serve.log", token)
    services.append(endpoint.service)
    write_examples(FOLDER)
    announce(endpoint, tracker)


def announce(endpoint: Endpoint, tracker: Service) -> None:
    """Write the file ``env``, and print the addresses."""
    variables = {"COVTANET_URL": endpoint.url, "COVTANET_TOKEN": endpoint.token}
    lines = [f"export {name}={shlex.quote(value)}\n" for name, value in variables.items()]
    write_private(FOLDER / "env", "".join(lines))
    print(f"ready     {endpoint.url}  (the token is in {FOLDER / 'env'})")
    print(f"page      {endpoint.url}/")
    print(f"API       {endpoint.url}/openapi.json  (with the token)")
    print(f"registry  {tracker.environment['MLFLOW_TRACKING_URI']}")
    print("Research use only, not a medical device. Ctrl-C ends it.", flush=True)


def write_examples(folder: Path) -> None:
    """Write a phantom as a NIfTI file and as a zip of DICOM objects."""
    _, config, _ = configs(3, 99)
    phantom = make_phantom(config)
    (folder / "example.nii.gz").write_bytes(nifti.write(phantom.hu, nifti_grid(phantom)))
    with zipfile.ZipFile(folder / "example-dicom.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for index, data in enumerate(dicom_objects(phantom, 99)):
            archive.writestr(f"series/{index:04d}.dcm", data)


if __name__ == "__main__":
    sys.exit(main())
