"""The manifests: valid, closed, and in step: whatever one object uses, another provides."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from llep.cli.export import dashboard_text, rules_text
from llep.cli.with_ray import LAST_WORKER_PORT, PORT
from llep.config import Settings, load_settings
from llep.monitoring.dashboards import dashboards
from llep.monitoring.rules import JOB, prometheus_rule
from llep_server.config import DEFAULT_PORT, ServerConfig
from llep_server.tracing import ENDPOINT_VARIABLE
from tests.ops.manifests import Object, Pod, named, pods, render, selects

ROOT = Path(__file__).parents[2]
K8S = ROOT / "k8s"
KUBERNETES = "1.31"
OVERLAYS = ("cpu-demo", "gpt-oss", "gpt-oss-many", "deepseek")
SECRETS = {
    "llep-keys": "keys",
    "llep-ray-token": "auth_token",
    "llep-prometheus-key": "key",
}  # made by hand: docs/kubernetes.md
SCHEMAS_BESIDE = K8S.parents[1] / "shared" / "data" / "crds"
CORE = ("apps/v1", "v1", "networking.k8s.io/v1", "policy/v1")


@pytest.fixture(scope="module", params=OVERLAYS)
def objects(request: pytest.FixtureRequest) -> list[Object]:
    return render(K8S / "overlays" / request.param)


def test_kubernetes_takes_its_own_objects(objects: list[Object]) -> None:
    for item in objects:
        if item["apiVersion"] in CORE:
            kubernetes_validate.validate(item, KUBERNETES, strict=True)


def test_operators_take_theirs(objects: list[Object]) -> None:
    folder = Path(os.environ.get("LLEP_CRD_SCHEMAS", SCHEMAS_BESIDE))
    if not folder.is_dir():
        pytest.skip(f"no schemas of custom resources, KIND-GROUP-VERSION.json, in {folder}: LLEP_CRD_SCHEMAS names it")
    theirs = [item for item in objects if item["apiVersion"] not in CORE]
    for item in theirs:
        group, _, version = item["apiVersion"].partition("/")
        schema = json.loads((folder / f"{item['kind'].lower()}-{group}-{version}.json").read_text())
        jsonschema.Draft202012Validator(schema).validate(item)  # some patterns are Go's: they are not looked at
        assert unknown_fields(item, schema) == [], item["metadata"]["name"]


def unknown_fields(value: Any, schema: dict[str, Any], path: str = "") -> list[str]:
    """Fields that the schema does not know, which an API server drops without a word."""
    if isinstance(value, list):
        return [name for item in value for name in unknown_fields(item, schema.get("items", {}), f"{path}[]")]
    known = schema.get("properties")
    if not isinstance(value, dict) or known is None or path in (".metadata", ""):
        inner = {"spec": value["spec"]} if path == "" else {}
        return [name for key, item in inner.items() for name in unknown_fields(item, known[key], f".{key}")]
    found = [f"{path}.{key}" for key in value if key not in known]
    return found + [
        name
        for key, item in value.items()
        if key in known
        for name in unknown_fields(item, known[key], f"{path}.{key}")
    ]


def test_pods_are_closed(objects: list[Object]) -> None:
    for pod in pods(objects):
        assert pod.spec["automountServiceAccountToken"] is False, pod.owner
        assert pod.spec.get("restartPolicy", "Always") == "Always"
        security = pod.spec["securityContext"]
        assert security["runAsNonRoot"] and security["runAsUser"] == 10001
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod.container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert "memory" in pod.container["resources"]["limits"]
        assert not pod.container["image"].endswith((":latest", "engine", "control-plane", "cpu"))


def test_pods_find_what_they_mount(objects: list[Object]) -> None:
    for pod in pods(objects):
        volumes = {volume["name"]: volume for volume in pod.spec["volumes"]}
        assert {mount["name"] for mount in pod.container["volumeMounts"]} == set(volumes), pod.owner
        for volume in volumes.values():
            if claim := volume.get("persistentVolumeClaim"):
                assert claim["claimName"] in named(objects, "PersistentVolumeClaim")
            elif config := volume.get("configMap"):
                assert config["name"] in named(objects, "ConfigMap")
            elif secret := volume.get("secret"):
                assert secret["secretName"] in SECRETS
            else:
                assert "emptyDir" in volume
        assert {"/tmp", "/dev/shm"} <= {mount["mountPath"] for mount in pod.container["volumeMounts"]}


def test_pods_are_told_what_the_code_wants(objects: list[Object]) -> None:
    for pod in pods(objects):
        ours = {name: v.get("value", "") for name, v in pod.environment.items() if name.startswith("LLEP_")}
        if pod.labels["app.kubernetes.io/component"] == "control-plane":
            image = {"LLEP_SERVER_HOST": "0.0.0.0", "LLEP_SERVER_PORT": str(DEFAULT_PORT)}
            config = ServerConfig.from_env(image | ours)
            assert config.port == pod.ports["http"] and config.keys_file is not None
            mounts = {mount["mountPath"] for mount in pod.container["volumeMounts"]}
            assert str(config.keys_file.parent) in mounts
            assert pod.ports["ray"] == PORT
        else:
            mounted = ours.pop("LLEP_CONFIG")
            (maps,) = (m for name, m in named(objects, "ConfigMap").items() if name.startswith("llep-settings"))
            assert maps["data"].keys() == {Path(mounted).name}
            assert isinstance(load_settings(environ=ours)[0], Settings)
            Settings.parse(yaml.safe_load(maps["data"]["settings.yaml"]))
            host, _, port = ours["LLEP_RAY_ADDRESS"].partition(":")
            assert int(port) in {p["port"] for p in named(objects, "Service")[host]["spec"]["ports"]}


def test_engines_of_one_model_have_names_of_their_own(objects: list[Object]) -> None:
    for cluster in named(objects, "RayCluster").values():
        for group in cluster["spec"]["workerGroupSpecs"]:
            environment = Pod(group["groupName"], group["template"]).environment
            by_pod = {"fieldRef": {"fieldPath": "metadata.name"}}
            assert group["replicas"] == 1 or environment["LLEP_ENGINE"]["valueFrom"] == by_pod
    for kind in ("Deployment", "LeaderWorkerSet"):
        assert all(item["spec"]["replicas"] == 1 for item in named(objects, kind).values())


def test_ray_asks_for_a_token_everywhere(objects: list[Object]) -> None:
    clusters = named(objects, "RayCluster").values()
    for cluster in clusters:  # KubeRay gives it to its pods itself
        assert cluster["spec"]["authOptions"] == {"mode": "token", "secretName": "llep-ray-token"}
    for pod in pods([item for item in objects if item not in clusters]):
        assert pod.environment["RAY_AUTH_MODE"]["value"] == "token"
        key = pod.environment["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]
        assert SECRETS[key["name"]] == key["key"]


def test_services_lead_to_pods_that_listen(objects: list[Object]) -> None:
    for name, service in named(objects, "Service").items():
        behind = chosen({"matchLabels": service["spec"]["selector"]}, objects)
        assert behind, name
        for port in service["spec"]["ports"]:
            assert all(port["targetPort"] in pod.ports for pod in behind), (name, port)


def chosen(selector: Object, objects: list[Object]) -> list[Pod]:
    return [pod for pod in pods(objects) if selects(selector, pod.labels)]


def test_probes_ask_ports_that_are_there(objects: list[Object]) -> None:
    for pod in pods(objects):
        probes = [pod.container.get(f"{kind}Probe") for kind in ("startup", "liveness", "readiness")]
        assert all(probes) or (not any(probes) and not pod.ports), pod.owner
        for probe in filter(None, probes):
            assert probe["httpGet"]["port"] in pod.ports
            assert probe["httpGet"]["path"] in ("/livez", "/health")


def test_policies_let_through_what_is_needed_and_no_more(objects: list[Object]) -> None:
    policies = named(objects, "NetworkPolicy")
    everything = [pod.owner for pod in pods(objects)]
    deny = policies.pop("llep-deny")["spec"]
    assert [pod.owner for pod in chosen(deny["podSelector"], objects)] == everything
    assert deny["policyTypes"] == ["Ingress", "Egress"] and "ingress" not in deny and "egress" not in deny
    (ray,) = policies["llep-ray"]["spec"]["ingress"]
    assert [(p["port"], p["endPort"]) for p in ray["ports"]] == [(PORT, PORT + LAST_WORKER_PORT)]
    for name, policy in policies.items():
        behind = chosen(policy["spec"]["podSelector"], objects)
        assert behind, name
        ports = [p["port"] for rule in policy["spec"].get("ingress", ()) for p in rule.get("ports", ())]
        if "endPort" not in json.dumps(policy["spec"]):
            assert all(port in pod.ports.values() for pod in behind for port in ports), name


def test_budgets_and_monitors_choose_somebody(objects: list[Object]) -> None:
    for budget in named(objects, "PodDisruptionBudget").values():
        assert chosen(budget["spec"]["selector"], objects)
    for monitor in named(objects, "PodMonitor").values():
        behind = chosen(monitor["spec"]["selector"], objects)
        assert behind and all(e["port"] in pod.ports for e in monitor["spec"]["podMetricsEndpoints"] for pod in behind)
    for monitor in named(objects, "ServiceMonitor").values():
        services = [
            service
            for service in named(objects, "Service").values()
            if selects(monitor["spec"]["selector"], service["metadata"]["labels"])
        ]
        (service,) = services
        (endpoint,) = monitor["spec"]["endpoints"]
        assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
        assert service["metadata"]["labels"][monitor["spec"]["jobLabel"]] == JOB
        credentials = endpoint["authorization"]["credentials"]
        assert SECRETS[credentials["name"]] == credentials["key"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_spans_get_out_where_they_are_wanted(overlay: str, tmp_path: Path) -> None:
    shutil.copytree(K8S, tmp_path / "k8s")
    path = tmp_path / "k8s" / "overlays" / overlay / "kustomization.yaml"
    content = yaml.safe_load(path.read_text())
    content["components"] = [*content.get("components", ()), "../../components/tracing"]
    path.write_text(yaml.safe_dump(content))
    objects = render(path.parent)
    (policy,) = (p for name, p in named(objects, "NetworkPolicy").items() if name == "llep-traces")
    kubernetes_validate.validate(policy, KUBERNETES, strict=True)
    (control_plane,) = chosen(policy["spec"]["podSelector"], objects)
    port = control_plane.environment[ENDPOINT_VARIABLE]["value"].rpartition(":")[2]
    (rule,) = policy["spec"]["egress"]
    assert [str(p["port"]) for p in rule["ports"]] == [port]
    assert not any(ENDPOINT_VARIABLE in pod.environment for pod in pods(objects) if pod.owner != control_plane.owner)


def test_monitoring_is_as_made() -> None:
    folder = K8S / "components" / "monitoring"
    way_out = "write it anew: llep export dashboards k8s/components/monitoring; llep export rules --operator ..."
    assert (folder / "rules.yaml").read_text() == rules_text(prometheus_rule()), way_out
    (generator,) = yaml.safe_load((folder / "kustomization.yaml").read_text())["configMapGenerator"]
    for name in generator["files"]:
        assert (folder / name).read_text() == dashboard_text(dashboards()[name]), way_out


@pytest.mark.parametrize("secret", SECRETS)
def test_secrets_are_told_of(secret: str) -> None:
    text = (ROOT / "docs" / "kubernetes.md").read_text()
    assert re.search(rf"create secret generic {secret} --from-(file|literal)={SECRETS[secret]}=", text)


def test_export_writes_what_kustomize_takes(tmp_path: Path) -> None:
    llep = Path(sys.executable).with_name("llep")
    subprocess.run([llep, "export", "k8s", tmp_path / "out"], check=True, capture_output=True, timeout=60)
    assert render(tmp_path / "out" / "overlays" / "gpt-oss") == render(K8S / "overlays" / "gpt-oss")
