"""Panels of infra/grafana.json and rules of infra/alerts.yaml against metrics of a real run."""

import time
from pathlib import Path

from dashboard import expressions, is_in_ray, metrics_in, scraped_metrics
from nights import SubmittedBatch
from running import Cluster
from sound_input import gz, plain_nifti

from infra.local.endpoint import Endpoint

# Ray counts them only where there is a GPU, or after a node has failed.
NOT_ON_THIS_MACHINE = {
    "ray_node_gpus_available",
    "ray_node_gpus_utilization",
    "ray_cluster_failed_nodes",
}
# Ray's processes report to its agent every 10 s.
REPORTED_WITHIN_S = 60


def missing_metrics(asked: set[str], shown: set[str]) -> set[str]:
    """The metrics that neither this Ray shows nor, if they cannot be here, Ray's code names."""
    rest = asked - shown
    return {name for name in rest if name not in NOT_ON_THIS_MACHINE or not is_in_ray(name)}


def test_every_metric_of_panels_and_alerts_exists_in_a_run(
    cluster: Cluster, endpoint: Endpoint, submitted_batch: SubmittedBatch
) -> None:
    """Those of a driver end with it: the batch was looked at while it ran."""
    assert endpoint.ask("POST", "/v1/studies", gz(plain_nifti()))[0] == 200
    asked, shown = metrics_in(expressions()), submitted_batch.metrics
    assert len([name for name in asked if "covtanet" in name]) >= 6
    deadline = time.monotonic() + REPORTED_WITHIN_S
    while missing := missing_metrics(asked, shown):
        assert time.monotonic() < deadline, sorted(missing)
        shown = shown | scraped_metrics(Path(cluster.environment["RAY_TMP"]))
        time.sleep(2)
    wrong = {"ray_covtanet_series", "ray_node_gpu_utilization", "ray_serve_queued_queries"}
    assert missing_metrics(wrong, shown) == wrong


def test_metrics_of_gpus_and_lost_nodes_are_named_by_ray() -> None:
    assert [name for name in NOT_ON_THIS_MACHINE if not is_in_ray(name)] == []
    assert not is_in_ray("ray_node_gpu_busy")
