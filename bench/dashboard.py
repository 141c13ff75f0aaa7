"""Draws docs/dashboard.svg: the dashboard's panels from its own queries, answered by a real Prometheus.

`python -m bench.dashboard` plays two engines for a while before a real control plane; what they route is recorded
(bench/natural), and one of them is kept from balancing for a third of the time. It shows what panels hold, not how
Grafana paints them.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt

from bench.natural.compare import TRACES
from llep.monitoring.dashboards import dashboards
from llep.simulate import split_sources
from llep.traces import Trace
from llep_server.config import ServerConfig
from tests.ops.prometheus import prometheus, wait_for
from tests.ops.queries import filled

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "server"))
from reporting import Engine
from running import Running, start

DOCS = Path(__file__).parents[1] / "docs"
STEP_S = 4
COLUMN, LINE, GAP = 42, 20, 4  # pixels of Grafana's grid
COLOURS = ("#3274d9", "#e0752d", "#56a64b", "#e02f44", "#8f3bb8", "#f2cc0c", "#37872d", "#5195ce")
STYLE = "text{font:11px sans-serif;fill:#222}.t{font-weight:bold}.v{font-size:22px}.s{fill:#666}"
Series = tuple[str, list[tuple[float, float]]]


class NaturalEngine(Engine):
    """Routes what a trained model did in vLLM: a recorded workload, step by step and round again, on eight ranks."""

    def __init__(self, name: str, workload: str) -> None:
        self._steps = {
            phase: itertools.cycle(list(Trace(TRACES / f"{workload}-{phase}").steps()))
            for phase in ("prefill", "decode")
        }
        shape = Trace(TRACES / f"{workload}-prefill").shape
        start_settings = {"metrics_level": "layer_rank", "imbalance_threshold": 1.1}
        super().__init__(
            name=name,
            ep_size=8,
            layer_numbers=shape.layer_numbers,
            num_experts=shape.num_experts,
            top_k=shape.top_k,
            start=start_settings,
        )

    def next_step(self, phase: str) -> None:
        self._step = next(self._steps[phase])
        self.run(tokens=int(self._step.counts_LRE[0].sum()) // self.top_k, phase=phase)

    def counts(self, layer: int, tokens: int, hot_share: float) -> npt.NDArray[np.int64]:
        return split_sources(self._step.counts_LRE[layer], self.ep_size)


def play(running: Running, seconds: float) -> None:
    """Two engines under natural skew; the first balances nothing for the middle third."""
    engines = [NaturalEngine("a", "shifting"), NaturalEngine("b", "manuals")]
    started_s = time.monotonic()
    while (part := (time.monotonic() - started_s) / seconds) < 1:
        engines[0].settings = engines[0].settings.changed({"imbalance_threshold": 5 if 1 / 3 < part < 2 / 3 else 1.1})
        for engine in engines:
            engine.next_step("prefill")
            engine.next_step("decode")
            running.report(engine)
        time.sleep(0.3)


def answers(url: str, target: dict[str, Any], seconds: float) -> list[Series]:
    """(legend, points) of one query over the last `seconds`."""
    now_s = time.time()
    query = {"query": filled(target["expr"]), "start": now_s - seconds, "end": now_s, "step": STEP_S}
    data = httpx.get(f"{url}/api/v1/query_range", params=query, timeout=20, trust_env=False).json()["data"]["result"]
    return [(legend(target["legendFormat"], row["metric"]), points(row["values"])) for row in data]


def points(values: list[list[Any]]) -> list[tuple[float, float]]:
    return [(float(at), float(value)) for at, value in values if value != "NaN"]


def legend(pattern: str, labels: dict[str, str]) -> str:
    if pattern == "__auto":
        return " ".join(labels.values())
    for name, value in labels.items():
        pattern = pattern.replace(f"{{{{{name}}}}}", value)
    return pattern


def shown(value: float, unit: str) -> str:
    match unit:
        case "percentunit":
            return f"{value:.0%}"
        case "s":
            return f"{value:.2g} s"
        case "bytes" | "Bps":
            return f"{value / 1e6:.3g} MB"
        case _:
            return f"{value:.3g}"


def lines(found: list[Series], width: float, height: float, unit: str) -> Iterator[str]:
    values = [value for _, row in found for _, value in row]
    low, high = min([0.0, *values]), max(values)
    start_s, end_s = (pick(at for _, row in found for at, _ in row) for pick in (min, max))
    for index, (name, row) in enumerate(found):
        colour = COLOURS[index % len(COLOURS)]
        along, up = width / max(end_s - start_s, 1), height / ((high - low) or 1)
        path = " ".join(f"{along * (at - start_s):.1f},{height - up * (value - low):.1f}" for at, value in row)
        yield f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.3"/>'
        if index < 4:
            x, y = index * width / 4, height + 14
            yield f'<text x="{x:.0f}" y="{y}" style="fill:{colour}">{escape(name[:16])}</text>'
    yield f'<text class="s" x="0" y="10">{shown(high, unit)}</text>'


def cells(found: list[Series], width: float, height: float) -> Iterator[str]:
    high = max((value for _, row in found for _, value in row), default=1) or 1
    start_s, end_s = (pick(at for _, row in found for at, _ in row) for pick in (min, max))
    tall, wide = height / len(found), width / (end_s - start_s + STEP_S)
    for index, (name, row) in enumerate(found):
        y = height - (index + 1) * tall
        for at, value in row:
            x = wide * (at - start_s)
            yield (
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{STEP_S * wide:.1f}" height="{tall:.1f}" fill="#e0752d" '
                f'fill-opacity="{value / high:.2f}"/>'
            )
        if tall > 9:
            yield f'<text class="s" x="2" y="{y + tall / 2 + 4:.1f}">{escape(name[:18])}</text>'


def bars(found: list[Series], width: float, height: float, unit: str) -> Iterator[str]:
    newest = [(name, row[-1][1]) for name, row in found if row][: int(height // 14)]
    high = max(value for _, value in newest) or 1
    for index, (name, value) in enumerate(newest):
        y = index * 14
        yield f'<rect x="110" y="{y}" width="{(width - 160) * value / high:.1f}" height="11" fill="#56a64b"/>'
        yield f'<text x="0" y="{y + 10}">{escape(name[:18])}</text>'
        yield f'<text x="{width}" y="{y + 10}" text-anchor="end">{shown(value, unit)}</text>'


def panel_svg(panel: dict[str, Any], found: list[Series]) -> str:
    place = panel["gridPos"]
    width, height = place["w"] * COLUMN - GAP, place["h"] * LINE - GAP
    inner, unit = (width - 16, height - 48), panel.get("fieldConfig", {}).get("defaults", {}).get("unit", "")
    found = [(name, row) for name, row in found if row]
    match panel["type"]:
        case "row":
            return f'<text class="t" x="4" y="15">{escape(panel["title"])}</text>'
        case _ if not found:
            body = ['<text class="s" x="0" y="14">from vLLM, which is not played here</text>']
        case "stat":
            texts = [name if panel["options"]["textMode"] == "name" else shown(row[-1][1], unit) for name, row in found]
            body = [
                f'<text class="v" x="0" y="{30 + 24 * i}">{escape(text)}</text>' for i, text in enumerate(texts[:2])
            ]
        case "heatmap":
            body = list(cells(ordered(found), *inner))
        case "bargauge" | "table":
            body = list(bars(found, *inner, unit))
        case _:
            body = list(lines(found, *inner, unit))
    frame = f'<rect width="{width}" height="{height}" rx="3" fill="#fff" stroke="#ccc"/>'
    title = f'<text class="t" x="8" y="16">{escape(panel["title"])}</text>'
    return f'{frame}{title}<g transform="translate(8 26)">{"".join(body)}</g>'


def ordered(found: list[Series]) -> list[Series]:
    """Buckets by their bound, each without those below it; other rows as they are."""
    try:
        by_bound = sorted(found, key=lambda series: float(series[0]))
    except ValueError:
        return found
    below: dict[float, float] = {}
    rows = []
    for name, row in by_bound:
        rows.append((name, [(at, max(value - below.get(at, 0.0), 0.0)) for at, value in row]))
        below = dict(row)
    return rows


def picture(dashboard: dict[str, Any], url: str, seconds: float) -> str:
    parts = []
    for panel in dashboard["panels"]:
        found = [series for target in panel.get("targets", ()) for series in answers(url, target, seconds)]
        x, y = panel["gridPos"]["x"] * COLUMN, panel["gridPos"]["y"] * LINE
        parts.append(f'<g transform="translate({x} {y})">{panel_svg(panel, found)}</g>')
    bottom = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in dashboard["panels"])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {24 * COLUMN} {bottom * LINE}"><style>{STYLE}</style>'
        f'<rect width="100%" height="100%" fill="#f4f5f5"/>{"".join(parts)}</svg>\n'
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=90.0, help="how long to play")
    seconds = parser.parse_args().seconds
    with tempfile.TemporaryDirectory() as name, contextmanager(start)(ServerConfig(), Path(name) / "state") as running:
        with prometheus(Path(name), {"llep": running.url.removeprefix("http://")}) as server:
            playing = threading.Thread(target=play, args=(running, seconds))
            playing.start()
            wait_for(lambda: server.query("llep_info"), 60)
            playing.join()
            text = picture(dashboards()["llep-overview.json"], server.url, seconds - 12)
    path = DOCS / "dashboard.svg"
    path.write_text(text)
    print(path)


if __name__ == "__main__":
    main()
