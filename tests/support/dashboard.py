"""The metrics that dashboard and alerts ask for, those of a running Ray, and those of its code."""

import json
import re
import urllib.request
from collections.abc import Iterable
from pathlib import Path

import ray
import yaml
from repository import ROOT

DASHBOARD, ALERTS = ROOT / "infra" / "grafana.json", ROOT / "infra" / "alerts.yaml"
# Ray writes it below its temporary folder, for Prometheus.
DISCOVERY = "prom_metrics_service_discovery.json"
SUFFIXES = ("_total", "_bucket", "_sum", "_count")


def expressions() -> list[str]:
    """Return the queries of all panels and alerts."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    asked = [target["expr"] for panel in panels for target in panel["targets"]]
    for group in yaml.safe_load(ALERTS.read_text())["groups"]:
        asked += [rule["expr"] for rule in group["rules"]]
    return asked


def metrics_in(queries: Iterable[str]) -> set[str]:
    """Return the names of Ray's and our metrics in queries."""
    return {name for query in queries for name in re.findall(r"\bray_\w+", query)}


def scraped_metrics(temp_folder: Path) -> set[str]:
    """Return the names of the samples that Prometheus would get from a running Ray."""
    names: set[str] = set()
    for group in json.loads((temp_folder / DISCOVERY).read_text()):
        for target in group["targets"]:
            with urllib.request.urlopen(f"http://{target}/metrics", timeout=10) as answer:
                lines = answer.read().decode().splitlines()
            names |= {re.split(r"[{ ]", line)[0] for line in lines if not line.startswith("#")}
    return names


def is_in_ray(name: str) -> bool:
    """Whether Ray's own code names a metric, which a machine without GPU may never show."""
    text = f'"{name.removeprefix("ray_")}"'
    sources = Path(ray.__file__).parent / "dashboard" / "modules" / "reporter"
    return any(text in path.read_text() for path in sources.glob("*.py"))
