"""`llep loads matrix` and `llep loads hot`: who computes what, layer by layer, and which experts are hot."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from llep.cli.control import loads_app, parse_duration
from llep.cli.http import DEFAULT_SERVER, ControlPlane, EngineOption, KeyFileOption, OutputOption, ServerOption
from llep.cli.output import Format, show
from llep.errors import LlepError, SettingsError

Row = dict[str, Any]

WindowOption = Annotated[str, typer.Option("--window", help="How far back, such as 60 or 5m.")]
SHADES = " ▁▂▃▄▅▆▇█"
MOST_CELLS = 64  # of one layer's picture in a table
FORMATS = {".csv": "csv", ".parquet": "parquet", ".json": "json"}


class By(StrEnum):
    RANK = "rank"
    EXPERT = "expert"


class Stage(StrEnum):
    BEFORE = "before"
    AFTER = "after"


class Phase(StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"


def add_to(app: typer.Typer) -> None:
    loads_app.command("matrix")(matrix)
    loads_app.command("hot")(hot)


def matrix(
    server: ServerOption = DEFAULT_SERVER,
    key_file: KeyFileOption = None,
    output: OutputOption = Format.TABLE,
    engine: EngineOption = None,
    by: Annotated[By, typer.Option(help="What the columns are.")] = By.RANK,
    stage: Annotated[Stage, typer.Option(help="As plain EP would compute, or as computed.")] = Stage.BEFORE,
    phase: Annotated[Phase | None, typer.Option(help="Only these steps.")] = None,
    window: WindowOption = "60s",
    file: Annotated[
        Path | None, typer.Option("--file", help="Write it there instead: .csv, .parquet or .json by its name.")
    ] = None,
) -> None:
    """Pairs of each layer and rank or expert. A table draws them: the taller, the more of the layer's pairs."""
    query: Row = {"engine": engine, "by": by.value, "stage": stage.value, "phase": phase.value if phase else None}
    query["window_s"] = parse_duration("--window", window)
    if file is not None and file.suffix.lower() not in FORMATS:
        raise SettingsError(f"--file {str(file)!r} must end in {', '.join(FORMATS)}", param="file")
    with ControlPlane(server, key_file) as control_plane:
        if file is not None:
            _save(control_plane.get_bytes("/v1/loads/matrix", format=FORMATS[file.suffix.lower()], **query), file)
            return
        found = control_plane.get("/v1/loads/matrix", **query)
    title = f"{found['engine']}, {stage.value} balancing, by {by.value}, last {found['window_s']:.0f} s"
    rows = _pictures(found) if output is Format.TABLE else _numbers(found)
    show(rows, output, data=found, title=title)


def hot(
    server: ServerOption = DEFAULT_SERVER,
    key_file: KeyFileOption = None,
    output: OutputOption = Format.TABLE,
    engine: EngineOption = None,
    limit: Annotated[int, typer.Option(min=1, max=500, help="How many.")] = 10,
    phase: Annotated[Phase | None, typer.Option(help="Only these steps.")] = None,
    window: WindowOption = "60s",
) -> None:
    """The hottest experts: where they live, how much of their layer they get, and for how long."""
    with ControlPlane(server, key_file) as control_plane:
        window_s = parse_duration("--window", window)
        query: Row = {"engine": engine, "limit": limit, "window_s": window_s, "phase": phase.value if phase else None}
        found = control_plane.get("/v1/loads/hot", **query)["data"]
    show([_hot_row(expert) for expert in found], output, data=found)


def sparkline(values: list[int], most_cells: int = MOST_CELLS) -> str:
    """Values as blocks, the highest full; neighbours share a cell where there are more than fit."""
    width = -(-len(values) // most_cells) or 1
    cells = [max(values[at : at + width]) for at in range(0, len(values), width)]
    highest = max(cells, default=0)
    return "".join(SHADES[round(cell / highest * (len(SHADES) - 1))] if highest else SHADES[0] for cell in cells)


def _pictures(found: Row) -> list[Row]:
    return [
        {
            "layer": layer,
            "imbalance": ratio,
            "pairs": sum(values),
            f"{found['by']}s 0 to {len(values) - 1}": sparkline(values),
            "most on": values.index(max(values)) if any(values) else None,
        }
        for layer, values, ratio in zip(found["layers"], found["values"], found["imbalance_ratio"], strict=True)
    ]


def _numbers(found: Row) -> list[Row]:
    return [
        {"layer": layer, **{f"{found['by']}_{at}": value for at, value in enumerate(values)}}
        for layer, values in zip(found["layers"], found["values"], strict=True)
    ]


def _save(data: bytes, file: Path) -> None:
    try:
        file.write_bytes(data)
    except OSError as error:
        raise LlepError(f"{file} can't be written: {error.strerror}") from None
    print(f"wrote {file} ({len(data):,} bytes)")


def _hot_row(expert: Row) -> Row:
    return {
        "engine": expert["engine"],
        "layer": expert["layer"],
        "expert": expert["expert"],
        "home": expert["home_rank"],
        "share %": 100 * expert["share"],
        "times fair": expert["load_ratio"],
        "hot for s": round(expert["hot_for_s"]),
        "replicas": ",".join(map(str, expert["replica_ranks"])) or "-",
    }
