"""`llep top`: engines, ranks, layers, hot experts and decisions, live in the terminal."""

from __future__ import annotations

import os
import select
import sys
import termios
import threading
import time
import tty
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from llep.cli.control import parse_duration
from llep.cli.http import DEFAULT_SERVER, ControlPlane, KeyFileOption, ServerOption
from llep.cli.loads import sparkline
from llep.errors import LlepError, SettingsError, UnknownEngine

Row = dict[str, Any]

REFRESH_S = 1.0
KEY_POLL_S = 0.1
STALE_S = 5.0
LAST_LOOK_S = 1.0
HISTORY_S = 600.0
LAYERS_WIDTH, HOT_WIDTH = 38, 40
MOST_ENGINES = 3  # listed above the one that is shown
KEYS = "q quits   n next engine   p next phase   w window"
WINDOWS_S = (10.0, 60.0, 600.0)
PHASES = (None, "prefill", "decode")
BEFORE, AFTER, GOOD, BAD, DIM = "yellow", "cyan", "green", "red", "dim"


def add_to(app: typer.Typer) -> None:
    app.command()(top)


@dataclass(slots=True)
class Choice:
    """What the user looks at."""

    engine: int = 0  # place in the list
    phase: int = 0
    window: int = 0


@dataclass(slots=True)
class Seen:
    """What was asked for last. problem: why there is nothing newer."""

    at_s: float = 0.0
    engines: list[Row] = field(default_factory=list)
    loads: Row | None = None
    history: list[Row] = field(default_factory=list)
    layers: Row | None = None
    hot: list[Row] = field(default_factory=list)
    decisions: list[Row] = field(default_factory=list)
    problem: str = ""


def top(
    server: ServerOption = DEFAULT_SERVER,
    key_file: KeyFileOption = None,
    once: Annotated[bool, typer.Option("--once", help="Print one picture and end; needs no terminal.")] = False,
    interval: Annotated[str, typer.Option(help="Time between looks, such as 1s.")] = "1s",
) -> None:
    """Engines, ranks, layers, hot experts and decisions, live; q or Ctrl-C ends it."""
    interval_s = parse_duration("--interval", interval)
    if not 0.2 <= interval_s <= 60:
        raise SettingsError(f"--interval {interval} is not between 0.2s and 60s", param="interval")
    if not once and not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise SettingsError(
            "llep top needs a terminal; for scripts there are `llep top --once` and `llep status -o json`"
        )
    choice = Choice()
    control_plane = ControlPlane(server, key_file)
    try:
        seen = look(control_plane, choice)  # ends here where there is no control plane
    except UnknownEngine:  # it has gone since engines were listed
        seen = look(control_plane, choice)
    if once:
        console = Console()
        console.print(picture(seen, choice, server, console.width, max(console.height, 24)))
        return
    _watch(control_plane, server, choice, seen, interval_s)


def _watch(control_plane: ControlPlane, server: str, choice: Choice, seen: Seen, interval_s: float) -> None:
    """Draw, look and listen to keys until q or Ctrl-C. Looking happens beside, so that keys are never waited for.

    Who looks closes the connections: a look that the control plane keeps waiting is not waited for at the end.
    """
    newest, wake, ended = [seen], threading.Event(), threading.Event()

    def look_on() -> None:
        with control_plane:
            while True:
                wake.wait(interval_s)
                wake.clear()
                if ended.is_set():
                    return
                newest[0] = _looked(control_plane, choice, newest[0])

    looking = threading.Thread(target=look_on, daemon=True)
    looking.start()
    try:
        console = Console()
        with _keys(), Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                live.update(picture(newest[0], choice, server, console.width, console.height), refresh=True)
                key = _key(KEY_POLL_S)
                if key in ("q", "Q", "\x03", "\x04"):
                    return
                if key:
                    choose(choice, key, newest[0])
                    wake.set()
    except KeyboardInterrupt:
        return
    finally:
        ended.set()
        wake.set()
        looking.join(LAST_LOOK_S)


def choose(choice: Choice, key: str, seen: Seen) -> None:
    if key == "n" and seen.engines:
        choice.engine = (choice.engine + 1) % len(seen.engines)
    elif key == "p":
        choice.phase = (choice.phase + 1) % len(PHASES)
    elif key == "w":
        choice.window = (choice.window + 1) % len(WINDOWS_S)


def look(control_plane: ControlPlane, choice: Choice) -> Seen:
    """Ask for all that is drawn."""
    seen = Seen(at_s=time.time(), engines=control_plane.get("/v1/engines")["data"])
    if not seen.engines:
        return seen
    engine = seen.engines[min(choice.engine, len(seen.engines) - 1)]["id"]
    window_s, phase = WINDOWS_S[choice.window], PHASES[choice.phase]
    loads = control_plane.get("/v1/loads", engine=engine, window_s=window_s, phase=phase)["data"]
    if not loads:
        raise UnknownEngine(f"engine {engine} has gone")
    seen.loads = loads[0]
    seen.history = control_plane.get("/v1/loads/history", engine=engine, window_s=HISTORY_S, step_s=10)["data"]
    query = {"engine": engine, "by": "rank", "window_s": window_s, "phase": phase}
    seen.layers = {stage: control_plane.get("/v1/loads/matrix", stage=stage, **query) for stage in ("before", "after")}
    seen.hot = control_plane.get("/v1/loads/hot", engine=engine, limit=10, window_s=max(window_s, 60))["data"]
    seen.decisions = control_plane.get("/v1/decisions", engine=engine, limit=5)["data"]
    return seen


