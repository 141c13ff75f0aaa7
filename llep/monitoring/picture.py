"""The dashboard's panels drawn as one SVG picture from the answers to their own queries: what panels hold, without a
Grafana, not how Grafana paints them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from html import escape
from typing import Any

from llep.monitoring.grafana import COLUMNS, Kind

COLUMN, LINE, GAP = 52, 20, 4  # pixels of Grafana's grid
LEFT, BOTTOM = 54, 16  # of a chart: for the numbers beside it, and a line of names
LETTER = 6.1  # mean width
COLOURS = ("#3274d9", "#e0752d", "#56a64b", "#e02f44", "#8f3bb8", "#c9a800", "#37872d", "#5195ce", "#ff7383", "#7c2ea3")
SHADES = {"green": "#d5ecd0", "orange": "#fbdcb8", "red": "#f7c0c4"}
STYLE = "text{font:11px sans-serif;fill:#222}.t{font-weight:bold}.v{font-size:20px}.s{fill:#666}"
Series = tuple[str, list[tuple[float, float]]]  # its name, and (unix time, value) in order
Ask = Callable[[dict[str, Any]], list[Series]]  # a panel's target -> its series


def picture(dashboard: dict[str, Any], ask: Ask, empty: str = "no data yet") -> str:
    """SVG text. dashboard: Grafana's JSON; empty: what panels without data say."""
    parts = []
    for panel in dashboard["panels"]:
        found = [series for target in panel.get("targets", ()) for series in ask(target) if series[1]]
        x, y = panel["gridPos"]["x"] * COLUMN, panel["gridPos"]["y"] * LINE
        parts.append(f'<g transform="translate({x} {y})">{_panel(panel, found, empty)}</g>')
    bottom = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in dashboard["panels"])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {COLUMNS * COLUMN} {bottom * LINE}">'
        f'<style>{STYLE}</style><rect width="100%" height="100%" fill="#f4f5f5"/>{"".join(parts)}</svg>\n'
    )


def legend(pattern: str, labels: dict[str, str]) -> str:
    """A series' name as Grafana makes it of its labels."""
    if pattern == "__auto":
        return " ".join(value for name, value in labels.items() if name != "__name__")
    return re.sub(r"{{(\w+)}}", lambda found: labels.get(found[1], ""), pattern).strip()


def shown(value: float, unit: str) -> str:
    match unit:
        case "percentunit":
            return f"{value:.0%}"
        case "s":
            return f"{value:.3g} s" if abs(value) >= 1 or not value else f"{1000 * value:.3g} ms"
        case "bytes" | "Bps":
            return f"{value / 1e6:.3g} MB"
        case _:
            return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _panel(panel: dict[str, Any], found: list[Series], empty: str) -> str:
    place = panel["gridPos"]
    if panel["type"] == "row":
        return f'<text class="t" x="4" y="15">{escape(panel["title"])}</text>'
    width, height = place["w"] * COLUMN - GAP, place["h"] * LINE - GAP
    inner, shade = (width - 16, height - 34), "#fff"
    match panel["type"]:
        case _ if not found:
            body = [f'<text class="s" y="14">{escape(empty)}</text>']
        case Kind.STAT:
            body, shade = list(_stat(panel, found)), _shade(panel, found[0][1][-1][1])
        case Kind.HEATMAP:
            is_bucketed = panel["targets"][0]["format"] == "heatmap"
            body = list(_heatmap(_buckets(found) if is_bucketed else found, *inner))
        case Kind.TABLE:
            body = list(_table(panel, found, *inner))
        case Kind.BARGAUGE:
            body = list(_bars(panel, found, *inner))
        case _:
            body = list(_chart(panel, found, *inner))
    return (
        f"<title>{escape(panel['description'])}</title>"
        f'<rect width="{width}" height="{height}" rx="3" fill="{shade}" stroke="#ccc"/>'
        f'<text class="t" x="8" y="16">{escape(_cut(panel["title"], width - 12, 6.8))}</text>'
        f'<g transform="translate(8 26)">{"".join(body)}</g>'
    )


