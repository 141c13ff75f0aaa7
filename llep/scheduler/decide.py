"""What the scheduler decides: pure functions from evidence and settings to decisions that carry their reasons.

Nothing in here asks a clock, a store or an engine. Every decision, also to do nothing, names what it was made from.
How each one is made, with its numbers, is in docs/scheduler.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from llep.config import Mode, Settings
from llep.messages import STEP_PHASES
from llep.scheduler.evidence import Evidence, Gain

FEWEST_LAYER_STEPS = 200.0  # of a verdict without a control group
SHORTEST_WINDOW_S = 30.0
WORTH_RATIO = 0.02  # share of the time inside layers that a change must save

BRAKE_S = 600.0
LONGEST_BRAKE_S = 86400.0
FORGIVE_AFTER_S = 3600.0  # without a brake, and with a gain that is surely there
RAISED_FACTOR = 1.5  # of how far the threshold is above 1

STEP_FACTOR = 2.0  # most that one proposal changes a key by
SMALLEST_CHANGE = 0.15  # a proposal nearer than that is none
TOKENS_RANGE = 8  # auto_tune keeps token limits within the start's value / and x this
MARGIN = 1.5  # a lend must be worth so much more than it costs


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What was decided about one engine. `patch`: the change of settings, for `for_s` seconds or for good."""

    kind: str  # placement, thresholds, brake, advice
    outcome: str
    reason: str
    inputs: dict[str, Any]
    expected_gain_ratio: float | None = None
    patch: dict[str, Any] = field(default_factory=dict)
    for_s: float | None = None


# Advice.


def advise(evidence: Evidence) -> Decision:
    """Whether lending is worth it for this engine: worth_it, not_worth_it, not_enough_evidence."""
    numbers = numbers_of(evidence)
    if evidence.window_s < SHORTEST_WINDOW_S or evidence.layer_steps < FEWEST_LAYER_STEPS:
        reason = (
            f"{evidence.layer_steps:.0f} layer-steps in {evidence.window_s:.0f} s say too little: "
            f"at least {FEWEST_LAYER_STEPS:.0f} in {SHORTEST_WINDOW_S:.0f} s are needed"
        )
        return _advice("not_enough_evidence", reason, numbers)
    if evidence.settings.mode is Mode.ACTIVE:
        return _advise_active(evidence, evidence.gain, numbers)
    if evidence.settings.mode is Mode.SHADOW:
        return _advise_shadow(evidence, numbers)
    if evidence.settings.mode is Mode.OFF:
        return _advice("not_enough_evidence", "in mode off nothing is counted: use observe", numbers, mode="observe")
    return _advise_observe(evidence, numbers)


def _advise_active(evidence: Evidence, gain: Gain | None, numbers: dict[str, float | None]) -> Decision:
    if gain is None:
        reason = (
            "lending is on, but too few steps were computed by plain EP to compare with: "
            f"probe_ratio is {evidence.settings.probe_ratio:g}, lends {evidence.lends:.0f}"
        )
        return _advice("not_enough_evidence", reason, numbers)
    measured = f"measured: {_percent(gain.ratio)} ± {_percent(gain.error)} of the time in the layers that lend"
    if gain.is_surely_positive:
        return _advice("worth_it", f"{measured} is saved", numbers, gain.ratio)
    if gain.is_surely_negative:
        return _advice("not_worth_it", f"{measured}: lending makes them slower", numbers, gain.ratio, mode="observe")
    return _advice("not_enough_evidence", f"{measured}: that may be chance", numbers, gain.ratio)


def _advise_shadow(evidence: Evidence, numbers: dict[str, float | None]) -> Decision:
    if evidence.has_cost_model and evidence.layer_seconds > 0:
        ratio = evidence.predicted_gain_s / evidence.layer_seconds
        source = "the cost model predicts"
    else:
        ratio, source = balancing_gain(evidence), "without a cost model, from loads and measured seconds alone,"
    return _verdict(f"{source} that plans save {_percent(ratio)} of the time in MoE layers", ratio, numbers)


