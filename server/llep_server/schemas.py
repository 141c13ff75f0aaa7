"""What the routes take and give beside the views of llep/views.py."""

from __future__ import annotations

from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from llep.config import Mode, Settings, is_hot
from llep_server.errors import ErrorDetail

T = TypeVar("T")

MAX_TTL_S = 7 * 24 * 3600


class Page(BaseModel, Generic[T]):
    """A list. Ask for the next page with `cursor` = next_cursor."""

    object: Literal["list"] = "list"
    data: list[T]
    has_more: bool = False
    next_cursor: str | None = None


class ModeChange(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    mode: Mode = Field(description="off, observe (count only), shadow (plan, move nothing) or active")
    ttl_s: float | None = Field(
        None, gt=0, le=MAX_TTL_S, description="seconds after which the mode goes back by itself"
    )


class Version(BaseModel):
    version: str
    python: str


class Check(BaseModel):
    """One part that readiness needs."""

    name: Literal["scheduler", "store", "engines", "settings"]
    ok: bool
    message: str


class Live(BaseModel):
    status: Literal["ok"] = "ok"


class Readiness(BaseModel):
    ready: bool
    checks: list[Check]


class Unready(BaseModel):
    """The error body, with the checks beside it."""

    error: ErrorDetail
    request_id: str
    ready: Literal[False]
    checks: list[Check]


class Health(BaseModel):
    """A summary for people. The status code is 200 as long as the control plane itself answers."""

    status: Literal["ok", "degraded"]
    version: str
    checks: list[Check]
    keys: str = Field(description="'open', 'ok', or why the keys file's newest content is not in force")


def settings_patch_schema() -> dict[str, Any]:
    """JSON Schema of a merge patch: any of the keys that can change while serving, null to take a change back."""
    schema = Settings.model_json_schema()
    properties = {}
    for key, rule in schema["properties"].items():
        if is_hot(key):
            rule = {name: value for name, value in rule.items() if name not in ("default", "hot", "title")}
            named = schema["$defs"].get(rule.pop("$ref", "").rpartition("/")[2], {})
            description = rule.pop("description")
            properties[key] = {"description": description, "anyOf": [{**named, **rule}, {"type": "null"}]}
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
        "examples": [{"imbalance_threshold": 1.5}],
    }
