"""`llep simulate`: planners side by side over a recording or generated loads."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from llep.cli.output import Format, show
from llep.cli.plan import needs_planning
from llep.errors import LlepError, SettingsError

if TYPE_CHECKING:
    from llep.shapes import ModelShape, StepCounts
    from llep.simulate import Setup

PLAIN_LINE_EVERY_S = 5.0
DEFAULT_RANKS, DEFAULT_STEPS = 8, 20  # of generated loads
DEFAULT_PLANNERS = ("home", "least_loaded", "quota")


def add_to(app: typer.Typer) -> None:
    app.command("simulate")(simulate)


def simulate(
    source: Annotated[str, typer.Argument(help="A recording, or a workload such as zipf:ratio=2,drift=0.01.")],
    planner: Annotated[
        list[str] | None,
        typer.Option(
            help="home, least_loaded, quota, exact, optimum, or with K copies per rank eplb+K, lplb+K, replicas+K, "
            "quota+K; may be given again and again. By default home, least_loaded and quota."
        ),
    ] = None,
    model: Annotated[
        str, typer.Option(help="Shape of generated loads: gpt-oss-20b, gpt-oss-120b, deepseek-v3, kimi-k2, qwen3-235b.")
    ] = "gpt-oss-120b",
    layers: Annotated[int | None, typer.Option(help="MoE layers of generated loads, if not the model's.")] = None,
    tokens_per_rank: Annotated[int, typer.Option(help="Tokens of generated loads.")] = 8192,
    phase: Annotated[str, typer.Option(help="Phase of generated loads: prefill or decode.")] = "prefill",
    seed: Annotated[int, typer.Option(help="The same seed generates the same loads.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Steps to replay; all of a recording, 20 of a workload.")] = None,
    ranks: Annotated[int | None, typer.Option(help="Ranks; the recording's, or 8.")] = None,
    ranks_per_node: Annotated[int | None, typer.Option(help="Ranks of one node; all by default.")] = None,
    slots_per_rank: Annotated[int, typer.Option(help="Experts that each rank can borrow.")] = 4,
    cost_model: Annotated[
        str | None, typer.Option(help="A preset (h100, h200, b200) or a file of `llep calibrate`; none: no gate.")
    ] = None,
    bytes_per_expert: Annotated[int, typer.Option(help="Bytes of one expert in one layer; 0: the model's.")] = 0,
    free_bytes: Annotated[int | None, typer.Option(help="Bytes of lent weights that each rank has room for.")] = None,
    max_lend_bytes: Annotated[int, typer.Option(help="Most bytes lent in one layer and step; 0: no limit.")] = 0,
    lend_scope: Annotated[str, typer.Option(help="any, or node: lend within a node only.")] = "any",
    imbalance_threshold: Annotated[float, typer.Option(help="Max / mean of rank loads to balance from.")] = 1.3,
    capacity_factor: Annotated[float, typer.Option(help="Rank capacity / mean rank load.")] = 1.0,
    min_chunk_tokens: Annotated[int, typer.Option(help="Fewest pairs worth lending an expert for.")] = 1024,
    window_steps: Annotated[int, typer.Option(help="Steps after which copies are placed anew (eplb, replicas).")] = 100,
    skip_broken: Annotated[bool, typer.Option("--skip-broken", help="Leave out a recording's broken parts.")] = False,
    save: Annotated[Path | None, typer.Option(help="Keep generated loads as a recording in this new folder.")] = None,
    chart: Annotated[Path | None, typer.Option(help="Write charts as one HTML file.")] = None,
    output: Annotated[Format, typer.Option("-o", "--output", help="How to print the result.")] = Format.TABLE,
) -> None:
    """Replay loads under several planners: imbalance, lends, bytes, memory, predicted time, planning time."""
    with needs_planning():
        from llep.planning import warm_up
        from llep.simulate import simulate as run
        from llep.simulate import summary
        from llep.simulate.contenders import make_planner
        from llep.traces import unpacked

    with ExitStack() as stack:
        loads = (
            _recorded(stack.enter_context(unpacked(Path(source))), skip_broken, steps)
            if Path(source).exists() or not _is_workload(source)
            else _generated(source, model, layers, ranks, tokens_per_rank, steps, seed, phase)
        )
        options: dict[str, Any] = {
            "imbalance_threshold": imbalance_threshold,
            "capacity_factor": capacity_factor,
            "min_chunk_tokens": min_chunk_tokens,
            "max_lend_bytes": max_lend_bytes,
            "lend_scope": lend_scope,
            "ranks_per_node": ranks_per_node,
        }
        num_ranks = loads.ranks if ranks is None else ranks
        setup = _setup(
            loads, num_ranks, slots_per_rank, bytes_per_expert, free_bytes, cost_model, window_steps, options
        )
        for name in planner or DEFAULT_PLANNERS:
            make_planner(name, setup)
        _check_chart(chart)
        warm_up()
        replayed = loads.steps if save is None else _saved(loads, save)
        with _progress(loads.count) as on_step:
            found = summary(_run(run, replayed, setup, planner or DEFAULT_PLANNERS, on_step))
        for note in loads.notes():
            print(f"llep: {note}", file=sys.stderr)
        if chart is not None:
            from llep.simulate.chart import page

            chart.write_text(page(source, found))
        show(_rows(found), output, data={"source": source, **found}, title=_title(source, found))


@dataclass(frozen=True)
class _Loads:
    """What is replayed. count: steps, None where unknown; notes: what to say of the recording afterwards."""

    shape: ModelShape
    ranks: int
    steps: Iterator[StepCounts]
    count: int | None
    notes: Callable[[], list[str]] = list


def _is_workload(source: str) -> bool:
    from llep.generate import KINDS

    return source.partition(":")[0] in KINDS or not any(mark in source for mark in "/.\\")


def _recorded(path: Path, skip_broken: bool, steps: int | None) -> _Loads:
    from llep.traces import Trace

    if steps is not None and steps < 1:
        raise SettingsError(f"steps must be at least 1, got {steps}", param="steps")
    trace = Trace(path, skip_broken=skip_broken)

    def notes() -> list[str]:
        broken = [f"left out {part.path}: {part.reason}" for part in trace.broken]
        unfinished = [f"left out {path}, which was never finished" for path in trace.unfinished]
        return [*broken, *unfinished]

    count = trace.num_steps()
    count = count if steps is None or (count is not None and count < steps) else steps
    return _Loads(trace.shape, trace.num_ranks, itertools.islice(trace.steps(), steps), count, notes)


def _generated(
    source: str,
    model: str,
    layers: int | None,
    ranks: int | None,
    tokens: int,
    steps: int | None,
    seed: int,
    phase: str,
) -> _Loads:
    from llep.generate import Workload, generate_steps
    from llep.shapes import PHASES, shape_of

    shape = shape_of(model)
    if layers is not None:
        if not 1 <= layers <= 10_000:
            raise SettingsError(f"layers must be between 1 and 10000, got {layers}", param="layers")
        shape = replace(shape, layer_numbers=tuple(range(layers)))
    if phase not in PHASES:
        raise SettingsError(f"phase={phase!r} is unknown; choose one of {', '.join(PHASES)}", param="phase")
    if seed < 0:
        raise SettingsError(f"seed must be >= 0, got {seed}", param="seed")
    ranks = DEFAULT_RANKS if ranks is None else ranks
    steps = DEFAULT_STEPS if steps is None else steps
    made = generate_steps(
        Workload.parse(source),
        shape,
        num_ranks=ranks,
        tokens_per_rank=tokens,
        steps=steps,
        seed=seed,
        phase="prefill" if phase == "prefill" else "decode",
    )
    return _Loads(shape, ranks, made, steps)


def _setup(
    loads: _Loads,
    ranks: int,
    slots_per_rank: int,
    bytes_per_expert: int,
    free_bytes: int | None,
    cost_model: str | None,
    window_steps: int,
    options: dict[str, Any],
) -> Setup:
    from llep.cost import cost_model as find_model
    from llep.planning import PlanOptions
    from llep.simulate import Setup

    size = bytes_per_expert or loads.shape.bytes_per_expert
    try:
        limits = PlanOptions(
            **options,
            bytes_per_expert=size,
            free_bytes=None if free_bytes is None else (free_bytes,) * ranks,
            cost_model=None if cost_model is None else find_model(cost_model),
        )
        return Setup(
            shape=loads.shape, num_ranks=ranks, slots_per_rank=slots_per_rank, options=limits, window_steps=window_steps
        )
    except ValueError as error:
        raise SettingsError(str(error)) from None


def _run(run: Any, steps: Iterator[StepCounts], setup: Setup, planners: Any, on_step: Callable[[int], None]) -> Any:
    try:
        return run(steps, setup, list(planners), on_step)
    except LlepError:
        raise
    except ValueError as error:
        raise SettingsError(str(error)) from None


def _saved(loads: _Loads, folder: Path) -> Iterator[StepCounts]:
    """The same steps, written down as they go by."""
    from llep.traces import TraceWriter

    with TraceWriter(folder, loads.shape, loads.ranks) as writer:
        for step in loads.steps:
            writer.append(step)
            yield step


def _check_chart(chart: Path | None) -> None:
    """Before any work: a run of minutes should not end with a folder that is not there."""
    if chart is not None and (chart.suffix.lower() not in (".html", ".htm") or not chart.parent.is_dir()):
        raise SettingsError(f"chart={str(chart)!r} must be an .html file in a folder that is there", param="chart")


@contextmanager
def _progress(total: int | None) -> Iterator[Callable[[int], None]]:
    """Reports steps: a bar on a terminal, a line now and then elsewhere; on standard error either way."""
    if sys.stderr.isatty():
        columns = (TextColumn("simulate"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("simulate", total=total)
            yield lambda step: bar.update(task, completed=step)
        return
    last_s = time.monotonic()

    def report(step: int) -> None:
        nonlocal last_s
        if time.monotonic() - last_s >= PLAIN_LINE_EVERY_S:
            last_s = time.monotonic()
            print(f"llep: {step} of {total or '?'} steps", file=sys.stderr)

    yield report


def _title(source: str, found: dict[str, Any]) -> str:
    return (
        f"{source}: {found['model']}, {found['layers']} layers, {found['experts']} experts, {found['ranks']} ranks, "
        f"{found['steps']} steps"
    )


def _rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    is_timed = found["cost_model"] is not None
    return [
        {
            "planner": planner["planner"],
            "imbalance": planner["imbalance_ratio"]["mean"],
            "p95": planner["imbalance_ratio"]["p95"],
            "highest": planner["imbalance_ratio"]["max"],
            "lends/layer": planner["lends_per_layer_step"],
            "lent GB": planner["lend_bytes"] / 1e9,
            "moved": planner["moved_copies"],
            "peak GB": max(planner["peak_memory_bytes_by_rank"]) / 1e9,
            **({"ms/step": (planner["predicted_s_per_step"] or 0.0) * 1e3} if is_timed else {}),
            "of ideal": planner["ideal_time_ratio" if is_timed else "ideal_load_ratio"],
            "plan us": planner["plan_us"]["p50"],
        }
        for planner in found["planners"]
    ]