def _advise_observe(evidence: Evidence, numbers: dict[str, float | None]) -> Decision:
    ratio = balancing_gain(evidence)
    reason = f"perfect balance would save at most {_percent(ratio)} of the time in MoE layers"
    decided = _verdict(reason, ratio, numbers)
    if decided.outcome == "worth_it" and not evidence.has_cost_model:
        return replace(decided, reason=f"{reason}; mode shadow tells how much of it plans reach")
    return decided


def _verdict(reason: str, ratio: float, numbers: dict[str, float | None]) -> Decision:
    if ratio >= WORTH_RATIO:
        return _advice("worth_it", reason, numbers, ratio, mode="active")
    return _advice("not_worth_it", f"{reason}: less than {_percent(WORTH_RATIO)}", numbers, ratio)


def _advice(
    verdict: str, reason: str, numbers: dict[str, float | None], ratio: float | None = None, **patch: Any
) -> Decision:
    return Decision(
        kind="advice", outcome=verdict, reason=reason, inputs=numbers, expected_gain_ratio=ratio, patch=patch
    )


def balancing_gain(evidence: Evidence) -> float:
    """Share of the time inside layers saved if computing took as long as balanced loads let it.

    In mode shadow balanced means as planned, in observe it means perfectly; batches that min_batch_tokens, phases or
    the threshold leave alone save nothing.
    """
    saved_s = 0.0
    for at, phase in enumerate(STEP_PHASES):
        before = float(evidence.before_P[at])
        is_large = evidence.batch_tokens_P[at] >= evidence.settings.min_batch_tokens
        is_chosen = evidence.settings.phases in ("both", phase)
        if not (math.isfinite(before) and is_large and is_chosen and before >= evidence.settings.imbalance_threshold):
            continue
        after = float(evidence.after_P[at]) if evidence.settings.mode is Mode.SHADOW else 1.0
        saved_s += float(evidence.layer_seconds_P[at]) * evidence.compute_share * max(1.0 - after / before, 0.0)
    return saved_s / evidence.layer_seconds if evidence.layer_seconds > 0 else 0.0


def numbers_of(evidence: Evidence) -> dict[str, float | None]:
    """What a verdict rests on, for people."""
    gain = evidence.gain
    return {
        "window_s": round(evidence.window_s, 1),
        "layer_steps": evidence.layer_steps,
        "imbalance_ratio_before": _rounded(evidence.mean_ratio(evidence.before_P)),
        "imbalance_ratio_after": _rounded(evidence.mean_ratio(evidence.after_P)),
        "layer_seconds": _rounded(evidence.layer_seconds),
        "compute_share": _rounded(evidence.compute_share),
        "batch_tokens_prefill": _rounded(float(evidence.batch_tokens_P[0])),
        "batch_tokens_decode": _rounded(float(evidence.batch_tokens_P[1])),
        "lends": evidence.lends,
        "lend_bytes": evidence.lend_bytes,
        "predicted_gain_s": _rounded(evidence.predicted_gain_s) if evidence.has_cost_model else None,
        "measured_gain_ratio": _rounded(gain.ratio) if gain else None,
        "measured_gain_error": _rounded(gain.error) if gain else None,
        "measured_gain_s": _rounded(gain.saved_s) if gain else None,
        "probed_steps": float(gain.probed_steps) if gain else None,
        "lent_steps": float(gain.lent_steps) if gain else None,
    }


# The brake.


@dataclass(frozen=True, slots=True)
class Brake:
    """How often lending was turned down, and until when it is; unix times."""

    strikes: int = 0
    since_s: float = -math.inf
    until_s: float = -math.inf


