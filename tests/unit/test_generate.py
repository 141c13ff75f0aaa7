"""Generated loads have the imbalance they state, the pairs they were asked for, and one set of counts for one seed."""

from __future__ import annotations

import numpy as np
import pytest

from llep.errors import SettingsError
from llep.generate import KINDS, Workload, draw_counts, generate_steps, lognormal_counts, source_pairs, zipf_counts
from llep.loads import home_loads, imbalance_ratio
from llep.placement import Placement
from llep.shapes import SHAPES, ModelShape, shape_of

SMALL = ModelShape(name="small", layer_numbers=(1, 2, 5), num_experts=32, top_k=4)


def ratio_of(counts_RE: np.ndarray, num_ranks: int) -> float:
    placement = Placement.linear(counts_RE.shape[1], num_ranks, 0)
    return imbalance_ratio(home_loads(counts_RE.sum(axis=0), placement.home_rank, num_ranks))


@pytest.mark.parametrize("ratio", [1.51, 2.01, 3.03])
@pytest.mark.parametrize("counts_of", [zipf_counts, lognormal_counts])
@pytest.mark.parametrize("seed", range(5))
def test_tuned_counts_have_the_stated_ratio(counts_of, ratio: float, seed: int) -> None:
    counts_RE = counts_of(64, 256, 8192 * 8, ratio, seed)
    assert ratio_of(counts_RE, 64) == pytest.approx(ratio, rel=0.01)
    assert (counts_RE.sum(axis=1) == 8192 * 8).all()
    assert (counts_RE >= 0).all()


@pytest.mark.parametrize("maxvio", [0.2, 1.0, 4.0])
def test_lognormal_by_maxvio(maxvio: float) -> None:
    shape = ModelShape(name="one", layer_numbers=(0,), num_experts=256, top_k=8)
    workload = Workload(kind="lognormal", maxvio=maxvio)
    step = next(generate_steps(workload, shape, num_ranks=8, tokens_per_rank=65536, steps=1))
    loads_E = step.counts_LRE[0].sum(axis=0)
    assert loads_E.max() / loads_E.mean() - 1 == pytest.approx(maxvio, abs=0.03, rel=0.01)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("experts", [16, 4, 1])
@pytest.mark.parametrize("kind", ["paper", "hot_set"])
def test_concentrated_loads_have_the_stated_share(kind: str, share: float, experts: int) -> None:
    workload = Workload(kind=kind, share=share, experts=experts)
    shape = ModelShape(name="wide", layer_numbers=(0, 1), num_experts=128, top_k=4)
    step = next(generate_steps(workload, shape, num_ranks=4, tokens_per_rank=4096, steps=1))
    for counts_RE in step.counts_LRE:
        hottest = np.sort(counts_RE.sum(axis=0))[::-1][:experts]
        assert hottest.sum() / counts_RE.sum() == pytest.approx(share, abs=0.02)
    if kind == "paper":
        assert step.counts_LRE[:, :, :experts].sum() / step.counts_LRE.sum() == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sources", ["even", "ragged", "zero"])
def test_every_kind_draws_the_pairs_of_its_sources_and_repeats_itself(kind: str, sources: str) -> None:
    workload = Workload(kind=kind, sources=sources, drift=0.1)
    runs = [list(generate_steps(workload, SMALL, num_ranks=4, tokens_per_rank=100, steps=3, seed=7)) for _ in range(2)]
    for first, second in zip(*runs, strict=True):
        assert first.counts_LRE.shape == (3, 4, 32)
        assert (first.counts_LRE == second.counts_LRE).all()
        assert (first.counts_LRE.sum(axis=2) == source_pairs(sources, 4, 100) * 4).all()
    if sources == "zero":
        assert runs[0][0].counts_LRE[:, 3].sum() == 0
    other = list(generate_steps(workload, SMALL, num_ranks=4, tokens_per_rank=100, steps=3, seed=8))
    assert any((a.counts_LRE != b.counts_LRE).any() for a, b in zip(runs[0], other, strict=True))


def hot_ranks(workload: Workload, steps: int) -> list[tuple[int, float]]:
    """(hottest rank, imbalance ratio) of layer 0, step by step."""
    found = []
    for step in generate_steps(workload, SMALL, num_ranks=4, tokens_per_rank=8192, steps=steps):
        loads = home_loads(step.counts_LRE[0].sum(axis=0), Placement.linear(32, 4, 0).home_rank, 4)
        found.append((int(np.argmax(loads)), imbalance_ratio(loads)))
    return found


