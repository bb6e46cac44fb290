"""Runs of MLflow: opened by their identity, described, and logged epoch by epoch.

Every function may be called again: a run's existing values are not logged twice.
"""

import logging
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities import Metric, Param
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from covtanet.tracking.version import software_version

logger = logging.getLogger(__name__)

RUN_KEY_TAG = "covtanet.run_key"
# MLflow refuses longer values of parameters.
MAX_PARAMETER_CHARACTERS = 500


@dataclass(frozen=True, kw_only=True)
class RunAddress:
    """Store, experiment and identity of a run."""

    uri: str
    """The tracking store."""
    experiment: str
    name: str
    key: str
    """The run's identity, by which a restart finds it again."""
    artifacts: str = ""
    """Location of the files of a new experiment; empty for the store's default."""
    parent: "RunAddress | None" = None


def tracking_uri() -> str:
    """Return the URI of the store that keeps runs and models."""
    return str(mlflow.get_tracking_uri())


def open_run(address: RunAddress) -> str:
    """Return the id of a run, which is created under its parent if its key is unknown."""
    client = MlflowClient(tracking_uri=address.uri)
    experiment_id = _experiment(client, address)
    query = f"tags.`{RUN_KEY_TAG}` = '{address.key}'"
    # By key and not by name: MLflow allows several runs of one name.
    runs = client.search_runs([experiment_id], query, max_results=1)
    if runs:
        return str(runs[0].info.run_id)
    tags = {RUN_KEY_TAG: address.key, "covtanet.software_version": software_version()}
    if address.parent is not None:
        # The parent first; MLflow's page nests runs by this tag.
        tags[MLFLOW_PARENT_RUN_ID] = open_run(address.parent)
    return str(client.create_run(experiment_id, run_name=address.name, tags=tags).info.run_id)


def _experiment(client: MlflowClient, address: RunAddress) -> str:
    experiment = client.get_experiment_by_name(address.experiment)
    if experiment is not None:
        return str(experiment.experiment_id)
    location = address.artifacts or None
    return str(client.create_experiment(address.experiment, artifact_location=location))


def log_history(run_id: str, history: Sequence[Mapping[str, float]], uri: str) -> None:
    """Log the epochs that the run does not have yet, one call per epoch, from any process."""
    client = MlflowClient(tracking_uri=uri)
    # MLflow keeps every value that is logged, so an epoch is logged only once.
    logged = {metric.step for metric in client.get_metric_history(run_id, "epoch")}
    now = _milliseconds()
    for metrics in history:
        step = int(metrics["epoch"])
        if step not in logged:
            entries = [Metric(name, value, now, step) for name, value in metrics.items()]
            client.log_batch(run_id, entries)


def describe_run(
    address: RunAddress,
    *,
    parameters: Mapping[str, Any] | None = None,
    metrics: Mapping[str, float] | None = None,
    files: Mapping[str, bytes] | None = None,
    tags: Mapping[str, str] | None = None,
    is_finished: bool = False,
) -> str:
    """Complete a run: parameters, final metrics, artifacts by path, tags; return its id."""
    client = MlflowClient(tracking_uri=address.uri)
    run_id = open_run(address)
    logged = client.get_run(run_id).data
    missing = [
        Param(name, str(value)[:MAX_PARAMETER_CHARACTERS])
        for name, value in flatten(parameters or {}).items()
        # MLflow refuses to change a parameter once it is logged.
        if name not in logged.params
    ]
    client.log_batch(run_id, params=missing)
    now = _milliseconds()
    entries = [
        Metric(name, value, now, 0)
        for name, value in (metrics or {}).items()
        if name not in logged.metrics
    ]
    client.log_batch(run_id, entries)
    for name, value in (tags or {}).items():
        client.set_tag(run_id, name, value)
    if files:
        _log_files(client, run_id, files)
    # Last: a run that is marked as finished has all its files.
    if is_finished:
        client.set_terminated(run_id)
    return run_id


def _log_files(client: MlflowClient, run_id: str, files: Mapping[str, bytes]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for path, data in files.items():
            target = Path(folder) / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
        client.log_artifacts(run_id, folder)


def _milliseconds() -> int:
    return int(time.time() * 1000)


@contextmanager
def tolerated(subject: str) -> Iterator[None]:
    """Go on with a warning if the tracking store does not take the subject.

    The caller logs it again later. Every error is caught: a store that is down raises whatever its
    kind raises, be it a database, an object store or an HTTP server.
    """
    try:
        yield
    except Exception as error:
        kind = type(error).__name__
        logger.warning("the tracking store does not take %s (%s); goes on without", subject, kind)


@contextmanager
def system_metrics(address: RunAddress) -> Iterator[None]:
    """Log processor, memory, disk, network and GPU of the driver's machine to a run."""
    monitor = None
    with tolerated("system metrics"):
        monitor = SystemMetricsMonitor(
            open_run(address), resume_logging=True, tracking_uri=address.uri
        )
        monitor.start()
    try:
        yield
    finally:
        if monitor is not None:
            monitor.finish()


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested values by dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
