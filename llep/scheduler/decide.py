"""What the scheduler decides: pure functions from evidence and settings to decisions that carry their reasons.

Nothing in here asks a clock, a store or an engine. Every decision, also to do nothing, names what it was made from.
How each one is made, with its numbers, is in docs/scheduler.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from llep.config import LendScope, Mode, Settings
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
CHUNKS = [round(2 ** (step / 8)) for step in range(16, 8 * 16 + 1)]  # pairs, 4 to 65536: as min_chunk_tokens may be


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
        return _advise_active(evidence, numbers)
    if evidence.settings.mode is Mode.SHADOW:
        return _advise_shadow(evidence, numbers)
    if evidence.settings.mode is Mode.OFF:
        return _advice("not_enough_evidence", "in mode off nothing is counted: use observe", numbers, mode="observe")
    return _advise_observe(evidence, numbers)


def _advise_active(evidence: Evidence, numbers: dict[str, float | None]) -> Decision:
    gain = evidence.gain
    if gain is None:
        reason = (
            "lending is on, but too few steps were computed by plain EP to compare with: "
            f"probe_ratio is {evidence.settings.probe_ratio:g}, lends {evidence.lends:.0f}"
        )
        return _advice("not_enough_evidence", reason, numbers)
    lost, kept = _phases_apart(evidence)
    if lost and kept and kept[1].is_surely_positive:
        reason = (
            f"measured: {_plus_minus(kept[1])} of the time is saved in {kept[0]}, {_plus_minus(lost[1])} in {lost[0]}"
        )
        return _advice("worth_it", f"{reason}: lend in {kept[0]} only", numbers, kept[1].ratio, phases=kept[0])
    measured = f"measured: {_plus_minus(gain)} of the time in the layers that lend"
    if gain.is_surely_positive:
        return _advice("worth_it", f"{measured} is saved", numbers, gain.ratio)
    if gain.is_surely_negative:
        return _advice("not_worth_it", f"{measured}: lending makes them slower", numbers, gain.ratio, mode="observe")
    return _advice("not_enough_evidence", f"{measured}: that may be chance", numbers, gain.ratio)


def _advise_shadow(evidence: Evidence, numbers: dict[str, float | None]) -> Decision:
    if evidence.cost_model and evidence.layer_seconds > 0:
        ratio = evidence.predicted_gain_s / evidence.layer_seconds
        source = "the cost model predicts"
    else:
        ratio, source = balancing_gain(evidence), "without a cost model, from loads and measured seconds alone,"
    return _verdict(f"{source} that plans save {_percent(ratio)} of the time in MoE layers", ratio, numbers)


def _advise_observe(evidence: Evidence, numbers: dict[str, float | None]) -> Decision:
    ratio = balancing_gain(evidence)
    reason = f"perfect balance would save at most {_percent(ratio)} of the time in MoE layers"
    decided = _verdict(reason, ratio, numbers)
    if decided.outcome == "worth_it" and evidence.cost_model is None:
        return replace(decided, reason=f"{reason}; mode shadow tells how much of it plans reach")
    return decided


def _phases_apart(evidence: Evidence) -> tuple[tuple[str, Gain] | None, tuple[str, Gain] | None]:
    """The phase of steps in which lending surely loses, and the one that lends too and does not; None where there is
    none, or both lose."""
    gains = [(phase, gain) for phase, gain in evidence.gain_by_phase.items() if gain is not None]
    lost = [(phase, gain) for phase, gain in gains if gain.is_surely_negative]
    kept = [(phase, gain) for phase, gain in gains if not gain.is_surely_negative]
    return (lost[0] if len(lost) == 1 else None), (kept[0] if kept else None)


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
    by_phase = evidence.gain_by_phase
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
        "predicted_gain_s": _rounded(evidence.predicted_gain_s) if evidence.cost_model else None,
        "measured_gain_ratio": _rounded(gain.ratio) if gain else None,
        "measured_gain_error": _rounded(gain.error) if gain else None,
        "measured_gain_s": _rounded(gain.saved_s) if gain else None,
        **{f"measured_gain_ratio_{phase}": _rounded(of.ratio) if of else None for phase, of in by_phase.items()},
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

    Where one phase of steps surely loses, and the other lends and does not, `phases` is the other. Else the threshold
    is raised for BRAKE_S first; then, and when that was not enough, the mode is observe. Each time for twice as long.
    A sure gain FORGIVE_AFTER_S after the last time forgets it all.
    """
    inputs: dict[str, Any] = {**numbers_of(evidence), "strikes": brake.strikes}
    lost, kept = _phases_apart(evidence)
    gain = lost[1] if lost else evidence.gain
    is_lost = gain is not None and gain.is_surely_negative
    # Whatever a long brake still lets lend is judged, but not before it had its time.
    is_settled = is_lost and now_s - brake.since_s >= BRAKE_S
    if now_s < brake.until_s <= now_s + LONGEST_BRAKE_S and not is_settled:  # a clock set back must not brake for ever
        inputs["until_s"] = brake.until_s
        return _brake("braking", f"turned down for another {brake.until_s - now_s:.0f} s", inputs)
    if evidence.settings.mode is not Mode.ACTIVE:
        return _brake("nothing", f"mode {evidence.settings.mode} lends nothing", inputs)
    if gain is None:
        return _brake("not_enough_evidence", "too few steps of plain EP to compare with", inputs)
    if not is_lost:
        is_over = now_s - max(brake.until_s, brake.since_s) > FORGIVE_AFTER_S
        if gain.is_surely_positive and brake.strikes and is_over:
            return _brake("forgiven", f"lending saves {_plus_minus(gain)} again: earlier brakes are forgotten", inputs)
        reason = f"lending saves {_plus_minus(gain)} of the time in the layers that lend"
        return _brake("nothing", reason, inputs, gain.ratio)
    strikes = brake.strikes + 1
    inputs["strikes"] = strikes
    for_s = min(BRAKE_S * 2.0 ** max(strikes - 1, 0), LONGEST_BRAKE_S)
    patch = _turned_down(evidence.settings, kept[0] if lost and kept else None, is_first=strikes == 1)
    what = ", ".join(f"{key}={value}" for key, value in patch.items())
    reason = (
        f"lending makes the layers that lend slower{f' in {lost[0]}' if lost else ''}, by {_percent(-gain.ratio)} ± "
        f"{_percent(gain.error)} over {evidence.window_s:.0f} s: {what} for {for_s:.0f} s, then it is tried again"
    )
    return _brake("brake", reason, inputs, -gain.ratio, patch, for_s)


