"""`llep control-plane`: the HTTP server as a process of its own."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from llep.cli.output import ExitCode, fail


def add_to(app: typer.Typer) -> None:
    app.command("control-plane")(control_plane)


def control_plane(
    host: Annotated[str | None, typer.Option(help="Address to listen on.", show_default="127.0.0.1")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 takes a free one.", show_default="8088")] = None,
    keys_file: Annotated[Path | None, typer.Option(help="Who may come in: lines 'name scope key'.")] = None,
    state_dir: Annotated[Path | None, typer.Option(help="The scheduler's state, should it have to be started.")] = None,
    ray_address: Annotated[
        str | None, typer.Option(help="The Ray that the scheduler is in.", show_default="auto")
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Listen beyond loopback without keys.")] = False,
) -> None:
    """Serve the control plane until Ctrl-C. Each flag may also come as LLEP_SERVER_HOST, _PORT, _KEYS_FILE, ..."""
    if importlib.util.find_spec("fastapi") is None or importlib.util.find_spec("uvicorn") is None:
        raise typer.Exit(fail("the control plane is not installed: pip install 'llep[server]'", ExitCode.ERROR))
    flags = {
        "LLEP_SERVER_HOST": host,
        "LLEP_SERVER_PORT": port,
        "LLEP_SERVER_KEYS_FILE": keys_file,
        "LLEP_SERVER_STATE_DIR": state_dir,
        "LLEP_RAY_ADDRESS": ray_address,
        "LLEP_SERVER_INSECURE": 1 if insecure else None,
    }
    given = {name: str(value) for name, value in flags.items() if value is not None}
    # In this process's place, so that llep knows nothing of llep_server and signals go where they should.
    os.execve(sys.executable, [sys.executable, "-m", "llep_server"], {**os.environ, **given})
