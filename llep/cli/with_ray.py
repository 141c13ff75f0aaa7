"""`llep with-ray`: a command beside a Ray node of its own, as containers need it.

Ray lets a process join only through a node on the same machine, and a container is a machine of its own.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import sys
import tempfile
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from llep.cli.preflight import vllm_group_nice
from llep.cli.supervise import Child, StopRequested, StopSignals
from llep.errors import LlepError, UnsupportedConfiguration
from llep.scheduler.client import SCHEDULER_RESOURCE, check_address

PORT = 6379
# Beyond the first port, which only a head listens on. NetworkPolicies let through the whole range.
PORT_FLAGS = ("node-manager-port", "object-manager-port", "runtime-env-agent-port", "dashboard-agent-grpc-port")
METRICS_PORT, CLIENT_PORT, FIRST_WORKER_PORT, LAST_WORKER_PORT = 9, 10, 20, 99
OBJECT_STORE_BYTES = 80 * 1024**2  # Ray's least; nothing is kept there
RAY_TOKEN = Path("~/.ray/auth_token")  # where Ray looks by itself
LOOK_EVERY_S = 0.5
RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_enable_metrics_collection": "0",  # unless LLEP_SERVER_RAY_METRICS is set
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    "RAY_worker_niceness": "0",
}


class Role(StrEnum):
    HEAD = "head"
    NODE = "node"


def add_to(app: typer.Typer) -> None:
    # What follows the role belongs to the command, its options too.
    app.command("with-ray", context_settings={"allow_extra_args": True, "allow_interspersed_args": False})(with_ray)


def with_ray(
    context: typer.Context,
    role: Annotated[Role, typer.Argument(help="head: start a Ray here; node: join the one at LLEP_RAY_ADDRESS.")],
    node_ip: Annotated[
        str,
        typer.Option(envvar="POD_IP", help="Where others reach this container; its own name's address if not given."),
    ] = "",
    port: Annotated[
        int, typer.Option(min=1024, max=65435, help=f"Ray listens on this port and the {LAST_WORKER_PORT} after it.")
    ] = PORT,
) -> None:
    """Run a command beside a Ray node: `llep with-ray head COMMAND ...`. In containers; elsewhere `llep serve` does it.

    Ray is started again whenever it ends; when the command ends, so does Ray, with the command's exit status.
    """
    if not context.args:
        raise UnsupportedConfiguration("no command: give it after head or node, such as llep control-plane")
    if shutil.which(context.args[0]) is None:
        raise UnsupportedConfiguration(f"{context.args[0]} is no command that can be run here: see PATH")
    ip = node_ip or socket.gethostbyname(socket.gethostname())
    folder = _temporary_folder()
    try:
        environment = _environment(role, ip, port, os.environ)
        ray = Child("Ray", ray_command(role, ip, port, environment, folder), environment, None)
        group_nice = vllm_group_nice() if role is Role.NODE else 0
        command = Child("the command", context.args, environment, None, stop_s=30.0, group_nice=group_nice)
        status = _run(ray, command, _token_file(role, environment))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    raise typer.Exit(status)


def ray_command(role: Role, ip: str, port: int, environment: Mapping[str, str], folder: Path) -> list[str]:
    """`ray start` in the foreground; every port is in port .. port + LAST_WORKER_PORT."""
    ports = [f"--{flag}={port + offset}" for offset, flag in enumerate(PORT_FLAGS, start=1)]
    where = (
        [
            *("--head", f"--port={port}", f"--ray-client-server-port={port + CLIENT_PORT}", "--no-monitor"),
            *("--include-dashboard=false", f'--resources={{"{SCHEDULER_RESOURCE}": 1}}', f"--temp-dir={folder}"),
        ]
        if role is Role.HEAD
        else [f"--address={environment['LLEP_RAY_ADDRESS']}"]
    )
    return [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--node-ip-address={ip}", *where, *ports),
        *(f"--min-worker-port={port + FIRST_WORKER_PORT}", f"--max-worker-port={port + LAST_WORKER_PORT}"),
        *(
            f"--metrics-export-port={port + METRICS_PORT}",
            "--dashboard-agent-listen-port=0",
            "--num-cpus=0",
            "--num-gpus=0",
            "--disable-usage-stats",
        ),
        *(f"--object-store-memory={OBJECT_STORE_BYTES}", "--include-log-monitor=false"),
    ]


def _temporary_folder() -> Path:
    """With a short path: it holds unix sockets."""
    try:
        return Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    except OSError as error:
        raise LlepError(f"/tmp can't be written ({error.strerror}): mount a temporary file system there") from None


def _environment(role: Role, ip: str, port: int, environ: Mapping[str, str]) -> dict[str, str]:
    environment = {"RAY_AUTH_MODE": "token", **environ, **RAY_ENVIRONMENT}
    if environ.get("LLEP_SERVER_RAY_METRICS"):
        environment["RAY_enable_metrics_collection"] = "1"
    if role is Role.HEAD:
        environment["LLEP_RAY_ADDRESS"] = f"{ip}:{port}"
    elif check_address(environment.get("LLEP_RAY_ADDRESS", "")) == "auto":
        raise UnsupportedConfiguration("LLEP_RAY_ADDRESS=auto names no Ray to join: give host:port of the head")
    return environment


def _token_file(role: Role, environment: Mapping[str, str]) -> Path | None:
    """Where Ray's token is, which a head writes if nobody has; None if the token comes otherwise or none is wanted.

    Raises UnsupportedConfiguration where it can come from nowhere.
    """
    path = Path(environment.get("RAY_AUTH_TOKEN_PATH", ""))
    if environment["RAY_AUTH_MODE"] != "token" or environment.get("RAY_AUTH_TOKEN"):
        return None
    if not path.name:
        if not RAY_TOKEN.expanduser().exists():
            raise UnsupportedConfiguration(
                f"Ray wants a token and there is none: set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH (a head writes a file "
                f"there), put one into {RAY_TOKEN}, or set RAY_AUTH_MODE=disabled"
            )
        return None
    if role is Role.HEAD and not path.exists():
        try:
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o400), "w") as file:
                file.write(secrets.token_hex(32))
        except OSError as error:
            raise UnsupportedConfiguration(f"RAY_AUTH_TOKEN_PATH={path} can't be written: {error.strerror}") from None
    return path


def _run(ray: Child, command: Child, token_file: Path | None) -> int:
    """Until the command ends; its exit status. Asked to stop, it stops both."""
    signals = StopSignals()
    with signals.heeded():
        try:
            command.start()
            if token_file is not None and not token_file.exists():
                print(
                    f"llep: Ray waits for its token in {token_file}, which a head writes: give both the same volume "
                    "there, or RAY_AUTH_TOKEN",
                    flush=True,
                )
            while command.status is None:
                if token_file is None or token_file.exists():
                    _keep(ray)
                signals.pause(LOOK_EVERY_S)
        except StopRequested:
            command.stop(lambda: signals.is_urgent)
        finally:
            command.stop(lambda: signals.is_urgent)
            ray.stop(lambda: signals.is_urgent)
    status = command.status or 0
    return status if status >= 0 else 128 - status


def _keep(ray: Child) -> None:
    """See to it that Ray runs."""
    if ray.process is None:
        ray.start()
    elif ray.status is not None and ray.is_due_again():
        print(f"llep: Ray ended with status {ray.status}; it is started again", flush=True)
        ray.restart()
