"""Services for the demo and the tests: an S3 server, a Ray head, MLflow.

Each runs on a free port as a process group and is stopped as one. They listen on loopback; on
another address a service without authentication does not start.
"""

import contextlib
import ipaddress
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LOOPBACK = "127.0.0.1"
LOOPBACK_SECRET = "covtanet-on-loopback"
START_TIMEOUT_S = 90
STOP_TIMEOUT_S = 5
# More logical CPUs than a small machine has cores: two training workers, ingest and prediction each
# hold one; the endpoint and the driver of a batch hold two, and leave three that a screening needs.
NUM_LOGICAL_CPUS = 5
OBJECT_STORE_BYTES = 1 << 30
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_COLOR_PREFIX": "0"}
# A hospital's HTTP proxy leads to hosts outside; requests to loopback must not go through it.
NO_PROXY = {"NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost"}


@dataclass
class Service:
    """A running process group, and the environment variables that its clients need."""

    process: subprocess.Popen[bytes]
    environment: dict[str, str]
    log: Path = field(default=Path())

    def stop(self) -> None:
        """End the whole process group: SIGTERM, wait, SIGKILL."""
        stop_group(self.process)


def stop_group(process: subprocess.Popen[bytes] | subprocess.Popen[str]) -> None:
    """End a process and its group: SIGTERM, then SIGKILL for those that survive it."""
    for sent in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sent)
        except ProcessLookupError:
            break
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while time.monotonic() < deadline and _is_alive(process):
            time.sleep(0.1)


def _is_alive(process: subprocess.Popen[bytes] | subprocess.Popen[str]) -> bool:
    process.poll()
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True


def write_private(path: Path, text: str) -> None:
    """Write a file that other users cannot read."""
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o600), "w") as file:
        file.write(text)


def check_address(service: str, host: str, *, is_authenticated: bool) -> None:
    """Refuse to listen beyond loopback without authentication.

    Raises:
        PermissionError: names the service and the address.
    """
    if not ipaddress.ip_address(host).is_loopback and not is_authenticated:
        raise PermissionError(
            f"{service} would answer anybody on {host}, expected loopback or authentication"
        )


def check_token(token: Path) -> None:
    """Refuse a token file that others can read.

    Raises:
        PermissionError: names the file's mode.
    """
    mode = token.stat().st_mode & 0o777
    if mode & 0o077 or not token.read_text().strip():
        raise PermissionError(
            f"the token file has mode {mode:04o}, expected 0600 and a token in it"
        )


def free_ports(count: int) -> list[int]:
    """Return ports that nothing listens on now."""
    with contextlib.ExitStack() as stack:
        ports = []
        # All are bound at once: a port that is closed again may be given out a second time.
        for _ in range(count):
            listener = stack.enter_context(socket.socket())
            listener.bind((LOOPBACK, 0))
            ports.append(int(listener.getsockname()[1]))
        return ports


def start_s3(
    folder: Path,
    log: Path,
    key: str = "covtanet",
    secret: str = LOOPBACK_SECRET,
    port: int = 0,
    host: str = LOOPBACK,
) -> Service:
    """Serve a folder as S3: its subfolders are buckets. port: 0 takes a free one."""
    # LOOPBACK_SECRET stands in this file, so it protects nothing.
    check_address("S3", host, is_authenticated=secret not in ("", LOOPBACK_SECRET))
    port = port or free_ports(1)[0]
    binary = Path(sys.executable).with_name("rclone")
    folder.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as out:
        process = subprocess.Popen(
            [binary, "serve", "s3", "--addr", f"{host}:{port}", folder],
            stdout=out,
            stderr=out,
            start_new_session=True,
            # By environment: every user can read a process' arguments. The value is a CSV list of
            # one pair, which holds a comma itself.
            env={**os.environ, "RCLONE_CONFIG": os.devnull, "RCLONE_AUTH_KEY": f'"{key},{secret}"'},
        )
    direct_hosts = f"{NO_PROXY['NO_PROXY']},{host}"
    service = Service(
        process,
        {
            "NO_PROXY": direct_hosts,
            "no_proxy": direct_hosts,
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": key,
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
        },
        log,
    )
    wait_for(service, lambda: _answers(host, port))
    return service


