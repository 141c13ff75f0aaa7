"""Is every acknowledged change there, and none by half, when the control plane is killed while people change settings?

    python -m bench.server_kills [--changes 1000] [--kills 20] [--append]

Each change sets three keys whose values belong together. Four writers change settings over HTTP as fast as they are
answered, while the process that answers is killed with SIGKILL and started anew; the scheduler runs in another process.
In the end the scheduler's revisions must hold every change that was acknowledged, once, whole, in order.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import httpx

from bench.record import add_record
from bench.server import Caller, child

WRITERS = 4
KEYS = ("min_chunk_tokens", "min_batch_tokens", "watchdog_s")


def patch_of(number: int) -> dict[str, int]:
    """The change of that number: three values that tell the same number."""
    return {"min_chunk_tokens": 1 + number, "min_batch_tokens": 10_000 + number, "watchdog_s": 5 + number % 3000}


class Run:
    """Writers, a killer, and what was acknowledged: revision -> number of the change."""

    def __init__(self, changes: int, kills: int, path: str, state: str, seed: int) -> None:
        self.acknowledged: dict[int, int] = {}
        self.unanswered: set[int] = set()
        self.statuses: Counter[int] = Counter()
        self.kills = 0
        self._changes, self._most_kills, self._path, self._state = changes, kills, path, state
        self._numbers: Iterator[int] = itertools.count()
        self._random = random.Random(seed)
        self._port = 0

    async def go(self) -> None:
        writers = [asyncio.create_task(self._write()) for _ in range(WRITERS)]
        serving = asyncio.create_task(self._serve_and_kill())
        await asyncio.gather(*writers)
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)

    async def _serve_and_kill(self) -> None:
        while True:
            with ExitStack() as stack:
                opening = asyncio.to_thread(stack.enter_context, child("--serve", self._path))
                process, port = await opening
                self._port = int(port)
                due = (self.kills + 1) * self._changes // (self._most_kills + 1)
                while len(self.acknowledged) < due or self.kills >= self._most_kills:
                    await asyncio.sleep(0.005)
                await asyncio.sleep(self._random.random() * 0.02)
                process.kill()
                self._port = 0
                self.kills += 1

    async def _write(self) -> None:
        async with httpx.AsyncClient(trust_env=False, timeout=30) as http:
            while len(self.acknowledged) < self._changes:
                if not self._port:
                    await asyncio.sleep(0.005)
                    continue
                number = next(self._numbers)
                url = f"http://127.0.0.1:{self._port}/v1/settings"
                try:
                    answer = await http.patch(url, json=patch_of(number))
                except httpx.HTTPError:
                    self.unanswered.add(number)
                    continue
                self.statuses[answer.status_code] += 1
                if answer.status_code == 503:  # started anew, and not at its scheduler yet
                    self.unanswered.add(number)
                    continue
                assert answer.status_code == 200, answer.text
                self.acknowledged[answer.json()["revision"]] = number


async def stored(caller: Caller) -> list[dict[str, Any]]:
    """All revisions that the scheduler has, oldest first."""
    found: list[dict[str, Any]] = []
    before = None
    while page := await caller.call("revisions", limit=1000, before=before):
        found += page
        before = page[-1]["number"]
    return found[::-1]


def check(run: Run, revisions: list[dict[str, Any]]) -> None:
    """AssertionError for a change that is lost, doubled or there by half."""
    numbers = [revision["patch"]["min_chunk_tokens"] - 1 for revision in revisions]
    for revision, number in zip(revisions, numbers, strict=True):
        assert revision["patch"] == patch_of(number), f"half a change: {revision}"
        assert set(revision["diff"]) <= set(KEYS)
    assert [revision["number"] for revision in revisions] == list(range(1, len(revisions) + 1)), "not in order"
    assert len(set(numbers)) == len(numbers), "a change was made twice"
    by_revision = dict(zip((revision["number"] for revision in revisions), numbers, strict=True))
    for revision, number in run.acknowledged.items():
        assert by_revision.get(revision) == number, f"acknowledged change {number} of revision {revision} is not there"
    assert set(numbers) <= set(run.acknowledged.values()) | run.unanswered, "a change that nobody asked for"


async def measure(changes: int, kills: int, seed: int, folder: str) -> dict[str, Any]:
    path, state = f"{folder}/scheduler", f"{folder}/state"
    started_s = time.monotonic()
    with child("--scheduler", path, "--state", state):
        run = Run(changes, kills, path, state, seed)
        await run.go()
        caller = Caller(path)
        revisions = await stored(caller)
        view = {item["key"]: item["value"] for item in (await caller.call("settings"))["settings"]}
        await caller.close()
    check(run, revisions)
    assert {key: view[key] for key in KEYS} == revisions[-1]["patch"]
    return {
        **{"changes": len(run.acknowledged), "kills": run.kills, "unanswered": len(run.unanswered)},
        **{"revisions": len(revisions), "seconds": round(time.monotonic() - started_s)},
    }


def run_kills(changes: int, kills: int, seed: int = 0) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        return asyncio.run(measure(changes, kills, seed, folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--changes", type=int, default=1000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--append", action="store_true", help="add the line to bench/results/server_kills.jsonl")
    asked = parser.parse_args()
    add_record("server_kills", run_kills(asked.changes, asked.kills, asked.seed), append=asked.append)


if __name__ == "__main__":
    main()