def _field(panel: dict[str, Any], name: str) -> Any:
    return panel["fieldConfig"]["defaults"].get(name)


def _cut(text: str, width: float, letter: float = LETTER) -> str:
    room = max(int(width / letter), 1)
    return text if len(text) <= room else f"{text[: room - 1]}\N{HORIZONTAL ELLIPSIS}"


def _shade(panel: dict[str, Any], value: float) -> str:
    steps = _field(panel, "thresholds")["steps"]
    return next(SHADES[s["color"]] for s in reversed(steps) if s["value"] is None or value >= s["value"])


def _stat(panel: dict[str, Any], found: list[Series]) -> Iterator[str]:
    """One value large; several with their names."""
    unit, names = _field(panel, "unit"), panel["options"]["textMode"] == "name"
    if len(found) == 1:
        name, row = found[0]
        text = name if names else shown(row[-1][1], unit)
        size = "v" if len(text) < 10 else ""
        yield f'<text class="{size}" y="30">{escape(text)}</text>'
        return
    for line, (name, row) in enumerate(found[:4]):
        yield f'<text y="{12 + 15 * line}">{escape(name if names else f"{name}: {shown(row[-1][1], unit)}")}</text>'


def _chart(panel: dict[str, Any], found: list[Series], width: float, height: float) -> Iterator[str]:
    unit, is_stacked = _field(panel, "unit"), _field(panel, "custom")["stacking"]["mode"] == "normal"
    rows = _stacked(found) if is_stacked else found
    values = [value for _, row in rows for _, value in row]
    low = min([0.0 if _field(panel, "min") is None else _field(panel, "min"), *values])
    high = max([*values, *([_field(panel, "max")] if _field(panel, "max") is not None else [])])
    start_s, end_s = (pick(at for _, row in rows for at, _ in row) for pick in (min, max))
    wide, tall = width - LEFT, height - BOTTOM - 6
    along, up = wide / max(end_s - start_s, 1.0), tall / ((high - low) or 1.0)

    def path(row: Sequence[tuple[float, float]]) -> str:
        return " ".join(f"{LEFT + along * (at - start_s):.1f},{tall - up * (value - low):.1f}" for at, value in row)

    for value, y in ((high, 0.0), ((low + high) / 2, tall / 2), (low, tall)):
        yield f'<line x1="{LEFT}" x2="{width}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e8e8e8"/>'
        yield f'<text class="s" x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{shown(value, unit)}</text>'
    dashed = [override["matcher"]["options"].strip("/") for override in panel["fieldConfig"]["overrides"]]
    for index, (name, row) in enumerate(rows):
        colour, is_dashed = COLOURS[index % len(COLOURS)], any(re.match(pattern, name) for pattern in dashed)
        if is_stacked:
            below = rows[index - 1][1] if index else [(at, low) for at, _ in row]
            yield f'<polygon points="{path(row)} {path(below[::-1])}" fill="{colour}" fill-opacity=".4"/>'
        more = ' stroke-dasharray="5 4"' if is_dashed else ""
        yield f'<polyline points="{path(row)}" fill="none" stroke="{colour}" stroke-width="1.3"{more}/>'
    yield from _names([name for name, _ in rows], width, height)


def _names(names: list[str], width: float, y: float) -> Iterator[str]:
    """As many as the line holds, each in its colour."""
    x = 0.0
    for index, name in enumerate(names):
        if index and x + LETTER * len(name) > width - 30:
            yield f'<text class="s" x="{x:.0f}" y="{y:.0f}">+{len(names) - index}</text>'
            return
        text = _cut(name, width)
        yield f'<text x="{x:.0f}" y="{y:.0f}" style="fill:{COLOURS[index % len(COLOURS)]}">{escape(text)}</text>'
        x += LETTER * len(text) + 10


def _stacked(found: list[Series]) -> list[Series]:
    """Each on top of those before it, at all times that any has."""
    times = sorted({at for _, row in found for at, _ in row})
    sums, rows = dict.fromkeys(times, 0.0), []
    for name, row in found:
        for at, value in row:
            sums[at] += value
        rows.append((name, list(sums.items())))
    return rows


