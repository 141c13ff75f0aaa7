"""What docs/kubernetes.md says to type, run by a real kubectl without a cluster: what it would make is what the
manifests want, and what it would ask a cluster for they have."""

from __future__ import annotations

import base64
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from llep_server.keys import KeyRing
from tests.documented import PAGES, blocks
from tests.ops.manifests import Object, named, render
from tests.ops.test_k8s import K8S, SECRETS

OVERLAY = K8S / "overlays" / "cpu-demo"
# What needs a cluster is done without one: objects are written down instead of made, and labelled where they lie.
KUBECTL = """#!/bin/bash
echo "$*" >> {folder}/typed
case "$*" in
  "label namespace "*) {kubectl} create namespace "$3" --dry-run=client -o yaml > {folder}/namespace.yaml
    {kubectl} label --local -f {folder}/namespace.yaml "${{@:4}}" -o yaml ;;
  *create*) {kubectl} "$@" --dry-run=client -o yaml ;;
  "apply -k "*) {kubectl} kustomize "$3" ;;
  *) {kubectl} "$@" ;;
esac >> {folder}/made.yaml
status=$?
echo --- >> {folder}/made.yaml
exit $status
"""


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Object], Path, str]:
    """(what the page's first block makes, where, what it said)."""
    kubectl, openssl = shutil.which("kubectl"), shutil.which("openssl")
    if kubectl is None or openssl is None:
        pytest.skip("kubectl or openssl is not there")
    folder = tmp_path_factory.mktemp("kubectl")
    (folder / "kubectl").write_text(KUBECTL.format(folder=folder, kubectl=kubectl))
    (folder / "kubectl").chmod(0o755)
    (folder / "k8s").symlink_to(K8S)
    page = next(page for page in PAGES if page.name == "kubernetes.md").read_text()
    (block,) = (
        block for block in re.findall(r"^```.*?^```", page, re.DOTALL | re.MULTILINE) if "create secret" in block
    )
    lines = [line for line in blocks(block) if line]
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "KUBECONFIG": str(folder / "no-cluster")}
    done = subprocess.run(
        ["bash", "-c", "\n".join(lines)], cwd=folder, env=environment, capture_output=True, text=True, timeout=60
    )
    made = [document for document in yaml.safe_load_all((folder / "made.yaml").read_text()) if document]
    return made, folder, done.stderr


def test_every_command_was_run(started: tuple[list[Object], Path, str]) -> None:
    """Those that ask a cluster find none: nothing else is wrong with them."""
    _, folder, said = started
    page = next(page for page in PAGES if page.name == "kubernetes.md").read_text()
    wanted = {line.removeprefix("kubectl ").split(" ")[0] for line in blocks(page) if line.startswith("kubectl ")}
    typed = (folder / "typed").read_text().splitlines()
    assert wanted == {line.split(" ")[0] for line in typed} and len(typed) > 7
    complaints = [line for line in said.splitlines() if "memcache.go" not in line]
    asking = [line for line in typed if " get " in line or "port-forward" in line]
    assert len(complaints) == len(asking) == 3
    assert all(re.match("The connection to the server .* was refused", line) for line in complaints)


def test_it_makes_what_the_manifests_want(started: tuple[list[Object], Path, str]) -> None:
    made, folder, _ = started
    overlay = render(OVERLAY)
    namespaces = named(made, "Namespace")
    assert {item["metadata"].get("namespace") for item in overlay} <= namespaces.keys() | {None}
    assert namespaces["monitoring"]["metadata"]["labels"] == {"llep.io/scrapes": "true"}
    assert "llep.io/scrapes" in str(named(overlay, "NetworkPolicy"))
    secrets = named(made, "Secret")
    assert {name: list(secret["data"]) for name, secret in secrets.items()} == {n: [key] for n, key in SECRETS.items()}
    assert all(secret["metadata"]["namespace"] == "llep" for secret in secrets.values())
    ours = [item for item in made if item["kind"] not in ("Namespace", "Secret")]
    assert ours == overlay

    content = {name: base64.b64decode(secret["data"][SECRETS[name]]) for name, secret in secrets.items()}
    (folder / "of-the-secret").write_bytes(content["llep-keys"])
    (folder / "of-the-secret").chmod(0o600)
    ring = KeyRing(folder / "of-the-secret")
    who = ring.find(content["llep-prometheus-key"].decode())
    assert who is not None and (who.name, who.scope) == ("prometheus", "read")
    assert len(content["llep-ray-token"]) == 64


def test_what_is_forwarded_is_there(started: tuple[list[Object], Path, str]) -> None:
    _, folder, _ = started
    services = named(render(OVERLAY), "Service")
    forwarded = re.findall(r"port-forward service/(\S+) (\d+)", (folder / "typed").read_text())
    assert len(forwarded) == 2
    for name, port in forwarded:
        assert int(port) in [one["port"] for one in services[name]["spec"]["ports"]]
