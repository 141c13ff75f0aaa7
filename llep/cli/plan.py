"""`llep plan`: plans that engines made, and what a planner does with one batch, without a server and a GPU."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llep.cli.http import DEFAULT_SERVER, ControlPlane, EngineOption, KeyFileOption, OutputOption, ServerOption
from llep.cli.output import Format, show
from llep.errors import LlepError, SettingsError

if TYPE_CHECKING:
    from llep.planning.milp import HomeQuality


def add_to(app: typer.Typer) -> None:
    plans = typer.Typer(help="Plans that engines made, and those that planners would make.", no_args_is_help=True)
    plans.command("list")(list_plans)
    plans.command("show")(show_plan)
    plans.command("simulate")(simulate)
    plans.command("place")(place)
    app.add_typer(plans, name="plan")


@contextmanager
def needs_planning() -> Iterator[None]:
    """Around imports: says what to install where the extra `planning` is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise LlepError(f"this needs the package {error.name}: pip install 'llep[planning]'") from None


def list_plans(
    server: ServerOption = DEFAULT_SERVER,
    key_file: KeyFileOption = None,
    output: OutputOption = Format.TABLE,
    engine: EngineOption = None,
    limit: Annotated[int, typer.Option(min=1, max=500, help="How many.")] = 20,
) -> None:
    """Layers of steps that lent, as engines sample them; newest first."""
    with ControlPlane(server, key_file) as control_plane:
        plans = control_plane.get("/v1/plans", engine=engine, limit=limit)["data"]
    show([_plan_row(plan) for plan in plans], output, data=plans)


def show_plan(
    id: Annotated[int, typer.Argument(help="The plan; `llep plan list` shows them.")],
    server: ServerOption = DEFAULT_SERVER,
    key_file: KeyFileOption = None,
    output: OutputOption = Format.TABLE,
    engine: EngineOption = None,
) -> None:
    """One plan: loads of the ranks before and after, and who lent what to whom."""
    with ControlPlane(server, key_file) as control_plane:
        plan = control_plane.get(f"/v1/plans/{id}", engine=engine)
    loads = [
        {
            "rank": rank,
            "routed": routed,
            "computed": computed,
            "lent": sum(lend["src_rank"] == rank for lend in plan["lends"]),
            "borrowed": sum(lend["dst_rank"] == rank for lend in plan["lends"]),
        }
        for rank, (routed, computed) in enumerate(zip(plan["routed"], plan["computed"], strict=True))
    ]
    title = f"plan {id}: " + ", ".join(f"{key} {value}" for key, value in _plan_row(plan).items() if key != "id")
    if output is Format.TABLE:
        show(loads, output, title=title)
        print()
        show(plan["lends"], output)
    else:
        show(loads, output, data=plan)


def _plan_row(plan: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": plan["id"],
        "engine": plan["engine"],
        "time": time.strftime("%H:%M:%S", time.localtime(plan["time_s"])),
        "step": plan["step"],
        "layer": plan["layer"],
        "phase": plan["phase"],
        "decision": plan["decision"],
        "tokens": plan["tokens"],
        "before": plan["imbalance_ratio_before"],
        "after": plan["imbalance_ratio_after"],
        "lends": len(plan["lends"]),
        "lent MB": plan["lend_bytes"] / 1e6,
        "layer ms": 1e3 * plan["layer_seconds"],
        "gain ms": 1e3 * plan["predicted_gain_s"],
    }


def simulate(
    file: Annotated[Path, typer.Argument(help="The question as JSON; '-' reads standard input.")],
    planner: Annotated[str, typer.Option(help="quota, least_loaded or home.")] = "quota",
    output: Annotated[Format, typer.Option("-o", "--output", help="How to print the answer.")] = Format.TABLE,
) -> None:
    """Plan one batch: who computes what, what is lent, and what it is worth.

    The question: {"tokens": [[per rank, per expert]], "home_rank": [...]?, "slots_per_rank": n or [...],
    "bytes_per_expert": n?, "free_bytes": [...]?, "ranks_per_node": n?, "min_chunk_tokens": n?, "capacity_factor": x?,
    "imbalance_threshold": x?, "cost_model": name or null}.
    """
    from llep.planning import warm_up
    from llep.planning.question import answer, check_planner, parse_question

    check_planner(planner)
    question = parse_question(_read(file))
    warm_up()
    found = answer(question, planner)
    show(_summary(found), output, data=found, title=f"{found['planner']}: {found['decision']}")