def decide_brake(evidence: Evidence, brake: Brake, now_s: float) -> Decision:
    """Turn lending down where it is measured to make the engine slower; again and longer where it does so again.

    First the threshold is raised for BRAKE_S; then, and when that was not enough, the mode is observe, each time for
    twice as long. A sure gain FORGIVE_AFTER_S after the last time forgets it all.
    """
    inputs: dict[str, Any] = {**numbers_of(evidence), "strikes": brake.strikes}
    if now_s < brake.until_s <= now_s + LONGEST_BRAKE_S:  # a clock that was set back must not brake for ever
        inputs["until_s"] = brake.until_s
        return _brake("braking", f"turned down for another {brake.until_s - now_s:.0f} s", inputs)
    if evidence.settings.mode is not Mode.ACTIVE:
        return _brake("nothing", f"mode {evidence.settings.mode} lends nothing", inputs)
    gain = evidence.gain
    if gain is None:
        return _brake("not_enough_evidence", "too few steps of plain EP to compare with", inputs)
    measured = f"{_percent(gain.ratio)} ± {_percent(gain.error)}"
    if not gain.is_surely_negative:
        if gain.is_surely_positive and brake.strikes and now_s - max(brake.until_s, brake.since_s) > FORGIVE_AFTER_S:
            return _brake("forgiven", f"lending saves {measured} again: earlier brakes are forgotten", inputs)
        return _brake("nothing", f"lending saves {measured} of the time in the layers that lend", inputs, gain.ratio)
    strikes = brake.strikes + 1
    inputs["strikes"] = strikes
    for_s = min(BRAKE_S * 2.0 ** max(strikes - 1, 0), LONGEST_BRAKE_S)
    raised = round(1.0 + RAISED_FACTOR * max(evidence.settings.imbalance_threshold - 1.0, 0.1), 3)
    is_mild = strikes == 1 and raised <= 100
    patch: dict[str, Any] = {"imbalance_threshold": raised} if is_mild else {"mode": "observe"}
    what = f"imbalance_threshold={raised:g}" if is_mild else "mode=observe"
    reason = (
        f"lending makes the layers that lend slower, by {_percent(-gain.ratio)} ± {_percent(gain.error)} over "
        f"{evidence.window_s:.0f} s: {what} for {for_s:.0f} s, then it is tried again"
    )
    return _brake("brake", reason, inputs, -gain.ratio, patch, for_s)


def _brake(
    outcome: str,
    reason: str,
    inputs: dict[str, Any],
    ratio: float | None = None,
    patch: dict[str, Any] | None = None,
    for_s: float | None = None,
) -> Decision:
    return Decision(
        kind="brake",
        outcome=outcome,
        reason=reason,
        inputs=inputs,
        expected_gain_ratio=ratio,
        patch=patch or {},
        for_s=for_s,
    )


# Thresholds.


def decide_thresholds(evidence: Evidence, start: Settings) -> Decision:
    """Propose imbalance_threshold, min_chunk_tokens and min_batch_tokens from what lending costs and computing takes.

    With auto_tune the proposal stays within auto_tune_min_threshold to auto_tune_max_threshold, and token limits
    within TOKENS_RANGE times what the engine started with; the caller applies it.
    """
    settings = evidence.settings
    costs = _costs(evidence)
    if costs is None:
        reason = "the layers that lent say too little: lends, their seconds and computing seconds are all needed"
        return Decision(kind="thresholds", outcome="not_enough_evidence", reason=reason, inputs=numbers_of(evidence))
    inputs: dict[str, Any] = {**numbers_of(evidence), **{key: _significant(value) for key, value in costs.items()}}
    gain = evidence.gain
    wanted = _break_even(evidence, costs)
    if gain is not None and gain.is_surely_negative:  # what is measured beats what is reckoned
        wanted["imbalance_threshold"] = max(
            wanted["imbalance_threshold"], 1.0 + RAISED_FACTOR * (settings.imbalance_threshold - 1.0)
        )
    proposed = {
        key: _towards(getattr(settings, key), value, _range(key, settings, start)) for key, value in wanted.items()
    }
    patch = {key: value for key, value in proposed.items() if value is not None}
    if not patch:
        reason = "what lending costs and saves bears out the settings that hold"
        return Decision(kind="thresholds", outcome="nothing", reason=reason, inputs=inputs)
    reason = (
        f"a layer that lends costs {1e3 * costs['overhead_s']:.3g} ms and one lend {1e3 * costs['lend_s']:.3g} ms, "
        f"a pair computes in {1e9 * costs['pair_s']:.3g} ns: "
        + ", ".join(f"{key} {getattr(settings, key):g} -> {value:g}" for key, value in patch.items())
    )
    return Decision(kind="thresholds", outcome="propose", reason=reason, inputs=inputs, patch=patch)


