"""Pictures of the page: inline SVG, and heatmaps as small PNGs inside them. Pure text, no package needed.

Colors come from the page's variables, so that every picture follows light, dark and print.
"""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Callable, Sequence
from html import escape

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

WIDTH = 880
LEFT, RIGHT = 46, 14
LOW, HIGH = (37, 99, 189), (196, 62, 28)  # below and above the mean; how far shows in opacity, on any background
STEPS = 120  # of the palette, on either side of the mean


def heatmap(values: Floats, rows: Sequence[str], columns: str, most: float, unit: str, width: int = WIDTH) -> str:
    """Rows x columns of multiples of the mean: 1 is invisible, `most` and above is full red, 0 is full blue.

    The script shows the number under the pointer; rows are named at the left, columns by number at the bottom.
    """
    count_rows, count_columns = values.shape
    row_height = max(min(18.0, 420 / count_rows), 5.0)
    height = row_height * count_rows
    inner = width - LEFT - RIGHT
    hundredths = np.clip(np.round(values * 100), 0, 65535).astype("<u2")
    data = base64.b64encode(hundredths.tobytes()).decode()
    parts = [
        f'<rect class="frame" x="{LEFT}" y="0" width="{inner}" height="{height:.1f}"/>',
        f'<image x="{LEFT}" y="0" width="{inner}" height="{height:.1f}" preserveAspectRatio="none" '
        f'href="data:image/png;base64,{_png(values, most)}"/>',
    ]
    every = _every(count_rows, height / 14)
    for row in range(0, count_rows, every):
        y = (row + 0.5) * row_height + 4
        parts.append(f'<text class="muted" x="{LEFT - 6}" y="{y:.1f}" text-anchor="end">{escape(rows[row])}</text>')
    for column in range(0, count_columns, _every(count_columns, inner / 34)):
        x = LEFT + (column + 0.5) * inner / count_columns
        parts.append(f'<text class="muted" x="{x:.1f}" y="{height + 15:.1f}" text-anchor="middle">{column}</text>')
    names = ",".join(rows)
    return (
        f'<svg class="heat" viewBox="0 0 {width} {height + 20:.0f}" role="img" aria-label="{escape(unit)}" '
        f'data-rows="{escape(names)}" data-columns="{count_columns}" data-column="{columns}" '
        f'data-unit="{escape(unit)}" data-left="{LEFT}" data-inner="{inner}" data-height="{height:.1f}" '
        f'data-values="{data}">{"".join(parts)}</svg>'
    )


def legend(most: float) -> str:
    """What the colors of a heatmap mean."""
    return (
        f'<p class="legend"><i style="background:rgb{LOW}"></i> none'
        f'<i class="mean"></i> the mean<i style="background:rgb{HIGH}"></i> {most:.3g} times the mean or more</p>'
    )


def most_of(values: Floats) -> float:
    """Where a heatmap's scale ends: the 99th percentile, at least 1.5 times the mean."""
    return max(float(np.percentile(values, 99)), 1.5) if values.size else 1.5


def lines(series: Sequence[tuple[str, str, Sequence[float]]], at: Sequence[int], threshold: float) -> str:
    """Series (name, class, values) over `at`; from 1 up, with the threshold as a dashed line."""
    height = 220
    highest = max([threshold * 1.05, *(max(values) for _, _, values in series)])
    y = _scale(1.0, highest, height, 6)
    x = _scale(0, max(len(at) - 1, 1), LEFT, WIDTH - RIGHT)
    parts = [_rule(y(tick), f"{tick:g}") for tick in ticks(1.0, highest)]
    parts.append(_threshold_line(y(threshold)))
    for name, kind, values in series:
        points = " ".join(f"{x(place):.1f},{y(value):.1f}" for place, value in enumerate(values))
        dot = f'<circle cx="{x(0):.1f}" cy="{y(values[0]):.1f}" r="3"/>' if len(values) == 1 else ""
        parts.append(f'<g class="{kind}"><title>{escape(name)}</title><polyline points="{points}"/>{dot}</g>')
    for place in range(0, len(at), _every(len(at), 9)):
        parts.append(
            f'<text class="muted" x="{x(place):.1f}" y="{height + 18}" text-anchor="middle">{at[place]:,}</text>'
        )
    return _svg(parts, height + 24, "imbalance ratio over steps")


