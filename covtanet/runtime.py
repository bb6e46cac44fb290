"""Shared parts of the commands: log, Ray, locations, exit codes, and the one way to end.

Ray is imported when a command joins it: commands that only read a ledger start without it.
"""

import argparse
import logging
import os
import secrets
import sys
import traceback
from collections.abc import Callable, Mapping
from enum import IntEnum
from pathlib import Path

from pythonjsonlogger.json import JsonFormatter

from covtanet import storage
from covtanet.environment import check_endpoints, check_ray_environment
from covtanet.errors import (
    AlreadyCommittedError,
    CheckpointError,
    ConfigError,
    NodesLostError,
    TrainingError,
    WeakSandboxError,
    error_location,
)
from covtanet.machine import num_cores

logger = logging.getLogger(__name__)


class ExitCode(IntEnum):
    """Exit codes of every command."""

    DONE = 0
    """Everything is done, now or by an earlier start."""
    ERROR = 1
    """Storage, Ray, a node or this software failed; the same command continues, unless the ledger
    is committed with rows of ``internal_error``."""
    USAGE = 2
    """The arguments are wrong; given by argparse."""
    REFUSED = 3
    """Refused to start: configuration, model, environment, or nothing to work on."""
    BELOW_BOUND = 4
    """Done, but the result is below a bound: too many rejected series, a worse model, ledgers
    that differ, series that could not be evaluated or exported."""
    NOT_PUBLISHED = 5
    """Not published because of another run: another driver committed first."""


