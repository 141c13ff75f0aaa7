"""`llep serve`: Ray, the scheduler, the control plane and vLLM with the plugin, in one command."""

from __future__ import annotations

import os
import secrets
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import httpx
import typer

from llep.cli.output import ExitCode, fail
from llep.cli.preflight import (
    VllmFlags,
    check_flags,
    check_model,
    check_port,
    check_settings,
    check_vllm,
    free_port,
    is_cpu_build,
)
from llep.cli.supervise import Child
from llep.errors import LlepError
from llep.scheduler.client import DEFAULT_STATE_DIR

CONTROL_PLANE_START_S = 60.0
RAY_OBJECT_STORE_BYTES = 80 * 1024**2  # Ray's least; nothing is kept there


class _Stop(Exception):
    """Somebody asked us to end."""


@dataclass(frozen=True, slots=True)
class Stack:
    """What runs, in the order it is started. ray is None where LLEP_RAY_ADDRESS names one that runs already."""

    ray: Child | None
    control_plane: Child
    vllm: Child

    @property
    def restarted(self) -> list[Child]:
        """Serving goes on without them, so they are started again when they die."""
        return [child for child in (self.ray, self.control_plane) if child is not None]


def add_to(app: typer.Typer) -> None:
    app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(serve)


def serve(
    context: typer.Context,
    model: str = typer.Argument(help="A checkpoint's folder, or a name that vLLM can load."),
    control_plane_port: int = typer.Option(8088, "--control-plane-port", envvar="LLEP_SERVER_PORT"),
    control_plane_host: str = typer.Option("127.0.0.1", "--control-plane-host", envvar="LLEP_SERVER_HOST"),
    state_dir: str = typer.Option(DEFAULT_STATE_DIR, envvar="LLEP_STATE_DIR", help="Settings, events and logs."),
    engine: str = typer.Option("", envvar="LLEP_ENGINE", help="This engine's name; the model's if not given."),
) -> None:
    """Serve MODEL with vLLM and llep: Ray, scheduler, control plane and engine. All other flags are vLLM's.

    Give vLLM --enable-expert-parallel and --tensor-parallel-size or --data-parallel-size; Ctrl-C ends everything.
    """
    flags = VllmFlags(context.args)
    check_vllm()
    check_settings(flags)
    check_flags(flags)
    check_model(model)
    host = flags.value("--host") or "127.0.0.1"
    port = flags.number("--port", default=8000)
    check_port(host, port, "the API", "choose another port with --port")
    other = "choose another port with --control-plane-port or LLEP_SERVER_PORT"
    check_port(control_plane_host, control_plane_port, "the control plane", other)
    if flags.ep_size == 1:
        _say("nothing to balance: give --enable-expert-parallel with --tensor-parallel-size or --data-parallel-size")
    name = flags.value("--served-model-name") or Path(model).name
    folder = Path(state_dir).expanduser()
    refusal = folder / "logs" / f"refusal-{os.getpid()}.txt"
    environment = {
        **os.environ,
        "LLEP_STATE_DIR": str(folder),
        "LLEP_ENGINE": engine or name,
        "LLEP_SERVER_HOST": control_plane_host,
        "LLEP_SERVER_PORT": str(control_plane_port),
        "LLEP_REFUSAL_FILE": str(refusal),
    }
    stack = _plan_stack(model, name, host, port, flags, folder, environment)
    urls = _Urls(f"http://{_reachable(host)}:{port}", f"http://{_reachable(control_plane_host)}:{control_plane_port}")
    code = _run(stack, name, urls)
    if code and refusal.exists():
        fail(refusal.read_text())
    refusal.unlink(missing_ok=True)
    if code:
        raise typer.Exit(code)


@dataclass(frozen=True, slots=True)
class _Urls:
    api: str
    control_plane: str


def _plan_stack(
    model: str, name: str, host: str, port: int, flags: VllmFlags, state_dir: Path, environment: dict[str, str]
) -> Stack:
    logs = state_dir / "logs"
    ray = None
    if not environment.get("LLEP_RAY_ADDRESS"):
        ray_port = free_port()
        environment["LLEP_RAY_ADDRESS"] = f"127.0.0.1:{ray_port}"
        environment.setdefault("RAY_AUTH_MODE", "token")
        environment.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        ray = Child("Ray", _ray_command(ray_port), {**environment, **_RAY_ENVIRONMENT}, logs / "ray.log")
    control_plane = Child(
        "the control plane", [sys.executable, "-m", "llep_server"], environment, logs / "control-plane.log"
    )
    vllm_flags = ["--model", model, "--host", host, "--port", str(port), *_served_name(name, flags), *flags.arguments]
    vllm_environment = dict(environment)
    if is_cpu_build():
        vllm_flags += _cpu_flags(flags)
        vllm_environment = {**_cpu_environment(flags), **environment}
    if Path(model).expanduser().is_dir():
        vllm_environment.setdefault("HF_HUB_OFFLINE", "1")
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *vllm_flags]
    return Stack(ray, control_plane, Child("vLLM", command, vllm_environment, None, stop_s=20.0))


