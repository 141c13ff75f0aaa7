"""A recording at the real scheduler, ordered over HTTP and delivered as an engine's agent does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from reporting import Engine
from running import Running

from llep.generate import Workload, generate_steps
from llep.shapes import ModelShape
from llep.traces import TraceWriter

SHAPE = ModelShape(
    name="tiny", layer_numbers=(1, 2, 5), num_experts=16, top_k=4, hidden_size=64, intermediate_size=64,
    bytes_per_expert=3_000_000,
)  # fmt: skip


def recorded(running: Running, folder: Path, steps: int = 40, engine: Engine | None = None) -> str:
    """Id of a recording of the engine `tiny` that is done."""
    running.report(engine or Engine())
    id = order(running.http)
    deliver(running.call, id, folder, steps)
    return id


def order(http: httpx.Client) -> str:
    ordered = http.post("/v1/recordings", json={"duration_s": 60, "reason": "to see"})
    assert ordered.status_code == 201, ordered.text
    id = str(ordered.json()["id"])
    assert ordered.headers["Location"] == f"/v1/recordings/{id}" and ordered.json()["state"] == "ordered"
    return id


def deliver(
    call: Callable[..., Any],
    id: str,
    folder: Path,
    steps: int,
    shape: ModelShape = SHAPE,
    loads: str = "zipf:ratio=1.7",
    num_ranks: int = 2,
    tokens_per_rank: int = 4096,
) -> None:
    """So many generated steps, from the recording's begin to its end; the files are left in `folder`."""
    with TraceWriter(folder, shape, num_ranks) as writer:
        for step in generate_steps(
            Workload.parse(loads), shape, num_ranks=num_ranks, tokens_per_rank=tokens_per_rank, steps=steps, seed=1
        ):
            writer.append(step)
    call("recording_begun", engine="tiny", id=id)
    for part in sorted(folder.glob("*.parquet")):
        call("recording_part", engine="tiny", id=id, name=part.name, offset=0, data=part.read_bytes(), is_whole=True)
    call("recording_end", engine="tiny", id=id, steps=steps, problem="")