# Decoding, prediction and measuring each hold a CPU at the same time.
MIN_LOGICAL_CPUS = 4
# Without these glibc keeps freed volumes for reuse, and the memory of every worker grows towards
# that of the largest series it has read.
RETURN_MEMORY = {
    "MALLOC_ARENA_MAX": "2",
    "MALLOC_MMAP_THRESHOLD_": str(8 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(16 << 20),
}
# MLflow would retry for minutes while a training waits for a tracker that is down.
MLFLOW_TIMEOUTS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
# Ray Train polls its workers every two seconds; an epoch that is shorter would wait for it.
RAY_TRAIN_POLLING = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"}
# Ray tries 20 times to reach the head of a cluster, 40 s each: a head that died would be waited for
# for a quarter of an hour without a line in the log.
RAY_CONNECT_TRIES = ("RAY_gcs_server_port_wait_time_s", "3")
NO_USAGE_STATS = {"RAY_USAGE_STATS_ENABLED": "0"}
WORKER_ENVIRONMENT = {**RETURN_MEMORY, **MLFLOW_TIMEOUTS}
QUIET_LOGGERS = (
    "ray", "ray.data", "botocore", "s3fs", "aiobotocore", "mlflow", "alembic", "openvino",
)  # fmt: skip
SILENT_LOGGERS = ("ray._private.authentication", "ray.data._internal.progress")
# A stage does not turn these into a row, since they concern every series.
JOB_ERRORS = (storage.AccessError, storage.UnreachableError, WeakSandboxError, CheckpointError)


def run_command(command: Callable[[argparse.Namespace], int], arguments: argparse.Namespace) -> int:
    """Start the log, run a command on its arguments and return its exit code; see ``run_job``."""
    start_logging()
    return run_job(lambda: command(arguments))


def run_job(job: Callable[[], int]) -> int:
    """Run a command's job, turn its errors into an exit code, and leave Ray.

    The log gets one line for an error that the person on call can act on, and a traceback for a
    fault of this software. Texts of storage's and Ray's errors may name a study: only their types
    are logged.
    """
    code: int = ExitCode.ERROR
    try:
        code = job()
    except (ConfigError, CheckpointError) as error:
        logger.error("%s", error)
        code = ExitCode.REFUSED
    except AlreadyCommittedError as error:
        logger.error("%s", error)
        code = ExitCode.NOT_PUBLISHED
    except (TrainingError, NodesLostError) as error:
        logger.error("%s; the same command continues", error)
    except FloatingPointError as error:
        # The same seed meets the same NaN again.
        logger.error("%s; change the learning rate or the seed before another start", error)
    except OSError as error:
        cause = getattr(error, "cause", None) or error
        logger.error("storage: %s; the same command continues", type(cause).__name__)
    except Exception as error:
        if _is_ray_error(error):
            logger.error("Ray: %s; the same command continues", cause_of(error))
        else:
            # The frames alone: the text of the error may quote the input.
            frames = "".join(traceback.format_tb(error.__traceback__))
            logger.error("internal error, %s\n%s", error_location(error), frames)
    finally:
        # Before the last line of the log, so that Ray's own messages do not follow it.
        _leave_ray()
        logger.info("exit code %d: %s", code, describe_exit(code))
    return code


def describe_exit(code: int) -> str:
    """Return an exit code in words, for the last line of the log."""
    return {
        ExitCode.DONE: "done",
        ExitCode.ERROR: "failed, see the error above; the same command continues, unless the "
        "ledger is committed or the error says otherwise",
        ExitCode.USAGE: "wrong arguments",
        ExitCode.REFUSED: "refused to start",
        ExitCode.BELOW_BOUND: "done, but the result is outside its limits",
        ExitCode.NOT_PUBLISHED: "not published, another run was first",
    }[ExitCode(code)]


def cause_of(error: BaseException) -> str:
    """Return the type of an error of Ray's and of the error within it.

    Ray Data hands on an error of a worker as the text of its traceback alone, a line of which
    begins with the error's type.
    """
    name = type(error).__name__
    for kind in JOB_ERRORS:
        if f"\n{kind.__module__}.{kind.__qualname__}:" in str(error):
            return f"{name} of {kind.__name__}"
    cause = getattr(error, "cause", None)
    return name if cause is None else f"{name} of {type(cause).__name__}"


def _is_ray_error(error: Exception) -> bool:
    ray = sys.modules.get("ray")
    if ray is None:
        return False
    # Ray Data raises it if nothing moves for long; it is no RayError.
    data = sys.modules.get("ray.data.exceptions")
    is_timeout = data is not None and isinstance(error, data.ExecutionTimeoutError)
    return is_timeout or isinstance(error, ray.exceptions.RayError)


def _leave_ray() -> None:
    ray = sys.modules.get("ray")
    if ray is not None:
        ray.shutdown()


def start_logging(**fields: str) -> None:
    """Log to standard error: lines for people, or JSON objects if COVTANET_LOG is ``json``.

    fields: added to every JSON object, such as the run's id; a later call replaces them.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(_formatter(os.environ, fields))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    for name in QUIET_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in SILENT_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)


def _formatter(environment: Mapping[str, str], fields: dict[str, str]) -> logging.Formatter:
    if environment.get("COVTANET_LOG") != "json":
        return logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S")
    names = {"asctime": "time", "levelname": "level", "name": "logger"}
    layout = "%(asctime)s %(levelname)s %(name)s %(message)s"
    return JsonFormatter(layout, rename_fields=names, static_fields=fields)


def connect(*, with_dashboard: bool = False) -> None:
    """Join the cluster of RAY_ADDRESS; without one, start Ray on this machine until the job ends.

    with_dashboard: also start the dashboard of a local Ray, which Ray Train asks for its state.
    A small machine gets more logical CPUs than cores: decoding, prediction and measuring each hold
    one.

    Raises:
        ConfigError: the cluster admits callers without a token, or Ray Data would unpickle data.
        NodesLostError: the cluster does not answer.
    """
    import ray

    check_ray_environment(os.environ)
    for name, value in {**MLFLOW_TIMEOUTS, **RAY_TRAIN_POLLING, **NO_USAGE_STATS}.items():
        os.environ.setdefault(name, value)
    if os.environ.get("RAY_ADDRESS"):
        os.environ.setdefault(*RAY_CONNECT_TRIES)
        runtime_env = {"env_vars": WORKER_ENVIRONMENT}
        try:
            ray.init(log_to_driver=True, logging_level=logging.WARNING, runtime_env=runtime_env)
        except ConnectionError as error:
            raise NodesLostError("the Ray of RAY_ADDRESS does not answer") from error
        return
    # A Ray of our own inherits the variables. With a runtime environment it would start every
    # worker anew and by way of an agent, instead of using those that it started with itself.
    os.environ.update(WORKER_ENVIRONMENT)
    # Before ray.init, which would create the file readable for every user.
    _write_private_token()
    ray.init(
        address="local",
        num_cpus=max(MIN_LOGICAL_CPUS, num_cores()),
        include_dashboard=with_dashboard,
        _node_ip_address="127.0.0.1",
        logging_level=logging.WARNING,
    )


def _write_private_token() -> None:
    """Create Ray's token file with mode 0600 before Ray creates it readable for every user.

    A file that Ray has created so gets mode 0600.
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
    """Return whether ``ray job submit`` started this process, in a temporary copy of the folder."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def location(uri: str, option: str) -> str:
    """Return an absolute path, an s3:// URI or a DICOMweb URI.

    Raises:
        ConfigError: a relative path inside a Ray job.
    """
    if storage.is_dicomweb(uri):
        return storage.absolute(uri)
    path = Path(uri.removeprefix("file://")).expanduser()
    if is_ray_job() and not storage.is_s3(uri) and not path.is_absolute():
        raise ConfigError(
            f"{option} {uri} is relative, and a Ray job runs in a temporary copy of the folder it "
            f"was submitted from; give the absolute path, /.../{uri.removeprefix('./')}"
        )
    return storage.absolute(uri)


def check_tracking() -> None:
    """Refuse endpoints in clear text, and a relative SQLite registry inside a Ray job.

    Raises:
        ConfigError: with the form to use.
    """
    check_endpoints(os.environ)
    uri = os.environ.get("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    scheme, _, path = uri.partition("sqlite:///")
    if is_ray_job() and not scheme and path and not path.startswith("/"):
        raise ConfigError(
            f"MLFLOW_TRACKING_URI {uri} is relative, and a Ray job runs in a temporary copy of the "
            f"folder it was submitted from; give the absolute path, sqlite:////.../{path}"
        )


def parser(doc: str | None, prog: str) -> argparse.ArgumentParser:
    """Return an argument parser that shows a command's own description."""
    return argparse.ArgumentParser(
        prog=f"covtanet {prog}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
