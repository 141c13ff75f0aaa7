"""docs/thresholds.svg: what each threshold does, one at a time, over the natural traces replayed on 8 ranks.

Experts, links and batches as in bench.natural.compare: gpt-oss-20b on H200s, 8192 tokens a rank. Prints the numbers.

    python -m bench.natural.thresholds
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.natural.compare import SIZE, TOKENS_PER_RANK, TRACES, _scaled
from llep.cost import PRESETS
from llep.planning import PlanOptions, warm_up
from llep.shapes import StepCounts
from llep.simulate import Setup, simulate
from llep.traces import Trace

TARGET = Path(__file__).parents[2] / "docs" / "thresholds.svg"
RANKS = 8
# Setting -> (values, its default).
SWEPT: dict[str, tuple[tuple[float, ...], float]] = {
    "imbalance_threshold": ((1.0, 1.1, 1.2, 1.3, 1.5, 2.0, 3.0, 4.0), 1.3),
    "capacity_factor": ((1.0, 1.05, 1.1, 1.2, 1.3, 1.5, 2.0), 1.0),
    "min_chunk_tokens": ((64, 256, 1024, 4096, 8192, 16384, 32768), 1024),
    "slots_per_rank": ((0, 1, 2, 3, 4, 8), 4),
}
WIDTH, HEIGHT, LEFT, TOP, GAP = 380, 150, 46, 34, 62
SAVED, LENDS = "#2f6fd0", "#d9822b"


@dataclass(frozen=True, slots=True)
class Point:
    """saved: share of plain EP's predicted time in MoE layers. lends: per layer and step."""

    value: float
    saved: float
    lends: float
    imbalance: float


def outcome(key: str, value: float) -> Point:
    """With one setting at `value` and the others at their defaults, over all prefill traces."""
    home_s = planned_s = highest = mean = lends = layer_steps = 0.0
    for folder in sorted(TRACES.glob("*-prefill")):
        trace = Trace(folder)
        shape = replace(
            trace.shape,
            hidden_size=SIZE.hidden_size,
            intermediate_size=SIZE.intermediate_size,
            bytes_per_expert=SIZE.bytes_per_expert,
        )
        slots = int(value) if key == "slots_per_rank" else 4
        changed: dict[str, Any] = {} if key == "slots_per_rank" else {key: type(SWEPT[key][0][-1])(value)}
        options = PlanOptions(cost_model=PRESETS["h200"], **changed)
        setup = Setup(shape=shape, num_ranks=RANKS, slots_per_rank=slots, options=options)
        steps: Iterator[StepCounts] = _scaled(trace.steps(), shape.top_k, TOKENS_PER_RANK["prefill"] * RANKS)
        home, plan = simulate(steps, setup, ["home", "quota"]).tallies
        home_s += home.predicted_s
        planned_s += plan.predicted_s
        highest += plan.highest_tokens
        mean += plan.mean_tokens
        lends += plan.lends
        layer_steps += plan.ratios.count
    return Point(value, 1 - planned_s / home_s, lends / layer_steps, highest / mean)


def draw(swept: dict[str, list[Point]]) -> str:
    height = 2 * (TOP + HEIGHT + GAP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * (WIDTH + LEFT) + 30} {height}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{2 * (WIDTH + LEFT) + 30}" height="{height}" fill="#fff"/>',
    ]
    most_saved = max(point.saved for points in swept.values() for point in points) * 1.1
    most_lends = max(point.lends for points in swept.values() for point in points) * 1.5
    for at, (key, points) in enumerate(swept.items()):
        left, top = LEFT + (at % 2) * (WIDTH + LEFT + 10), TOP + (at // 2) * (TOP + HEIGHT + GAP)
        parts += _panel(key, points, left, top, most_saved, most_lends)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(key: str, points: Sequence[Point], left: int, top: int, most_saved: float, most_lends: float) -> list[str]:
    step = (WIDTH - 40) / len(points)
    places = [left + (at + 0.5) * step for at in range(len(points))]
    heights = [top + HEIGHT * (1 - point.saved / most_saved) for point in points]
    parts = [f'<text x="{left}" y="{top - 14}" font-size="13" font-weight="bold">{key}</text>']
    for share in (0.1, 0.2, 0.3):
        y = top + HEIGHT * (1 - share / most_saved)
        parts.append(f'<line x1="{left}" x2="{left + WIDTH - 40}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e2e6ec"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end" fill="#667085">{share:.0%}</text>')
    for x, point in zip(places, points, strict=True):
        size = HEIGHT * point.lends / most_lends
        y = top + HEIGHT - size
        parts.append(
            f'<rect x="{x - step * 0.3:.1f}" y="{y:.1f}" width="{step * 0.6:.1f}" height="{size:.1f}" '
            f'fill="{LENDS}" opacity="0.35"/>'
        )
        parts.append(
            f'<text x="{x:.1f}" y="{top + HEIGHT - 5}" text-anchor="middle" fill="#a35a10" font-size="10">'
            f"{point.lends:.1f}</text>"
        )
        is_default = point.value == SWEPT[key][1]
        weight = ' font-weight="bold"' if is_default else ' fill="#667085"'
        parts.append(f'<text x="{x:.1f}" y="{top + HEIGHT + 16}" text-anchor="middle"{weight}>{point.value:g}</text>')
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(places, heights, strict=True))
    parts.append(f'<polyline points="{line}" fill="none" stroke="{SAVED}" stroke-width="2"/>')
    parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{SAVED}"/>' for x, y in zip(places, heights, strict=True)]
    if key == list(SWEPT)[2]:
        parts.append(
            f'<text x="{left}" y="{top + HEIGHT + 34}"><tspan fill="{SAVED}">line: time in MoE layers saved, predicted'
            f'</tspan>   <tspan fill="#a35a10">bars: lends per layer and step</tspan>   bold: the default</text>'
        )
    return parts


def main() -> None:
    warm_up()
    swept = {key: [outcome(key, value) for value in values] for key, (values, _) in SWEPT.items()}
    for key, points in swept.items():
        for point in points:
            what = f"saved {point.saved:.1%}, {point.lends:.2f} lends, imbalance {point.imbalance:.2f}"
            print(f"{key}={point.value:g}: {what}")
    TARGET.write_text(draw(swept))
    print(TARGET.name)


if __name__ == "__main__":
    main()
