"""What `llep serve` refuses before it starts anything: a line that names value, rule and way out, and an exit code."""

from __future__ import annotations

import json
import os
import shlex
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llep.cli import main
from llep.cli.preflight import VllmFlags, check_settings, conflicts, free_ports
from llep.cli.stack import find_place, plan_stack, summary
from llep.errors import UnsupportedConfiguration
from llep.tiny_models import write_tiny_model

ERROR, USAGE = 1, 2
Refused = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return write_tiny_model("qwen3", folder, layers=1, experts=4, top_k=2).directory


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs `llep serve` with these arguments -> (exit code, what it says on standard error)."""
    for name in list(os.environ):
        if name.startswith(("LLEP_", "VLLM_")):
            monkeypatch.delenv(name)

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(
            sys, "argv", ["llep", "serve", *map(str, arguments), "--state-dir", str(tmp_path / "state")]
        )
        children = _children()
        with pytest.raises(SystemExit) as ended:
            main()
        assert _children() == children
        said = capsys.readouterr()
        assert "starting" not in said.out
        assert isinstance(ended.value.code, int)
        return ended.value.code, said.err

    return run


def _children() -> set[str]:
    return {line for task in Path("/proc/self/task").iterdir() for line in (task / "children").read_text().split()}


def assert_said(answer: tuple[int, str], code: int, *words: str) -> None:
    found, said = answer
    assert found == code
    assert said.startswith("llep: ") and said.count("\n") == 1, said
    for word in words:
        assert word in said


def changed(model: Path, folder: Path, **changes: Any) -> Path:
    """A copy of the model with another config.json; None takes a key away."""
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).symlink_to(file)
    config = json.loads((model / "config.json").read_text()) | changes
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return folder


# Settings


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("LLEP_IMBALANCE_TRESHOLD", "2", ("environment", "imbalance_treshold", "did you mean 'imbalance_threshold'")),
        ("LLEP_IMBALANCE_THRESHOLD", "0.5", ("environment", "imbalance_threshold='0.5'", "greater than or equal to 1")),
        ("LLEP_MODE", "fast", ("mode='fast'", "'off', 'observe', 'shadow' or 'active'")),
        ("LLEP_MIN_CHUNK_TOKENS", "many", ("min_chunk_tokens='many'", "integer", "default 1024")),
        ("LLEP_CONFIG", "/nowhere/llep.yaml", ("LLEP_CONFIG=/nowhere/llep.yaml", "No such file")),
    ],
)
def test_settings_of_the_environment(
    refused: Refused, model: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, words: tuple[str, ...]
) -> None:
    monkeypatch.setenv(variable, value)
    assert_said(refused(model), USAGE, *words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("imbalance_treshold: 2", ("llep.yaml", "did you mean 'imbalance_threshold'")),
        ("capacity_factor: 9", ("llep.yaml", "capacity_factor=9", "less than or equal to 4")),
        ("mode: [", ("llep.yaml", "can't be read")),
        ("- mode", ("llep.yaml", "key: value", "list")),
        ("\x00\x01", ("llep.yaml", "can't be read")),
        ("1: 2", ("llep.yaml", "1")),
    ],
)
def test_settings_of_the_file(
    refused: Refused, model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, words: tuple[str, ...]
) -> None:
    (tmp_path / "llep.yaml").write_text(text)
    monkeypatch.setenv("LLEP_CONFIG", str(tmp_path / "llep.yaml"))
    assert_said(refused(model), USAGE, *words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--additional-config", '{"llep": {"planer": "home"}}'], ("planer", "did you mean 'planner'")),
        (['--additional-config={"llep": {"watchdog_s": 1}}'], ("watchdog_s=1", "greater than or equal to 5")),
        (["--additional_config", "llep"], ("--additional-config 'llep' is not JSON",)),
        (["--additional-config", '{"llep": 1}'], ('{"llep": {"mode": "active"}}', '{"llep": 1}')),
        (["--additional-config", "[1]"], ("must look like", "[1]")),
        (["--additional-config.llep.mode", "fast"], ("mode='fast'", "'active'")),
        (["--additional-config.llep.slots-per-rank=-1"], ("slots_per_rank=-1", "greater than or equal to 0")),
    ],
)
def test_settings_among_the_flags(refused: Refused, model: Path, arguments: list[str], words: tuple[str, ...]) -> None:
    assert_said(refused(model, *arguments), USAGE, *words)


def test_flags_beat_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLEP_CAPACITY_FACTOR", "2")
    monkeypatch.setenv("LLEP_IMBALANCE_THRESHOLD", "3")
    found = check_settings(
        VllmFlags(["--additional-config", '{"llep": {"mode": "shadow"}}', "--additional-config.llep.capacity_factor=3"])
    )
    # A dotted flag stands for the whole key, as in vLLM's own merging of the two the last one is right.
    assert (found.capacity_factor, found.imbalance_threshold) == (3, 3)


# The model


def test_no_such_folder(refused: Refused, tmp_path: Path) -> None:
    for name in ("./nothing", str(tmp_path / "nothing"), "~/no/such/thing", "a/b/c"):
        assert_said(refused(name), ERROR, f"model {name}: no such folder", "llep model tiny gpt-oss")


def test_a_file_is_no_model(refused: Refused, model: Path) -> None:
    assert_said(refused(model / "config.json"), ERROR, "is a file", "give the checkpoint's folder")


def test_no_config(refused: Refused, tmp_path: Path) -> None:
    assert_said(refused(tmp_path), ERROR, str(tmp_path), "no config.json")


@pytest.mark.parametrize("text", ['{"num_experts": 4', "", "\x00", "[]", "7"])
def test_broken_config(refused: Refused, model: Path, tmp_path: Path, text: str) -> None:
    folder = changed(model, tmp_path / "broken")
    (folder / "config.json").write_text(text)
    assert_said(refused(folder), ERROR, str(folder), "config.json", "copy or make it again")


def test_dense_model(refused: Refused, model: Path, tmp_path: Path) -> None:
    dense = changed(model, tmp_path / "dense", num_experts=0, num_experts_per_tok=None, moe_intermediate_size=None)
    assert_said(refused(dense), ERROR, "names no experts", "not a MoE model", "serve it with vLLM alone")


def test_no_weights(refused: Refused, model: Path, tmp_path: Path) -> None:
    folder = changed(model, tmp_path / "empty")
    (folder / "model.safetensors").unlink()
    assert_said(refused(folder), ERROR, "has no weights", "*.safetensors", "copy or make the checkpoint again")


# Order, flags, versions


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tensor-parallel-size", "2", "MODEL"], ("give the model first", "llep serve MODEL --tensor-parallel-size")),
        (["-tp", "2", "MODEL"], ("give the model first", "llep serve MODEL -tp")),
        (["--model", "MODEL"], ("give the model first",)),
        (["MODEL", "other"], ("'other'", "is no flag")),
        (["MODEL", "--model", "other"], ("--model", "drop --model")),
        (["MODEL", "--enable-eplb"], ("--enable-eplb", "drop --enable-eplb")),
        (["MODEL", "--enable_lora"], ("--enable-lora", "drop --enable-lora")),
        (["MODEL", "--enable-dbo"], ("--enable-dbo", "drop --enable-dbo")),
        (["MODEL", "--uds", "/tmp/socket"], ("--uds", "--port")),
        (["MODEL", "--all2all-backend=moonep"], ("moonep", "choose another backend")),
        (
            ["MODEL", "-tp", "2", "-dp=2", "-ep", "--all2all-backend", "deepep_low_latency"],
            ("would be sent 2 times", "choose --all2all-backend allgather_reducescatter"),
        ),
        (["MODEL", "--pipeline-parallel-size", "2"], ("several EP groups", "drop --pipeline-parallel-size")),
        (["MODEL", "--cpu-offload-gb=4"], ("offloaded weights", "drop --cpu-offload-gb")),
        (["MODEL", "-tp", "two"], ("--tensor-parallel-size", "'two'", "number from 1")),
        (["MODEL", "--data-parallel-size=0"], ("--data-parallel-size", "'0'", "number from 1")),
        (["MODEL", "--tensor-parallel-size"], ("--tensor-parallel-size", "got nothing")),
        (["MODEL", "--port", "99999"], ("--port", "'99999'", "65535")),
        (["MODEL", "--port=http"], ("--port", "'http'")),
        (["MODEL", "--config", "/nowhere.yaml"], ("--config /nowhere.yaml", "No such file")),
    ],
)
def test_flags(refused: Refused, model: Path, arguments: list[str], words: tuple[str, ...]) -> None:
    assert_said(refused(*(model if word == "MODEL" else word for word in arguments)), USAGE, *words)


def test_flags_of_a_file_count_too(refused: Refused, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "vllm.yaml"
    file.write_text(
        "tensor-parallel-size: 2\ndata_parallel_size: 2\nenable-expert-parallel: true\nenable-lora: false\n"
        "all2all-backend: deepep_low_latency\n"
    )
    assert_said(refused(model, "--config", file), USAGE, "would be sent 2 times")
    file.write_text("- tensor-parallel-size")
    assert_said(refused(model, "--config", file), USAGE, "flag: value", "list")


def test_vllm_that_would_not_load_llep(refused: Refused, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for plugins in ("", "other", "other, llep2"):
        monkeypatch.setenv("VLLM_PLUGINS", plugins)
        assert_said(refused(model), USAGE, f"VLLM_PLUGINS={plugins!r}", "add llep to it, or unset it")


def test_untested_vllm(refused: Refused, model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As the packages on the path say it is."""
    (tmp_path / "vllm-9.9.9.dist-info").mkdir()
    (tmp_path / "vllm-9.9.9.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 9.9.9\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert_said(refused(model), USAGE, "vllm 9.9.9", "0.32.x", 'pip install "llep[vllm]"')


def test_missing_packages(refused: Refused, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, extra in (("ray", "scheduler"), ("uvicorn", "server")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)  # as Python marks what is not there
            assert_said(refused(model), USAGE, f"{module} is not installed", f'pip install "llep[{extra}]"')


# Places


def test_ports_in_use(refused: Refused, model: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        (free,) = free_ports(1)
        for arguments in (("--port", port, "--control-plane-port", free), (f"--port={port}", "--host=127.0.0.1")):
            assert_said(refused(model, *arguments), ERROR, f"the API can't use 127.0.0.1:{port}", "in use", "--port")
        answer = refused(model, "--port", free, "--control-plane-port", port)
        assert_said(answer, ERROR, f"the control plane can't use 127.0.0.1:{port}", "in use", "--control-plane-port")


def test_one_port_for_two(refused: Refused, model: Path) -> None:
    (port,) = free_ports(1)
    answer = refused(model, "--port", port, "--control-plane-port", port)
    assert_said(answer, USAGE, f"port {port} is for both", "--control-plane-port")


def test_addresses_of_others(refused: Refused, model: Path) -> None:
    assert_said(refused(model, "--host", "198.51.100.1"), ERROR, "the API can't use 198.51.100.1", "assign")
    answer = refused(model, "--port", 0, "--control-plane-host", "no.such.host.invalid")
    assert_said(answer, ERROR, "the control plane can't use no.such.host.invalid")


def test_control_plane_port_out_of_range(refused: Refused, model: Path) -> None:
    assert_said(refused(model, "--control-plane-port", 70000), USAGE, "--control-plane-port 70000", "0", "65535")


def test_state_folder_that_can_not_be(refused: Refused, model: Path, tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file")
    assert_said(refused(model), ERROR, f"state folder {tmp_path / 'state'}", "--state-dir or LLEP_STATE_DIR")


def test_temporary_folder_that_can_not_be(
    refused: Refused, model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/nowhere")
    assert_said(refused(model), ERROR, "no temporary folder", "/nowhere", "set TMPDIR")


def test_address_of_ray_that_is_none(refused: Refused, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLEP_RAY_ADDRESS", "ray://somewhere")
    assert_said(refused(model), USAGE, "'ray://somewhere'", "host:port", "127.0.0.1:6379")


# What vLLM is told


def test_flags_in_every_form() -> None:
    flags = VllmFlags(["-tp", "2", "--port=1", "--port", "3", "--served_model_name", "a", "b", "--enforce-eager"])
    assert flags.number("--tensor-parallel-size", "-tp", default=1) == 2
    assert flags.number("--port", default=8000) == 3  # the last one counts, as in vLLM
    assert flags.value("--served-model-name") == "a"
    assert flags.has("--enforce-eager") and flags.value("--enforce-eager") is None
    assert flags.ep_size == 1
    assert VllmFlags(["-dp=4", "-ep"]).ep_size == 4
    with pytest.raises(UnsupportedConfiguration):
        VllmFlags(["--port", "-1"]).number("--port", default=8000)


def vllm_command(model: str, tmp_path: Path, *arguments: str) -> tuple[str, dict[str, str | None]]:
    """What `llep serve` would start: (the summary, flag -> value)."""
    flags = VllmFlags(arguments)
    place = find_place(model, flags, "0.0.0.0", 8088, tmp_path, tmp_path)
    command = plan_stack(place, flags, "", {}).vllm.command
    names = [word for word in command if word.startswith("--")]
    assert len(set(names)) == len(names), "a flag twice"
    found = VllmFlags(command)
    return summary(place), {name: found.value(name) for name in names}


def test_vllm_is_told_what_was_said(model: Path, tmp_path: Path) -> None:
    said, flags = vllm_command(str(model), tmp_path, "--host", "::1", "--port=1234", "--dtype", "half")
    assert flags["--model"] == str(model)
    assert flags["--served-model-name"] == "tiny"
    assert flags["--dtype"] == "half"
    assert "http://[::1]:1234/v1/completions" in said
    assert "http://127.0.0.1:8088/v1/loads" in said
    body = json.loads(shlex.split(said.split("\n")[2])[-1])
    assert body["model"] == "tiny"


def test_names_of_models(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model)
    assert vllm_command(".", tmp_path)[1]["--served-model-name"] == "tiny"
    assert vllm_command("openai/gpt-oss-20b", tmp_path)[1]["--served-model-name"] == "openai/gpt-oss-20b"
    assert vllm_command(str(model), tmp_path, "--served-model-name", "it's", "b")[1]["--served-model-name"] == "it's"
    said, _ = vllm_command(str(model), tmp_path, "--served-model-name", "it's")
    assert json.loads(shlex.split(said.split("\n")[2])[-1])["model"] == "it's"


def test_keys_are_asked_for_but_not_printed(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLEP_SERVER_KEYS_FILE", "/keys")
    said, _ = vllm_command(str(model), tmp_path, "--api-key", "secret")
    assert "Bearer $VLLM_API_KEY" in said and "Bearer $LLEP_KEY" in said and "secret" not in said


def test_flags_that_llep_works_with_are_no_conflict() -> None:
    fine = [*("-tp", "2", "-dp", "2", "-ep", "--pipeline-parallel-size=1", "--cpu-offload-gb", "0")]
    assert list(conflicts(VllmFlags(fine))) == []
    assert list(conflicts(VllmFlags(["-tp", "8", "-ep", "--all2all-backend", "deepep_low_latency"]))) == []
