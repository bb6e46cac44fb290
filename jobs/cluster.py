"""What every job does first: join or start Ray, set up the log, refuse what cannot work inside a Ray job."""

import argparse
import logging
import os
import secrets
import sys
from pathlib import Path

import ray
from pythonjsonlogger.json import JsonFormatter

from covtanet import storage
from covtanet.doors import check_endpoints, check_ray_doors
from covtanet.errors import ConfigError

logger = logging.getLogger("covtanet.cluster")

MIN_LOGICAL_CPUS = 4
# Without these glibc keeps freed volumes for reuse, and every worker creeps towards the largest series it has seen.
RETURN_MEMORY = {
    "MALLOC_ARENA_MAX": "2",
    "MALLOC_MMAP_THRESHOLD_": str(8 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(16 << 20),
}
# A tracker that is down must not hold a training up for the minutes that MLflow would go on asking.
ASK_TRACKER_BRIEFLY = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
# Ray Train looks for reports every two seconds; an epoch that is shorter would wait for it.
ASK_TRAINING_OFTEN = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"}
WORKER_ENVIRONMENT = {**RETURN_MEMORY, **ASK_TRACKER_BRIEFLY}
QUIET = ("ray", "ray.data", "botocore", "s3fs", "aiobotocore", "mlflow", "alembic", "openvino")
SILENT = ("ray._private.authentication", "ray.data._internal.progress")


def start_logging(**known: str) -> None:
    """Log to standard error; lines for people or, where COVTANET_LOG is ``json``, one object a line.

    known: fields of every object from here on, such as the run's id; call again when there is more to know.
    """
    handler = logging.StreamHandler()
    if os.environ.get("COVTANET_LOG") == "json":
        names = {"asctime": "time", "levelname": "level", "name": "logger"}
        handler.setFormatter(
            JsonFormatter(
                "%(asctime)s %(levelname)s %(name)s %(message)s",
                rename_fields=names,
                static_fields=known,
            )
        )
    else:
        handler.setFormatter(
            logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S")
        )
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in SILENT:
        logging.getLogger(name).setLevel(logging.ERROR)


def connect(*, with_dashboard: bool = False) -> None:
    """Join the cluster of this job or of RAY_ADDRESS; without one, start Ray on this machine for the job's time.

    with_dashboard: of a Ray of its own; Ray Train asks its state, and says so every second where there is none.
    A small machine gets more logical CPUs than it has cores: decoding, prediction and measuring each hold one.

    Raises:
        ConfigError: the cluster would let anybody in, or Ray Data would unpickle what it reads.
    """
    check_ray_doors(os.environ)
    for name, value in {**ASK_TRACKER_BRIEFLY, **ASK_TRAINING_OFTEN}.items():
        os.environ.setdefault(name, value)
    if os.environ.get("RAY_ADDRESS"):
        ray.init(
            log_to_driver=True,
            logging_level=logging.WARNING,
            runtime_env={"env_vars": WORKER_ENVIRONMENT},
        )
        return
    _keep_token_private()
    num_cpus = max(MIN_LOGICAL_CPUS, len(os.sched_getaffinity(0)))
    ray.init(
        address="local",
        num_cpus=num_cpus,
        include_dashboard=with_dashboard,
        _node_ip_address="127.0.0.1",
        logging_level=logging.WARNING,
        runtime_env={"env_vars": WORKER_ENVIRONMENT},
    )


def _keep_token_private() -> None:
    """Make Ray's token file before Ray does, which would leave it readable for everyone on the machine.

    One that Ray has made so is closed.
    """
    path = Path.home() / ".ray" / "auth_token"
    if path.exists() and path.stat().st_mode & 0o077:
        path.chmod(0o600)
        logger.warning("Ray's token file could be read by others; it has mode 0600 now")
    if not path.exists() and not os.environ.get("RAY_AUTH_TOKEN"):
        path.parent.mkdir(exist_ok=True)
        with open(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600), "w") as file:
            file.write(secrets.token_hex(32))


def is_ray_job() -> bool:
    """Whether this process is the entrypoint of ``ray job submit``, whose folder is a temporary copy."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def place(uri: str, option: str) -> str:
    """An absolute path or s3:// URI.

    Raises:
        ConfigError: for a relative path inside a Ray job.
    """
    path = Path(uri.removeprefix("file://")).expanduser()
    if is_ray_job() and not storage.is_s3(uri) and not path.is_absolute():
        raise ConfigError(
            f"{option} {uri} is relative, and a Ray job runs in a temporary copy of the folder it was submitted from; "
            f"give the absolute path, /.../{uri.removeprefix('./')}"
        )
    return storage.absolute(uri)


def check_tracking() -> None:
    """Refuse endpoints in clear text and, inside a Ray job, a relative SQLite registry, MLflow's default.

    Raises:
        ConfigError: with the form to use.
    """
    check_endpoints(os.environ)
    uri = os.environ.get("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    scheme, _, path = uri.partition("sqlite:///")
    if is_ray_job() and not scheme and path and not path.startswith("/"):
        raise ConfigError(
            f"MLFLOW_TRACKING_URI {uri} is relative, and a Ray job runs in a temporary copy of the folder it was "
            f"submitted from; give the absolute path, sqlite:////.../{path}"
        )


def parser(doc: str | None) -> argparse.ArgumentParser:
    """An argument parser that shows the job's own description."""
    return argparse.ArgumentParser(
        prog=f"python jobs/{Path(sys.argv[0]).name}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
