"""docs/layer.svg: what the layer gains and what it allocates, from the committed lines of bench.layer and bench.memory.

The paper's Figures 1, 4, 6, 7 and 9 at this machine's scale: speed-up over plain EP by scenario, batch size, alpha,
lambda, hidden size and number of experts, what force-balanced routing would give beside it, and peaks of memory.
By the processor time of the rank that needs most, where a line has it: some are taken while others use the machine. Of
several lines of one case the newest counts.

    python -m bench.figures
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.record import RESULTS

TARGET = Path(__file__).parents[1] / "docs" / "layer.svg"
WIDTH, HEIGHT, LEFT, TOP, BOTTOM, GAP, COLUMNS = 300, 210, 40, 40, 40, 24, 3
LLEP, IDEAL, PLAIN = "#0a7", "#bbb", "#b44"
PANELS = {  # sweep: its title, and what its cases differ by
    "scenario": ("Skew (Figure 1): share of tokens into hot experts", ("share", "hot")),
    "tokens": ("Batch size (Figure 6): tokens per rank", ("tokens",)),
    "alpha": ("alpha (Figure 7a)", ("alpha",)),
    "lambda": ("lambda (Figure 7b): threshold, share", ("threshold", "share")),
    "hidden": ("Hidden size (Figure 9)", ("hidden",)),
    "experts": ("Number of experts (Figure 9)", ("experts",)),
}
SHARED = ("tokens", "alpha", "hidden", "experts")  # sweeps that the skewed case of `scenario` belongs to as well

Line = dict[str, Any]
Bars = list[tuple[str, list[tuple[float, str]]]]  # label, then (height, colour) of each bar


def newest(name: str, keys: tuple[str, ...]) -> list[Line]:
    """The last line of each case, in order of first appearance."""
    found: dict[tuple[Any, ...], Line] = {}
    path = RESULTS / f"{name}.jsonl"
    for line in map(json.loads, path.read_text().splitlines()) if path.exists() else ():
        found[tuple(line[key] for key in keys)] = line
    return list(found.values())


def speed_bars(sweep: str, lines: list[Line], by: tuple[str, ...]) -> Bars:
    mine = [line for line in lines if line["sweep"] == sweep]
    if sweep in SHARED and mine:
        mine += [line for line in lines if line["sweep"] == "scenario" and (line["share"], line["hot"]) == (0.8, 4)]
    if sweep != "scenario":
        mine.sort(key=lambda line: [line[key] for key in reversed(by)])
    return [
        (
            "/".join(f"{line[key]:g}" for key in by) if line["hot"] else "balanced",
            [(speedup, LLEP), (speedup / of_ideal, IDEAL)],
        )
        for line in mine
        for speedup, of_ideal in ([line.get(f"{key}_cpu", line[key]) for key in ("speedup", "of_ideal")],)
    ]


def memory_bars(lines: list[Line]) -> Bars:
    return [
        (
            f"{line['share']:g}/{line['hot']}" if line["hot"] else "balanced",
            [(line["plain_of_balanced"], PLAIN), (line["llep_of_balanced"], LLEP)],
        )
        for line in lines
    ]


def draw_panel(title: str, bars: Bars, left: int, top: int, marks: tuple[float, ...]) -> list[str]:
    width, height = WIDTH - LEFT - 10, HEIGHT - TOP - BOTTOM
    highest = max([*marks, *(value for _, group in bars for value, _ in group)]) * 1.05

    def at(value: float) -> float:
        return round(top + TOP + height * (1 - value / highest), 1)

    parts = [f'<text x="{left}" y="{top + 20}" font-weight="bold">{title}</text>']
    for mark in marks:
        parts.append(f'<text x="{left + LEFT - 6}" y="{at(mark) + 4}" text-anchor="end">{mark:g}</text>')
        parts.append(f'<path d="M{left + LEFT} {at(mark)}h{width}" stroke="#ddd"/>')
    step = width / max(len(bars), 1)
    for place, (label, group) in enumerate(bars):
        x, each = left + LEFT + place * step + step * 0.1, step * 0.8 / len(group)
        for number, (value, colour) in enumerate(group):
            tall = round(at(0) - at(value), 1)
            parts.append(
                f'<rect x="{x + number * each:.1f}" y="{at(value)}" width="{each:.1f}" height="{tall}" fill="{colour}">'
                f"<title>{label}: {value:.3f}</title></rect>"
            )
        middle, low = x + step * 0.4, at(0) + 12
        turn = (
            f' transform="rotate(-35 {middle:.1f} {low})" text-anchor="end"'
            if len(bars) > 6
            else ' text-anchor="middle"'
        )
        parts.append(f'<text x="{middle:.1f}" y="{low}" font-size="9"{turn}>{label}</text>')
    return parts


def draw() -> str:
    lines = newest("layer", ("sweep", "share", "hot", "tokens", "hidden", "experts", "alpha", "threshold"))
    panels = [(title, speed_bars(sweep, lines, by), (1.0, 1.5)) for sweep, (title, by) in PANELS.items()]
    memory = memory_bars(newest("memory", ("share", "hot")))
    panels.append(("Peak of activations and workspace (Figure 4)", memory, (0.5, 1.0, 1.15)))
    panels = [panel for panel in panels if panel[1]]
    rows = -(-len(panels) // COLUMNS)
    width, height = COLUMNS * (WIDTH + GAP), rows * (HEIGHT + GAP) + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    for place, (title, bars, marks) in enumerate(panels):
        row, column = divmod(place, COLUMNS)
        parts += draw_panel(title, bars, 10 + column * (WIDTH + GAP), row * (HEIGHT + GAP), marks)
    legend = (
        (LLEP, "llep"),
        (IDEAL, "force-balanced routing"),
        (PLAIN, "plain EP (memory, as a ratio to the balanced batch's)"),
    )
    x = 20
    for colour, name in legend:
        parts.append(f'<rect x="{x}" y="{height - 22}" width="10" height="10" fill="{colour}"/>')
        parts.append(f'<text x="{x + 14}" y="{height - 13}">{name}</text>')
        x += 40 + 7 * len(name)
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    TARGET.write_text(draw())


if __name__ == "__main__":
    main()
