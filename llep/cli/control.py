"""Commands that see and steer through the control plane: `llep status`, `loads`, `settings`, `mode`."""

from __future__ import annotations

import re
import time
from typing import Annotated, Any

import typer

from llep.cli import complete
from llep.cli.http import DEFAULT_SERVER, ControlPlane, EngineOption, KeyFileOption, OutputOption, ServerOption
from llep.cli.output import Format, show
from llep.config import Mode, Settings, is_hot, parse_assignments
from llep.errors import SettingsError

Row = dict[str, Any]

EnginesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--engine",
        help="Only this engine (repeat for more); else all, also those to come.",
        autocompletion=complete.engines,
    ),
]
ReasonOption = Annotated[str, typer.Option("--reason", help="Why, for the audit trail.")]

_UNIT_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_DURATION = re.compile(r"(?:\d+(?:\.\d+)?[smhd])+|\d+(?:\.\d+)?", re.ASCII)
_DURATION_PART = re.compile(r"(\d+(?:\.\d+)?)([smhd]?)")

loads_app = typer.Typer(help="What the ranks computed.", no_args_is_help=True)
settings_app = typer.Typer(help="Show and change settings while engines serve.", no_args_is_help=True)


def add_to(app: typer.Typer) -> None:
    app.command()(status)
    app.add_typer(loads_app, name="loads")
    app.add_typer(settings_app, name="settings")
    app.command()(mode)


def status(
    server: ServerOption = DEFAULT_SERVER,
    key_file: KeyFileOption = None,
    output: OutputOption = Format.TABLE,
    window: Annotated[str, typer.Option("--window", help="How far back loads go, such as 60 or 5m.")] = "60s",
) -> None:
    """What runs, what is missing, and how balanced it is."""
    with ControlPlane(server, key_file) as control_plane:
        health = control_plane.get("/health")
        engines = control_plane.get("/v1/engines")["data"]
        loads = control_plane.get("/v1/loads", window_s=parse_duration("--window", window))["data"]
    if output is Format.TABLE:
        show([_check_row(check) for check in health["checks"]], output, title=f"{server}, llep {health['version']}")
        print()
    by_engine = {engine_loads["engine"]: engine_loads for engine_loads in loads}
    rows = [_engine_row(engine, by_engine.get(engine["id"])) for engine in engines]
    whole = {"server": server, **health, "engines": engines, "loads": loads}
    show(rows, output, data=whole, title=f"engines, loads of the last {window}")


@loads_app.command("ranks")
def loads_ranks(
    server: ServerOption = DEFAULT_SERVER,
    key_file: KeyFileOption = None,
    output: OutputOption = Format.TABLE,
    window: Annotated[str, typer.Option("--window", help="How far back, such as 60 or 5m.")] = "60s",
    engine: EngineOption = None,
) -> None:
    """Token-expert pairs per rank: routed (what plain EP would compute) and computed, with the rank's memory."""
    with ControlPlane(server, key_file) as control_plane:
        loads = control_plane.get("/v1/loads", window_s=parse_duration("--window", window), engine=engine)["data"]
    rows = [_rank_row(engine_loads, rank) for engine_loads in loads for rank in engine_loads["ranks"]]
    show(rows, output, data=loads)


@settings_app.command("get")
def settings_get(
    keys: Annotated[
        list[str] | None,
        typer.Argument(help="Only these keys.", show_default="all", autocompletion=complete.setting_keys),
    ] = None,
    server: ServerOption = DEFAULT_SERVER,
    key_file: KeyFileOption = None,
    output: OutputOption = Format.TABLE,
    engine: EngineOption = None,
) -> None:
    """Effective settings, and where each comes from."""
    _check_keys(keys or [])
    with ControlPlane(server, key_file) as control_plane:
        view = control_plane.get("/v1/settings", engine=engine)
    if keys:
        view["settings"] = [setting for setting in view["settings"] if setting["key"] in keys]
    show(
        [_setting_row(setting) for setting in view["settings"]], output, data=view, title=f"revision {view['revision']}"
    )


