"""docs/natural-skew.svg: how popular each expert is, by layer and workload, in the natural traces.

python -m bench.natural.picture
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from bench.natural.compare import TRACES
from llep.traces import Trace

TARGET = Path(__file__).parents[2] / "docs" / "natural-skew.svg"
CELL, ROW, LABEL, GAP, TOP = 5, 18, 80, 10, 34
HOTTEST = 3.0  # times the fair share; what is above has the same colour


def popularity(folder: Path) -> npt.NDArray[np.float64]:
    """Share / fair share of each expert [L, E] over a recording."""
    counts_LE = sum(step.counts_LRE.sum(axis=1) for step in Trace(folder).steps())
    assert isinstance(counts_LE, np.ndarray)
    shares_LE: npt.NDArray[np.float64] = counts_LE / counts_LE.mean(axis=1, keepdims=True)
    return shares_LE


def draw(by_workload: dict[str, npt.NDArray[np.float64]]) -> str:
    layers, experts = next(iter(by_workload.values())).shape
    width = LABEL + layers * (experts * CELL + GAP)
    height = TOP + len(by_workload) * ROW + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    for layer in range(layers):
        left = LABEL + layer * (experts * CELL + GAP)
        parts.append(f'<text x="{left}" y="22">layer {layer}: experts 0 to {experts - 1}</text>')
        for row, shares_LE in enumerate(by_workload.values()):
            for expert, share in enumerate(shares_LE[layer].tolist()):
                parts.append(
                    f'<rect x="{left + expert * CELL}" y="{TOP + row * ROW}" width="{CELL}" height="{ROW - 2}" '
                    f'fill="{_color(share)}"/>'
                )
    for row, name in enumerate(by_workload):
        parts.append(f'<text x="4" y="{TOP + row * ROW + 12}">{name}</text>')
    legend = f"white: nobody goes there; darkest: {HOTTEST:g} times the fair share or more"
    parts.append(f'<text x="{LABEL}" y="{height - 10}">{legend}</text></svg>')
    return "\n".join(parts) + "\n"


def _color(share: float) -> str:
    """From white to dark red."""
    heat = min(share / HOTTEST, 1.0)
    red, green, blue = (round(255 + (dark - 255) * heat) for dark in (140, 0, 20))
    return f"#{red:02x}{green:02x}{blue:02x}"


if __name__ == "__main__":
    folders = sorted(TRACES.glob("*-prefill"))
    TARGET.write_text(draw({folder.name.removesuffix("-prefill"): popularity(folder) for folder in folders}))
    print(TARGET)
