"""A simulation as one page: HTML with inline SVG and styles, nothing fetched from anywhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from typing import Any

WIDTH = 860
LABEL = 150  # room for names on the left
ROW = 30
COLORS = ("#3366cc", "#d9822b", "#2a9d6f", "#a85bc4", "#c23b4b", "#6b7280", "#0f8b8d", "#8d6e3f")

STYLE = """
:root { --text: #1c2127; --muted: #667085; --line: #d5dae1; --page: #ffffff; --soft: #f3f5f8 }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e9ee; --muted: #98a2b3; --line: #3b4350; --page: #14181f; --soft: #1f2630 }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page);
       max-width: 900px; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.4rem } h2 { font-size: 1.05rem; margin: 2.2rem 0 .2rem } 
p { color: var(--muted); margin: .2rem 0 .8rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; font-size: 13px }
th, td { text-align: right; padding: .3rem .5rem; border-bottom: 1px solid var(--line) }
th:first-child, td:first-child { text-align: left } th { color: var(--muted); font-weight: 500 }
svg { width: 100%; height: auto; overflow: visible } svg text { fill: var(--text); font: 12px system-ui, sans-serif }
svg .muted { fill: var(--muted) } svg .grid { stroke: var(--line) } .scroll { overflow-x: auto }
"""


def page(source: str, found: dict[str, Any]) -> str:
    """The page for `simulate.summary`'s values; `source` says what was replayed."""
    planners: list[dict[str, Any]] = found["planners"]
    nodes = f", {found['ranks_per_node']} per node" if found["ranks_per_node"] else ""
    intro = (
        f"{found['model']}: {found['layers']} MoE layers, {found['experts']} experts, {found['ranks']} ranks{nodes}, "
        f"{found['slots_per_rank']} slots per rank; {found['steps']:,} steps; "
        f"cost model: {found['cost_model'] or 'none'}."
    )
    parts = [
        f"<h1>{escape(source)}</h1><p>{escape(intro)}</p>",
        _table(planners),
        "<h2>Imbalance ratio</h2><p>Max / mean of rank loads over layers and steps, 1 is perfect. "
        "Bar: mean. Line: to the 95th percentile. Dot: highest.</p>",
        _ratio_bars(planners),
    ]
    if found["cost_model"]:
        parts += [
            "<h2>Share of the ideal</h2><p>Predicted time with every batch balanced / predicted time; 1 is ideal.</p>",
            _bars(planners, lambda planner: planner["ideal_time_ratio"] or 0.0, 1.0),
        ]
    parts += ["<h2>Over the steps</h2><p>Mean imbalance ratio of the layers.</p>", _lines(planners)]
    parts += ["<h2>By layer</h2><p>Mean imbalance ratio; darker is worse.</p>", _heatmap(planners)]
    title = escape(f"llep simulate: {source}")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>\n'
        f"<body>\n{chr(10).join(parts)}\n</body></html>\n"
    )


def _table(planners: Sequence[dict[str, Any]]) -> str:
    columns: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("planner", lambda p: escape(p["planner"])),
        ("imbalance mean", lambda p: _text(p["imbalance_ratio"]["mean"])),
        ("p95", lambda p: _text(p["imbalance_ratio"]["p95"])),
        ("highest", lambda p: _text(p["imbalance_ratio"]["max"])),
        ("lends / layer and step", lambda p: _text(p["lends_per_layer_step"])),
        ("lent GB", lambda p: _text(p["lend_bytes"] / 1e9)),
        ("moved copies", lambda p: f"{p['moved_copies']:,}"),
        ("peak GB of a rank", lambda p: _text(max(p["peak_memory_bytes_by_rank"]) / 1e9)),
        ("ms / step", lambda p: _text(p["predicted_s_per_step"], 1e3)),
        ("of ideal", lambda p: _text(p["ideal_time_ratio"])),
        ("plan us p50", lambda p: _text(p["plan_us"]["p50"])),
    ]
    head = "".join(f"<th>{name}</th>" for name, _ in columns)
    rows = "".join("<tr>" + "".join(f"<td>{cell(p)}</td>" for _, cell in columns) + "</tr>" for p in planners)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _ratio_bars(planners: Sequence[dict[str, Any]]) -> str:
    highest = max((p["imbalance_ratio"]["max"] or 1.0 for p in planners), default=1.0)
    x = _scale(1.0, max(highest, 1.05), LABEL, WIDTH - 60)
    body = [_grid(x, _ticks(1.0, max(highest, 1.05)), len(planners) * ROW)]
    for row, planner in enumerate(planners):
        ratio, y = planner["imbalance_ratio"], row * ROW
        if ratio["mean"] is None:
            continue
        mean, p95, top = x(ratio["mean"]), x(ratio["p95"]), x(ratio["max"])
        body.append(
            f"<g><title>{escape(planner['planner'])}: mean {_text(ratio['mean'])}, p95 {_text(ratio['p95'])}, "
            f"highest {_text(ratio['max'])}</title>"
            f'<rect x="{LABEL}" y="{y + 6}" width="{max(mean - LABEL, 1):.1f}" height="{ROW - 12}" rx="2" '
            f'fill="{_color(row)}"/>'
            f'<line x1="{mean:.1f}" x2="{p95:.1f}" y1="{y + ROW / 2}" y2="{y + ROW / 2}" stroke="{_color(row)}" '
            f'stroke-width="2"/><circle cx="{top:.1f}" cy="{y + ROW / 2}" r="3" fill="{_color(row)}"/></g>'
        )
        body.append(_name(planner["planner"], y))
        body.append(f'<text x="{max(mean, p95, top) + 8:.1f}" y="{y + ROW / 2 + 4}">{_text(ratio["mean"])}</text>')
    return _svg(body, len(planners) * ROW + 22)


