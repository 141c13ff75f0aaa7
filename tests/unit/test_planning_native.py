"""The compiled planners make the plans that the readable ones define, bit for bit; nothing is compiled in a request."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.planning.cases import random_case
from bench.planning.fuzz import fuzz
from bench.planning.optimum import excess_over_optimum, small_case
from llep.cost import PRESETS
from llep.generate import zipf_counts
from llep.placement import Placement
from llep.planning import PLANNERS, PlanOptions, native, plan_step, quota, warm_up
from llep.planning.least_loaded import plan_least_loaded


@pytest.fixture(scope="module", autouse=True)
def compiled() -> Iterator[None]:
    """The compiled planners behind plan_step, for this module only. Compiling takes half a minute, once."""
    readable = dict(PLANNERS)
    assert warm_up()
    yield
    PLANNERS.update(readable)


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=1500, deadline=None)
def test_equals_the_definition(seed: int) -> None:
    case = random_case(seed)
    assert native.plan_quota(*case) == quota.plan_quota(*case)
    tokens_E = case.counts_RE.sum(axis=0).tolist()
    assert native.plan_least_loaded(*case) == plan_least_loaded(tokens_E, case.placement, case.options)


@pytest.mark.parametrize("ratio", [1.51, 3.03])
def test_equals_the_definition_at_64_ranks(ratio: float) -> None:
    counts_RE, placement = zipf_counts(64, 256, 8192 * 8, ratio, 0), Placement.linear(256, 64, 2)
    for per_node in (None, 8):
        options = PlanOptions(ranks_per_node=per_node)
        assert native.plan_quota(counts_RE, placement, options) == quota.plan_quota(counts_RE, placement, options)


def test_no_rule_is_broken_in_a_share_of_the_fuzzing() -> None:
    decisions = fuzz("quota", range(10**9, 10**9 + 3000))
    assert min(decisions[each] for each in ("lend", "replica", "balanced", "no_gain", "no_slot", "memory")) > 0


@pytest.mark.parametrize("seed", range(20))
def test_within_2_percent_of_the_optimum(seed: int) -> None:
    assert excess_over_optimum(small_case(seed), time_limit_s=0.3) <= 0.02


@pytest.mark.parametrize(("ratio", "most_lends"), [(1.51, 36), (2.01, 42), (3.03, 44)])
def test_lends_of_a_large_batch(ratio: float, most_lends: int) -> None:
    """On average over 20 seeds at 64 ranks, 256 experts, 2 slots; every maximum load within 1% of the mean."""
    placement, lends = Placement.linear(256, 64, 2), []
    for seed in range(20):
        plan = plan_step("quota", zipf_counts(64, 256, 8192 * 8, ratio, seed), placement, PlanOptions())
        assert max(plan.rank_loads) <= 1.01 * sum(plan.rank_loads) / 64
        lends.append(len(plan.lends))
    assert np.mean(lends) <= most_lends


@pytest.mark.parametrize(
    "counts",
    [
        np.array([[8, 0], [8, 0]], dtype=np.int32),
        np.asfortranarray([[8, 0], [8, 0]]),
        np.frombuffer(np.array([8, 0, 8, 0]).tobytes(), dtype=np.int64).reshape(2, 2),
    ],
    ids=["int32", "fortran", "read-only"],
)
def test_any_integer_counts_run_without_compiling_again(counts: np.ndarray) -> None:  # type: ignore[type-arg]
    options = PlanOptions(imbalance_threshold=1, capacity_factor=1, min_chunk_tokens=1)
    assert plan_step("quota", counts, Placement.linear(2, 2, 1), options).rank_loads == [8, 8]


def test_memory_does_not_grow_with_plans() -> None:
    counts_RE, placement = zipf_counts(64, 256, 8192 * 8, 2.0, 0), Placement.linear(256, 64, 2)
    options = PlanOptions(cost_model=PRESETS["h200"], ranks_per_node=8)

    def resident_pages() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1])

    for _ in range(500):
        plan_step("quota", counts_RE, placement, options)
    before = resident_pages()
    for _ in range(5000):
        plan_step("quota", counts_RE, placement, options)
    assert resident_pages() - before < 256  # 1 MiB; one plan's segments are 10 KiB


def test_without_numba_the_definition_plans() -> None:
    """As in an environment without the extra `planning`: warm_up says so, and plan_step goes on."""
    program = (
        "import sys; sys.modules['numba'] = None\n"
        "import numpy as np\n"
        "from llep.placement import Placement\n"
        "from llep.planning import PlanOptions, plan_step, warm_up\n"
        "assert not warm_up()\n"
        "options = PlanOptions(min_chunk_tokens=1)\n"
        "print(plan_step('quota', np.array([[8, 0], [8, 0]]), Placement.linear(2, 2, 1), options).rank_loads)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[8, 8]\n", done.stderr
