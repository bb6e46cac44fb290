"""Manifests against KubeRay's schemas, and what no schema says: not root, secrets by reference, who reaches whom."""

import json
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from repository import ROOT

PIPELINE = ROOT / "covtanet" / "screening" / "pipeline.py"
KUBERAY = ROOT / "infra" / "kuberay"
SCHEMAS = ROOT.parent / "shared" / "schemas" / "kuberay"
KINDS = {"RayJob": "rayjobs", "RayService": "rayservices", "RayCronJob": "raycronjobs"}


def load_all(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


def load(path: Path) -> dict[str, Any]:
    """The first document of a file."""
    return load_all(path)[0]


def pods(value: Any) -> list[dict[str, Any]]:
    if isinstance(value, list):
        return [pod for each in value for pod in pods(each)]
    if not isinstance(value, dict):
        return []
    found = [value] if "containers" in value else []
    return found + [pod for each in value.values() for pod in pods(each)]


def templates(value: Any) -> list[dict[str, Any]]:
    """Pod templates with their labels, submitters included."""
    if isinstance(value, list):
        return [template for each in value for template in templates(each)]
    if not isinstance(value, dict):
        return []
    own = value.get("spec")
    found = [value] if isinstance(own, dict) and "containers" in own else []
    return found + [template for each in value.values() for template in templates(each)]


def cluster_specs(value: Any) -> Iterator[dict[str, Any]]:
    """Specs of the Ray clusters that KubeRay makes."""
    if isinstance(value, dict):
        if "headGroupSpec" in value:
            yield value
        for each in value.values():
            yield from cluster_specs(each)


MANIFESTS = sorted(KUBERAY.glob("*.yaml"))
RAY_MANIFESTS = [path for path in MANIFESTS if load(path)["kind"] in KINDS]
POD_MANIFESTS = [path for path in MANIFESTS if pods(load(path))]


@pytest.mark.skipif(not SCHEMAS.exists(), reason="KubeRay's schemas are not at hand")
@pytest.mark.parametrize("path", RAY_MANIFESTS, ids=lambda path: path.stem)
def test_custom_resources_satisfy_kuberay_schema(path: Path) -> None:
    manifest = load(path)
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    with (SCHEMAS / f"ray.io_{KINDS[manifest['kind']]}.yaml").open() as file:
        definition = yaml.load(file, loader)
    (schema,) = [
        v["schema"]["openAPIV3Schema"] for v in definition["spec"]["versions"] if v["name"] == "v1"
    ]
    close(schema)
    jsonschema.Draft7Validator(schema).validate(manifest)


def close(schema: Any) -> None:
    """Kubernetes drops fields that it does not know; here they are mistakes."""
    if isinstance(schema, list):
        for each in schema:
            close(each)
    elif isinstance(schema, dict):
        if schema.get("x-kubernetes-int-or-string"):
            schema.pop("anyOf", None)
            schema["type"] = ["integer", "string"]
        is_closed = (
            schema.get("type") == "object"
            and schema.get("properties")
            and "kind" not in schema["properties"]
        )
        if is_closed and "additionalProperties" not in schema:
            schema["additionalProperties"] = bool(
                schema.get("x-kubernetes-preserve-unknown-fields", False)
            )
        for each in list(schema.values()):
            close(each)


@pytest.mark.parametrize("path", POD_MANIFESTS, ids=lambda path: path.stem)
def test_pods_run_without_root_writes_or_secrets(path: Path) -> None:
    for pod in pods(load(path)):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        for container in [*pod["containers"], *pod.get("initContainers", [])]:
            context = container["securityContext"]
            assert context["readOnlyRootFilesystem"] is True
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}
            for amounts in (container["resources"]["requests"], container["resources"]["limits"]):
                assert amounts["cpu"]
                assert amounts["memory"]
            for each in container["env"]:
                is_secret = any(
                    part in each["name"] for part in ("TOKEN", "KEY", "SECRET", "PASSWORD", "URI")
                )
                assert ("secretKeyRef" in each.get("valueFrom", {})) == is_secret, each["name"]


@pytest.mark.parametrize("path", RAY_MANIFESTS, ids=lambda path: path.stem)
def test_ray_resources_ask_operator_for_token(path: Path) -> None:
    # Without authOptions operator and submitter are answered 401. A hand-made variable in a pod would win over the
    # secret that authOptions names, and the two could differ.
    (spec,) = cluster_specs(load(path))
    assert spec["authOptions"] == {"mode": "token", "secretName": "covtanet-ray"}
    assert spec["rayVersion"] == metadata.version("ray")
    names = [
        each["name"]
        for pod in pods(load(path))
        for container in pod["containers"]
        for each in container["env"]
    ]
    assert not [name for name in names if name.startswith("RAY_AUTH")]