def _looked(control_plane: ControlPlane, choice: Choice, before: Seen) -> Seen:
    """The newest, or what was seen before with the reason why there is nothing newer."""
    try:
        return look(control_plane, choice)
    except LlepError as error:
        before.problem = error.message
    except (typer.Exit, KeyError):
        before.problem = "the control plane does not answer"
    return before


def picture(seen: Seen, choice: Choice, server: str, width: int, height: int) -> RenderableType:
    """All of it, in at most `height` lines."""
    parts: list[RenderableType] = [_head(seen, choice, server, width)]
    if not seen.engines:
        return Group(*parts, Text("no engine has reported yet", style=DIM))
    shown_id = seen.loads["engine"] if seen.loads else ""  # a new choice shows with its own numbers
    engine = next((one for one in seen.engines if one["id"] == shown_id), seen.engines[0])
    left = height - 3 - min(len(seen.engines), MOST_ENGINES) - 1
    parts += [_engines(seen.engines, engine), _summary(seen, width)]
    left -= 2
    # Half of what is left for the ranks, the rest for layers and experts side by side.
    ranks = seen.loads["ranks"] if seen.loads else []
    shown = max(min(len(ranks), (left - 2) // 2), 1)
    parts.append(_ranks(ranks, shown, width))
    left -= shown + (1 if len(ranks) > shown else 0) + 1
    rows = max(left - 4, 1)
    parts.append(_layers_and_experts(seen, rows, width))
    parts.append(_decisions(seen, width))
    parts.append(Text(KEYS, style=DIM))
    return Group(*parts)


def _head(seen: Seen, choice: Choice, server: str, width: int) -> RenderableType:
    age_s = time.time() - seen.at_s
    phase = PHASES[choice.phase] or "all phases"
    text = Text.assemble(
        ("llep top ", "bold"),
        (f"{server}  {time.strftime('%H:%M:%S', time.localtime(seen.at_s))}  ", DIM),
        f"last {WINDOWS_S[choice.window]:.0f} s, {phase}",
    )
    if seen.problem and age_s > STALE_S:
        text = Text(f"STALE for {age_s:.0f} s: {seen.problem}", style=f"bold {BAD}")
    text.truncate(width, overflow="ellipsis")
    return text


def _engines(engines: list[Row], chosen: Row) -> Table:
    table = Table(box=None, pad_edge=False, expand=False, header_style=DIM)
    for name in ("", "engine", "state", "mode", "planner", "ranks", "slots", "revision"):
        table.add_column(name, no_wrap=True, overflow="ellipsis")
    at = engines.index(chosen)
    first = max(min(at - 1, len(engines) - MOST_ENGINES), 0)
    for engine in engines[first : first + MOST_ENGINES]:
        live, desired = engine["live_revision"], engine["desired_revision"]
        state = Text(engine["state"], style=GOOD if engine["state"] == "live" else BAD)
        table.add_row(
            ">" if engine is chosen else "",
            Text(engine["id"]),
            state,
            engine["mode"],
            engine["planner"],
            str(engine["ep_size"]),
            str(engine["slots_per_rank"]),
            str(live) if live == desired else f"{live} -> {desired}",
        )
    return table


def _summary(seen: Seen, width: int) -> RenderableType:
    loads = seen.loads
    if loads is None:
        return Text("")
    before, after = loads["imbalance_ratio_before"], loads["imbalance_ratio_after"]
    recent = [point["imbalance_ratio_before"] or 1.0 for point in seen.history[-40:]]
    course = sparkline([round(100 * (ratio - 1)) for ratio in recent], 40)
    rate = loads["tokens"] / loads["window_s"] if loads["window_s"] else 0.0
    line = Text.assemble(
        "imbalance ",
        (_number(before), BEFORE),
        " -> ",
        (_number(after), AFTER),
        f"   {rate:,.0f} tokens/s   {loads['lends']:,} lends, {_bytes(loads['lend_bytes'])}   ",
        (f"{loads['layer_steps']:,} layer-steps", DIM),
    )
    line.truncate(width, overflow="ellipsis")
    return Group(line, Text.assemble(("10 min ", DIM), (course, BEFORE)))


def _ranks(ranks: list[Row], shown: int, width: int) -> RenderableType:
    """A line per rank: what plain EP would compute, and what was computed, against the mean."""
    table = Table(box=None, pad_edge=False, header_style=DIM, expand=False)
    for name, justify in (("rank", "right"), ("routed", "right"), ("", "left"), ("computed", "right"), ("", "left")):
        table.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    table.add_column("memory", justify="right", no_wrap=True)
    routed = [rank["routed_tokens"] for rank in ranks]
    highest = max([1, *routed, *(rank["computed_tokens"] for rank in ranks)])
    size = max((width - 46) // 2, 6)
    busiest = sorted(ranks, key=lambda rank: -rank["routed_tokens"])[:shown]
    for rank in sorted(busiest, key=lambda rank: int(rank["rank"])):
        budget = rank["memory_budget_bytes"]
        table.add_row(
            str(rank["rank"]),
            _count(rank["routed_tokens"]),
            Text(_bar(rank["routed_tokens"] / highest, size), style=BEFORE),
            _count(rank["computed_tokens"]),
            Text(_bar(rank["computed_tokens"] / highest, size), style=AFTER),
            f"{rank['memory_used_bytes'] / budget:.0%}" if budget else "-",
        )
    if len(ranks) > shown:
        return Group(table, Text(f"the {shown} busiest of {len(ranks)} ranks", style=DIM))
    return table


def _layers_and_experts(seen: Seen, rows: int, width: int) -> Table:
    beside = Table(box=None, pad_edge=False, show_header=False, expand=False)
    beside.add_column(no_wrap=True, width=LAYERS_WIDTH)
    beside.add_column(no_wrap=True)
    beside.add_row(_layers(seen, rows), _hot(seen, rows) if width >= LAYERS_WIDTH + HOT_WIDTH else Text(""))
    return beside


def _layers(seen: Seen, rows: int) -> Table:
    table = Table(box=None, pad_edge=False, header_style=DIM)
    for name in ("worst layer", "before", "after", "ranks"):
        table.add_column(name, justify="right" if name != "ranks" else "left", no_wrap=True)
    if seen.layers is None:
        return table
    before, after = seen.layers["before"], seen.layers["after"]
    places = [at for at, ratio in enumerate(before["imbalance_ratio"]) if ratio is not None]
    for at in sorted(places, key=lambda at: -float(before["imbalance_ratio"][at]))[:rows]:
        table.add_row(
            str(before["layers"][at]),
            Text(_number(before["imbalance_ratio"][at]), style=BEFORE),
            Text(_number(after["imbalance_ratio"][at]), style=AFTER),
            sparkline(before["values"][at], 12),
        )
    return table


def _hot(seen: Seen, rows: int) -> Table:
    table = Table(box=None, pad_edge=False, header_style=DIM)
    for name in (" hot in layer", "expert", "home", "x fair", "for"):
        table.add_column(name, justify="right", no_wrap=True)
    for expert in seen.hot[:rows]:
        table.add_row(
            str(expert["layer"]),
            str(expert["expert"]),
            str(expert["home_rank"]),
            f"{expert['load_ratio']:.1f}",
            _ago(expert["hot_for_s"]),
        )
    return table


def _decisions(seen: Seen, width: int) -> RenderableType:
    counted = sorted((seen.loads or {}).get("decisions", {}).items(), key=lambda one: -one[1])
    total = sum(count for _, count in counted) or 1
    plans = "  ".join(f"{name} {count / total:.0%}" for name, count in counted if count)
    lines = [Text.assemble(("plans ", DIM), plans or "none yet")]
    if seen.decisions:
        newest = seen.decisions[0]
        age = _ago(time.time() - newest["time_s"])
        lines.append(Text.assemble(("scheduler ", DIM), f"{age} ago, {newest['kind']}: {newest['reason']}"))
    for line in lines:
        line.truncate(width, overflow="ellipsis")
    return Group(*lines)


@contextmanager
def _keys() -> Iterator[None]:
    """Keys come one by one and are not shown, until the block ends."""
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    tty.setcbreak(descriptor)
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def _key(timeout_s: float) -> str:
    """The key that was pressed, '' if none was. A terminal that is gone says q."""
    if not select.select([sys.stdin], [], [], timeout_s)[0]:
        return ""
    pressed = os.read(sys.stdin.fileno(), 1)
    return pressed.decode(errors="replace") if pressed else "q"


def _bar(share: float, size: int) -> str:
    eighths = round(min(max(share, 0.0), 1.0) * size * 8)
    return "█" * (eighths // 8) + (" ▏▎▍▌▋▊▉"[eighths % 8] if eighths % 8 else "")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _count(value: int) -> str:
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**4, "k")):
        if value >= size:
            return f"{value / (1000 if unit == 'k' else size):.1f}{unit}"
    return str(value)


def _bytes(value: float) -> str:
    for size, unit in ((1 << 30, "GiB"), (1 << 20, "MiB")):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return f"{value:.0f} B"


def _ago(seconds: float) -> str:
    if seconds >= 5400:
        return f"{seconds / 3600:.0f}h"
    return f"{seconds / 60:.0f}m" if seconds >= 90 else f"{max(seconds, 0):.0f}s"
