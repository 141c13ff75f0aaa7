"""The containers' files: clean by their tools, closed to the network, in step with each other and the code."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from llep.cli.dashboard import prometheus_config
from llep.cli.with_ray import PORT
from llep.config import Settings, load_settings
from llep.monitoring.rules import rules
from llep_server.config import DEFAULT_PORT, ServerConfig
from tests.ops.tools import tool

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
BIN = Path(sys.executable).parent
DOCKERFILES = sorted(DEPLOY.glob("*.Dockerfile"))
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]


def instructions(path: Path, word: str) -> list[str]:
    """What follows this instruction, wherever it stands in the Dockerfile."""
    text = re.sub(r"^#.*\n", "", path.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return re.findall(rf"^{word} (.*)$", text, flags=re.MULTILINE)


def environment(path: Path) -> dict[str, str]:
    return dict(pair.split("=", 1) for line in instructions(path, "ENV") for pair in shlex.split(line))


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_hadolint_has_nothing_to_say(path: Path) -> None:
    done = subprocess.run([BIN / "hadolint", path], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_image_is_closed_and_says_what_it_is(path: Path) -> None:
    assert instructions(path, "USER")[-1] == "10001:10001"
    assert instructions(path, "HEALTHCHECK") and instructions(path, "LABEL")
    (base,) = (line for line in instructions(path, "ARG") if line.startswith("BASE_IMAGE"))
    assert re.fullmatch(r"BASE_IMAGE=[\w./-]+:[\w.-]+", base) and "latest" not in base


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_build_finds_what_it_copies(path: Path) -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {
        word for line in instructions(path, "COPY") if not line.startswith("--from") for word in line.split()[:-1]
    }
    assert copied <= kept
    assert all((ROOT / name).exists() for name in kept)


def test_ports_are_those_of_the_code() -> None:
    path = DEPLOY / "control-plane.Dockerfile"
    assert instructions(path, "EXPOSE") == [f"{DEFAULT_PORT} {PORT}"]
    assert ServerConfig.from_env(environment(path) | {"LLEP_SERVER_INSECURE": "1"}).port == DEFAULT_PORT


def test_the_control_plane_can_all_that_it_offers() -> None:
    """Simulation, tuning, Parquet and spans need packages that nobody can add to a read-only image."""
    text = (DEPLOY / "control-plane.Dockerfile").read_text()
    assert set(re.findall(r"'\.\[(.*)\]'", text)[0].split(",")) == {"server", "scheduler", "planning", "otel"}


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_head_and_nodes_agree_on_state_and_token(path: Path) -> None:
    ours = environment(path)
    assert (ours["LLEP_STATE_DIR"], ours["RAY_AUTH_TOKEN_PATH"]) == ("/var/lib/llep", "/run/llep/ray-token")
    assert '"llep", "with-ray"' in instructions(path, "ENTRYPOINT")[0]


@pytest.mark.parametrize("path", [path for path in DOCKERFILES if "engine" in path.name], ids=lambda path: path.name)
def test_engines_record_where_they_may_write(path: Path) -> None:
    """Their root is read-only, and their state folder is the head's."""
    recordings = Path(environment(path)["LLEP_RECORD_DIR"])
    assert recordings.is_relative_to("/tmp")
    assert load_settings(environ={"LLEP_RECORD_DIR": str(recordings)})[0].record_dir == str(recordings)