@settings_app.command("set")
def settings_set(
    assignments: Annotated[
        list[str],
        typer.Argument(
            help="key=value; key=null takes back what was changed before.", autocompletion=complete.assignments
        ),
    ],
    server: ServerOption = DEFAULT_SERVER,
    key_file: KeyFileOption = None,
    output: OutputOption = Format.TABLE,
    engines: EnginesOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would change, change nothing.")] = False,
    reason: ReasonOption = "",
    if_revision: Annotated[
        int | None, typer.Option("--if-revision", min=0, help="Only if this is still the newest revision.")
    ] = None,
) -> None:
    """Change settings on engines that serve, all or nothing."""
    patch = parse_assignments(assignments)
    headers = None if if_revision is None else {"If-Match": f'"{if_revision}"'}
    query = {"engines": engines, "reason": reason or None, "dry_run": "true" if dry_run else None}
    with ControlPlane(server, key_file) as control_plane:
        change = control_plane.patch("/v1/settings", patch, headers, **query)
    show_change(change, output)


@settings_app.command("schema")
def settings_schema(output: OutputOption = Format.TABLE) -> None:
    """Every setting with its default and range. Asks no server."""
    schema = Settings.model_json_schema()
    rows = [
        {"key": key, "default": value, "hot": is_hot(key), "description": Settings.model_fields[key].description}
        for key, value in Settings().dump().items()
    ]
    show(rows, output, data=schema)


def mode(
    mode: Annotated[Mode, typer.Argument(help="off, observe (count only), shadow (plan, move nothing) or active.")],
    server: ServerOption = DEFAULT_SERVER,
    key_file: KeyFileOption = None,
    output: OutputOption = Format.TABLE,
    ttl: Annotated[str | None, typer.Option("--ttl", help="Go back by itself after this time, such as 10m.")] = None,
    engines: EnginesOption = None,
    reason: ReasonOption = "",
) -> None:
    """Switch the mode of engines that serve."""
    body = {"mode": mode.value, "ttl_s": None if ttl is None else parse_duration("--ttl", ttl)}
    with ControlPlane(server, key_file) as control_plane:
        change = control_plane.put("/v1/mode", body, engines=engines, reason=reason or None)
    show_change(change, output)


def parse_duration(name: str, text: str) -> float:
    """Seconds in '90', '90s', '10m', '1h30m' or '2d'. Raises SettingsError naming the option."""
    if not _DURATION.fullmatch(text.strip()):
        raise SettingsError(
            f"{name} {text!r} is not a duration: give one such as 90, 90s, 10m, 1h30m or 2d", param=name
        )
    return sum(float(number) * _UNIT_S[unit or "s"] for number, unit in _DURATION_PART.findall(text))


def _check_keys(keys: list[str]) -> None:
    for key in keys:
        if key not in Settings.model_fields:
            Settings.parse({key: None})  # raises, naming the nearest key


def _check_row(check: Row) -> Row:
    return {"part": check["name"], "state": "ok" if check["ok"] else "missing", "detail": check["message"]}


def _engine_row(engine: Row, loads: Row | None) -> Row:
    loads = loads or {}
    return {
        "engine": engine["id"],
        "model": engine["model_name"],
        "state": engine["state"],
        "ep": engine["ep_size"],
        "mode": engine["mode"],
        "planner": engine["planner"],
        "revision": _revision(engine),
        "tokens": loads.get("tokens"),
        "imbalance_before": loads.get("imbalance_ratio_before"),
        "imbalance_after": loads.get("imbalance_ratio_after"),
        "lends": loads.get("lends"),
        "seen_s_ago": max(time.time() - engine["last_seen_s"], 0.0),
    }


def _revision(engine: Row) -> str:
    live, desired = engine["live_revision"], engine["desired_revision"]
    return str(live) if live == desired else f"{live} -> {desired}"


def _rank_row(loads: Row, rank: Row) -> Row:
    return {"engine": loads["engine"], "window_s": loads["window_s"], **rank}


def _setting_row(setting: Row) -> Row:
    return {key: setting[key] for key in ("key", "value", "source", "hot")}


def show_change(change: Row, output: Format) -> None:
    rows = [{"key": key, "before": before, "after": after} for key, (before, after) in change["diff"].items()]
    if output is not Format.TABLE:
        return show(rows, output, data=change)
    if not rows:
        return print(f"nothing to change: these are the settings of revision {change['revision']} already")
    show(
        rows,
        output,
        title="would change (nothing is changed)" if change["dry_run"] else f"revision {change['revision']}",
    )
    for applied in change["applied"]:
        step = "" if applied["step"] is None else f" since step {applied['step']}"
        print(f"{applied['engine']}: {applied['state']}{step}")
    if change.get("reverts_at_s"):
        print(f"goes back by itself at {time.strftime('%H:%M:%S', time.localtime(change['reverts_at_s']))}")