def test_hot_rank_stays_and_rotating_moves_on() -> None:
    stays = hot_ranks(Workload(kind="hot_rank", ratio=2.5), 6)
    assert len({rank for rank, _ in stays}) == 1
    assert all(ratio == pytest.approx(2.5, rel=0.02) for _, ratio in stays)
    moves = [rank for rank, _ in hot_ranks(Workload(kind="rotating", ratio=2.5, period=2), 8)]
    assert moves == [rank for step in range(4) for rank in [(moves[0] + step) % 4] * 2]


def test_a_burst_is_short() -> None:
    ratios = [ratio for _, ratio in hot_ranks(Workload(kind="burst", ratio=3.0, period=10), 20)]
    assert [step for step, ratio in enumerate(ratios) if ratio > 2.5] == [9, 19]
    assert sum(ratio < 1.1 for ratio in ratios) == 18


def test_drift_changes_who_is_hot_and_no_drift_does_not() -> None:
    def hottest(drift: float) -> set[int]:
        steps = generate_steps(
            Workload(kind="zipf", ratio=2.0, drift=drift), SMALL, num_ranks=4, tokens_per_rank=8192, steps=40
        )
        return {int(step.counts_LRE[0].sum(axis=0).argmax()) for step in steps}

    assert len(hottest(0.0)) == 1
    assert len(hottest(0.3)) > 5


def test_the_normal_limit_has_the_multinomials_means_and_spread() -> None:
    popularity_E = np.array([0.4, 0.3, 0.2, 0.1])
    counts = draw_counts(np.full(20_000, 1000, dtype=np.int64), popularity_E, np.random.default_rng(1))
    assert (counts.sum(axis=1) == 1000).all()
    assert counts.mean(axis=0) == pytest.approx(1000 * popularity_E, rel=0.005)
    covariance = 1000 * (np.diag(popularity_E) - np.outer(popularity_E, popularity_E))
    assert np.cov(counts.T) == pytest.approx(covariance, abs=8)


def test_presets() -> None:
    assert {name: (s.num_layers, s.num_experts, s.top_k) for name, s in SHAPES.items()} == {
        "gpt-oss-20b": (24, 32, 4),
        "gpt-oss-120b": (36, 128, 4),
        "deepseek-v3": (58, 256, 8),
        "kimi-k2": (60, 384, 8),
        "qwen3-235b": (94, 128, 8),
    }
    with pytest.raises(SettingsError, match="model='gpt-4' is unknown; choose one of gpt-oss-20b"):
        shape_of("gpt-4")


def test_parse() -> None:
    parsed = Workload.parse("zipf:ratio=3, sources=ragged,drift=0.01")
    assert parsed == Workload(kind="zipf", ratio=3.0, sources="ragged", drift=0.01)
    assert Workload.parse("balanced") == Workload()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("zipff", "kind='zipff' is unknown; choose one of balanced"),
        ("zipf:ration=2", "unknown key 'ration' of a workload; did you mean 'ratio'"),
        ("zipf:ratio", "'ratio' is not of the form key=value"),
        ("zipf:ratio=high", "ratio='high' is not a number"),
        ("paper:experts=1.5", "experts='1.5' is not an integer"),
        ("zipf:ratio=0.5", "ratio=0.5 is out of range: it must be at least 1"),
        ("zipf:ratio=nan", "ratio=nan is out of range"),
        ("paper:share=1.5", "share=1.5 is out of range: it must be between 0 and 1"),
        ("hot_rank:sources=none", "sources='none' is unknown"),
    ],
)
def test_bad_workloads(text: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        Workload.parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("zipf:ratio=4", "ratio=4 can't be had: it must be below 4"),
        ("lognormal:maxvio=31", "maxvio=31 can't be had: it must be below 31"),
        ("hot_rank:ratio=5", "ratio=5 must be at most the number of ranks, 4"),
        ("paper:experts=32", "experts=32 must be below the model's number of experts, 32"),
    ],
)
def test_imbalances_that_cannot_be_had(text: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        next(generate_steps(Workload.parse(text), SMALL, num_ranks=4, tokens_per_rank=10, steps=1))
