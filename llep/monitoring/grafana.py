"""Grafana's dashboard JSON from typed panels: only what the dashboards of llep use, laid out by itself."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

SCHEMA_VERSION = 39  # Grafana 11; newer ones migrate it
COLUMNS = 24
DATASOURCE = {"type": "prometheus", "uid": "$datasource"}


class Kind(StrEnum):
    STAT = "stat"
    TIMESERIES = "timeseries"
    HEATMAP = "heatmap"
    BARGAUGE = "bargauge"
    TABLE = "table"


class Unit(StrEnum):
    """Grafana's names."""

    NONE = "short"
    RATIO = "percentunit"
    SECONDS = "s"
    BYTES = "bytes"
    BYTES_PER_S = "Bps"
    PER_S = "cps"
    TIME_AGO = "dateTimeFromNow"


@dataclass(frozen=True, slots=True)
class Query:
    """is_instant: one value at the end of the time range. is_dashed: a line to compare with."""

    expr: str
    legend: str = ""
    is_instant: bool = False
    is_dashed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """description: what it shows, what good and bad look like, what to do.

    steps: (from this value on, colour) in rising order; the first colour holds below all. level: the metrics_level from
    which there are data. row_by, column_by: labels that span a table. link: (title, URL) of where there is more.
    """

    kind: Kind
    title: str
    description: str
    queries: Sequence[Query]
    unit: Unit = Unit.NONE
    width: int = 8
    height: int = 8
    steps: Sequence[tuple[float | None, str]] = ((None, "green"),)
    is_stacked: bool = False
    is_bucketed: bool = False  # a heatmap over the buckets of a histogram, not over series
    shows_name: bool = False  # a stat that shows the legend, not the value
    low: float | None = None
    high: float | None = None
    row_by: str = ""
    column_by: str = ""
    link: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Row:
    title: str
    panels: Sequence[Panel]


@dataclass(frozen=True, slots=True)
class Variable:
    """A choice above the dashboard, filled by a query."""

    name: str
    label: str
    query: str


@dataclass(frozen=True, slots=True)
class Annotation:
    """Marks on all panels where expr is above 0."""

    name: str
    expr: str
    colour: str
    title: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Dashboard:
    uid: str
    title: str
    description: str
    page: str  # where people reach the control plane's page, until they say otherwise
    variables: Sequence[Variable]
    annotations: Sequence[Annotation]
    rows: Sequence[Row]


def as_json(dashboard: Dashboard) -> dict[str, Any]:
    """What Grafana provisions from a file."""
    return {
        "uid": dashboard.uid,
        "title": dashboard.title,
        "description": dashboard.description,
        "tags": ["llep", "vllm"],
        "schemaVersion": SCHEMA_VERSION,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "timezone": "browser",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {
            "list": [_datasource_variable(), *map(_variable, dashboard.variables), _page_variable(dashboard.page)]
        },
        "annotations": {"list": [_annotation(annotation) for annotation in dashboard.annotations]},
        "links": [],
        "panels": list(_panels(dashboard.rows)),
    }


def _datasource_variable() -> dict[str, Any]:
    return {"name": "datasource", "label": "data source", "type": "datasource", "query": "prometheus", "hide": 0}


def _page_variable(page: str) -> dict[str, Any]:
    return {
        **{"name": "page", "label": "control plane's page", "type": "textbox", "query": page, "hide": 0},
        "current": {"text": page, "value": page},
    }


def _variable(variable: Variable) -> dict[str, Any]:
    return {
        "name": variable.name,
        "label": variable.label,
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"query": variable.query, "refId": f"variable-{variable.name}"},
        "refresh": 2,  # with every change of the time range
        "sort": 3,  # by number
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": ["All"], "value": ["$__all"]},
        "hide": 0,
    }


def _annotation(annotation: Annotation) -> dict[str, Any]:
    return {
        "name": annotation.name,
        "datasource": DATASOURCE,
        "enable": True,
        "hide": False,
        "iconColor": annotation.colour,
        "expr": annotation.expr,
        "step": "15s",
        "titleFormat": annotation.title,
        "useValueForTime": "false",
    }


