"""Kubernetes manifests as rendered: objects, the pods in them, and who selects whom."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

Object = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod's template, and the name of what makes it."""

    owner: str
    template: Object

    @property
    def labels(self) -> dict[str, str]:
        labels: dict[str, str] = self.template["metadata"]["labels"]
        return labels

    @property
    def spec(self) -> Object:
        spec: Object = self.template["spec"]
        return spec

    @property
    def container(self) -> Object:
        (container,) = self.spec["containers"]
        assert isinstance(container, dict)
        return container

    @property
    def ports(self) -> dict[str, int]:
        return {port["name"]: port["containerPort"] for port in self.container.get("ports", ())}

    @property
    def environment(self) -> dict[str, Any]:
        return {variable["name"]: variable for variable in self.container["env"]}


def render(folder: Path) -> list[Object]:
    """What kustomize makes of the folder."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not there: it brings kustomize")
    done = subprocess.run([kubectl, "kustomize", folder], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def pods(objects: list[Object]) -> Iterator[Pod]:
    for item in objects:
        name, spec = item["metadata"]["name"], item.get("spec", {})
        match item["kind"]:
            case "Deployment":
                yield Pod(name, spec["template"])
            case "RayCluster":
                yield Pod(f"{name} head", spec["headGroupSpec"]["template"])
                yield from (
                    Pod(f"{name} {group['groupName']}", group["template"]) for group in spec["workerGroupSpecs"]
                )
            case "LeaderWorkerSet":
                template = spec["leaderWorkerTemplate"]
                yield from (Pod(f"{name} {role}", template[f"{role}Template"]) for role in ("leader", "worker"))


def named(objects: list[Object], kind: str) -> dict[str, Object]:
    return {item["metadata"]["name"]: item for item in objects if item["kind"] == kind}


def selects(selector: Object, labels: dict[str, str]) -> bool:
    """Whether a selector of labels fits."""
    for rule in selector.get("matchExpressions", ()):
        assert rule["operator"] == "In"
        if labels.get(rule["key"]) not in rule["values"]:
            return False
    wanted: dict[str, str] = selector.get("matchLabels", {})
    return wanted.items() <= labels.items()