def test_plain_cron_job_mounts_the_token() -> None:
    ((container,),) = (pod["containers"] for pod in pods(load(KUBERAY / "cronjob.yaml")))
    given = {each["name"]: each for each in container["env"]}
    assert given["RAY_AUTH_MODE"]["value"] == "token"
    assert given["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"] == {
        "name": "covtanet-ray",
        "key": "auth_token",
    }


@pytest.mark.parametrize("path", RAY_MANIFESTS, ids=lambda path: path.stem)
def test_ray_pods_drain_and_do_not_autoscale(path: Path) -> None:
    (spec,) = cluster_specs(load(path))
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        assert group["template"]["spec"]["terminationGracePeriodSeconds"] == 60
    for group in spec["workerGroupSpecs"]:
        assert group["minReplicas"] == group["replicas"] == group["maxReplicas"]
    assert "enableInTreeAutoscaling" not in spec


def test_service_serves_on_workers_and_upgrades_by_new_cluster() -> None:
    spec = load(KUBERAY / "service.yaml")["spec"]
    assert spec["excludeHeadPodFromServeSvc"] is True
    assert spec["upgradeStrategy"] == {"type": "NewCluster"}
    assert not [
        name for name in spec if name.endswith("UnhealthySecondThreshold")
    ]  # KubeRay uses them no more


GIB = 1 << 30


def in_bytes(quantity: str) -> int:
    """A Kubernetes quantity of memory in Gi."""
    return int(quantity.removesuffix("Gi")) * GIB


def test_service_workers_hold_the_replicas_resources() -> None:
    from covtanet.screening.config import ScreeningConfig
    from serve.settings import Caller, ServeConfig

    settings = ServeConfig(callers=(Caller(name="any", token_sha256="0" * 64),))
    decoders = settings.max_api_replicas * settings.num_decoders
    decode_bytes = (
        ScreeningConfig().decode_memory_mib + 600
    ) << 20  # the child, and its parent's copy of the series
    (spec,) = cluster_specs(load(KUBERAY / "service.yaml"))
    cpus = memory = shm = 0
    for group in spec["workerGroupSpecs"]:
        (container,) = group["template"]["spec"]["containers"]
        limits = container["resources"]["limits"]
        cpus += group["replicas"] * int(limits["cpu"])
        memory += group["replicas"] * in_bytes(limits["memory"])
        volumes = {each["name"]: each for each in group["template"]["spec"]["volumes"]}
        shm += group["replicas"] * in_bytes(volumes["shm"]["emptyDir"]["sizeLimit"])
    segmenter, batch = (
        1,
        1 + 3,
    )  # a batch: its driver, and one CPU each to predict, decode and measure
    assert cpus >= decoders + segmenter + batch
    assert (
        memory >= (decoders + 1) * decode_bytes + (4 + 3 + 2 + 2) * GIB + shm
    )  # Segmenter, predict, measure, Ray