def _panels(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """Rows one below the other; in each, panels from left to right until it is full."""
    number, y = 0, 0
    for row in rows:
        number += 1
        yield {
            **{"id": number, "type": "row", "title": row.title, "collapsed": False, "panels": []},
            "gridPos": {"h": 1, "w": COLUMNS, "x": 0, "y": y},
        }
        y += 1
        x = height = 0
        for panel in row.panels:
            if x + panel.width > COLUMNS:
                x, y, height = 0, y + height, 0
            number += 1
            yield _panel(panel, number, {"h": panel.height, "w": panel.width, "x": x, "y": y})
            x, height = x + panel.width, max(height, panel.height)
        y += height


def _panel(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    return {
        "id": number,
        "type": str(panel.kind),
        "title": panel.title,
        "description": panel.description,
        "datasource": DATASOURCE,
        "gridPos": place,
        "targets": [_target(panel, query, index) for index, query in enumerate(panel.queries)],
        "fieldConfig": {"defaults": _field(panel), "overrides": list(_overrides(panel))},
        "options": _options(panel),
        "transformations": _transformations(panel),
        "links": [_link(*panel.link)] if panel.link else [],
    }


def _link(title: str, url: str) -> dict[str, Any]:
    return {
        **{"title": title, "url": url, "type": "link", "icon": "external link", "tooltip": "", "tags": []},
        **{"asDropdown": False, "targetBlank": True, "includeVars": False, "keepTime": False},
    }


def _target(panel: Panel, query: Query, index: int) -> dict[str, Any]:
    formats = {Kind.HEATMAP: "heatmap" if panel.is_bucketed else "time_series", Kind.TABLE: "table"}
    return {
        "refId": chr(ord("A") + index),
        "datasource": DATASOURCE,
        "editorMode": "code",
        "expr": query.expr,
        "legendFormat": query.legend or "__auto",
        "format": formats.get(panel.kind, "time_series"),
        "instant": query.is_instant,
        "range": not query.is_instant,
    }


def _field(panel: Panel) -> dict[str, Any]:
    field: dict[str, Any] = {
        "unit": str(panel.unit),
        "thresholds": {"mode": "absolute", "steps": [{"value": at, "color": colour} for at, colour in panel.steps]},
        "color": {"mode": "palette-classic" if panel.kind is Kind.TIMESERIES else "thresholds"},
        "custom": _custom(panel),
    }
    bounds = {"min": panel.low, "max": panel.high}
    return field | {name: bound for name, bound in bounds.items() if bound is not None}


def _custom(panel: Panel) -> dict[str, Any]:
    if panel.kind is Kind.TIMESERIES:
        return {
            "drawStyle": "line",
            "lineWidth": 1,
            "fillOpacity": 40 if panel.is_stacked else 8,
            "showPoints": "never",
            "stacking": {"mode": "normal" if panel.is_stacked else "none", "group": "A"},
        }
    return {"cellOptions": {"type": "color-background"}} if panel.kind is Kind.TABLE else {}


def _overrides(panel: Panel) -> Iterator[dict[str, Any]]:
    for query in panel.queries:
        if query.is_dashed:
            yield {
                "matcher": {"id": "byRegexp", "options": f"/^{re.sub(r'{{.*?}}', '.*', query.legend)}$/"},
                "properties": [
                    {"id": "custom.lineStyle", "value": {"fill": "dash", "dash": [10, 10]}},
                    {"id": "custom.fillOpacity", "value": 0},
                ],
            }


def _options(panel: Panel) -> dict[str, Any]:
    reduce = {"calcs": ["lastNotNull"], "fields": "", "values": False}
    match panel.kind:
        case Kind.STAT:
            text = "name" if panel.shows_name else "auto"
            return {"reduceOptions": reduce, "textMode": text, "colorMode": "background", "graphMode": "none"}
        case Kind.BARGAUGE:
            return {"reduceOptions": reduce, "orientation": "horizontal", "displayMode": "gradient"}
        case Kind.HEATMAP:
            return {
                "calculate": False,
                "color": {
                    **{"mode": "scheme", "scheme": "Oranges", "steps": 64, "reverse": False},
                    **{"fill": "dark-orange", "exponent": 0.5},
                },
                "exemplars": {"color": "rgba(255,0,255,0.7)"},
                "yAxis": {"axisPlacement": "left", "unit": "short"},
                "rowsFrame": {"layout": "auto"},
                "tooltip": {"mode": "single", "yHistogram": False},
                "legend": {"show": True},
            }
        case Kind.TABLE:
            return {"showHeader": True, "cellHeight": "sm"}
        case _:
            return {
                "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
                "tooltip": {"mode": "multi", "sort": "desc"},
            }


def _transformations(panel: Panel) -> list[dict[str, Any]]:
    """A table's rows and columns, from two labels."""
    if not panel.row_by:
        return []
    options = {"rowField": panel.row_by, "columnField": panel.column_by, "valueField": "Value"}
    return [{"id": "groupingToMatrix", "options": options}]
