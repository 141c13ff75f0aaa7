"""What the shell proposes at Tab beyond commands, options and choices: names that the control plane knows.

Where that can't be reached at once nothing is proposed, and nothing is said: it would be in the middle of a line.
"""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path

import typer

from llep.errors import LlepError

WITHIN_S = 1.5


def engines(context: typer.Context, incomplete: str) -> list[str]:
    return _ids(context, "/v1/engines", incomplete)


def recordings(context: typer.Context, incomplete: str) -> list[str]:
    return _ids(context, "/v1/recordings", incomplete)


def setting_keys(incomplete: str) -> list[str]:
    from llep.config import Settings

    return [key for key in Settings.model_fields if key.startswith(incomplete)]


def assignments(incomplete: str) -> list[str]:
    """Keys that can change while serving, ready for a value."""
    from llep.config import is_hot

    return [f"{key}=" for key in setting_keys(incomplete) if is_hot(key)]


def _ids(context: typer.Context, path: str, incomplete: str) -> list[str]:
    from llep.cli.http import DEFAULT_SERVER, ControlPlane

    server = context.params.get("server") or os.environ.get("LLEP_SERVER") or DEFAULT_SERVER
    key_file = context.params.get("key_file") or os.environ.get("LLEP_KEY_FILE")
    with contextlib.suppress(LlepError, typer.Exit), contextlib.redirect_stderr(io.StringIO()):
        with ControlPlane(server, Path(key_file) if key_file else None, WITHIN_S) as control_plane:
            return [one["id"] for one in control_plane.get(path)["data"] if one["id"].startswith(incomplete)]
    return []