def _heatmap(found: list[Series], width: float, height: float) -> Iterator[str]:
    high = max(value for _, row in found for _, value in row) or 1.0
    times = sorted({at for _, row in found for at, _ in row})
    start_s, step_s = times[0], min((b - a for a, b in zip(times, times[1:], strict=False)), default=1.0)
    tall, wide = height / len(found), (width - LEFT) / (times[-1] - start_s + step_s)
    for index, (name, row) in enumerate(found):
        y = height - (index + 1) * tall
        for at, value in row:
            if value > 0:
                x, opacity = LEFT + wide * (at - start_s), (value / high) ** 0.5
                yield (
                    f'<rect x="{x:.1f}" y="{y:.1f}" width="{step_s * wide:.1f}" height="{tall:.1f}" fill="#e0752d" '
                    f'fill-opacity="{opacity:.2f}"/>'
                )
        if tall > 8 or index % 4 == 0:
            text = name.removeprefix("+")[-9:]
            yield f'<text class="s" x="{LEFT - 5}" y="{y + tall / 2 + 4:.1f}" text-anchor="end">{escape(text)}</text>'


def _buckets(found: list[Series]) -> list[Series]:
    """By their bound, each without those below it; those above all that ever held something are left out."""
    below: dict[float, float] = {}
    rows = []
    for name, row in sorted(found, key=lambda series: float(series[0])):
        rows.append((name, [(at, max(value - below.get(at, 0.0), 0.0)) for at, value in row]))
        below = dict(row)
    last = max((index for index, (_, row) in enumerate(rows) if any(value > 0 for _, value in row)), default=0)
    return rows[: last + 2]


def _table(panel: dict[str, Any], found: list[Series], width: float, height: float) -> Iterator[str]:
    """A matrix: names are a row's and a column's, as in the labels."""
    values = {name.partition(" ")[::2]: row[-1][1] for name, row in found}
    lines, columns = (sorted({key[place] for key in values}, key=_by_number) for place in (0, 1))
    wide, tall = (width - 30) / len(columns), min(22.0, (height - 14) / len(lines))
    for across, column in enumerate(columns):
        yield f'<text class="s" x="{30 + wide * (across + 0.5):.1f}" y="8" text-anchor="middle">{escape(column)}</text>'
    for down, line in enumerate(lines):
        y = 14 + tall * down
        yield f'<text class="s" x="20" y="{y + tall / 2 + 4:.1f}" text-anchor="end">{escape(line)}</text>'
        for across, column in enumerate(columns):
            if (value := values.get((line, column))) is not None:
                x = 30 + wide * across
                yield (
                    f'<rect x="{x:.1f}" y="{y:.1f}" width="{wide - 1:.1f}" height="{tall - 1:.1f}" '
                    f'fill="{_shade(panel, value)}"/>'
                )
                if wide > 26 and tall > 10:
                    middle = x + wide / 2
                    yield f'<text x="{middle:.1f}" y="{y + tall / 2 + 4:.1f}" text-anchor="middle">{value:.2f}</text>'


def _by_number(text: str) -> tuple[bool, int, str]:
    return (False, int(text), "") if text.isdecimal() else (True, 0, text)


def _bars(panel: dict[str, Any], found: list[Series], width: float, height: float) -> Iterator[str]:
    newest = [(name, row[-1][1]) for name, row in found][: int(height // 15)]
    high = max(value for _, value in newest) or 1.0
    names = LETTER * max(len(name) for name, _ in newest) + 8
    for index, (name, value) in enumerate(newest):
        y, length = index * 15, max(width - names - 50, 0) * value / high
        yield f'<rect x="{names:.0f}" y="{y}" width="{length:.1f}" height="12" fill="{_shade(panel, value)}"/>'
        yield f'<text x="0" y="{y + 10}">{escape(name)}</text>'
        yield f'<text x="{width}" y="{y + 10}" text-anchor="end">{shown(value, _field(panel, "unit"))}</text>'