# Usage statistics would leave the machine; the log monitor and the like are of no use to one actor.
# Nothing is worth draining: the scheduler's truth is in its state folder.
_RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
}


def _ray_command(port: int) -> list[str]:
    # Unix sockets below it must stay under 108 characters.
    temp_dir = tempfile.mkdtemp(prefix="llep-ray-")
    return [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}"),
        *("--node-ip-address=127.0.0.1", "--num-cpus=1", "--num-gpus=0", "--include-dashboard=false"),
        *(f"--object-store-memory={RAY_OBJECT_STORE_BYTES}", f"--temp-dir={temp_dir}", "--disable-usage-stats"),
    ]


def _served_name(name: str, flags: VllmFlags) -> list[str]:
    return [] if flags.has("--served-model-name") else ["--served-model-name", name]


def _cpu_flags(flags: VllmFlags) -> list[str]:
    """float32 where the processor would have to emulate bfloat16."""
    if flags.has("--dtype") or "amx_bf16" in _cpu_features() or "avx512_bf16" in _cpu_features():
        return []
    return ["--dtype", "float32"]


def _cpu_features() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return {word for line in lines if line.startswith("flags") for word in line.split()[2:]}


def _cpu_environment(flags: VllmFlags) -> dict[str, str]:
    """Cores dealt out to ranks in equal, adjacent parts, since vLLM's own binding wants a NUMA node for each."""
    cores = sorted(os.sched_getaffinity(0))
    ranks = flags.number("--tensor-parallel-size", "-tp", default=1) * flags.number(
        "--data-parallel-size", "-dp", default=1
    )
    share = max(len(cores) // ranks, 1)
    parts = [cores[(rank * share) % len(cores) :][:share] for rank in range(ranks)]
    return {
        "VLLM_CPU_OMP_THREADS_BIND": "|".join(",".join(map(str, part)) for part in parts),
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }


def _reachable(host: str) -> str:
    return "127.0.0.1" if host in ("0.0.0.0", "::") else host


def _run(stack: Stack, name: str, urls: _Urls) -> int:
    """Start all, keep them running until vLLM ends or somebody asks to stop; nothing is left behind."""
    try:
        with _stop_on_signals():
            _start(stack, name, urls)
            _keep_running(stack)
            status = stack.vllm.status
            return fail(f"vLLM ended with status {status}; everything else was ended too", ExitCode.ERROR)
    except _Stop:
        _say("ending everything")
        return ExitCode.OK
    except LlepError as error:
        return fail(error.message, ExitCode.ERROR)
    finally:
        for child in (stack.vllm, stack.control_plane, stack.ray):
            if child is not None:
                child.stop()


def _start(stack: Stack, name: str, urls: _Urls) -> None:
    if stack.ray is not None:
        _say("starting Ray")
        stack.ray.start()
    _say(f"starting the control plane on {urls.control_plane}")
    stack.control_plane.start()
    _say("starting vLLM; on CPU this takes about a minute")
    stack.vllm.start()
    _wait_for(stack.control_plane, f"{urls.control_plane}/livez", CONTROL_PLANE_START_S, stack)
    _wait_for(stack.vllm, f"{urls.api}/health", None, stack)
    _say(_summary(name, urls))


def _wait_for(child: Child, url: str, timeout_s: float | None, stack: Stack) -> None:
    """Until `url` answers 200. Raises LlepError if the child ends before, or does not answer in time."""
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    while True:
        for needed in (child, stack.vllm):
            if needed.status is not None:
                where = f": see {needed.log}" if needed.log else "; what it printed above says why"
                raise LlepError(f"{needed.name} ended with status {needed.status} before it was ready{where}")
        if deadline is not None and time.monotonic() > deadline:
            raise LlepError(f"{child.name} did not answer on {url} within {timeout_s:.0f} s: see {child.log}")
        try:
            if httpx.get(url, timeout=2.0).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.25)


def _keep_running(stack: Stack) -> None:
    """Until vLLM ends. The others are started again when they die: serving goes on meanwhile."""
    while stack.vllm.status is None:
        for child in stack.restarted:
            if child.status is not None and child.is_due_again():
                _say(f"{child.name} ended with status {child.status}, serving goes on; starting it again")
                child.start()
        time.sleep(0.5)


@contextmanager
def _stop_on_signals() -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> Any:
        for other in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(other, signal.SIG_IGN)  # once is enough: ending takes a few seconds
        raise _Stop

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    yield


def _summary(name: str, urls: _Urls) -> str:
    data = f'{{"model": {name!r}, "prompt": "def main():", "max_tokens": 16}}'.replace("'", '"')
    return "\n".join(
        [
            f"serving {name}; Ctrl-C ends everything",
            f"  API            {urls.api}/v1",
            f"    curl {urls.api}/v1/completions -H 'Content-Type: application/json' -d {shlex.quote(data)}",
            f"  control plane  {urls.control_plane}",
            f"    curl {urls.control_plane}/v1/loads",
            f"  its docs       {urls.control_plane}/docs",
            f"    curl {urls.control_plane}/openapi.json",
        ]
    )


def _say(text: str) -> None:
    print(f"llep: {text}", flush=True)
