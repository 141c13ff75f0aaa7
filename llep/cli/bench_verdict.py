"""What `llep bench` makes of its runs: what llep counted meanwhile, medians and spread, and whether lending pays."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llep.errors import LlepError

Row = dict[str, Any]

# What is compared, and whether more of it is better.
MEASURES = {
    "total_token_throughput": True,
    "output_throughput": True,
    "request_throughput": True,
    "mean_ttft_ms": False,
    "p99_ttft_ms": False,
    "mean_tpot_ms": False,
    "p99_tpot_ms": False,
    "mean_itl_ms": False,
    "p99_itl_ms": False,
    "duration": False,
}
COUNTERS = {
    "tokens": "llep_tokens_total",
    "lends": "llep_lends_total",
    "lend_bytes": "llep_lend_bytes_total",
    "layer_seconds": "llep_layer_seconds_total",
}
SAMPLE = re.compile(r"^(llep_\w+)\{(.*)\} ([-+.\deE]+|NaN)$", re.MULTILINE)
LEAST_GAIN = 0.01
LEAST_PAIRS = 3
SURE_RATIO = 0.8  # of the pairs that must agree


@dataclass(frozen=True, slots=True)
class Run:
    """One `vllm bench serve`: what it measured, and what llep counted meanwhile."""

    mode: str
    measured: dict[str, float]
    counted: dict[str, float]


def order(pairs: int, modes: tuple[str, str]) -> list[str]:
    """One run of each to warm up, then pairs whose order alternates, so that a drift of the machine cancels out."""
    first, second = modes
    return [first, second] + [mode for at in range(pairs) for mode in (modes if at % 2 == 0 else (second, first))]


def summary(runs: Sequence[Run], modes: tuple[str, str], measure: str) -> Row:
    """Medians and spread of both modes, their ratio pair by pair, and the verdict on `measure`."""
    before, after = ([run for run in runs if run.mode == mode] for mode in modes)
    rows = [_compared(name, before, after) for name in MEASURES if all(name in run.measured for run in runs)]
    deciding = next((row for row in rows if row["measure"] == measure), None)
    if deciding is None:
        raise LlepError(f"vllm bench serve did not measure {measure}: choose another --measure")
    verdict, reason = judge(deciding, measure)
    counted = {mode: _medians(of) for mode, of in zip(modes, (before, after), strict=True)}
    return {
        "verdict": verdict,
        "reason": f"{reason}; {_what_llep_did(counted[modes[1]])}",
        "measure": measure,
        "pairs": len(before),
        "modes": list(modes),
        "failed_requests": int(sum(run.measured.get("failed", 0) for run in runs)),
        "measures": rows,
        "counted": counted,
        "runs": [{"mode": run.mode, **run.measured, **run.counted} for run in runs],
    }


def judge(compared: Row, measure: str) -> tuple[str, str]:
    """(pays, costs, no_difference or not_enough_evidence, why). The median gain counts if most pairs have its sign."""
    gains: list[float] = compared["gains"]
    median = statistics.median(gains)
    agree = sum(gain * median > 0 for gain in gains) / len(gains)
    words = f"{measure} {'better' if median > 0 else 'worse'} by {abs(median):.1%} (pairs: {_spread(gains)})"
    if len(gains) < LEAST_PAIRS:
        return "not_enough_evidence", f"{words}: too few to tell; measure {LEAST_PAIRS} --pairs or more"
    if abs(median) < LEAST_GAIN:
        return "no_difference", f"{words}: within the noise"
    if agree < SURE_RATIO:
        return "no_difference", f"{words}: {agree:.0%} of the pairs agree, which is too few; measure more --pairs"
    return ("pays" if median > 0 else "costs"), words


def counters(text: str, engine: str) -> dict[str, float]:
    """Of one engine, from the text of /metrics, summed over ranks; imbalance and decisions by their labels."""
    found: dict[str, float] = dict.fromkeys(COUNTERS, 0.0)
    for name, labels, value in SAMPLE.findall(text):
        if f'engine="{engine}"' not in labels:
            continue
        label = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        if name == "llep_plan_decisions_total":
            found[f"decision_{label['decision']}"] = float(value)
        elif name in ("llep_imbalance_ratio_sum", "llep_imbalance_ratio_count"):
            found[f"imbalance_{label['stage']}_{name.rpartition('_')[2]}"] = float(value)
        for key, metric in COUNTERS.items():
            if name == metric and label.get("direction") != "out":
                found[key] += float(value)
    return found


def counted_between(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """What was counted meanwhile, and the mean imbalance over layers and steps, before and after balancing."""
    spent = {key: value - before.get(key, 0.0) for key, value in after.items()}
    result = {key: value for key, value in spent.items() if key in COUNTERS or (key.startswith("decision_") and value)}
    for stage in ("before", "after"):
        if count := spent.get(f"imbalance_{stage}_count"):
            result[f"imbalance_{stage}"] = spent[f"imbalance_{stage}_sum"] / count
    return result


def _compared(name: str, before: Sequence[Run], after: Sequence[Run]) -> Row:
    is_more_better = MEASURES[name]
    pairs = [(b.measured[name], a.measured[name]) for b, a in zip(before, after, strict=True)]
    # As a ratio of speeds in either case, so that 2 is twice as good.
    gains = [(a / b if is_more_better else b / a) - 1 if a and b else 0.0 for b, a in pairs]
    return {
        "measure": name,
        "off": statistics.median(b for b, _ in pairs),
        "off_min_max": [min(b for b, _ in pairs), max(b for b, _ in pairs)],
        "on": statistics.median(a for _, a in pairs),
        "on_min_max": [min(a for _, a in pairs), max(a for _, a in pairs)],
        "gain": statistics.median(gains),
        "gains": gains,
    }


def _what_llep_did(counted: Mapping[str, float]) -> str:
    """In one run with lending on; where it lent nothing, the reason that was counted most."""
    if counted.get("lends"):
        imbalance = [counted.get(f"imbalance_{stage}", 1.0) for stage in ("before", "after")]
        size = f"{counted['lend_bytes'] / 1e6:,.0f} MB"
        return (
            f"llep made an imbalance of {imbalance[0]:.2f} into {imbalance[1]:.2f} with {counted['lends']:,.0f} lends, "
            f"{size}, a run"
        )
    reasons = {key.removeprefix("decision_"): n for key, n in counted.items() if key.startswith("decision_")}
    if not reasons:
        return "llep decided nothing meanwhile"
    most = max(reasons, key=reasons.__getitem__)
    return f"llep lent nothing: {most} in {reasons[most] / sum(reasons.values()):.0%} of its decisions"


def _medians(runs: Sequence[Run]) -> dict[str, float]:
    keys = {key: None for run in runs for key in run.counted}
    return {key: statistics.median(run.counted.get(key, 0.0) for run in runs) for key in keys}


def _spread(gains: Sequence[float]) -> str:
    return f"{min(gains):+.1%} to {max(gains):+.1%}"
