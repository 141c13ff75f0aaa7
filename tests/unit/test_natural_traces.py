"""The committed traces of a trained model: whole, small, and skewed as their README says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bench.natural.compare import results, table
from llep.loads import home_loads, imbalance_ratio
from llep.placement import Placement
from llep.traces import Trace

TRACES = Path(__file__).parents[2] / "bench" / "natural" / "traces"
WORKLOADS = ("python", "headers", "manuals", "prose", "mixed", "shifting")
FOLDERS = [f"{workload}-{phase}" for workload in WORKLOADS for phase in ("prefill", "decode")]


def test_they_are_small_and_complete() -> None:
    assert sorted(path.name for path in TRACES.iterdir() if path.is_dir()) == sorted(FOLDERS)
    assert sum(path.stat().st_size for path in TRACES.rglob("*.parquet")) < 1_000_000


@pytest.mark.parametrize("name", FOLDERS)
def test_every_step_is_what_a_router_can_do(name: str) -> None:
    """In every layer the same tokens, each to top-k different experts."""
    trace = Trace(TRACES / name)
    assert trace.shape.num_experts == 32 and trace.shape.top_k == 4 and trace.num_ranks == 2
    steps = list(trace.steps())
    assert len(steps) >= 30 and {step.phase for step in steps} == {name.rpartition("-")[2]}
    for step in steps:
        pairs_L = step.counts_LRE.sum(axis=(1, 2))
        assert (pairs_L == pairs_L[0]).all() and pairs_L[0] % trace.shape.top_k == 0
        assert step.counts_LRE.sum(axis=1).max() <= pairs_L[0] // trace.shape.top_k


def test_domains_favour_different_experts() -> None:
    def shares(name: str) -> np.ndarray:
        counts_LE = sum(step.counts_LRE.sum(axis=1) for step in Trace(TRACES / f"{name}-prefill").steps())
        return counts_LE / counts_LE.sum(axis=1, keepdims=True)

    for one, other in (("python", "prose"), ("headers", "manuals"), ("headers", "prose")):
        moved = np.abs(shares(one) - shares(other)).sum(axis=1) / 2
        assert moved.max() > 0.1, "a tenth of the pairs and more go elsewhere"


def test_eight_ranks_are_skewed_in_every_domain() -> None:
    home_rank = Placement.linear(32, 8, 0).home_rank
    for workload in WORKLOADS[:4]:
        ratios = [
            imbalance_ratio(home_loads(tokens_E, home_rank, 8))
            for step in Trace(TRACES / f"{workload}-prefill").steps()
            for tokens_E in step.counts_LRE.sum(axis=1)
        ]
        assert np.mean(ratios) > 1.3 and np.max(ratios) > 1.6


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_the_documented_table_is_that_of_the_results(phase: str) -> None:
    text = (TRACES.parents[2] / "docs" / "natural-skew.md").read_text()
    assert table(phase, *results(phase)) in text, "paste it: python -m bench.natural.compare --table"
