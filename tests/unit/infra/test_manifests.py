"""Manifests against KubeRay's schemas, and rules without a schema: not root, secrets by
reference.
"""

import json
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from manifests import (
    COMPONENT,
    KINDS,
    KUBERAY,
    POD_MANIFESTS,
    RAY_MANIFESTS,
    cluster_specs,
    load,
    load_all,
    pods,
    templates,
)
from repository import ROOT

from covtanet.config import read_toml
from covtanet.screening.config import ScreeningConfig
from covtanet.screening.worker_counts import num_cpus_needed
from serve.settings import ServeConfig

PIPELINE = ROOT / "covtanet" / "screening" / "pipeline.py"
SCHEMAS = ROOT.parent / "shared" / "schemas" / "kuberay"


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
    # Without authOptions operator and submitter are answered 401. A hand-made variable in a pod
    # would win over the secret that authOptions names, and the two could differ.
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
    settings = service_settings()
    num_models = settings.max_model_replicas
    decoders = settings.max_api_replicas * settings.num_decoders
    decode_bytes = (
        ScreeningConfig().decode_memory_mib + 600
    ) << 20  # the child, and its parent's copy of the series
    (spec,) = cluster_specs(load(KUBERAY / "service.yaml"))
    (group,) = spec["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    limits = container["resources"]["limits"]
    volumes = {each["name"]: each for each in group["template"]["spec"]["volumes"]}
    shm = in_bytes(volumes["shm"]["emptyDir"]["sizeLimit"])
    num_workers = group["replicas"]
    assert group["minReplicas"] == num_workers == group["maxReplicas"]
    # A batch plans a predictor for each GPU of the cluster; one that gets a whole GPU is enough.
    worker_cpus = [int(limits["cpu"])] * num_workers
    batch_cpus = settings.driver_cpus + num_cpus_needed(worker_cpus, num_workers)
    batch_gpus = 1
    model_cpus = num_models * settings.model_cpus
    cpus = decoders * settings.cpus_per_decoder + model_cpus + batch_cpus
    assert num_workers * int(limits["cpu"]) >= cpus
    gpus = num_models * settings.model_gpus + batch_gpus
    assert num_workers * int(limits["nvidia.com/gpu"]) >= gpus
    # Models, predict, measure; Ray on each worker.
    of_work = (decoders + 1) * decode_bytes + (4 * num_models + 3 + 2) * GIB
    assert num_workers * in_bytes(limits["memory"]) >= of_work + num_workers * (2 * GIB + shm)


def service_settings() -> ServeConfig:
    """The settings that the endpoint of service.yaml has."""
    return read_toml(KUBERAY / "serve.toml", ServeConfig)


def test_service_survives_the_loss_of_a_worker() -> None:
    settings = service_settings()
    (spec,) = cluster_specs(load(KUBERAY / "service.yaml"))
    (group,) = spec["workerGroupSpecs"]
    assert settings.num_model_replicas >= 2
    assert settings.num_api_replicas >= 2
    assert settings.max_model_replicas_per_node == 1
    assert group["replicas"] > settings.max_model_replicas >= settings.num_model_replicas


def test_disruption_budget_lets_one_worker_of_the_endpoint_go() -> None:
    spec = load(KUBERAY / "disruption.yaml")["spec"]
    assert spec["maxUnavailable"] == 1
    # KubeRay sets the label of a pod's kind.
    selected = spec["selector"]["matchLabels"]
    assert selected.pop("ray.io/node-type") == "worker"
    (cluster,) = cluster_specs(load(KUBERAY / "service.yaml"))
    for group in cluster["workerGroupSpecs"]:
        assert selected.items() <= group["template"]["metadata"]["labels"].items()


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
    code = "".join(path.read_text() for path in ((ROOT / "serve" / "studies.py"), PIPELINE))
    counted = set(re.findall(r'"(covtanet_\w+)"', code))
    assert {re.sub(r"_bucket$|_total$|$", "", name, count=1) for name in asked} == counted


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
    # The endpoint's own time limits come first, so that the caller gets its reason and not the
    # proxy's 504.
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
