"""`llep record`: record what a live engine routes, and fetch it."""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from llep.cli import complete
from llep.cli.control import ReasonOption, parse_duration
from llep.cli.http import DEFAULT_SERVER, ControlPlane, EngineOption, KeyFileOption, OutputOption, ServerOption
from llep.cli.output import ExitCode, Format, fail, show
from llep.cli.progress import progress
from llep.errors import LlepError, SettingsError

Row = dict[str, Any]

LOOK_EVERY_S = 1.0
ACTIVE = ("ordered", "running")
_ID = re.compile(r"\d{8}-\d{6}-[0-9a-f]{6}")
IdArgument = Annotated[
    str,
    typer.Argument(
        metavar="ID", help="The recording; `llep record list` shows them.", autocompletion=complete.recordings
    ),
]

commands = typer.Typer(help="Record the counts of an engine that serves.", no_args_is_help=True)


def add_to(app: typer.Typer) -> None:
    app.add_typer(commands, name="record")


@commands.command()
def start(
    server: ServerOption = DEFAULT_SERVER,
    key_file: KeyFileOption = None,
    output: OutputOption = Format.TABLE,
    engine: EngineOption = None,
    duration: Annotated[str | None, typer.Option(help="End after this time, such as 2m; a minute if not told.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="End after so many steps.")] = None,
    max_bytes: Annotated[int | None, typer.Option(min=1 << 20, help="End at this size.")] = None,
    reason: ReasonOption = "",
    wait: Annotated[bool, typer.Option("--wait", help="Return when it has ended; exit code 4 if it failed.")] = False,
) -> None:
    """Record an engine from its next step on; it ends by itself after time, steps or bytes, whichever is first."""
    body = {
        "engine": engine,
        "duration_s": None if duration is None else parse_duration("--duration", duration),
        "steps": steps,
        "max_bytes": max_bytes,
        "reason": reason,
    }
    with ControlPlane(server, key_file) as control_plane:
        recording = control_plane.post("/v1/recordings", body)
        if wait:
            recording = _wait(control_plane, recording)
    _show(recording, output)
    if recording["state"] == "failed":
        raise typer.Exit(fail(recording["problem"], ExitCode.CHECK_FAILED))


@commands.command()
def stop(
    id: IdArgument,
    server: ServerOption = DEFAULT_SERVER,
    key_file: KeyFileOption = None,
    output: OutputOption = Format.TABLE,
) -> None:
    """End a recording now; what has been recorded is kept, and all of it here within a few seconds."""
    with ControlPlane(server, key_file) as control_plane:
        _show(control_plane.post(f"/v1/recordings/{_checked(id)}/stop", {}), output)


@commands.command("list")
def list_recordings(
    server: ServerOption = DEFAULT_SERVER, key_file: KeyFileOption = None, output: OutputOption = Format.TABLE
) -> None:
    """All that are kept, newest first."""
    with ControlPlane(server, key_file) as control_plane:
        recordings = control_plane.get("/v1/recordings")["data"]
    show([_row(recording) for recording in recordings], output, data=recordings)


@commands.command()
def export(
    id: IdArgument,
    target: Annotated[
        Path | None, typer.Option("-o", "--output", help="The file to write; ID.tar if not told.")
    ] = None,
    server: ServerOption = DEFAULT_SERVER,
    key_file: KeyFileOption = None,
) -> None:
    """Fetch a recording that has ended as one .tar; a download that broke off goes on where it was.

    `llep report`, `llep tune` and `llep simulate` read it as it is.
    """
    target = target or Path(f"{_checked(id)}.tar")
    with ControlPlane(server, key_file) as control_plane:
        recording = control_plane.get(f"/v1/recordings/{_checked(id)}")
        fetch(control_plane, recording, target)
    print(f"wrote {target} ({target.stat().st_size / 1e6:.1f} MB, {recording['steps']} steps)")


@commands.command()
def delete(
    id: IdArgument,
    server: ServerOption = DEFAULT_SERVER,
    key_file: KeyFileOption = None,
    output: OutputOption = Format.TABLE,
) -> None:
    """Throw a recording away."""
    with ControlPlane(server, key_file) as control_plane:
        _show(control_plane.delete(f"/v1/recordings/{_checked(id)}"), output)


@contextmanager
def at_hand(recording: str, server: str, key_file: Path | None) -> Iterator[Path]:
    """Where the recording is on this machine; one that the server has is fetched for as long as the block lasts."""
    if is_file(recording):
        yield Path(recording)
        return
    with (
        tempfile.TemporaryDirectory(prefix="llep-recording-") as folder,
        ControlPlane(server, key_file) as control_plane,
    ):
        target = Path(folder) / "recording.tar"
        fetch(control_plane, control_plane.get(f"/v1/recordings/{_checked(recording)}"), target)
        yield target


def is_file(recording: str) -> bool:
    """Whether that is on this machine; else it is an id. Raises SettingsError for a file that isn't there."""
    if Path(recording).exists():
        return True
    if not _ID.fullmatch(recording):
        raise SettingsError(
            f"{recording} does not exist, and is not the id of a recording: `llep record list` shows them",
            param="recording",
        )
    return False


def fetch(control_plane: ControlPlane, recording: Row, target: Path) -> None:
    """The recording as one tar. Raises LlepError while it has not ended, or if the disk fails."""
    id, size = recording["id"], recording["data_bytes"]
    if not size:
        why = recording["problem"] or "wait for it to end, or stop it"
        raise LlepError(f"recording {id} is {recording['state']}, it has no data to fetch: {why}")
    try:
        with progress("export") as report:
            path, etag = f"/v1/recordings/{id}/data", f'"{id}-{size}"'
            control_plane.download(path, target, size, etag, lambda done: report("bytes", done, size))
    except OSError as error:
        raise LlepError(f"{target} can't be written: {error.strerror}") from None


def _wait(control_plane: ControlPlane, recording: Row) -> Row:
    wanted = recording["steps_wanted"] or 0
    with progress("record") as report:
        while recording["state"] in ACTIVE:
            report(f"{recording['state']}, {recording['bytes'] / 1e6:.1f} MB, steps", recording["steps"], wanted)
            time.sleep(LOOK_EVERY_S)
            recording = control_plane.get(f"/v1/recordings/{recording['id']}")
    return recording


def _checked(id: str) -> str:
    if not id or not id.isascii() or set(id) & set("/?#% \\"):
        raise SettingsError(f"{id!r} is not the id of a recording: `llep record list` shows them", param="id")
    return id


def _show(recording: Row, output: Format) -> None:
    show([_row(recording)], output, data=recording)


def _row(recording: Row) -> Row:
    return {
        "id": recording["id"],
        "engine": recording["engine"],
        "state": recording["state"],
        "started": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(recording["created_s"])),
        "steps": recording["steps"],
        "MB": recording["bytes"] / 1e6,
        "author": recording["author"],
        "problem": recording["problem"],
    }
