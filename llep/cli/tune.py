"""`llep tune`: which settings a recording asks for."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from llep.cli.control import EnginesOption, show_change
from llep.cli.http import DEFAULT_SERVER, ControlPlane, KeyFileOption, OutputOption, ServerOption
from llep.cli.output import ExitCode, Format, fail, show
from llep.cli.plan import needs_planning
from llep.cli.progress import progress
from llep.cli.record import is_file
from llep.cli.report import (
    CostOption,
    Loads,
    NodeOption,
    RanksOption,
    RecordingArgument,
    SettingOption,
    SizesOption,
    TokensOption,
)
from llep.config import SWEPT, Settings, parse_assignments
from llep.errors import LlepError, SettingsError

Row = dict[str, Any]

LOOK_EVERY_S = 0.3
DEFAULT_SLOTS = 4


def add_to(app: typer.Typer) -> None:
    app.command()(tune)


def tune(
    recording: RecordingArgument,
    server: ServerOption = DEFAULT_SERVER,
    key_file: KeyFileOption = None,
    output: OutputOption = Format.TABLE,
    ranks: RanksOption = None,
    slots_per_rank: Annotated[
        int | None,
        typer.Option(help="Experts that each rank can borrow now.", show_default="the engine's; for a file 4"),
    ] = None,
    cost_model: CostOption = "h200",
    ranks_per_node: NodeOption = None,
    sizes_of: SizesOption = None,
    tokens_per_rank: TokensOption = None,
    settings: SettingOption = None,
    apply: Annotated[bool, typer.Option("--apply", help="Set what is proposed, at the server.")] = False,
    engines: EnginesOption = None,
) -> None:
    """Replay a recording under many settings and rank them by predicted time; prints the patch that is worth it.

    A file is swept here and needs no server, but for --apply; an id is swept by the control plane. Exit code 4 if
    --apply finds nothing worth setting.
    """
    base = parse_assignments(settings or [])
    if slots_per_rank is not None:
        base["slots_per_rank"] = slots_per_rank
    if is_file(recording):
        if apply:
            base = {**_held(server, key_file, engines), **base}
        slots = base.get("slots_per_rank", DEFAULT_SLOTS)
        found = _swept_here(Path(recording), base, ranks, slots, cost_model, ranks_per_node, sizes_of, tokens_per_rank)
    else:
        if sizes_of is not None or tokens_per_rank is not None:
            raise SettingsError("--sizes-of and --tokens-per-rank are for files: export it first")
        costs = None if cost_model == "none" else cost_model
        order = {"recording": recording, "cost_model": costs, "ranks": ranks, "ranks_per_node": ranks_per_node}
        found = _swept_there(server, key_file, {**order, "base": base})
    _show(found, output)
    if apply:
        _apply(found, recording, server, key_file, engines)


def _swept_here(path: Path, base: Row, *options: Any) -> Row:
    with needs_planning():
        from llep.planning import warm_up
        from llep.traces import unpacked
        from llep.tune import Sample
        from llep.tune import tune as sweep
    start = Settings.parse(base)
    with unpacked(path) as folder, progress("tune") as report:
        warm_up()
        loads = Loads(folder, *options)
        sample = Sample.of(loads.setup.shape, loads.steps())
        found = sweep(sample, loads.setup, start, lambda done, total: report("settings", done, total)).as_dict()
    return {**found, "notes": loads.notes()}


def _swept_there(server: str, key_file: Path | None, order: Row) -> Row:
    """As an operation of the control plane; Ctrl-C cancels it."""
    with ControlPlane(server, key_file) as control_plane, progress("tune") as report:
        operation = control_plane.post("/v1/tuning", order)
        try:
            while operation["state"] in ("waiting", "running"):
                report(operation["state"], round(100 * operation["progress_ratio"]), 100)
                time.sleep(LOOK_EVERY_S)
                operation = control_plane.get(f"/v1/operations/{operation['id']}")
        except KeyboardInterrupt:
            control_plane.delete(f"/v1/operations/{operation['id']}")
            raise
    if operation["state"] != "done":
        error = operation["error"] or {"message": f"the operation was {operation['state']}"}
        raise LlepError(error["message"])
    result: Row = operation["result"]
    return {**result, "notes": []}


def _held(server: str, key_file: Path | None, engines: list[str] | None) -> Row:
    """What holds now, of the keys that are swept, on the first of these engines."""
    with ControlPlane(server, key_file) as control_plane:
        chosen = engines or sorted(one["id"] for one in control_plane.get("/v1/engines")["data"])
        view = control_plane.get("/v1/settings", engine=chosen[0] if chosen else None)
    return {one["key"]: one["value"] for one in view["settings"] if one["key"] in (*SWEPT, "slots_per_rank")}


def _apply(found: Row, recording: str, server: str, key_file: Path | None, engines: list[str] | None) -> None:
    if not found["patch"]:
        raise typer.Exit(fail("nothing is worth setting: nothing is changed", ExitCode.CHECK_FAILED))
    with ControlPlane(server, key_file) as control_plane:
        reason = f"llep tune {recording}: {found['reason']}"[:500]
        change = control_plane.patch("/v1/settings", found["patch"], engines=engines, reason=reason)
    show_change(change, Format.TABLE)


def _show(found: Row, output: Format) -> None:
    is_timed = found["cost_model"] is not None
    rows = [_row(case, found, is_timed=is_timed) for case in found["cases"]]
    show(
        rows, output, data=found, title=f"{found['model']} on {found['ranks']} ranks, cost model {found['cost_model']}"
    )
    if output is not Format.TABLE:
        return
    print(f"\n{found['verdict']}: {found['reason']}")
    for note in found["notes"]:
        print(f"note: {note}")
    if found["patch"]:
        print(f"patch: {json.dumps(found['patch'])}")
        print("set it with: llep settings set " + " ".join(f"{key}={value}" for key, value in found["patch"].items()))
    elif found["verdict"] == "worth_it":
        print("patch: none, what holds now is as good as anything that was tried with as many slots")
    if found["slots_reason"]:
        print(f"slots: {found['slots_reason']}")


def _row(case: Row, found: Row, *, is_timed: bool) -> Row:
    mark = "proposed" if case == found["proposed"] else "now" if case == found["start"] else ""
    return {
        **{key: case["settings"][key] for key in SWEPT},
        "slots": case["slots_per_rank"],
        "imbalance": case["imbalance_ratio"],
        "lends/layer": case["lends_per_layer_step"],
        "saved %": 100 * case["gain_ratio"],
        **({"ms/step": 1e3 * case["seconds_per_step"]} if is_timed else {}),
        "": mark,
    }
