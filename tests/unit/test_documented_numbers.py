"""Numbers in the docs are those of bench/results."""

from __future__ import annotations

from pathlib import Path

from bench.sizing import HEAD, rows

DOCS = Path(__file__).parents[2] / "docs"


def test_the_sizing_table_was_measured() -> None:
    text = (DOCS / "kubernetes.md").read_text()
    assert HEAD in text
    shown = text.partition(HEAD)[2].partition("\n\n")[0].split("\n")[1:]
    assert set(shown) <= set(rows()), "paste it: python -m bench.sizing"
