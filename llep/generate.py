"""Generated loads with a stated imbalance: what a planner is tried on where there is no recording.

Pairs are drawn independently of each other, as in the paper's synthetic benchmarks: with one expert above a share of
1 / top-k the counts are ones that no real router could make, and a harder case than any it could.

Shape letters: L MoE layers, R ranks (sources of tokens), E experts.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from llep.errors import SettingsError
from llep.placement import Placement
from llep.shapes import ModelShape, StepCounts

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

KINDS = {
    "balanced": "every expert alike",
    "paper": "share of the pairs in the first `experts` experts, one rank's where they fit (the paper's benchmark)",
    "hot_set": "share of the pairs in `experts` experts chosen at random, other ones in each layer",
    "hot_rank": "one rank, another in each layer, with `ratio` times the mean load",
    "rotating": "hot_rank that moves to the next rank every `period` steps",
    "burst": "balanced, but hot_rank for the last tenth (at least one step) of every `period` steps",
    "zipf": "popularity by Zipf's law over experts in random order, its exponent tuned to `ratio`",
    "lognormal": "popularity lognormal, its sigma tuned to `ratio`, or to `maxvio` where that is given",
}
# Below this expected count a normal approximation of the multinomial would be seen.
NORMAL_FROM = 32.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Which experts are popular, and where the tokens come from. SettingsError names what is invalid.

    ratio is max / mean of rank loads under plain EP with experts in contiguous blocks, in expectation; maxvio is
    max / mean - 1 of expert loads (vLLM's and MoonEP's measure).
    """

    kind: str = "balanced"
    ratio: float = 2.0  # zipf, lognormal, hot_rank, rotating, burst
    maxvio: float | None = None  # lognormal
    share: float = 0.5  # paper, hot_set
    experts: int = 4  # paper, hot_set
    period: int = 100  # rotating, burst
    sources: str = "even"  # even; ragged: rank r has in proportion to 1 / (r + 1); zero: the last rank has no token
    drift: float = 0.0  # zipf, lognormal: correlation of popularity lost from step to step, 0 never changes

    def __post_init__(self) -> None:
        _check_choice("kind", self.kind, list(KINDS))
        _check_choice("sources", self.sources, ["even", "ragged", "zero"])
        _check_range("ratio", self.ratio, 1.0, math.inf)
        _check_range("maxvio", 0.0 if self.maxvio is None else self.maxvio, 0.0, math.inf)
        _check_range("share", self.share, 0.0, 1.0)
        _check_range("experts", self.experts, 1, math.inf)
        _check_range("period", self.period, 1, math.inf)
        _check_range("drift", self.drift, 0.0, 1.0)

    @classmethod
    def parse(cls, text: str) -> Workload:
        """'zipf:ratio=2,sources=ragged' -> Workload. Raises SettingsError for what is unknown or out of range."""
        kind, _, rest = text.partition(":")
        values: dict[str, Any] = {"kind": kind.strip()}
        for assignment in filter(None, rest.split(",")):
            key, equals, value = (part.strip() for part in assignment.partition("="))
            if not equals:
                raise SettingsError(f"{assignment!r} is not of the form key=value", param=key)
            values[key] = _parse_value(key, value)
        return cls(**values)


def generate_steps(
    workload: Workload,
    shape: ModelShape,
    *,
    num_ranks: int,
    tokens_per_rank: int,
    steps: int,
    seed: int = 0,
    phase: Literal["prefill", "decode"] = "prefill",
) -> Iterator[StepCounts]:
    """One StepCounts after the other, [layers, num_ranks, experts] each; the same seed gives the same counts."""
    _check_range("num_ranks", num_ranks, 1, shape.num_experts)
    _check_range("tokens_per_rank", tokens_per_rank, 0, 2**32)
    _check_range("steps", steps, 1, 2**62)
    return _steps(workload, shape, num_ranks, tokens_per_rank, steps, seed, phase)


def _steps(
    workload: Workload,
    shape: ModelShape,
    num_ranks: int,
    tokens_per_rank: int,
    steps: int,
    seed: int,
    phase: str,
) -> Iterator[StepCounts]:
    rng = np.random.Generator(np.random.SFC64([seed, 0]))  # the fastest at drawing
    popularities = [
        _popularities(workload, shape.num_experts, num_ranks, np.random.default_rng([seed, 1, layer]))
        for layer in range(shape.num_layers)
    ]
    pairs_R = source_pairs(workload.sources, num_ranks, tokens_per_rank) * shape.top_k
    draws = [_Draw(pairs_R, np.zeros(shape.num_experts))] * shape.num_layers
    for step in range(steps):
        counts_LRE = np.empty((shape.num_layers, num_ranks, shape.num_experts), dtype=np.int64)
        for layer, popularity_E in enumerate(map(next, popularities)):
            if popularity_E is not draws[layer].popularity_E:
                draws[layer] = _Draw(pairs_R, popularity_E)
            draws[layer](rng, counts_LRE[layer])
        yield StepCounts(step, phase, counts_LRE)