def layers(names: Sequence[str], before: Floats, after: Floats, threshold: float) -> str:
    """A column per layer: from before (upper end) to after (lower end), with the threshold as a dashed line."""
    height = 220
    highest = max(threshold * 1.05, float(before.max()), float(after.max()))
    y = _scale(1.0, highest, height, 6)
    step = (WIDTH - LEFT - RIGHT) / len(names)
    bar = min(step * 0.62, 30.0)
    parts = [_rule(y(tick), f"{tick:g}") for tick in ticks(1.0, highest)]
    for at, (name, was, now) in enumerate(zip(names, before.tolist(), after.tolist(), strict=True)):
        left = LEFT + (at + 0.5) * step - bar / 2
        parts.append(
            f"<g><title>layer {escape(name)}: {was:.2f} before, {now:.2f} after</title>"
            f'<rect class="before" x="{left:.1f}" y="{y(was):.1f}" width="{bar:.1f}" '
            f'height="{height - y(was):.1f}"/><rect class="after" x="{left:.1f}" y="{y(now):.1f}" '
            f'width="{bar:.1f}" height="{height - y(now):.1f}"/></g>'
        )
    parts.append(_threshold_line(y(threshold)))
    for at in range(0, len(names), _every(len(names), 26)):
        x = LEFT + (at + 0.5) * step
        parts.append(f'<text class="muted" x="{x:.1f}" y="{height + 18}" text-anchor="middle">{names[at]}</text>')
    return _svg(parts, height + 24, "imbalance ratio by layer, before and after")


def bar(share: float, kind: str = "after") -> str:
    """A bar for a table's cell."""
    return f'<span class="bar"><span class="{kind}" style="width:{max(min(share, 1.0), 0.0):.1%}"></span></span>'


def ticks(low: float, high: float) -> list[float]:
    """About five round numbers from low on."""
    rough = max(high - low, 1e-9) / 5
    unit = next((u for u in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50) if u >= rough), rough)
    return [round(low + unit * step, 6) for step in range(int((high - low) / unit) + 1)]


def _rule(y: float, text: str) -> str:
    return (
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="muted" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'
    )


def _threshold_line(y: float) -> str:
    return f'<line class="threshold" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'


def _svg(parts: Sequence[str], height: float, label: str) -> str:
    body = "".join(parts)
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(label)}">{body}</svg>'


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    return lambda value: start + (value - low) / (high - low or 1.0) * (end - start)


def _every(count: int, fits: float) -> int:
    """Label every so many, so that at most `fits` are labelled."""
    return next(n for n in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 1 << 30) if count / n <= max(fits, 1))


def _png(values: Floats, most: float) -> str:
    """A paletted PNG, one pixel per value."""
    below = np.round((1 - np.clip(values, 0, 1)) * STEPS)
    above = np.round(np.clip((values - 1) / max(most - 1, 1e-9), 0, 1) * STEPS)
    pixels = np.where(values < 1, STEPS - below, STEPS + above).astype(np.uint8)
    palette = bytes(part for at in range(2 * STEPS + 1) for part in (LOW if at < STEPS else HIGH))
    opacity = bytes(round(255 * abs(at - STEPS) / STEPS) for at in range(2 * STEPS + 1))
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    height, width = values.shape
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)),
        (b"PLTE", palette),
        (b"tRNS", opacity),
        (b"IDAT", zlib.compress(rows, 9)),
        (b"IEND", b""),
    )
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )
    return base64.b64encode(data).decode()