def _turned_down(settings: Settings, kept_phase: str | None, *, is_first: bool) -> dict[str, Any]:
    """The change of settings that lends less. kept_phase: lends on as it does."""
    if kept_phase is not None:
        return {"phases": kept_phase}
    raised = round(1.0 + RAISED_FACTOR * max(settings.imbalance_threshold - 1.0, 0.1), 3)
    return {"imbalance_threshold": raised} if is_first and raised <= 100 else {"mode": "observe"}


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


@dataclass(frozen=True, slots=True)
class BreakEven:
    """From where on lending is worth MARGIN times what it costs, in pairs of one rank. inputs: what it follows from."""

    chunk_pairs: float  # of one expert, lent
    surplus_pairs: float  # of the fullest rank over the mean, that balancing a layer takes away
    reason: str
    inputs: dict[str, Any]


def decide_thresholds(evidence: Evidence, start: Settings) -> Decision:
    """Propose imbalance_threshold, min_chunk_tokens and min_batch_tokens from what lending costs and computing takes:
    by the cost model's curve where there is one, else as measured.

    With auto_tune the proposal stays within auto_tune_min_threshold to auto_tune_max_threshold, and token limits
    within TOKENS_RANGE times what the engine started with; the caller applies it.
    """
    settings, gain = evidence.settings, evidence.gain
    found = _measured_break_even(evidence) if evidence.cost_model is None else _predicted_break_even(evidence)
    batch_tokens = max(evidence.batch_tokens_P[np.isfinite(evidence.batch_tokens_P)], default=0.0)
    if found is None or batch_tokens <= 0:
        reason = "the layers that lent say too little: lends, their seconds and computing seconds are all needed"
        if evidence.cost_model is not None:
            reason = "no batch in the window" if found else "the cost model says that no lend of any size would pay"
        return Decision(kind="thresholds", outcome="not_enough_evidence", reason=reason, inputs=numbers_of(evidence))
    inputs: dict[str, Any] = {
        **numbers_of(evidence),
        "chunk_pairs": _significant(found.chunk_pairs),
        "surplus_pairs": _significant(found.surplus_pairs),
        **found.inputs,
    }
    pairs_per_rank = batch_tokens * evidence.top_k / evidence.ep_size  # of the batches that are large enough to lend
    excess = max((evidence.mean_ratio(evidence.before_P) or 1.0) - 1.0, 0.05)
    wanted = {
        "imbalance_threshold": 1.0 + found.surplus_pairs / pairs_per_rank,
        "min_chunk_tokens": found.chunk_pairs,
        "min_batch_tokens": found.surplus_pairs / excess * evidence.ep_size / evidence.top_k,
    }
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
    changes = ", ".join(f"{key} {getattr(settings, key):g} -> {value:g}" for key, value in patch.items())
    return Decision(
        kind="thresholds", outcome="propose", reason=f"{found.reason}: {changes}", inputs=inputs, patch=patch
    )