def _costs(evidence: Evidence) -> dict[str, float] | None:
    """Measured means: seconds that one lending layer-step costs besides computing, of one lend, of one pair."""
    lending_steps = evidence.decisions.get("lend", 0.0)
    compute_s = evidence.phase_seconds.get("compute", 0.0)
    pairs = float(evidence.tokens_P.sum()) * evidence.top_k * evidence.num_layers
    after = evidence.mean_ratio(evidence.after_P)
    if lending_steps < FEWEST_LAYER_STEPS / 4 or evidence.lends <= 0 or compute_s <= 0 or pairs <= 0 or after is None:
        return None
    overhead_s = sum(evidence.phase_seconds.get(phase, 0.0) for phase in ("plan", "lend")) / lending_steps
    lends_by_rank = evidence.lends / evidence.ep_size
    return {
        "overhead_s": overhead_s,
        "lend_s": evidence.phase_seconds.get("lend", 0.0) / max(lends_by_rank, 1.0),
        "pair_s": compute_s / (pairs / evidence.ep_size * after),  # the most loaded rank's pairs take as long
        "layer_compute_s": compute_s / evidence.layer_steps,
    }


def _break_even(evidence: Evidence, costs: Mapping[str, float]) -> dict[str, float]:
    """Where a lend saves MARGIN times what it costs."""
    overhead_s, pair_s = MARGIN * costs["overhead_s"], costs["pair_s"]
    before = evidence.mean_ratio(evidence.before_P) or 1.0
    # A layer whose balanced compute takes c seconds takes c x ratio without lending.
    balanced_s = costs["layer_compute_s"] / max(evidence.mean_ratio(evidence.after_P) or 1.0, 1.0)
    excess = max(before - 1.0, 0.05)
    return {
        "imbalance_threshold": 1.0 + overhead_s / balanced_s,
        "min_chunk_tokens": MARGIN * costs["lend_s"] / pair_s,
        # tokens x top_k / ranks x excess x pair_s is what balancing saves of a batch.
        "min_batch_tokens": overhead_s * evidence.ep_size / (pair_s * evidence.top_k * excess),
    }


def _range(key: str, settings: Settings, start: Settings) -> tuple[float, float]:
    if key == "imbalance_threshold":
        low, high = settings.auto_tune_min_threshold, settings.auto_tune_max_threshold
        return min(low, high), max(low, high)
    value = float(getattr(start, key))
    return max(value / TOKENS_RANGE, 1.0), max(value, 1.0) * TOKENS_RANGE


def _towards(value: float, wanted: float, bounds: tuple[float, float]) -> float | int | None:
    """A value nearer to the wanted one, within the bounds and one step; None where that is no real change."""
    is_ratio = isinstance(value, float)
    base = 1.0 if is_ratio else 0.0  # a threshold is about what is above 1
    now = max(value - base, 0.05 if is_ratio else 1.0)
    stepped = min(max(wanted - base, now / STEP_FACTOR), now * STEP_FACTOR) + base
    found = min(max(stepped, bounds[0]), bounds[1])
    if abs((found - base) / now - 1.0) < SMALLEST_CHANGE:
        return None
    return round(found, 3) if is_ratio else round(found)


def _percent(ratio: float) -> str:
    return f"{100 * ratio:.1f}%"


def _rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(float(value), 4)


def _significant(value: float) -> float:
    return float(f"{value:.4g}") if math.isfinite(value) else 0.0
