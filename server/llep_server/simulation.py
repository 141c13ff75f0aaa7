"""POST /v1/plans/simulate: which job it is, done by a process beside this one."""

from __future__ import annotations

import json
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from llep.config import Settings
from llep.cost import PRESETS
from llep.errors import SettingsError
from llep.planning.question import KEYS
from llep_server.errors import InvalidJson, InvalidRequest
from llep_server.recordings import copy_of
from llep_server.scheduler import Scheduler
from llep_server.schemas import Replay
from llep_server.work import Worker

TIMEOUT_S = 60.0
MOST_WAITING = 8
MOST_PARSED_BYTES = 1 << 16
MOST_EXPERTS = 1 << 16
MOST_RANKS = 4096
MOST_EXPERT_BYTES = 1 << 40


class Simulator:
    """Answers what-if questions, one at a time."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._worker = Worker(MOST_WAITING)

    async def run(self, body: bytes) -> bytes:
        """A Simulation in JSON. Raises what is wrong with the body, TookTooLong, Busy, and what fetching raises."""
        # Counts by the megabyte are for the other process to parse.
        asked = parse_object(body) if len(body) <= MOST_PARSED_BYTES else {}
        if asked.get("recording") is None:
            async with self._worker.turn(TIMEOUT_S):
                return await self._worker.do("question", body)
        order = parse_replay(asked)
        async with self._worker.turn(TIMEOUT_S), copy_of(self._scheduler, order.recording) as folder:
            job = json.dumps({**order.model_dump(exclude={"recording"}), "folder": str(folder)}).encode()
            return await self._worker.do("replay", job)

    async def close(self) -> None:
        await self._worker.close()


def parse_object(body: bytes) -> dict[str, Any]:
    """The body's JSON object. Raises InvalidJson, InvalidRequest."""
    try:
        values = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise InvalidJson(f"the body is not JSON: {error}", param="body") from None
    if not isinstance(values, dict):
        raise InvalidRequest("the body must be a JSON object", param="body")
    return values


def check_cost_model(name: Any) -> None:
    """Over HTTP a cost model is a preset: a path would be the server's. Raises SettingsError."""
    if name is not None and (not isinstance(name, str) or name.lower() not in PRESETS):
        raise SettingsError(
            f"cost_model={name!r} is not a preset: choose one of {', '.join(PRESETS)}", param="cost_model"
        )


def check_size(question: dict[str, Any]) -> None:
    """As many experts and ranks as the scheduler and /v1/tuning take: answers grow with them. Raises SettingsError."""
    tokens = question.get("tokens")
    if isinstance(tokens, list) and len(tokens) > MOST_RANKS:
        raise SettingsError(f"tokens has {len(tokens)} ranks, at most {MOST_RANKS} are taken", param="tokens")
    for row in tokens if isinstance(tokens, list) else ():
        if isinstance(row, list) and len(row) > MOST_EXPERTS:
            raise SettingsError(f"tokens has {len(row)} experts, at most {MOST_EXPERTS} are taken", param="tokens")
    size = question.get("bytes_per_expert")
    if isinstance(size, int) and size > MOST_EXPERT_BYTES:
        raise SettingsError(f"bytes_per_expert must be at most {MOST_EXPERT_BYTES}", param="bytes_per_expert")


def check_settings(settings: Any, name: str = "settings") -> dict[str, Any]:
    """Settings that a client wants tried: valid ones. Raises SettingsError."""
    if not isinstance(settings, dict):
        raise SettingsError(f"{name} must be a JSON object of settings", param=name)
    if settings.get("cost_model"):
        raise SettingsError(f"cost_model is named beside {name}, as a preset", param="cost_model")
    Settings.parse(settings)
    return settings


def parse_replay(body: dict[str, Any]) -> Replay:
    """A body that names a recording; null is as good as left out. Raises SettingsError, RequestValidationError."""
    for key in body:
        if key not in Replay.model_fields:
            known = ", ".join(Replay.model_fields)
            raise SettingsError(f"{key} does not go with recording: give {known}", param=key)
    try:
        order = Replay.model_validate({key: value for key, value in body.items() if value is not None})
    except ValidationError as error:  # to be said as of every other route's body
        raise RequestValidationError([{**one, "loc": ("body", *one["loc"])} for one in error.errors()]) from None
    check_cost_model(order.cost_model)
    check_settings(order.settings)
    return order


def simulation_schema() -> dict[str, Any]:
    """JSON Schema of what simulate takes."""
    of_batch: dict[str, dict[str, Any]] = {
        "tokens": {"type": "array", "items": {"type": "array", "items": {"type": "integer", "minimum": 0}}},
        "home_rank": {"type": "array", "items": {"type": "integer", "minimum": 0}},
        "slots_per_rank": {"anyOf": [{"type": "integer"}, {"type": "array", "items": {"type": "integer"}}]},
        "bytes_per_expert": {"type": "integer", "minimum": 0},
        "free_bytes": {"type": "array", "items": {"type": "integer", "minimum": 0}},
        "ranks_per_node": {"type": "integer", "minimum": 1},
        "min_chunk_tokens": {"type": "integer", "minimum": 1},
        "capacity_factor": {"type": "number", "minimum": 1},
        "imbalance_threshold": {"type": "number", "minimum": 1},
        "cost_model": {"type": "string", "enum": sorted(PRESETS)},
    }
    of_recording = Replay.model_json_schema()["properties"]
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            **{key: {"description": KEYS[key], **rule} for key, rule in of_batch.items()},
            "planner": {"type": "string", "enum": ["quota", "least_loaded", "home"], "default": "quota"},
            **{key: rule for key, rule in of_recording.items() if key not in of_batch},
        },
        "examples": [{"tokens": [[4000, 96], [4000, 96]], "min_chunk_tokens": 64}],
    }
