"""Network policies: the pods, and the ports of them, that may reach each other."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from manifests import COMPONENT, KUBERAY, PART_OF, POD_MANIFESTS, load, load_all, templates

POLICIES = [each["spec"] for each in load_all(KUBERAY / "network-policy.yaml")]
NAMESPACE = "kubernetes.io/metadata.name"


@dataclass(frozen=True)
class Peer:
    """One end of a connection. namespace: empty for ours; labels: of its pod. address: of a machine
    that is no pod.
    """

    labels: dict[str, str] = field(default_factory=dict)
    namespace: str = ""
    address: str = ""


def pod_of(component: str) -> Peer:
    return Peer({PART_OF: "covtanet", COMPONENT: component})


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    assert set(selector) <= {"matchLabels", "matchExpressions"}
    for name, value in selector.get("matchLabels", {}).items():
        if labels.get(name) != value:
            return False
    for each in selector.get("matchExpressions", ()):
        assert each["operator"] == "In"
        if labels.get(each["key"]) not in each["values"]:
            return False
    return True


def is_peer(described: dict[str, Any], peer: Peer) -> bool:
    assert set(described) <= {"podSelector", "namespaceSelector", "ipBlock"}
    if "ipBlock" in described or peer.address:
        return bool(described.get("ipBlock", {}).get("cidr") == f"{peer.address}/32")
    if "namespaceSelector" in described:
        is_there = selects(described["namespaceSelector"], {NAMESPACE: peer.namespace})
    else:
        is_there = peer.namespace == ""
    return is_there and selects(described.get("podSelector", {}), peer.labels)


def permits(rule: dict[str, Any], side: str, peer: Peer, port: int) -> bool:
    assert rule.get(side), "a rule without peers admits everybody"
    is_port = "ports" not in rule or port in [each["port"] for each in rule["ports"]]
    return is_port and any(is_peer(described, peer) for described in rule[side])


def may(direction: str, pod: Peer, peer: Peer, port: int) -> bool:
    """Whether the policies let a pod of ours connect to, or be reached by, a peer."""
    if pod.namespace or pod.address:
        return True  # no policy of ours holds there
    side = {"Ingress": "from", "Egress": "to"}[direction]
    policies = [each for each in POLICIES if selects(each["podSelector"], pod.labels)]
    policies = [each for each in policies if direction in each["policyTypes"]]
    rules = [rule for policy in policies for rule in policy.get(direction.lower(), ())]
    return not policies or any(permits(rule, side, peer, port) for rule in rules)


def reaches(source: Peer, target: Peer, port: int) -> bool:
    return may("Egress", source, target, port) and may("Ingress", target, source, port)


@pytest.mark.parametrize("path", POD_MANIFESTS, ids=lambda path: path.stem)
def test_network_policies_deny_by_default_for_every_pod(path: Path) -> None:
    for template in templates(load(path)):
        labels = template["metadata"]["labels"]
        assert labels[PART_OF] == "covtanet"
        pod, stranger = Peer(labels), Peer({"app": "stranger"})
        for port in (22, 443, 6379, 8000, 8265, 10001):
            assert not reaches(stranger, pod, port)
            assert not reaches(pod, stranger, port)
            assert not reaches(pod, Peer(namespace="elsewhere"), port)
        assert reaches(pod, Peer({"k8s-app": "kube-dns"}, "kube-system"), 53)


CLUSTERS = ("serve", "screen", "train")
COMPONENTS = (*CLUSTERS, "nightly", "screen-submitter", "train-submitter")


def test_network_policies_know_every_component() -> None:
    found = {
        each["metadata"]["labels"][COMPONENT]
        for path in POD_MANIFESTS
        for each in templates(load(path))
    }
    assert found == set(COMPONENTS)


def test_ray_clusters_reach_only_their_pods() -> None:
    allowed = {(name, name, port) for name in CLUSTERS for port in (6379, 8265, 10001)}
    allowed |= {("screen-submitter", "screen", 8265), ("train-submitter", "train", 8265)}
    found = set()
    for source in COMPONENTS:
        for target in COMPONENTS:
            for port in (6379, 8265, 10001):
                if reaches(pod_of(source), pod_of(target), port):
                    found.add((source, target, port))
    assert found == allowed


@pytest.mark.parametrize("component", COMPONENTS)
def test_only_data_components_reach_store_and_registry(component: str) -> None:
    has_data = component in (*CLUSTERS, "nightly")
    for port, is_open in ((443, True), (5000, True), (22, False), (8265, False)):
        assert reaches(pod_of(component), Peer(namespace="storage"), port) == (has_data and is_open)
    assert not reaches(Peer(namespace="storage"), pod_of(component), 8265)


@pytest.mark.parametrize("component", COMPONENTS)
def test_only_operator_ingress_and_prometheus_come_in(component: str) -> None:
    is_cluster = component in CLUSTERS
    for namespace, port, is_open in (
        ("kuberay-system", 8265, is_cluster),
        ("kuberay-system", 8000, False),
        ("nginx-ingress", 8000, component == "serve"),
        ("nginx-ingress", 8265, False),
        ("monitoring", 8080, is_cluster),
        ("monitoring", 8265, False),
        ("default", 8000, False),
    ):
        assert reaches(Peer(namespace=namespace), pod_of(component), port) == is_open, (
            namespace,
            port,
        )


@pytest.mark.parametrize("component", COMPONENTS)
def test_only_heads_with_an_autoscaler_reach_kubernetes(component: str) -> None:
    """KubeRay's operator labels the heads."""
    server = Peer(address="192.0.2.1")
    head = Peer({**pod_of(component).labels, "ray.io/node-type": "head"})
    for port, is_open in ((443, True), (6443, True), (22, False)):
        assert reaches(head, server, port) == (component in ("screen", "train") and is_open)
        assert not reaches(pod_of(component), server, port)
    assert not reaches(head, Peer(address="192.0.2.2"), 443)
