"""What `llep serve` starts, where and with which command lines. Starts nothing by itself."""

from __future__ import annotations

import json
import os
import secrets
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llep.cli.preflight import VllmFlags, free_ports, is_cpu_build, vllm_group_nice
from llep.cli.supervise import Child
from llep.errors import UnsupportedConfiguration

RAY_OBJECT_STORE_BYTES = 80 * 1024**2  # Ray's least; nothing is kept there


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


@dataclass(frozen=True, slots=True)
class Place:
    """Where everything is. model: as vLLM wants it; name: what requests call it; temporary: gone at the end."""

    model: str
    name: str
    host: str
    port: int
    control_plane_host: str
    control_plane_port: int
    state_dir: Path
    temporary: Path
    is_tls: bool
    has_api_key: bool
    has_server_keys: bool

    @property
    def refusal(self) -> Path:
        """Where a worker leaves what it refuses to do."""
        return self.temporary / "refusal.txt"

    @property
    def api(self) -> str:
        return f"{'https' if self.is_tls else 'http'}://{_reachable(self.host)}:{self.port}"

    @property
    def control_plane(self) -> str:
        return f"http://{_reachable(self.control_plane_host)}:{self.control_plane_port}"


def find_place(
    model: str, flags: VllmFlags, control_plane_host: str, control_plane_port: int, state_dir: Path, temporary: Path
) -> Place:
    """Raises UnsupportedConfiguration for ports that are none."""
    if not 0 <= control_plane_port <= 65535:
        raise UnsupportedConfiguration(
            f"--control-plane-port {control_plane_port} is no port: give a number from 0 (a free one) to 65535",
            param="control_plane_port",
        )
    api_port = flags.number("--port", default=8000, lowest=0, highest=65535)
    free_port, other_free_port = free_ports(2)
    return Place(
        model=model,
        name=_served_name(model, flags),
        host=flags.value("--host") or "127.0.0.1",
        port=api_port or free_port,
        control_plane_host=control_plane_host,
        control_plane_port=control_plane_port or other_free_port,
        state_dir=state_dir,
        temporary=temporary,
        is_tls=flags.has("--ssl-certfile"),
        has_api_key=flags.has("--api-key") or bool(os.environ.get("VLLM_API_KEY")),
        has_server_keys=bool(os.environ.get("LLEP_SERVER_KEYS_FILE")),
    )


def _served_name(model: str, flags: VllmFlags) -> str:
    """What requests call the model: a folder's name, or a hub's name in full, as in vLLM."""
    given = flags.value("--served-model-name")
    return given or (Path(model).resolve().name if Path(model).is_dir() else model)


def plan_stack(place: Place, flags: VllmFlags, engine: str, environ: Mapping[str, str]) -> Stack:
    """The processes to start in the environment `environ`; `engine` is this engine's name, '' for the model's."""
    environment = {
        **environ,
        "LLEP_STATE_DIR": str(place.state_dir),
        "LLEP_SERVER_STATE_DIR": str(place.state_dir),
        "LLEP_ENGINE": engine or place.name.rpartition("/")[2],
        "LLEP_SERVER_HOST": place.control_plane_host,
        "LLEP_SERVER_PORT": str(place.control_plane_port),
        "LLEP_REFUSAL_FILE": str(place.refusal),
    }
    logs = place.state_dir / "logs"
    ray = None
    if not environment.get("LLEP_RAY_ADDRESS"):
        port, client_port = free_ports(2)
        environment["LLEP_RAY_ADDRESS"] = f"127.0.0.1:{port}"
        environment.setdefault("RAY_AUTH_MODE", "token")
        environment.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        command = _ray_command(port, client_port, place.temporary / "ray")
        ray = Child("Ray", command, {**environment, **_RAY_ENVIRONMENT}, logs / "ray.log")
    control_plane = Child(
        "the control plane", [sys.executable, "-m", "llep_server"], environment, logs / "control-plane.log"
    )
    return Stack(ray, control_plane, _plan_vllm(place, flags, environment))


