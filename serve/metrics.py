"""Metrics of this endpoint, of Ray Serve and of the screening jobs, on all nodes of the cluster.

Each node of Ray has a Prometheus endpoint of its own, on a port that the network policy closes to
other pods and without a token. This route collects them behind the token.
"""

import urllib.request
from collections.abc import Iterator

import ray

PREFIXES = ("ray_covtanet_", "ray_serve_")
TIMEOUT_S = 5


def cluster_metrics() -> str:
    """Return the metrics of all nodes that answer, in Prometheus' text format."""
    lines: list[str] = []
    comments: set[str] = set()
    for node in ray.nodes():
        for line in _node_metrics(node):
            # Every node describes every metric; Prometheus accepts one description of each.
            if line in comments:
                continue
            if line.startswith("# "):
                comments.add(line)
            lines.append(line)
    return "\n".join([*lines, ""])


def _node_metrics(node: dict[str, object]) -> Iterator[str]:
    """Yield the lines of one node with a known prefix; none if it does not answer."""
    if not node["Alive"]:
        return
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
            text = answer.read().decode()
    except OSError:
        return
    for line in text.splitlines():
        if _metric_name(line).startswith(PREFIXES):
            yield line


def _metric_name(line: str) -> str:
    """Return the start of a sample, or the metric of a line such as ``# HELP name text``."""
    words = line.split()
    if line.startswith("# ") and len(words) > 2:
        return words[2]
    return line
