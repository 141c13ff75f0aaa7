"""The dashboard drawn without a Grafana: well-formed whatever engines are called, every panel there, data or not."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

import pytest

from llep.monitoring.dashboards import dashboards
from llep.monitoring.picture import Series, legend, picture, shown

DASHBOARD = dashboards()["llep-overview.json"]
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def answers(target: dict[str, Any]) -> list[Series]:
    """Two engines with names that XML would trip over; the buckets of a histogram."""
    times = [1000.0 + 15 * step for step in range(20)]
    if target["legendFormat"] == "{{le}}":
        return [(bound, [(at, float(place)) for at in times]) for place, bound in enumerate(("1", "1.5", "+Inf"))]
    if target["legendFormat"] == "{{layer}} {{ep_rank}}":
        return [(f"{layer} {rank}", [(times[-1], 1.0)]) for layer in range(12) for rank in range(2)]
    return [
        (legend(target["legendFormat"], {"engine": name, "phase": "prefill"}), [(at, at % 7) for at in times])
        for name in ("a<b>&c", 'd"e')
    ]


def texts(svg: str) -> list[str]:
    return [text.text or "" for text in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_every_panel_is_drawn_whatever_engines_are_called() -> None:
    found = texts(picture(DASHBOARD, answers))
    assert "no data yet" not in found
    assert {panel["title"] for panel in PANELS} - set(found) <= {p["title"] for p in PANELS if len(p["title"]) > 17}
    assert any(text.startswith("a<b>&c") for text in found)


@pytest.mark.parametrize("values", [[], [0.0], [5.0, 5.0]])
def test_little_or_no_data(values: list[float]) -> None:
    rows = [("1", [(1000.0 + at, value) for at, value in enumerate(values)])]
    found = texts(picture(DASHBOARD, lambda target: rows))
    assert found.count("no data yet") == (0 if values else len(PANELS))


def test_layers_are_in_the_order_of_their_numbers() -> None:
    table = next(panel for panel in PANELS if panel["type"] == "table")
    found = texts(picture({"panels": [table]}, answers))
    assert [text for text in found if text.isdecimal()][2:] == [str(layer) for layer in range(12)]


def test_numbers_carry_their_unit() -> None:
    assert [shown(0.5, "percentunit"), shown(0.002, "s"), shown(2.0, "s"), shown(1500.0, "short")] == [
        *("50%", "2 ms", "2 s", "1,500"),
    ]
