"""The Kubernetes manifests of infra/kuberay, and the pods that they make."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from repository import ROOT

KUBERAY = ROOT / "infra" / "kuberay"
KINDS = {"RayJob": "rayjobs", "RayService": "rayservices", "RayCronJob": "raycronjobs"}
PART_OF = "app.kubernetes.io/part-of"
COMPONENT = "app.kubernetes.io/component"


def load_all(path: Path) -> list[dict[str, Any]]:
    """Return all documents of a file."""
    return list(yaml.safe_load_all(path.read_text()))


def load(path: Path) -> dict[str, Any]:
    """Return the first document of a file."""
    return load_all(path)[0]


def pods(value: Any) -> list[dict[str, Any]]:
    """Return the pod specs anywhere in a document."""
    if isinstance(value, list):
        return [pod for each in value for pod in pods(each)]
    if not isinstance(value, dict):
        return []
    found = [value] if "containers" in value else []
    return found + [pod for each in value.values() for pod in pods(each)]


def templates(value: Any) -> list[dict[str, Any]]:
    """Return pod templates with their labels, submitters included."""
    if isinstance(value, list):
        return [template for each in value for template in templates(each)]
    if not isinstance(value, dict):
        return []
    own = value.get("spec")
    found = [value] if isinstance(own, dict) and "containers" in own else []
    return found + [template for each in value.values() for template in templates(each)]


def cluster_specs(value: Any) -> Iterator[dict[str, Any]]:
    """Yield the specs of the Ray clusters that KubeRay makes."""
    if isinstance(value, dict):
        if "headGroupSpec" in value:
            yield value
        for each in value.values():
            yield from cluster_specs(each)


MANIFESTS = sorted(KUBERAY.glob("*.yaml"))
RAY_MANIFESTS = [path for path in MANIFESTS if load(path)["kind"] in KINDS]
POD_MANIFESTS = [path for path in MANIFESTS if pods(load(path))]