def place(
    recording: Annotated[Path, typer.Argument(help="The recording whose loads and transitions to place for.")],
    ranks: Annotated[int | None, typer.Option(help="Ranks; the recording's by default.")] = None,
    ranks_per_node: Annotated[int | None, typer.Option(help="Ranks of one node; all by default.")] = None,
    rank_weight: Annotated[float, typer.Option(help="Cost of pairs that go on to another rank.")] = 0.25,
    node_weight: Annotated[float, typer.Option(help="Cost of pairs that go on to another node, on top.")] = 0.5,
    time_limit_s: Annotated[float, typer.Option("--time-limit", help="Seconds; then the greedy answer stands.")] = 60.0,
    skip_broken: Annotated[bool, typer.Option("--skip-broken", help="Leave out broken parts.")] = False,
    output: Annotated[Format, typer.Option("-o", "--output", help="json and yaml hold the home ranks.")] = Format.TABLE,
) -> None:
    """Choose home ranks offline: even loads, and experts that tokens visit in turn close together."""
    with needs_planning():
        import numpy as np

        from llep.planning.milp import HomeOptions, plan_homes
        from llep.traces import Trace

    trace = Trace(recording, skip_broken=skip_broken)
    loads_LE = np.zeros((trace.shape.num_layers, trace.shape.num_experts), dtype=np.int64)
    for step in trace.steps():
        loads_LE += step.counts_LRE.sum(axis=1)
    try:
        options = HomeOptions(
            ranks_per_node=ranks_per_node, rank_weight=rank_weight, node_weight=node_weight, time_limit_s=time_limit_s
        )
        found = plan_homes(loads_LE, trace.num_ranks if ranks is None else ranks, trace.transitions(), options)
    except LlepError:
        raise
    except ValueError as error:
        raise SettingsError(str(error)) from None
    rows = [
        {"layer": number, "before": before, "after": after, "gap": gap, "greedy": is_greedy}
        for number, before, after, gap, is_greedy in zip(
            trace.shape.layer_numbers,
            found.before.imbalance_L,
            found.after.imbalance_L,
            found.gap_L,
            found.is_greedy_L,
            strict=True,
        )
    ]
    homes = found.home_rank_LE.tolist()
    data = {
        "model": trace.shape.name,
        "before": _quality(found.before),
        "after": _quality(found.after),
        "layers": [{**row, "home_rank": home} for row, home in zip(rows, homes, strict=True)],
    }
    shares = f"{found.before.other_rank_share:.3f} -> {found.after.other_rank_share:.3f}"
    show(rows, output, data=data, title=f"to other ranks: {shares}")


def _quality(quality: HomeQuality) -> dict[str, float]:
    return {
        "imbalance_ratio": sum(quality.imbalance_L) / len(quality.imbalance_L),
        "other_rank_share": quality.other_rank_share,
        "other_node_share": quality.other_node_share,
        "cost": quality.cost,
    }


def _read(file: Path) -> Any:
    name = "standard input" if str(file) == "-" else str(file)
    try:
        text = sys.stdin.read() if str(file) == "-" else file.read_text()
        return json.loads(text)
    except OSError as error:
        raise SettingsError(f"{name} can't be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"{name} is not JSON: {error}") from None


def _summary(found: dict[str, Any]) -> list[dict[str, Any]]:
    """A row per rank: its load before and after, and what it borrows."""
    borrowed = [lend["dst_rank"] for lend in found["lends"]]
    lent = [lend["src_rank"] for lend in found["lends"]]
    pairs = zip(found["before"]["rank_loads"], found["after"]["rank_loads"], strict=True)
    rows: list[dict[str, Any]] = [
        {"rank": rank, "before": before, "after": after, "borrows": borrowed.count(rank), "lends": lent.count(rank)}
        for rank, (before, after) in enumerate(pairs)
    ]
    ratios = {"before": found["before"]["imbalance_ratio"], "after": found["after"]["imbalance_ratio"]}
    return [*rows, {"rank": "max / mean", **ratios, "borrows": len(borrowed), "lends": len(lent)}]