def test_nightly_jobs_forbid_overlap_and_name_time_zone() -> None:
    cron, ray_cron = (
        load(KUBERAY / "cronjob.yaml")["spec"],
        load(KUBERAY / "raycronjob.yaml")["spec"],
    )
    assert cron["concurrencyPolicy"] == "Forbid"
    assert cron["timeZone"] == ray_cron["timeZone"] == "Europe/Berlin"
    assert "jobs/nightly.py" in ray_cron["jobTemplate"]["entrypoint"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Ray's own models
def test_serve_config_satisfies_ray_schema() -> None:
    from ray.serve.schema import ServeDeploySchema

    for values in (
        load(ROOT / "infra" / "serve.yaml"),
        yaml.safe_load(load(KUBERAY / "service.yaml")["spec"]["serveConfigV2"]),
    ):
        assert (
            ServeDeploySchema.model_validate(values).applications[0].import_path == "serve.app:app"
        )
    assert load(ROOT / "infra" / "serve.yaml")["http_options"]["host"] == "127.0.0.1"


def test_dashboard_queries_existing_metrics() -> None:
    panels = json.loads((ROOT / "infra" / "grafana.json").read_text())["panels"]
    asked = {
        name
        for panel in panels
        for name in re.findall(r"ray_(covtanet_\w+)", panel["targets"][0]["expr"])
    }
    code = "".join(path.read_text() for path in ((ROOT / "serve" / "app.py"), PIPELINE))
    counted = set(re.findall(r'"(covtanet_\w+)"', code))
    assert {re.sub(r"_bucket$|_total$|$", "", name, count=1) for name in asked} == counted


PART_OF, COMPONENT = "app.kubernetes.io/part-of", "app.kubernetes.io/component"
POLICIES = [each["spec"] for each in load_all(KUBERAY / "network-policy.yaml")]
NAMESPACE = "kubernetes.io/metadata.name"


@dataclass(frozen=True)
class Peer:
    """One end of a connection. namespace: empty for ours; labels: of its pod."""

    labels: dict[str, str] = field(default_factory=dict)
    namespace: str = ""


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
    assert set(described) <= {"podSelector", "namespaceSelector"}
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
    if pod.namespace:
        return True  # policies of other namespaces are not ours
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


@pytest.mark.parametrize("path", POD_MANIFESTS, ids=lambda path: path.stem)
def test_every_workload_has_its_s3_role(path: Path) -> None:
    roles = {"nightly": "screen", "screen-submitter": None, "train-submitter": None}
    for template in templates(load(path)):
        component = template["metadata"]["labels"][COMPONENT]
        role = roles.get(component, component)
        for container in template["spec"]["containers"]:
            secrets = [each["secretRef"]["name"] for each in container.get("envFrom", ())]
            assert secrets == ([f"covtanet-s3-{role}"] if role else [])


def test_namespace_enforces_restricted_pod_security() -> None:
    namespace, account = load_all(KUBERAY / "namespace.yaml")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    assert account["automountServiceAccountToken"] is False
    used = {pod["serviceAccountName"] for path in POD_MANIFESTS for pod in pods(load(path))}
    assert used == {account["metadata"]["name"]}


def test_ingress_ends_tls_with_the_endpoint_limits() -> None:
    from covtanet.archive.upload import IntakeLimits
    from serve.settings import Caller, ServeConfig

    ingress, service = load(KUBERAY / "ingress.yaml"), load(KUBERAY / "service.yaml")
    settings = ServeConfig(callers=(Caller(name="any", token_sha256="0" * 64),))
    (rule,) = ingress["spec"]["rules"]
    (tls,) = ingress["spec"]["tls"]
    assert tls["hosts"] == [rule["host"]]
    assert tls["secretName"]
    (path,) = rule["http"]["paths"]
    serve = yaml.safe_load(service["spec"]["serveConfigV2"])["http_options"]
    backend = {
        "name": f"{service['metadata']['name']}-serve-svc",
        "port": {"number": serve["port"]},
    }
    assert path["backend"]["service"] == backend
    given = {
        name.removeprefix("nginx.org/"): value
        for name, value in ingress["metadata"]["annotations"].items()
    }
    assert given["redirect-to-https"] == given["hsts"] == "true"
    assert int(given["hsts-max-age"]) >= 365 * 86400
    assert int(given["client-max-body-size"].removesuffix("m")) << 20 == IntakeLimits().max_bytes
    # The endpoint's own time limits come first, so that the caller gets its reason and not the proxy's 504.
    assert int(given["proxy-read-timeout"].removesuffix("s")) > serve["request_timeout_s"]
    assert int(given["proxy-send-timeout"].removesuffix("s")) > settings.upload_timeout_s


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Ray's own models
def test_cluster_launcher_names_the_ray_token() -> None:
    import ray.autoscaler

    launcher = load(ROOT / "infra" / "cluster" / "aws.yaml")
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.Draft7Validator(schema).validate(launcher)
    starts = [*launcher["head_start_ray_commands"], *launcher["worker_start_ray_commands"]]
    starts = [command for command in starts if "ray start" in command]
    assert len(starts) == 2
    for command in starts:
        assert "RAY_AUTH_MODE=token" in command
        (path,) = re.findall(r"RAY_AUTH_TOKEN_PATH=(\S+)", command)
        assert any(option.endswith(f":{path}:ro") for option in launcher["docker"]["run_options"])
    assert "--dashboard-host=127.0.0.1" in starts[0]


# The image

IMAGE = ROOT / "infra" / "image" / "requirements.txt"
FROM_TORCHS_INDEX = {"torch", "torchvision"}


def constraints() -> dict[str, str]:
    """Version by name."""
    pins = [line.partition("==") for line in (ROOT / "constraints.txt").read_text().splitlines()]
    return {canonicalize_name(name): version for name, _, version in pins}


def locked() -> dict[str, list[str]]:
    """What follows the name in each requirement of the image: version, then hashes."""
    text = IMAGE.read_text().replace("\\\n", " ")
    lines = [line.split() for line in text.splitlines() if line and not line.startswith("#")]
    found = {}
    for requirement, *hashes in lines:
        name, _, version = requirement.partition("==")
        assert name not in found
        found[name] = [version, *hashes]
    return found


def required(name: str, extras: set[str], machine: str) -> set[tuple[str, frozenset[str]]]:
    """Distributions that an installed one needs on Linux with Python 3.11."""
    found: set[tuple[str, frozenset[str]]] = set()
    for line in metadata.requires(name) or []:
        requirement = Requirement(line)
        for extra in extras | {""}:
            environment = {
                "extra": extra,
                "sys_platform": "linux",
                "platform_machine": machine,
                "python_version": "3.11",
            }
            if requirement.marker is None or requirement.marker.evaluate(environment):
                found.add((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    return found


def needed(name: str, extras: frozenset[str]) -> set[str]:
    """Every distribution that the image needs for one, itself left out unless something refers to it."""
    waiting, seen = [(name, extras)], {(name, extras)}
    while waiting:
        each, wanted = waiting.pop()
        for machine in ("x86_64", "aarch64"):
            new = required(each, set(wanted), machine) - seen
            seen |= new
            waiting += new
    return {each for each, _ in seen} - {name}


def test_image_installs_every_distribution_by_version_and_hash() -> None:
    found, pins = locked(), constraints()
    assert not FROM_TORCHS_INDEX & set(found)
    for name, (version, *hashes) in found.items():
        assert version == pins.get(name, version), name
        assert hashes, name
        for each in hashes:
            assert re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", each), name


def test_image_adds_setuptools_to_the_constraints() -> None:
    # pip freeze names no setuptools, which builds our own package and which torch needs.
    assert set(locked()) - set(constraints()) == {"setuptools"}
    (build,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert Requirement(build).specifier.contains(locked()["setuptools"][0])


def test_image_installs_required_distributions_only() -> None:
    assert set(locked()) == needed("covtanet", frozenset({"imagenet"})) - FROM_TORCHS_INDEX


def commands(containerfile: str) -> list[str]:
    """Instructions of a Containerfile, each in one line."""
    lines = [line for line in containerfile.splitlines() if not line.startswith("#")]
    return [line for line in "\n".join(lines).replace("\\\n", " ").splitlines() if line]


def test_image_installs_by_hash_and_torch_by_index() -> None:
    found = commands((ROOT / "infra" / "Containerfile").read_text())
    installs = [each for line in found for each in re.findall(r"pip install [^&]*", line)]
    by_hash, torch, ours = installs
    assert "--require-hashes --no-deps" in by_hash
    assert "--only-binary :all:" in by_hash  # a source distribution would run its setup.py
    assert by_hash.split()[-2:] == ["-r", "requirements.txt"]
    assert '--index-url "$TORCH_INDEX"' in torch
    assert "'^torch(vision)?==' constraints.txt" in torch
    assert "--no-index --no-deps --no-build-isolation" in ours
    for path in (ROOT / "infra" / "Containerfile", ROOT / "Makefile", IMAGE):
        assert "--extra-index-url" not in path.read_text()


def test_image_base_needs_a_digest() -> None:
    found = commands((ROOT / "infra" / "Containerfile").read_text())
    assert found[:2] == ["ARG BASE", "FROM ${BASE}"]  # no default: who builds names it
    (check,) = [line for line in found if "@sha256:" in line]
    assert check.startswith("RUN ")
    assert "ALLOW_TAG" in check
    assert found.index(check) < found.index(next(line for line in found if "apt-get" in line))


def test_image_compiles_the_project() -> None:
    found = commands((ROOT / "infra" / "Containerfile").read_text())
    (compiled,) = [index for index, line in enumerate(found) if "compileall" in line]
    copies = [index for index, line in enumerate(found) if line.startswith("COPY")]
    assert "/opt/covtanet" in found[compiled]
    assert compiled > max(copies)


def test_make_test_prints_skip_reasons() -> None:
    """Of pytest's short summary, which -q does not hide; the Makefile passes no -r of its own that would replace it."""
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"][
        "addopts"
    ]
    (shown,) = re.findall(r"-r(\w+)", options)
    assert set(shown) >= set("fEs")
    assert not re.search(r"pytest.* -r", (ROOT / "Makefile").read_text())
