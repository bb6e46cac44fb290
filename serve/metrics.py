"""Ray's own metrics of every node, as far as they are ours or Serve's."""

import urllib.request

import ray

PREFIXES = ("ray_covtanet_", "ray_serve_")
TIMEOUT_S = 5


def cluster_metrics() -> str:
    """Lines of all nodes that answer, in Prometheus' text format."""
    lines: list[str] = []
    described: set[str] = set()
    for node in ray.nodes():
        if not node["Alive"]:
            continue
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
                text = answer.read().decode()
        except OSError:
            continue
        for line in text.splitlines():
            name = line.split()[2] if line.startswith("# ") and len(line.split()) > 2 else line
            if not name.startswith(PREFIXES) or line in described:
                continue
            if line.startswith("# "):
                described.add(line)
            lines.append(line)
    return "\n".join([*lines, ""])
