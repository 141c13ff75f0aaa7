"""How large one scheduler's cluster can be: the table of docs/kubernetes.md, from what bench.scheduler.load measured.

python -m bench.sizing
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from bench.record import RESULTS

HEAD = (
    "| engines x ranks | layers x experts | reports/s | a core's share | memory of the scheduler | lost | call p99 |\n"
    "|---|---|---|---|---|---|---|"
)


def rows() -> Iterator[str]:
    """A row of Markdown for each line that bench.scheduler.load left, oldest first."""
    path = RESULTS / "scheduler.jsonl"
    for line in path.read_text().splitlines() if path.exists() else ():
        found = json.loads(line)
        if found.get("bench") == "load":
            yield _row(found)


def _row(found: dict[str, Any]) -> str:
    cells = (
        f"{found['engines']} x {found['ranks']}",
        f"{found['layers']} x {found['experts']}",
        f"{found['reports_per_s']:.0f}",
        f"{found['core_ratio']:.0%}",
        f"{found['resident_mb']} MB",
        f"{found['reports_lost'] + found['reports_refused']}",
        f"{found['call_p99_ms']:.0f} ms",
    )
    return "| " + " | ".join(cells) + " |"


def table() -> str:
    """The newest row of each case."""
    newest = {tuple(row.split("|")[1:3]): row for row in rows()}
    return "\n".join([HEAD, *newest.values()])


if __name__ == "__main__":
    print(table())