def zipf_counts(num_ranks: int, num_experts: int, pairs_per_rank: int, ratio: float, seed: int) -> Counts:
    """One batch [num_ranks, num_experts] with Zipf popularity tuned to an expected max / mean of home rank loads."""
    return _one_batch(Workload(kind="zipf", ratio=ratio), num_ranks, num_experts, pairs_per_rank, seed)


def lognormal_counts(num_ranks: int, num_experts: int, pairs_per_rank: int, ratio: float, seed: int) -> Counts:
    """One batch [num_ranks, num_experts] with lognormal popularity tuned as in `zipf_counts`."""
    return _one_batch(Workload(kind="lognormal", ratio=ratio), num_ranks, num_experts, pairs_per_rank, seed)


def _one_batch(workload: Workload, num_ranks: int, num_experts: int, pairs_per_rank: int, seed: int) -> Counts:
    rng = np.random.default_rng(seed)
    popularity_E = next(_popularities(workload, num_experts, num_ranks, rng))
    return draw_counts(np.full(num_ranks, pairs_per_rank, dtype=np.int64), popularity_E, rng)


def source_pairs(sources: str, num_ranks: int, tokens_per_rank: int) -> Counts:
    """Tokens [R] of each rank; the total is num_ranks * tokens_per_rank, whatever the shares."""
    total = num_ranks * tokens_per_rank
    weights_R = np.ones(num_ranks)
    if sources == "ragged":
        weights_R = 1.0 / np.arange(1, num_ranks + 1)
    elif sources == "zero" and num_ranks > 1:
        weights_R[-1] = 0.0
    pairs_R: Counts = np.floor(total * weights_R / weights_R.sum()).astype(np.int64)
    pairs_R[0] += total - pairs_R.sum()
    return pairs_R


def draw_counts(pairs_R: Counts, popularity_E: Floats, rng: np.random.Generator) -> Counts:
    """Multinomial counts [R, E] with pairs_R pairs in each row; by its normal limit where that can't be told apart."""
    counts_RE = np.empty((len(pairs_R), len(popularity_E)), dtype=np.int64)
    _Draw(pairs_R, popularity_E)(rng, counts_RE)
    return counts_RE


class _Draw:
    """Draws counts again and again. What stays the same between draws is kept, and so are the arrays worked in.

    Where all expected counts are large, by the multinomial's normal limit (same means and covariances), which is ten
    times faster.
    """

    def __init__(self, pairs_R: Counts, popularity_E: Floats) -> None:
        self.popularity_E = popularity_E
        self._pairs_R = pairs_R
        self._is_normal = bool(popularity_E.min() * pairs_R.min() >= NORMAL_FROM)
        self._share_E = popularity_E.astype(np.float32)
        self._mean_RE = np.outer(pairs_R, popularity_E).astype(np.float32)
        self._deviation_RE = np.sqrt(self._mean_RE)
        self._noise_RE, self._common_RE = np.empty_like(self._mean_RE), np.empty_like(self._mean_RE)
        self._hottest = int(popularity_E.argmax())

    def __call__(self, rng: np.random.Generator, out_RE: Counts) -> None:
        if not self._is_normal:
            out_RE[...] = rng.multinomial(self._pairs_R, self.popularity_E)
            return
        noise_RE = self._noise_RE
        rng.standard_normal(out=noise_RE, dtype=np.float32)
        noise_RE *= self._deviation_RE
        noise_RE -= np.multiply(noise_RE.sum(axis=1, keepdims=True), self._share_E, out=self._common_RE)
        noise_RE += self._mean_RE
        np.rint(noise_RE, out=noise_RE)
        np.maximum(noise_RE, 0.0, out=noise_RE)
        out_RE[...] = noise_RE
        # Rounding leaves a few pairs over or short: the most popular expert settles it.
        out_RE[:, self._hottest] += self._pairs_R - out_RE.sum(axis=1)


def expected_ratio(popularity_E: Floats, num_ranks: int) -> float:
    """Max / mean of rank loads under plain EP with experts in contiguous blocks."""
    home_rank = Placement.linear(len(popularity_E), num_ranks, 0).home_rank
    return float(np.bincount(home_rank, popularity_E, num_ranks).max() * num_ranks / popularity_E.sum())


def _popularities(workload: Workload, num_experts: int, num_ranks: int, rng: np.random.Generator) -> Iterator[Floats]:
    """The popularity [E] of one layer's experts, step after step, without end."""
    if workload.kind in ("zipf", "lognormal"):
        yield from _tuned(workload, num_experts, num_ranks, rng)
    elif workload.kind in ("paper", "hot_set"):
        popularity_E = _concentrated(workload, num_experts, rng)
        while True:
            yield popularity_E
    yield from _hot_rank(workload, num_experts, num_ranks, rng)


def _tuned(workload: Workload, num_experts: int, num_ranks: int, rng: np.random.Generator) -> Iterator[Floats]:
    """Zipf or lognormal over a normal variable per expert, which drifts as an autoregressive process."""
    family = _zipf if workload.kind == "zipf" else _lognormal
    heat_E = rng.standard_normal(num_experts)
    spread = _tune(workload, lambda spread: family(heat_E, spread), num_ranks)
    popularity_E = family(heat_E, spread)
    while True:
        yield popularity_E
        if workload.drift:
            kept = 1.0 - workload.drift
            heat_E = kept * heat_E + math.sqrt(1.0 - kept * kept) * rng.standard_normal(num_experts)
            popularity_E = family(heat_E, spread)