def start_ray(
    log: Path,
    environment: dict[str, str],
    token: Path,
    temp_folder: Path,
    num_cpus: int = NUM_LOGICAL_CPUS,
) -> Service:
    """Start a Ray head on loopback with token authentication.

    environment: variables of the workers, which get none from the driver. token: a file with mode
    0600. temp_folder: a short path, because Ray keeps sockets below it.
    """
    check_token(token)
    port, dashboard, agent, agent_grpc, metrics, client, manager, raylet = free_ports(8)
    command = [
        str(Path(sys.executable).with_name("ray")),
        "start",
        "--head",
        "--block",
        "--disable-usage-stats",
        f"--node-ip-address={LOOPBACK}",
        f"--port={port}",
        f"--num-cpus={num_cpus}",
        f"--temp-dir={temp_folder}",
        f"--object-store-memory={OBJECT_STORE_BYTES}",
        "--include-dashboard=true",
        f"--dashboard-host={LOOPBACK}",
        f"--dashboard-port={dashboard}",
        f"--dashboard-agent-listen-port={agent}",
        f"--dashboard-agent-grpc-port={agent_grpc}",
        f"--metrics-export-port={metrics}",
        f"--ray-client-server-port={client}",
        f"--object-manager-port={manager}",
        f"--node-manager-port={raylet}",
    ]
    variables = {
        **environment,
        **QUIET,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
    }
    with log.open("ab") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, start_new_session=True, env={**os.environ, **variables}
        )
    variables["RAY_ADDRESS"] = f"{LOOPBACK}:{port}"
    variables["RAY_API_SERVER_ADDRESS"] = f"http://{LOOPBACK}:{dashboard}"
    service = Service(process, variables, log)
    wait_for(service, lambda: _jobs_ready(dashboard, token))
    return service


def start_mlflow(folder: Path, port: int, host: str = LOOPBACK) -> Service:
    """Start an MLflow server without authentication; database and artifacts lie in a folder."""
    check_address("MLflow", host, is_authenticated=False)
    log = folder / "mlflow.log"
    command = [
        str(Path(sys.executable).with_name("mlflow")),
        "server",
        "--host",
        host,
        "--port",
        str(port),
        "--workers",
        "1",
        "--backend-store-uri",
        f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination",
        str(folder / "artifacts"),
    ]
    with log.open("ab") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, start_new_session=True, env={**os.environ}
        )
    service = Service(process, {"MLFLOW_TRACKING_URI": f"http://{host}:{port}"}, log)
    wait_for(service, lambda: is_healthy(f"http://{host}:{port}/health"))
    return service


def is_healthy(url: str) -> bool:
    """Whether a GET returns 200."""
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def wait_for(
    service: Service, is_ready: Callable[[], bool], timeout_s: float = START_TIMEOUT_S
) -> None:
    """Wait until a service answers; stop it if it does not.

    Raises:
        RuntimeError: quotes the end of its log.
    """
    deadline = time.monotonic() + timeout_s
    try:
        while time.monotonic() < deadline and service.process.poll() is None:
            if is_ready():
                return
            time.sleep(0.2)
    except BaseException:  # interrupted before the caller could stop the service
        service.stop()
        raise
    service.stop()
    tail = service.log.read_text(errors="replace")[-2000:]
    raise RuntimeError(f"the service did not start; {service.log} ends:\n{tail}")


def _answers(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=1):
            return True
    except OSError:
        return False


def _jobs_ready(port: int, token: Path) -> bool:
    request = urllib.request.Request(
        f"http://{LOOPBACK}:{port}/api/jobs/",
        headers={"Authorization": f"Bearer {token.read_text().strip()}"},
    )
    try:
        with urllib.request.urlopen(request, timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