def test_the_wheel_that_images_install_holds_every_file(tmp_path: Path) -> None:
    """Also what is not Python: the page's files, manifests."""
    listed = subprocess.run(
        ["git", "ls-files", "llep", "server/llep_server", "k8s"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode or not listed.stdout:
        pytest.skip("not a checkout of git")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-cache-dir"]
    subprocess.run([*build, "--wheel-dir", tmp_path, ROOT], check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    for name in listed.stdout.split():
        place = f"llep/packaged/{name}" if name.startswith("k8s/") else name.removeprefix("server/")
        assert place in held, name


def test_the_demo_serves_the_same_model_as_make_serve() -> None:
    (options,) = re.findall(r"^DEMO +:= (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert any(options in " ".join(line.split()) for line in instructions(DEPLOY / "engine-cpu.Dockerfile", "RUN"))


def test_compose_file_is_one() -> None:
    command = [BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", DEPLOY / "compose.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", SERVICES)
def test_service_is_closed(name: str) -> None:
    service = SERVICES[name]
    assert all(str(port).startswith("127.0.0.1:") for port in service.get("ports", ()))
    assert service["read_only"] and service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert re.search(r":[\w.${}-]+$", service["image"])


@pytest.mark.parametrize("name", SERVICES)
def test_what_a_service_mounts_and_waits_for_is_there(name: str) -> None:
    service = SERVICES[name]
    for mount in service.get("volumes", ()):
        source = mount.partition(":")[0]
        assert (DEPLOY / source).exists() if source.startswith(".") else source in COMPOSE["volumes"]
    assert set(service.get("depends_on", ())) <= set(SERVICES)
    if "build" in service:
        assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).exists()


@pytest.mark.parametrize("name", SERVICES)
def test_settings_of_a_service_are_settings(name: str) -> None:
    environ = SERVICES[name].get("environment", {}).items()
    ours = {key: re.sub(r"\$\{\w+:-(.*)\}", r"\1", str(value)) for key, value in environ if key.startswith("LLEP_")}
    settings, _ = load_settings(environ=ours)
    assert isinstance(settings, Settings)


def test_what_is_open_on_this_machine_asks_for_its_name() -> None:
    """Else a page on the internet, in a browser here, could point its own name at the port."""
    image = environment(DEPLOY / "control-plane.Dockerfile")
    config = ServerConfig.from_env(image | SERVICES["control-plane"]["environment"])
    assert config.checks_host
    scraped = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    targets = {target for job in scraped for group in job.get("static_configs", ()) for target in group["targets"]}
    assert {target.partition(":")[0] for target in targets} & set(config.allowed_hosts) == {"control-plane"}


@pytest.mark.parametrize("name", ["prometheus.yml", "local.yml"])
def test_prometheus_takes_its_configuration(tmp_path: Path, name: str) -> None:
    path = DEPLOY / "prometheus" / name
    if name == "prometheus.yml":
        text = path.read_text().replace("/etc/prometheus", str(DEPLOY / "prometheus"))
        path = tmp_path / name
        path.write_text(text)
    command = [tool("promtool"), "check", "config", path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 rule files found" in done.stdout


def test_prometheus_takes_what_llep_dashboard_writes(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("0123456789abcdef0\n")
    config = prometheus_config("https://control.example", tmp_path / "key", "http://127.0.0.1:8000")
    (tmp_path / "prometheus.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules()))
    command = [tool("promtool"), "check", "config", tmp_path / "prometheus.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0 and "1 rule files found" in done.stdout, done.stdout + done.stderr
    llep, vllm = config["scrape_configs"]
    assert llep["static_configs"] == [{"targets": ["control.example:443"]}] and llep["scheme"] == "https"
    assert vllm["static_configs"] == [{"targets": ["127.0.0.1:8000"]}] and "authorization" not in vllm


def test_prometheus_scrapes_services_where_they_listen() -> None:
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    targets = {target for job in config["scrape_configs"] for s in job["static_configs"] for target in s["targets"]}
    listening = {f"{alias}:{port}" for name in SERVICES for alias in names(name) for port in container_ports(name)}
    assert targets <= listening
    assert {job["job_name"] for job in config["scrape_configs"]} == {"llep", "vllm"}


def test_a_local_prometheus_scrapes_what_make_serve_starts() -> None:
    config, compose = (
        yaml.safe_load((DEPLOY / "prometheus" / f"{n}.yml").read_text()) for n in ("local", "prometheus")
    )
    targets = {job["job_name"]: job["static_configs"][0]["targets"] for job in config["scrape_configs"]}
    assert targets == {"llep": [f"127.0.0.1:{DEFAULT_PORT}"], "vllm": ["127.0.0.1:8000"]}
    assert config["global"] == compose["global"]


def names(service: str) -> set[str]:
    """What others of the network may call it."""
    networks = SERVICES[service].get("networks", {})
    return {service, *(alias for network in networks.values() for alias in network["aliases"])}


def container_ports(service: str) -> set[str]:
    return {port.rpartition(":")[2] for port in SERVICES[service].get("ports", ())}


def test_grafana_finds_its_dashboards_and_its_data() -> None:
    provisioning = DEPLOY / "grafana" / "provisioning"
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "llep.yaml").read_text())["providers"]
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())["datasources"]
    mounted = {mount.split(":")[1]: DEPLOY / mount.split(":")[0] for mount in SERVICES["grafana"]["volumes"]}
    folder = mounted[provider["options"]["path"]]
    home = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (folder / Path(home).name).exists() and str(Path(home).parent) == provider["options"]["path"]
    host, _, port = source["url"].removeprefix("http://").partition(":")
    assert port in container_ports(host)