def _tune(workload: Workload, popularity: Callable[[float], Floats], num_ranks: int) -> float:
    """The spread whose popularity has the stated imbalance, by bisection. SettingsError where none has."""
    name, target, highest = "ratio", workload.ratio, float(num_ranks)
    if workload.maxvio is not None:
        name, target, highest = "maxvio", workload.maxvio, float(len(popularity(0.0)) - 1)
    if not target < highest:
        raise SettingsError(f"{name}={target:g} can't be had: it must be below {highest:g} here", param=name)

    def imbalance(spread: float) -> float:
        popularity_E = popularity(spread)
        if workload.maxvio is None:
            return expected_ratio(popularity_E, num_ranks)
        return float(popularity_E.max() * len(popularity_E)) - 1.0

    low, high = 0.0, 1.0
    while imbalance(high) < target:
        low, high = high, high * 2.0
    for _ in range(60):
        middle = (low + high) / 2.0
        low, high = (middle, high) if imbalance(middle) < target else (low, middle)
    return high


def _zipf(heat_E: Floats, exponent: float) -> Floats:
    places = np.empty(len(heat_E))
    places[np.argsort(-heat_E, kind="stable")] = np.arange(1.0, len(heat_E) + 1.0)
    return _shares(places**-exponent)


def _lognormal(heat_E: Floats, sigma: float) -> Floats:
    return _shares(np.exp(sigma * (heat_E - heat_E.max())))


def _shares(weights_E: Floats) -> Floats:
    shares_E: Floats = weights_E / weights_E.sum()
    return shares_E


def _concentrated(workload: Workload, num_experts: int, rng: np.random.Generator) -> Floats:
    if workload.experts >= num_experts:
        raise SettingsError(
            f"experts={workload.experts} must be below the model's number of experts, {num_experts}", param="experts"
        )
    first = np.arange(workload.experts)
    hot = first if workload.kind == "paper" else rng.permutation(num_experts)[: workload.experts]
    popularity_E = np.full(num_experts, (1.0 - workload.share) / (num_experts - workload.experts))
    popularity_E[hot] = workload.share / workload.experts
    return popularity_E


def _hot_rank(workload: Workload, num_experts: int, num_ranks: int, rng: np.random.Generator) -> Iterator[Floats]:
    """One rank with `ratio` times the mean: always, by turns, or now and then; balanced is the same without it."""
    if workload.kind != "balanced" and workload.ratio > num_ranks:
        raise SettingsError(f"ratio={workload.ratio:g} must be at most the number of ranks, {num_ranks}", param="ratio")
    home_rank = np.array(Placement.linear(num_experts, num_ranks, 0).home_rank)
    first = int(rng.integers(num_ranks))
    quiet_from = workload.period - max(workload.period // 10, 1)
    even_E = (1.0 / np.bincount(home_rank, minlength=num_ranks) / num_ranks)[home_rank]
    step = 0
    while True:
        is_hot = workload.kind in ("hot_rank", "rotating") or (
            workload.kind == "burst" and step % workload.period >= quiet_from
        )
        turn = step // workload.period if workload.kind == "rotating" else 0
        yield _heated(even_E, home_rank == (first + turn) % num_ranks, workload.ratio / num_ranks) if is_hot else even_E
        step += 1


def _heated(popularity_E: Floats, is_hot_E: npt.NDArray[np.bool_], share: float) -> Floats:
    """The same popularity with `share` of it on the hot experts."""
    heated_E = popularity_E.copy()
    heated_E[is_hot_E] *= share / popularity_E[is_hot_E].sum()
    if not is_hot_E.all():
        heated_E[~is_hot_E] *= (1.0 - share) / popularity_E[~is_hot_E].sum()
    return heated_E


def _parse_value(key: str, text: str) -> Any:
    types = {field.name: str(field.type) for field in fields(Workload) if field.name != "kind"}
    if key not in types:
        nearest = difflib.get_close_matches(key, types, n=1, cutoff=0.0)[0]
        raise SettingsError(f"unknown key {key!r} of a workload; did you mean {nearest!r}?", param=key)
    if types[key] == "str":
        return text
    try:
        return int(text) if types[key] == "int" else float(text)
    except ValueError:
        raise SettingsError(f"{key}={text!r} is not {'an integer' if types[key] == 'int' else 'a number'}") from None


def _check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise SettingsError(f"{name}={value!r} is unknown; choose one of {', '.join(allowed)}", param=name)


def _check_range(name: str, value: float, lowest: float, highest: float) -> None:
    if not lowest <= value <= highest:
        rule = f"at least {lowest:g}" if highest >= 2**62 else f"between {lowest:g} and {highest:g}"
        raise SettingsError(f"{name}={value:g} is out of range: it must be {rule}", param=name)