def _bars(planners: Sequence[dict[str, Any]], value: Callable[[dict[str, Any]], float], highest: float) -> str:
    highest = max([highest, *map(value, planners)])
    x = _scale(0.0, highest, LABEL, WIDTH - 60)
    body = [_grid(x, _ticks(0.0, highest), len(planners) * ROW)]
    for row, planner in enumerate(planners):
        y, end = row * ROW, x(value(planner))
        body.append(
            f'<rect x="{LABEL}" y="{y + 6}" width="{max(end - LABEL, 1):.1f}" height="{ROW - 12}" rx="2" '
            f'fill="{_color(row)}"/>{_name(planner["planner"], y)}'
            f'<text x="{end + 8:.1f}" y="{y + ROW / 2 + 4}">{_text(value(planner))}</text>'
        )
    return _svg(body, len(planners) * ROW + 22)


def _lines(planners: Sequence[dict[str, Any]]) -> str:
    height, left = 240, 44
    series = [planner["imbalance_ratio_by_steps"] for planner in planners]
    values = [mean for one in series for mean in one["mean"] if mean is not None]
    highest = max([*values, 1.05])
    y = _scale(1.0, highest, height, 0)
    body = []
    for tick in _ticks(1.0, highest):
        body.append(f'<line class="grid" x1="{left}" x2="{WIDTH - 10}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        body.append(f'<text class="muted" x="{left - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for row, (planner, one) in enumerate(zip(planners, series, strict=True)):
        count = len(one["mean"])
        x = _scale(0, max(count - 1, 1), left, WIDTH - 10)
        points = " ".join(f"{x(at):.1f},{y(mean):.1f}" for at, mean in enumerate(one["mean"]) if mean is not None)
        body.append(
            f'<polyline points="{points}" fill="none" stroke="{_color(row)}" stroke-width="2" stroke-linejoin="round">'
            f"<title>{escape(planner['planner'])}</title></polyline>"
        )
    steps = max((len(one["mean"]) * one["steps_per_point"] for one in series), default=0)
    body.append(f'<text class="muted" x="{left}" y="{height + 18}">step 0</text>')
    body.append(f'<text class="muted" x="{WIDTH - 10}" y="{height + 18}" text-anchor="end">{steps:,}</text>')
    position = left
    for row, planner in enumerate(planners):
        body.append(f'<rect x="{position}" y="{height + 32}" width="12" height="12" rx="2" fill="{_color(row)}"/>')
        body.append(f'<text x="{position + 17}" y="{height + 42}">{escape(planner["planner"])}</text>')
        position += 40 + 7 * len(planner["planner"])
    return _svg(body, height + 54)


def _heatmap(planners: Sequence[dict[str, Any]]) -> str:
    layers = list(planners[0]["imbalance_ratio_by_layer"]) if planners else []
    by_planner = [list(planner["imbalance_ratio_by_layer"].values()) for planner in planners]
    highest = max([ratio for ratios in by_planner for ratio in ratios if ratio is not None] + [1.05])
    cell = (WIDTH - LABEL - 10) / max(len(layers), 1)
    body = []
    for row, (planner, ratios) in enumerate(zip(planners, by_planner, strict=True)):
        body.append(_name(planner["planner"], row * ROW))
        for at, (layer, ratio) in enumerate(zip(layers, ratios, strict=True)):
            opacity = 0.0 if ratio is None else 0.06 + 0.94 * (ratio - 1.0) / (highest - 1.0)
            body.append(
                f'<rect x="{LABEL + at * cell:.2f}" y="{row * ROW + 3}" width="{max(cell - 1, 1):.2f}" '
                f'height="{ROW - 6}" fill="#c23b4b" fill-opacity="{opacity:.3f}"><title>{escape(planner["planner"])}, '
                f"layer {layer}: {_text(ratio)}</title></rect>"
            )
    bottom = len(planners) * ROW + 16
    if layers:
        body.append(f'<text class="muted" x="{LABEL}" y="{bottom}">layer {layers[0]}</text>')
        body.append(f'<text class="muted" x="{WIDTH - 10}" y="{bottom}" text-anchor="end">{layers[-1]}</text>')
    return _svg(body, bottom + 6)


def _svg(body: Sequence[str], height: float) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img">{"".join(body)}</svg>'


def _name(name: str, y: float) -> str:
    return f'<text x="{LABEL - 10}" y="{y + ROW / 2 + 4}" text-anchor="end">{escape(name)}</text>'


def _grid(x: Callable[[float], float], ticks: Sequence[float], height: float) -> str:
    return "".join(
        f'<line class="grid" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="0" y2="{height}"/>'
        f'<text class="muted" x="{x(tick):.1f}" y="{height + 16}" text-anchor="middle">{tick:g}</text>'
        for tick in ticks
    )


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers from low on."""
    rough = (high - low) / 5
    unit = next(u for u in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 1000) if u >= rough)
    return [round(low + unit * step, 6) for step in range(int((high - low) / unit) + 1)]


def _color(row: int) -> str:
    return COLORS[row % len(COLORS)]


def _text(value: float | None, times: float = 1.0) -> str:
    return "-" if value is None else f"{value * times:,.3g}" if abs(value * times) < 1 else f"{value * times:,.2f}"
