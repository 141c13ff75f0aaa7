"""`llep placement` and `llep advice`: resident replicas, and whether lending is worth it, as the scheduler sees it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from llep.cli.control import ReasonOption
from llep.cli.http import DEFAULT_SERVER, ControlPlane, EngineOption, KeyFileOption, OutputOption, ServerOption
from llep.cli.output import Format, show
from llep.errors import SettingsError

Row = dict[str, Any]

placement_app = typer.Typer(help="Resident replicas of experts that stay hot.", no_args_is_help=True)


def add_to(app: typer.Typer) -> None:
    placement_app.command("show")(show_placement)
    placement_app.command("suggest")(suggest)
    placement_app.command("apply")(apply)
    placement_app.command("rollback")(rollback)
    app.add_typer(placement_app, name="placement")
    app.command()(advice)


def show_placement(
    server: ServerOption = DEFAULT_SERVER,
    key_file: KeyFileOption = None,
    output: OutputOption = Format.TABLE,
    engine: EngineOption = None,
    replicas: Annotated[bool, typer.Option("--replicas", help="Every copy, not only how many there are.")] = False,
) -> None:
    """What is asked for, filled and live on each engine."""
    with ControlPlane(server, key_file) as control_plane:
        placements = control_plane.get("/v1/placement", engine=engine)["data"]
    if replicas:
        rows = [{"engine": each["engine"], **copy} for each in placements for copy in each["replicas"]]
    else:
        rows = [_placement_row(each) for each in placements]
    show(rows, output, data=placements)
    if output is Format.TABLE:
        for each in placements:
            if each["problem"]:
                print(f"{each['engine']}: {each['problem']}")


def suggest(
    server: ServerOption = DEFAULT_SERVER,
    key_file: KeyFileOption = None,
    output: OutputOption = Format.TABLE,
    engine: EngineOption = None,
) -> None:
    """What the scheduler would do now, and what it is worth. Changes nothing."""
    with ControlPlane(server, key_file) as control_plane:
        found = control_plane.post("/v1/placement/suggest", None, engine=engine)
    rows = [
        {"change": change, **copy}
        for change, copies in (("add", "added"), ("drop", "dropped"))
        for copy in found[copies]
    ]
    show(rows, output, data=found, title=f"engine {found['engine']}")
    if output is Format.TABLE:
        ratios = [found[f"imbalance_ratio_{stage}"] for stage in ("before", "after")]
        if None not in ratios:
            print(f"imbalance ratio foreseen: {ratios[0]:.3f} -> {ratios[1]:.3f}")
        if found["with_room"]:
            print(f"{found['reason']}\n{_with_room(found['with_room'], found['horizon_s'])}")
            return
        print(f"moves {found['move_bytes'] / 1e6:,.0f} MB in {found['move_s']:.1f} s")
        print(f"{'worth it' if found['is_worth_it'] else 'not worth it'}: {found['reason']}")


def _with_room(room: Row, horizon_s: float) -> str:
    if not room["replicas"]:
        return "with room no copy would surely help, by the loads of the last minutes"
    before, after = room["imbalance_ratio_before"], room["imbalance_ratio_after"]
    slots, size = room["slots_per_rank"], room["bytes_per_rank"] / 1e6
    return (
        f"with {slots} slots per rank ({size:,.0f} MB): {room['replicas']} copies, imbalance ratio "
        f"{before:.3f} -> {after:.3f}, saves {room['saving_s']:.3g} s of {horizon_s:.0f} s: "
        f"{'' if room['is_worth_it'] else 'not '}worth it"
    )


def apply(
    server: ServerOption = DEFAULT_SERVER,
    key_file: KeyFileOption = None,
    output: OutputOption = Format.TABLE,
    engine: EngineOption = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", help='JSON list of {"layer", "expert", "rank"}; without it what is suggested.'),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be, change nothing.")] = False,
    reason: ReasonOption = "",
) -> None:
    """Order resident replicas: ranks fill them between steps, then all switch them on at one step."""
    body = {"engine": engine, "reason": reason, "dry_run": dry_run}
    if file is not None:
        body["replicas"] = _read(file)
    with ControlPlane(server, key_file) as control_plane:
        _show_one(control_plane.post("/v1/placement/apply", body), output)


def rollback(
    server: ServerOption = DEFAULT_SERVER,
    key_file: KeyFileOption = None,
    output: OutputOption = Format.TABLE,
    engine: EngineOption = None,
    reason: ReasonOption = "",
) -> None:
    """Go back to the placement before the present one."""
    with ControlPlane(server, key_file) as control_plane:
        _show_one(control_plane.post("/v1/placement/rollback", {"engine": engine, "reason": reason}), output)


def advice(
    server: ServerOption = DEFAULT_SERVER,
    key_file: KeyFileOption = None,
    output: OutputOption = Format.TABLE,
    engine: EngineOption = None,
) -> None:
    """Whether lending is worth it on each engine, why, and the settings to change."""
    with ControlPlane(server, key_file) as control_plane:
        found = control_plane.get("/v1/advice", engine=engine)["data"]
    if output is not Format.TABLE:
        return show([_advice_row(each) for each in found], output, data=found)
    for each in found:
        print(f"{each['engine']}: {each['verdict'].replace('_', ' ')}. {each['reason']}")
        if each["patch"]:
            changes = " ".join(f"{key}={value}" for key, value in each["patch"].items())
            print(f"  llep settings set {changes} --engine {each['engine']}")
        known = {key: value for key, value in each["numbers"].items() if value is not None}
        print("  " + ", ".join(f"{key} {value:g}" for key, value in known.items()))


def _show_one(placement: Row, output: Format) -> None:
    show([_placement_row(placement)], output, data=placement)


def _placement_row(placement: Row) -> Row:
    used = placement["used_slots"]
    return {
        "engine": placement["engine"],
        "replicas": placement["replicas_setting"],
        "state": placement["state"],
        "number": placement["number"],
        "live": placement["live_number"],
        "copies": len(placement["replicas"]),
        "filled": placement["filled"],
        "most_on_a_rank": max(used, default=0),
        "slots_per_rank": placement["slots_per_rank"],
    }


def _advice_row(each: Row) -> Row:
    patch = " ".join(f"{key}={value}" for key, value in each["patch"].items())
    return {"engine": each["engine"], "verdict": each["verdict"], "reason": each["reason"], "patch": patch}


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise SettingsError(f"--file {path} can't be read as JSON: {error}", param="file") from None
