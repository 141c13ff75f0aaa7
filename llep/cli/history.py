"""`llep settings history`, `diff` and `rollback`: what was changed, by whom, and back again."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from llep.cli.control import ReasonOption, settings_app, show_change
from llep.cli.http import DEFAULT_SERVER, ControlPlane, EngineOption, KeyFileOption, OutputOption, ServerOption
from llep.cli.output import Format, show
from llep.errors import SettingsError

Row = dict[str, Any]


def add_to(app: typer.Typer) -> None:
    settings_app.command("history")(history)
    settings_app.command("diff")(diff)
    settings_app.command("rollback")(rollback)


def history(
    server: ServerOption = DEFAULT_SERVER,
    key_file: KeyFileOption = None,
    output: OutputOption = Format.TABLE,
    limit: Annotated[int, typer.Option(min=1, max=500, help="How many.")] = 20,
) -> None:
    """Every change, newest first: when, who, on which engines, what and why."""
    with ControlPlane(server, key_file) as control_plane:
        revisions = control_plane.get("/v1/settings/revisions", limit=limit)["data"]
    show([_row(revision) for revision in revisions], output, data=revisions)


def diff(
    revision: Annotated[
        int | None, typer.Argument(help="What this revision changed; else what differs from the defaults.")
    ] = None,
    server: ServerOption = DEFAULT_SERVER,
    key_file: KeyFileOption = None,
    output: OutputOption = Format.TABLE,
    engine: EngineOption = None,
) -> None:
    """What a revision changed; without one, where the settings that hold now differ from the defaults."""
    with ControlPlane(server, key_file) as control_plane:
        if revision is None:
            rows = _from_defaults(control_plane, engine)
        else:
            page = control_plane.get("/v1/settings/revisions", limit=1, cursor=revision + 1)["data"]
            if not page or page[0]["number"] != revision:
                raise SettingsError(f"no revision {revision} is kept: `llep settings history` lists them")
            rows = [{"key": key, "before": old, "after": new} for key, (old, new) in page[0]["diff"].items()]
    show(rows, output)


def rollback(
    revision: Annotated[int, typer.Argument(min=0, help="Whose settings are to hold again; 0: as engines started.")],
    server: ServerOption = DEFAULT_SERVER,
    key_file: KeyFileOption = None,
    output: OutputOption = Format.TABLE,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would change, change nothing.")] = False,
    reason: ReasonOption = "",
) -> None:
    """Put the settings of all engines back to what they were under a revision; that makes a new revision."""
    with ControlPlane(server, key_file) as control_plane:
        body = {"revision": revision, "reason": reason, "dry_run": dry_run}
        change = control_plane.post("/v1/settings/rollback", body)
    show_change(change, output)


def _from_defaults(control_plane: ControlPlane, engine: str | None) -> list[Row]:
    from llep.config import Settings

    defaults = Settings().dump()
    held = control_plane.get("/v1/settings", engine=engine)["settings"]
    return [
        {"key": one["key"], "default": defaults[one["key"]], "value": one["value"], "source": one["source"]}
        for one in held
        if one["value"] != defaults.get(one["key"])
    ]


def _row(revision: Row) -> Row:
    changed = ", ".join(f"{key}={value}" for key, value in revision["patch"].items())
    return {
        "revision": revision["number"],
        "time": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(revision["time_s"])),
        "author": revision["author"],
        "engines": ",".join(revision["engines"]) if revision["engines"] else "all",
        "change": changed,
        "reason": revision["reason"],
    }
