"""The parts of the page's forms that follow from the code: one row for each setting, one option for each mode."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Any

from llep.config import Mode, Settings, is_hot

MODES = {
    Mode.ACTIVE: "active: plan and move",
    Mode.SHADOW: "shadow: plan, move nothing",
    Mode.OBSERVE: "observe: count only",
    Mode.OFF: "off: plain EP, nothing counted",
}


def mode_options() -> str:
    return "".join(f'<option value="{mode}">{escape(words)}</option>' for mode, words in MODES.items())


def engine_settings() -> str:
    """A table row for each setting, with an input that knows the setting's type and range."""
    schema = Settings.model_json_schema()
    return "\n".join(_row(key, rule, schema["$defs"]) for key, rule in schema["properties"].items())


def _row(key: str, rule: dict[str, Any], definitions: dict[str, Any]) -> str:
    choices = definitions.get(rule.get("$ref", "").rpartition("/")[2], {}).get("enum")
    description = escape(rule["description"])
    name = f'id="set-{key}" data-key="{key}" aria-describedby="about-{key}"' + ("" if is_hot(key) else " disabled")
    field = _choice(name, choices) if choices else _input(name, rule)
    when = "" if is_hot(key) else '<span class="tag">at start only</span>'
    return (
        f'<tr id="row-{key}"><th scope="row"><label for="set-{key}">{key}</label>{when}</th><td>{field}</td>'
        f'<td class="source"></td><td class="about" id="about-{key}">{description}{escape(_range(rule))}</td></tr>'
    )


def _choice(name: str, choices: Iterable[str]) -> str:
    options = "".join(f'<option value="{choice}">{choice}</option>' for choice in choices)
    return f"<select {name}>{options}</select>"


def _input(name: str, rule: dict[str, Any]) -> str:
    if rule["type"] == "boolean":
        return f'<select {name} data-type="boolean"><option>true</option><option>false</option></select>'
    if rule["type"] not in ("number", "integer"):
        return f'<input type="text" {name} data-type="text" autocomplete="off" spellcheck="false">'
    step = "1" if rule["type"] == "integer" else "any"
    bounds = "".join(f' {side[:3]}="{rule[side]}"' for side in ("minimum", "maximum") if side in rule)
    return f'<input type="number" {name} data-type="number" step="{step}"{bounds} inputmode="decimal">'


def _range(rule: dict[str, Any]) -> str:
    low, high = rule.get("minimum"), rule.get("maximum")
    if low is None and high is None:
        return ""
    return f" ({low} to {high})" if high is not None else f" ({low} or more)"
