"""Worker groups that grow and shrink: their bounds, spot nodes, priorities, and the autoscaler."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
from manifests import KUBERAY, POD_MANIFESTS, cluster_specs, load, load_all, pods
from repository import ROOT

SCREENINGS = (KUBERAY / "screen.yaml", KUBERAY / "raycronjob.yaml")
TRAINING = KUBERAY / "train.yaml"
BATCH_JOBS = (*SCREENINGS, TRAINING)
MARKET, CAPACITY = "ray.io/market-type", "karpenter.sh/capacity-type"
# Least and most workers of each group.
SIZES = {"gpu": (1, 4), "decoders": (0, 8)}
TOKEN_FOLDER = "/var/run/secrets/kubernetes.io/serviceaccount"

each_batch_job = pytest.mark.parametrize("path", BATCH_JOBS, ids=lambda path: path.stem)
each_screening = pytest.mark.parametrize("path", SCREENINGS, ids=lambda path: path.stem)


def cluster(path: Path) -> dict[str, Any]:
    (spec,) = cluster_specs(load(path))
    return spec


def groups(path: Path) -> dict[str, dict[str, Any]]:
    return {group["groupName"]: group for group in cluster(path)["workerGroupSpecs"]}


def priorities() -> dict[str, int]:
    classes = load_all(KUBERAY / "priorities.yaml")
    return {each["metadata"]["name"]: each["value"] for each in classes}


def settings(name: str) -> dict[str, Any]:
    return tomllib.loads(load(KUBERAY / "config.yaml")["data"][name])


@each_batch_job
def test_worker_groups_have_min_and_max(path: Path) -> None:
    found = groups(path)
    assert set(found) == (set(SIZES) if path in SCREENINGS else {"gpu"})
    for name, group in found.items():
        assert (group["minReplicas"], group["maxReplicas"]) == SIZES[name]
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


@each_batch_job
def test_only_decoders_run_on_spot_nodes(path: Path) -> None:
    head = cluster(path)["headGroupSpec"]
    for name, group in {"head": head, **groups(path)}.items():
        market = "spot" if name == "decoders" else "on-demand"
        pod = group["template"]["spec"]
        assert group["labels"] == {MARKET: market}, name
        assert pod["nodeSelector"] == {CAPACITY: market}, name
        tolerated = [each for each in pod.get("tolerations", ()) if each["key"] == CAPACITY]
        assert bool(tolerated) == (market == "spot"), name


@each_batch_job
def test_gpus_are_in_the_gpu_group_alone(path: Path) -> None:
    for name, group in groups(path).items():
        (container,) = group["template"]["spec"]["containers"]
        assert ("nvidia.com/gpu" in container["resources"]["limits"]) == (name == "gpu")


@each_screening
def test_predictors_stand_above_decoders(path: Path) -> None:
    """A node that is short of room loses decoders; a CPU that is missing is a decoder's."""
    found = {
        name: priorities()[group["template"]["spec"]["priorityClassName"]]
        for name, group in groups(path).items()
    }
    head = priorities()[cluster(path)["headGroupSpec"]["template"]["spec"]["priorityClassName"]]
    assert head > found["gpu"] > found["decoders"]
    assert groups(path)["decoders"]["priority"] > groups(path)["gpu"]["priority"]


def test_priorities_stay_below_the_endpoint_and_above_the_cutoff() -> None:
    # Kubernetes' cluster autoscaler starts no node for a pod below -10.
    assert all(-10 <= value < 0 for value in priorities().values())
    used = {
        pod["priorityClassName"]
        for path in POD_MANIFESTS
        for pod in pods(load(path))
        if "priorityClassName" in pod
    }
    assert used == set(priorities())


@each_batch_job
def test_autoscaler_alone_has_the_token_of_kubernetes(path: Path) -> None:
    spec = cluster(path)
    options = spec["autoscalerOptions"]
    assert spec["enableInTreeAutoscaling"] is True
    assert options["version"] == "v2"
    assert options["idleTimeoutSeconds"] >= 60
    assert options["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    head = spec["headGroupSpec"]["template"]["spec"]
    assert head["serviceAccountName"] == "covtanet-autoscaler"
    (volume,) = [each["name"] for each in head["volumes"] if "projected" in each]
    (mount,) = [each for each in options["volumeMounts"] if each["name"] == volume]
    assert mount["mountPath"] == TOKEN_FOLDER
    for pod in pods(load(path)):
        mounts = [mount for each in pod["containers"] for mount in each["volumeMounts"]]
        assert volume not in {each["name"] for each in mounts}
        is_head = pod["containers"][0]["name"] == "ray-head"
        assert (pod["serviceAccountName"] == "covtanet-autoscaler") == is_head
    # KubeRay refuses another policy with version 2.
    assert "restartPolicy" not in head


@each_batch_job
def test_jobs_read_their_settings_on_the_head(path: Path) -> None:
    manifest = load(path)["spec"]
    name = "training.toml" if path == TRAINING else "screening.toml"
    assert f"--config /etc/covtanet/{name} " in manifest.get("jobTemplate", manifest)["entrypoint"]
    head = cluster(path)["headGroupSpec"]["template"]["spec"]
    (container,) = head["containers"]
    mounts = {each["mountPath"]: each["name"] for each in container["volumeMounts"]}
    volumes = {each["name"]: each for each in head["volumes"]}
    used = volumes[mounts["/etc/covtanet"]]["configMap"]["name"]
    assert used == load(KUBERAY / "config.yaml")["metadata"]["name"]


@each_screening
def test_pools_may_grow_to_all_workers(path: Path) -> None:
    most = sum(group["maxReplicas"] for group in groups(path).values())
    assert settings("screening.toml") == {"screening": {"max_nodes": most}}


def test_training_grows_and_shrinks_with_its_group() -> None:
    training = settings("training.toml")["training"]
    group = groups(TRAINING)["gpu"]
    workers = (training.pop("min_workers"), training.pop("num_workers"))
    assert workers == (group["minReplicas"], group["maxReplicas"])
    recipe = tomllib.loads((ROOT / "recipes" / "mosmed.toml").read_text())
    assert training == recipe["training"]


def test_cluster_launcher_has_the_same_groups() -> None:
    launcher = load(ROOT / "infra" / "cluster" / "aws.yaml")
    types = launcher["available_node_types"]
    for name, (least, most) in SIZES.items():
        assert (types[name]["min_workers"], types[name]["max_workers"]) == (least, most)
    assert launcher["max_workers"] == sum(most for _, most in SIZES.values())
    for name, node in types.items():
        is_spot = "InstanceMarketOptions" in node["node_config"]
        assert is_spot == (name == "decoders")
        assert node["labels"] == {MARKET: "spot" if is_spot else "on-demand"}
    # Version 1 knows no priority.
    assert any("autoscaler_v2=1" in each for each in launcher["head_start_ray_commands"])
    assert types["decoders"]["priority"] > types["gpu"].get("priority", 0)
