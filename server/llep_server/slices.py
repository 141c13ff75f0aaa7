"""Long work on the event loop, cut into slices: others wait for one at most, and no thread competes with the loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
from typing import TypeVar

T = TypeVar("T")

SLICE_S = 0.001  # longer: fewer turns of the loop, and others wait so much longer at each of theirs


async def sliced(items: Iterable[T]) -> AsyncIterator[T]:
    """The items; whenever to make and to use them has taken SLICE_S, everybody else's turn comes first."""
    until_s = time.perf_counter() + SLICE_S
    for item in items:
        yield item
        if time.perf_counter() >= until_s:
            await asyncio.sleep(0)
            until_s = time.perf_counter() + SLICE_S