def _plan_vllm(place: Place, flags: VllmFlags, environment: Mapping[str, str]) -> Child:
    """vLLM's own flags come last, so that they win."""
    ours = {
        "--model": place.model,
        "--host": place.host,
        "--port": str(place.port),
        "--served-model-name": place.name,
        **(_cpu_flags() if is_cpu_build() else {}),
    }
    added = [word for name, value in ours.items() if not flags.has(name) for word in (name, value)]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *added, *flags.arguments]
    if flags.value("--port") == "0":
        command += ["--port", str(place.port)]  # the free one that was found
    defaults = {"VLLM_RPC_BASE_PATH": str(place.temporary)}
    if is_cpu_build():
        defaults |= _cpu_environment(flags)
    if Path(place.model).is_dir():
        defaults["HF_HUB_OFFLINE"] = "1"
    return Child("vLLM", command, {**defaults, **environment}, None, stop_s=20.0, group_nice=vllm_group_nice())


# Usage statistics would leave the machine; the log monitor and the like are of no use to one actor.
# Nothing is worth draining: the scheduler's truth is in its state folder.
_RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    "RAY_worker_niceness": "0",  # Ray starts its workers with 15: beside a busy vLLM the scheduler would starve
}


def _ray_command(port: int, client_port: int, temp_dir: Path) -> list[str]:
    """Every port is a free one, so that stacks on one machine don't meet; what one actor can do without is left out."""
    return [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}"),
        *("--node-ip-address=127.0.0.1", "--num-cpus=1", "--num-gpus=0", "--include-dashboard=false"),
        *(f"--ray-client-server-port={client_port}", "--min-worker-port=0", "--max-worker-port=0"),
        *("--dashboard-agent-listen-port=0", "--no-monitor", "--include-log-monitor=false"),
        *(f"--object-store-memory={RAY_OBJECT_STORE_BYTES}", f"--temp-dir={temp_dir}", "--disable-usage-stats"),
    ]


def _cpu_flags() -> dict[str, str]:
    """float32 where the processor would have to emulate bfloat16."""
    has_bfloat16 = _cpu_features() & {"amx_bf16", "avx512_bf16"}
    return {} if has_bfloat16 else {"--dtype": "float32"}


def _cpu_features() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return {word for line in lines if line.startswith("flags") for word in line.split()[2:]}


def _cpu_environment(flags: VllmFlags) -> dict[str, str]:
    """Cores dealt out to ranks in equal, adjacent parts, since vLLM's own binding wants a NUMA node for each."""
    cores = sorted(os.sched_getaffinity(0))
    share = max(len(cores) // flags.ranks, 1)
    parts = [cores[(rank * share) % len(cores) :][:share] for rank in range(flags.ranks)]
    return {
        "VLLM_CPU_OMP_THREADS_BIND": "|".join(",".join(map(str, part)) for part in parts),
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }


def _reachable(host: str) -> str:
    """How this machine reaches itself there, as it stands in a URL."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host.strip("[]"), host.strip("[]"))
    return f"[{host}]" if ":" in host else host


def summary(place: Place) -> str:
    """What to tell people once all is there; every command can be copied into a shell."""
    data = json.dumps({"model": place.name, "prompt": "def main():", "max_tokens": 16})
    api_key = ' -H "Authorization: Bearer $VLLM_API_KEY"' if place.has_api_key else ""
    server_key = ' -H "Authorization: Bearer $LLEP_KEY"' if place.has_server_keys else ""
    post = f"-H 'Content-Type: application/json'{api_key} -d {shlex.quote(data)}"
    return "\n".join(
        [
            f"serving {place.name}; Ctrl-C ends everything",
            f"  API            {place.api}/v1",
            f"    curl {place.api}/v1/completions {post}",
            f"  control plane  {place.control_plane}",
            f"    curl {place.control_plane}/v1/loads{server_key}",
            f"  its docs       {place.control_plane}/docs",
            f"    curl {place.control_plane}/openapi.json",
        ]
    )
