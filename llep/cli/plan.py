"""`llep plan`: what a planner does with one batch, without a server and a GPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from llep.cli.output import Format, show
from llep.errors import SettingsError


def add_to(app: typer.Typer) -> None:
    plans = typer.Typer(help="Ask the planners: no server and no GPU needed.", no_args_is_help=True)
    plans.command("simulate")(simulate)
    app.add_typer(plans, name="plan")


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
    from llep.planning.question import answer, parse_question

    found = answer(parse_question(_read(file)), planner)
    show(_summary(found), output, data=found, title=f"{found['planner']}: {found['decision']}")


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
