"""Manifests against KubeRay's schemas, and what no schema says: not root, secrets by reference, never two at once."""

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from conftest import ROOT

PIPELINE = ROOT / "covtanet" / "screening" / "pipeline.py"
KUBERAY = ROOT / "infra" / "kuberay"
SCHEMAS = ROOT.parent / "shared" / "schemas" / "kuberay"
KINDS = {"RayJob": "rayjobs", "RayService": "rayservices", "RayCronJob": "raycronjobs"}


def load(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(path.read_text())
    return found


def pods(value: Any) -> list[dict[str, Any]]:
    if isinstance(value, list):
        return [pod for each in value for pod in pods(each)]
    if not isinstance(value, dict):
        return []
    found = [value] if "containers" in value else []
    return found + [pod for each in value.values() for pod in pods(each)]


MANIFESTS = sorted(KUBERAY.glob("*.yaml"))


@pytest.mark.skipif(not SCHEMAS.exists(), reason="KubeRay's schemas are not at hand")
@pytest.mark.parametrize("path", [p for p in MANIFESTS if load(p)["kind"] in KINDS], ids=lambda path: path.stem)
def test_custom_resources_satisfy_kuberays_schema(path: Path) -> None:
    manifest = load(path)
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    with (SCHEMAS / f"ray.io_{KINDS[manifest['kind']]}.yaml").open() as file:
        definition = yaml.load(file, loader)
    (schema,) = [v["schema"]["openAPIV3Schema"] for v in definition["spec"]["versions"] if v["name"] == "v1"]
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
        is_closed = schema.get("type") == "object" and schema.get("properties") and "kind" not in schema["properties"]
        if is_closed and "additionalProperties" not in schema:
            schema["additionalProperties"] = bool(schema.get("x-kubernetes-preserve-unknown-fields", False))
        for each in list(schema.values()):
            close(each)


@pytest.mark.parametrize("path", [path for path in MANIFESTS if pods(load(path))], ids=lambda path: path.stem)
def test_pods_are_not_root_write_nowhere_and_hold_no_secret(path: Path) -> None:
    for pod in pods(load(path)):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["automountServiceAccountToken"] is False
        for container in pod["containers"]:
            context = container["securityContext"]
            assert context["readOnlyRootFilesystem"] is True
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["limits"]["memory"]
            given = {each["name"]: each for each in container["env"]}
            assert given["RAY_AUTH_MODE"]["value"] == "token"
            for name, each in given.items():
                is_secret = any(part in name for part in ("TOKEN", "KEY", "SECRET", "PASSWORD", "URI"))
                assert ("secretKeyRef" in each.get("valueFrom", {})) == is_secret, name


def test_nights_never_overlap_and_say_their_time_zone() -> None:
    cron, ray_cron = load(KUBERAY / "cronjob.yaml")["spec"], load(KUBERAY / "raycronjob.yaml")["spec"]
    assert cron["concurrencyPolicy"] == "Forbid"
    assert cron["timeZone"] == ray_cron["timeZone"] == "Europe/Berlin"
    assert "jobs/nightly.py" in ray_cron["jobTemplate"]["entrypoint"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Ray's own models
def test_serve_config_satisfies_rays_own_schema() -> None:
    from ray.serve.schema import ServeDeploySchema

    for values in (
        load(ROOT / "infra" / "serve.yaml"),
        yaml.safe_load(load(KUBERAY / "service.yaml")["spec"]["serveConfigV2"]),
    ):
        assert ServeDeploySchema.model_validate(values).applications[0].import_path == "serve.app:app"
    assert load(ROOT / "infra" / "serve.yaml")["http_options"]["host"] == "127.0.0.1"


def test_the_dashboard_asks_for_metrics_that_are_counted() -> None:
    panels = json.loads((ROOT / "infra" / "grafana.json").read_text())["panels"]
    asked = {name for panel in panels for name in re.findall(r"ray_(covtanet_\w+)", panel["targets"][0]["expr"])}
    code = "".join(path.read_text() for path in ((ROOT / "serve" / "app.py"), PIPELINE))
    counted = set(re.findall(r'"(covtanet_\w+)"', code))
    assert {re.sub(r"_bucket$|_total$|$", "", name, count=1) for name in asked} == counted


def test_the_network_is_closed_but_for_the_ingress() -> None:
    spec = load(KUBERAY / "network-policy.yaml")["spec"]
    assert set(spec["policyTypes"]) == {"Ingress", "Egress"}
    assert all(rule.get("from") for rule in spec["ingress"])
    assert all(rule.get("to") for rule in spec["egress"])
