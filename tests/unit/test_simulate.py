"""The simulator: plans judged as plans and cost model themselves say, peers that learn, memory that does not grow."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import numpy as np
import pytest

from llep.cost import PRESETS, predict_s
from llep.errors import SettingsError
from llep.generate import Workload, generate_steps, zipf_counts
from llep.loads import home_loads, imbalance_ratio
from llep.placement import Placement
from llep.planning import PlanOptions, plan_step
from llep.planning.peers import plan_exact
from llep.shapes import ModelShape, StepCounts, split_sources
from llep.simulate import Setup, simulate, summary
from llep.simulate.chart import page
from llep.simulate.judge import Judge
from llep.simulate.tally import Histogram, Series, Tally

SHAPE = ModelShape(
    name="small",
    layer_numbers=(1, 4),
    num_experts=32,
    top_k=4,
    hidden_size=512,
    intermediate_size=256,
    bytes_per_expert=786_432,
)
OPEN = PlanOptions(imbalance_threshold=1.0, min_chunk_tokens=1)
RANKS = 8


def setup(**changes: object) -> Setup:
    return Setup(**{"shape": SHAPE, "num_ranks": RANKS, "slots_per_rank": 2, "options": OPEN, **changes})


def steps_of(text: str, count: int, tokens_per_rank: int = 2048, ranks: int = RANKS) -> list[StepCounts]:
    return list(
        generate_steps(Workload.parse(text), SHAPE, num_ranks=ranks, tokens_per_rank=tokens_per_rank, steps=count)
    )


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("ranks_per_node", [None, 4])
@pytest.mark.parametrize("model", ["h100", "b200"])
def test_a_plan_is_judged_as_the_plan_and_the_cost_model_say(seed: int, ranks_per_node: int | None, model: str) -> None:
    counts_RE = zipf_counts(RANKS, 32, 2048, 2.5, seed)
    tokens_E = counts_RE.sum(axis=0)
    costs = PRESETS[model]
    options = replace(OPEN, ranks_per_node=ranks_per_node, bytes_per_expert=SHAPE.bytes_per_expert)
    placement = Placement.linear(32, RANKS, 3)
    replicated = replace(placement, replicas=((0, 3), (0, 5), (9, 7)))
    priced = replace(options, cost_model=costs)
    plans = [
        plan_step("quota", counts_RE, placement, priced),
        plan_step("quota", counts_RE, replicated, priced),
        plan_step("least_loaded", counts_RE, placement, priced),
        plan_step("home", counts_RE, placement, options),
        plan_step("least_loaded", counts_RE, placement, options),
        plan_step("quota", counts_RE, placement, options),
        plan_step("quota", counts_RE, replicated, options),
        plan_exact(tokens_E, placement),
    ]
    timed = setup(options=replace(options, cost_model=costs))
    judge = Judge(timed)
    for plan in plans:
        plan.ranks_per_node = ranks_per_node
        tally = Tally("one", timed)
        resident_R = np.arange(RANKS)
        ratio = judge.judge(tally, 1, plan, resident_R, is_planned=True)
        assert ratio == imbalance_ratio(plan.rank_loads)
        assert tally.lends == len(plan.lends)
        assert tally.most_lends_R.tolist() == [
            sum(lend.dst_rank == rank for lend in plan.lends) for rank in range(RANKS)
        ]
        assert tally.predicted_s == pytest.approx(predict_s(plan, costs, SHAPE.bytes_per_expert), rel=1e-9)
        spilled = sum(s.stop - s.start for s in plan.segments if s.rank != placement.home_rank[s.expert])
        assert tally.spilled_tokens == spilled
        expected = (tally.most_lends_R + resident_R) * 786_432 + np.array(plan.rank_loads) * 2 * (512 + 256)
        assert tally.peak_bytes_R.tolist() == expected.tolist()


def test_home_is_plain_ep_and_balancing_helps() -> None:
    steps = steps_of("zipf:ratio=2.5", 5)
    found = summary(simulate(steps, setup(), ["home", "least_loaded", "quota", "exact", "home"]))
    assert [planner["planner"] for planner in found["planners"]] == ["home", "least_loaded", "quota", "exact"]
    home, least, quota, exact = found["planners"]
    homes = Placement.linear(32, RANKS, 0).home_rank
    ratios = [imbalance_ratio(home_loads(c.sum(axis=0), homes, RANKS)) for step in steps for c in step.counts_LRE]
    assert home["imbalance_ratio"]["mean"] == pytest.approx(np.mean(ratios), abs=1e-6)
    assert home["imbalance_ratio"]["max"] == pytest.approx(max(ratios), abs=1e-6)
    assert home["decisions"] == {"off": 10} and home["lends"] == 0
    assert exact["imbalance_ratio"]["max"] < 1.001
    for planner in (least, quota):
        assert planner["imbalance_ratio"]["max"] < 1.25
        assert planner["lend_bytes"] == planner["lends"] * SHAPE.bytes_per_expert > 0
        assert max(planner["most_lends_by_rank"]) <= 2
    assert found["tokens"] == 5 * 2 * RANKS * 2048 * 4
    assert (found["steps"], found["layer_steps"]) == (5, 10)
    assert list(home["imbalance_ratio_by_layer"]) == ["1", "4"]
    assert home["predicted_s_per_step"] is None and home["ideal_time_ratio"] is None
    assert home["ideal_load_ratio"] == pytest.approx(1 / np.mean(ratios), rel=0.01)


def test_time_is_predicted_with_a_cost_model_and_never_longer_than_plain_ep() -> None:
    for text in ("zipf:ratio=2.5", "balanced", "paper:share=0.8,experts=1"):
        options = replace(OPEN, cost_model=PRESETS["h200"])
        found = summary(simulate(steps_of(text, 3), setup(options=options), ["home", "least_loaded", "quota"]))
        home, *others = found["planners"]
        for planner in others:
            assert planner["predicted_s_per_step"] <= home["predicted_s_per_step"] * (1 + 1e-9)
        assert 0 < home["ideal_time_ratio"] <= 1.01
        assert found["ideal_s_per_step"] == pytest.approx(home["ideal_time_ratio"] * home["predicted_s_per_step"])


def test_peers_place_after_a_window_and_count_what_they_move() -> None:
    steps = steps_of("zipf:ratio=2.5", 30)
    names = ["home", "eplb", "eplb+1", "lplb+1", "replicas+1", "quota+1"]
    found = summary(simulate(steps, setup(window_steps=10), names))
    home, eplb0, eplb, lplb, replicas, quota = found["planners"]
    before = home["imbalance_ratio_by_steps"]["mean"][0]
    for planner in (eplb, lplb, replicas):
        series = planner["imbalance_ratio_by_steps"]["mean"]
        assert series[:10] == pytest.approx(home["imbalance_ratio_by_steps"]["mean"][:10])
        assert max(series[10:]) < 1 + (before - 1) / 4
        assert planner["moved_copies"] > 0 and planner["lends"] == 0
        assert planner["moved_bytes"] == planner["moved_copies"] * SHAPE.bytes_per_expert
    assert 1.0 < eplb0["imbalance_ratio"]["mean"] < home["imbalance_ratio"]["mean"]
    assert (
        np.mean(lplb["imbalance_ratio_by_steps"]["mean"]) <= np.mean(eplb["imbalance_ratio_by_steps"]["mean"]) + 0.001
    )
    assert replicas["moved_copies"] < eplb["moved_copies"] / 4
    assert quota["imbalance_ratio"]["max"] < 1.3
    resident = [max(p["peak_memory_bytes_by_rank"]) for p in (eplb0, eplb)]
    assert resident[1] > resident[0] - 2048 * 4 * 8 * 2 * 768


def test_in_decode_copies_act_by_themselves_and_nothing_is_planned_per_batch() -> None:
    """Where planning takes as long as the layer, copies must not be charged for it."""
    options = replace(OPEN, cost_model=PRESETS["h200"])
    steps = [step._replace(phase="decode") for step in steps_of("zipf:ratio=2.5", 30)]
    names = ["home", "eplb+1", "replicas+1", "quota+1"]
    home, eplb, *copies = summary(simulate(steps, setup(options=options, window_steps=10), names))["planners"]
    for planner in copies:
        series = planner["imbalance_ratio_by_steps"]["mean"]
        assert series[:10] == pytest.approx(home["imbalance_ratio_by_steps"]["mean"][:10])
        assert max(series[10:]) < min(home["imbalance_ratio_by_steps"]["mean"])
        assert planner["lends"] == 0 and planner["decisions"] == {"replica": 60}
        assert planner["predicted_s_per_step"] < home["predicted_s_per_step"]
        assert 0 < planner["moved_copies"] < eplb["moved_copies"] / 4


def test_the_optimum_is_below_everybody_under_the_same_limits() -> None:
    shape = replace(SHAPE, num_experts=8, layer_numbers=(0,))
    steps = generate_steps(Workload(kind="zipf", ratio=1.8), shape, num_ranks=4, tokens_per_rank=512, steps=5)
    small = Setup(shape=shape, num_ranks=4, slots_per_rank=1, options=OPEN)
    found = summary(simulate(steps, small, ["optimum", "quota", "least_loaded"]))
    best, *others = (planner["imbalance_ratio"]["mean"] for planner in found["planners"])
    assert all(best <= other for other in others)


@pytest.mark.parametrize("ranks", [1, 2, 4, 5, 16, 32])
def test_any_number_of_ranks(ranks: int) -> None:
    steps = steps_of("zipf:ratio=2.5,sources=zero", 2)
    found = summary(simulate(steps, setup(num_ranks=ranks), ["home", "quota"]))
    assert found["ranks"] == ranks
    assert found["tokens"] == sum(int(step.counts_LRE.sum()) for step in steps)
    assert found["planners"][1]["imbalance_ratio"]["mean"] <= found["planners"][0]["imbalance_ratio"]["mean"]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8, 12, 20])
def test_sources_are_split_evenly_and_keep_the_order_of_tokens(ranks: int) -> None:
    counts_RE = np.random.default_rng(0).integers(0, 50, size=(4, 10))
    found = split_sources(counts_RE, ranks)
    assert found.shape == (ranks, 10)
    assert (found.sum(axis=0) == counts_RE.sum(axis=0)).all()
    assert (found >= 0).all()
    if ranks % 4 == 0:
        parts = found.reshape(4, ranks // 4, 10)
        assert (parts.sum(axis=1) == counts_RE).all()
        assert (parts.max(axis=1) - parts.min(axis=1)).max() <= 1
        assert np.ptp(parts.sum(axis=2), axis=1).max() <= 5
    elif 4 % ranks == 0:
        assert (found == counts_RE.reshape(ranks, -1, 10).sum(axis=1)).all()
    else:
        assert np.ptp(found, axis=0).max() <= 1


def test_layers_and_steps_without_tokens() -> None:
    steps = steps_of("zipf:ratio=2", 3)
    steps[0].counts_LRE[1] = 0
    steps[2].counts_LRE[:] = 0
    found = summary(
        simulate(steps, setup(options=replace(OPEN, cost_model=PRESETS["h100"])), ["home", "quota", "eplb"])
    )
    assert (found["steps"], found["layer_steps"]) == (3, 3)
    nothing = summary(simulate([], setup(), ["quota"]))
    assert nothing["planners"][0]["imbalance_ratio"] == {"mean": None, "p50": None, "p95": None, "max": None}
    assert nothing["planners"][0]["lends_per_layer_step"] is None
    assert "<svg" in page("nothing", nothing)


def test_phases_reach_the_planners() -> None:
    steps = [step._replace(phase="decode") for step in steps_of("zipf:ratio=2", 2)]
    quota = summary(simulate(steps, setup(), ["quota"]))["planners"][0]
    assert quota["lends"] == 0 and quota["decisions"] == {"no_gain": 4}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("best", "planner='best' is unknown; choose from quota, least_loaded, home, eplb"),
        ("home+1", r"eplb\+K, lplb\+K, replicas\+K, quota\+K have K copies per rank"),
        ("eplb+x", r"what follows \+ must be a number of copies per rank"),
        ("eplb+", r"what follows \+ must be a number"),
    ],
)
def test_unknown_planners(name: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        simulate(steps_of("balanced", 1), setup(), [name])


def test_what_a_setup_rules_out() -> None:
    with pytest.raises(SettingsError, match="must be a multiple of the number of ranks, got 5"):
        simulate([], setup(num_ranks=5), ["eplb+1"])
    with pytest.raises(SettingsError, match="ranks x experts must be at most 512, got 1024"):
        simulate([], setup(num_ranks=32), ["optimum"])
    with pytest.raises(SettingsError, match="ranks must be between 1 and the number of experts, 32, got 33"):
        setup(num_ranks=33)
    with pytest.raises(SettingsError, match="ranks must be between 1 and the number of experts, 32, got 0"):
        setup(num_ranks=0)
    with pytest.raises(SettingsError, match="slots_per_rank must be between 0 and the number of experts, 32, got 99"):
        setup(slots_per_rank=99)
    with pytest.raises(SettingsError, match="window_steps must be at least 1, got 0"):
        setup(window_steps=0)
    with pytest.raises(ValueError, match="step 0 has 1 layers and 32 experts; small has 2 and 32"):
        step = steps_of("balanced", 1)[0]
        simulate([step._replace(counts_LRE=step.counts_LRE[:1])], setup(), ["home"])


def test_a_histogram_knows_quantiles_within_a_percent() -> None:
    values = np.random.default_rng(0).lognormal(sigma=2.0, size=5000)
    histogram = Histogram()
    for value in values.tolist():
        histogram.add(value)
    for share in (0.01, 0.5, 0.95, 0.99):
        assert histogram.quantile(share) == pytest.approx(np.quantile(values, share, method="inverted_cdf"), rel=0.006)
    assert histogram.quantile(1.0) == values.max()
    assert histogram.mean == pytest.approx(values.mean())
    assert math.isnan(Histogram().quantile(0.5))


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 100, 1000])
def test_a_series_keeps_few_points_and_every_value(count: int) -> None:
    series = Series(points=8)
    for value in range(count):
        series.add(float(value))
    means = series.means
    assert len(means) == min(math.ceil(count / series.width), 8)
    if count:
        assert means[0] == pytest.approx((min(count, series.width) - 1) / 2)
        weights = [series.width] * (len(means) - 1) + [count - series.width * (len(means) - 1)]
        assert np.average(means, weights=weights) == pytest.approx((count - 1) / 2)


def test_the_page_is_whole_and_fetches_nothing() -> None:
    options = replace(OPEN, cost_model=PRESETS["h100"])
    found = summary(simulate(steps_of("zipf:ratio=2", 4), setup(options=options), ["home", "quota", "eplb+1"]))
    html = page("<b>&source", found)
    assert "&lt;b&gt;&amp;source" in html and "<b>" not in html
    for svg in html.split("<svg")[1:]:
        ElementTree.fromstring("<svg" + svg.split("</svg>")[0] + "</svg>")
    assert html.count("<svg") == 4
    assert "http" not in html and "src=" not in html and "@import" not in html
    assert "nan" not in html