def _predicted_break_even(evidence: Evidence) -> BreakEven | None:
    """By the cost model: half of an expert's pairs, lent, must save MARGIN times what lending takes. None: never."""
    model, size = evidence.cost_model, evidence.bytes_per_expert
    assert model is not None
    is_near = evidence.is_one_node or evidence.settings.lend_scope is LendScope.NODE
    link = model.node_link if is_near else model.network_link
    lend_s = link.latency_s + size / link.bytes_per_s + model.gemm_launch_s

    def fewest(cost_s: float) -> int | None:
        saved = ((pairs, model.expert_s(2 * pairs, size) - model.expert_s(pairs, size)) for pairs in CHUNKS)
        return next((pairs for pairs, saved_s in saved if saved_s >= MARGIN * cost_s), None)

    chunk_pairs, surplus_pairs = fewest(lend_s), fewest(lend_s + model.plan_s)
    if chunk_pairs is None or surplus_pairs is None:
        return None
    reason = (
        f"by the cost model {model.name} a lend takes {1e3 * lend_s:.3g} ms and pays from {chunk_pairs} pairs on, "
        f"{surplus_pairs} with its plan"
    )
    return BreakEven(chunk_pairs, surplus_pairs, reason, {"lend_s": _significant(lend_s)})


def _measured_break_even(evidence: Evidence) -> BreakEven | None:
    """From the seconds that lending layers took to plan, lend and compute; None without enough of them."""
    lending_steps = evidence.decisions.get("lend", 0.0)
    compute_s = evidence.phase_seconds.get("compute", 0.0)
    pairs = float(evidence.tokens_P.sum()) * evidence.top_k * evidence.num_layers
    after = evidence.mean_ratio(evidence.after_P)
    if lending_steps < FEWEST_LAYER_STEPS / 4 or evidence.lends <= 0 or compute_s <= 0 or pairs <= 0 or after is None:
        return None
    pair_s = compute_s / (pairs / evidence.ep_size * after)  # the most loaded rank's pairs take as long
    lend_s = evidence.phase_seconds.get("lend", 0.0) / max(evidence.lends / evidence.ep_size, 1.0)
    overhead_s = sum(evidence.phase_seconds.get(phase, 0.0) for phase in ("plan", "lend")) / lending_steps
    reason = (
        f"a layer that lends costs {1e3 * overhead_s:.3g} ms and one lend {1e3 * lend_s:.3g} ms, "
        f"a pair computes in {1e6 * pair_s:.3g} µs"
    )
    inputs = {"overhead_s": overhead_s, "lend_s": lend_s, "pair_s": pair_s}
    return BreakEven(
        chunk_pairs=MARGIN * lend_s / pair_s,
        surplus_pairs=MARGIN * overhead_s / pair_s,
        reason=reason,
        inputs={key: _significant(value) for key, value in inputs.items()},
    )


def _range(key: str, settings: Settings, start: Settings) -> tuple[float, float]:
    if key == "imbalance_threshold":
        low, high = settings.auto_tune_min_threshold, settings.auto_tune_max_threshold
        return min(low, high), max(low, high)
    value = float(getattr(start, key))
    return max(value / TOKENS_RANGE, 1.0), min(max(value, 1.0) * TOKENS_RANGE, _largest(key))


def _largest(key: str) -> float:
    """The largest value that the setting may have at all."""
    limits = Settings.model_fields[key].metadata
    return float(next((limit.le for limit in limits if hasattr(limit, "le")), math.inf))


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


def _plus_minus(gain: Gain) -> str:
    return f"{_percent(gain.ratio)} ± {_percent(gain.error)}"


def _rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(float(value), 4)


def _significant(value: float) -> float:
    return float(f"{value:.4g}") if math.isfinite(value) else 0.0
