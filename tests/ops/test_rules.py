"""Every alert fires when its fault is there and is silent when all is well, or when nothing happens: by promtool."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from llep.monitoring.rules import ALERTS, RECORDINGS, rules
from tests.ops.tools import tool

ROOT = Path(__file__).parents[2]
MINUTES = 60
ENGINE = 'model_name="m",engine="e"'
VLLM = 'model_name="m",engine="0",instance="v"'
Series = dict[str, str]


def still(value: float) -> str:
    return f"{value:g}+0x{MINUTES}"


def growing(per_minute: float, start: float = 0) -> str:
    return f"{start:g}+{per_minute:g}x{MINUTES}"


def healthy() -> Series:
    """Half of the layer-steps lend, and take nearly all of the imbalance away."""
    series = {
        'up{job="llep",instance="c"}': still(1),
        "llep_scheduler_up": still(1),
        "llep_scheduler_store_open": still(1),
        f"llep_info{{{ENGINE}}}": still(1),
        f'llep_mode{{{ENGINE},mode="active"}}': still(1),
        f"llep_engine_last_seen_timestamp_seconds{{{ENGINE}}}": growing(60),
        f"llep_metrics_levels_dropped{{{ENGINE}}}": still(0),
        f"llep_settings_imbalance_threshold{{{ENGINE}}}": still(1.3),
        f"llep_settings_last_apply_successful{{{ENGINE}}}": still(1),
        f'llep_errors_total{{{ENGINE},component="transport",type="timeout"}}': still(3),
        f"llep_steps_total{{{ENGINE}}}": growing(60),
        f'llep_imbalance_ratio_sum{{{ENGINE},stage="before"}}': growing(600 * 2.0),
        f'llep_imbalance_ratio_sum{{{ENGINE},stage="after"}}': growing(600 * 1.05),
        f'llep_phase_seconds_sum{{{ENGINE},phase="compute"}}': growing(30),
        f'llep_phase_seconds_sum{{{ENGINE},phase="plan"}}': growing(1),
        f'llep_phase_seconds_sum{{{ENGINE},phase="lend"}}': growing(2),
        f'llep_memory_used_bytes{{{ENGINE},ep_rank="0"}}': still(50),
        f'llep_memory_budget_bytes{{{ENGINE},ep_rank="0"}}': still(100),
        f'llep_spilled_tokens_total{{{ENGINE},ep_rank="0",direction="in"}}': growing(100),
        f'llep_rank_routed_tokens_total{{{ENGINE},ep_rank="0"}}': growing(1000),
        f'llep_lend_bytes_total{{{ENGINE},ep_rank="0",direction="in"}}': growing(6e6),
        f'llep_device_free_ratio{{{ENGINE},ep_rank="0"}}': still(0.1),
        f"vllm:num_requests_running{{{VLLM}}}": still(2),
        f"vllm:prompt_tokens_total{{{VLLM}}}": growing(1000),
        f"vllm:generation_tokens_total{{{VLLM}}}": growing(1000),
    }
    series |= balancedness("prefill", 0.5, 0.95) | balancedness("decode", 0.5, 0.5)
    series |= {f'llep_imbalance_ratio_count{{{ENGINE},stage="{s}"}}': growing(600) for s in ("before", "after")}
    series |= {f"llep_settings_{name}revision{{{ENGINE}}}": still(3) for name in ("", "held_", "desired_")}
    series |= worth(lent_s=8, lent_pairs=900, probed_s=0.1, probed_pairs=9)
    return series | decisions(lend=300, balanced=200, small_batch=100) | state("live")


def balancedness(phase: str, before: float, after: float) -> Series:
    """Means over 300 layer-steps a minute."""
    series = {}
    for stage, value in (("before", before), ("after", after)):
        labels = f'{ENGINE},phase="{phase}",stage="{stage}"'
        series[f"llep_balancedness_ratio_sum{{{labels}}}"] = growing(300 * value)
        series[f"llep_balancedness_ratio_count{{{labels}}}"] = growing(300)
    return series


def worth(**per_minute: float) -> Series:
    """With one probed step a minute, all in prefill."""
    units = {"s": "seconds", "pairs": "pairs", "steps": "steps"}
    per_minute = {"probed_steps": 1, "lent_steps": 99, **per_minute}
    labels = f'{ENGINE},phase="prefill"'
    idle = f'{ENGINE},phase="decode"'
    series = {}
    for name, value in per_minute.items():
        side, _, unit = name.partition("_")
        series[f'llep_worth_{units[unit]}_total{{{labels},side="{side}"}}'] = growing(value)
        series[f'llep_worth_{units[unit]}_total{{{idle},side="{side}"}}'] = still(0)
    return series


def decisions(**per_minute: float) -> Series:
    names = ("lend", "replica", "balanced", "small_batch", "no_gain", "no_slot", "memory", "off", "error")
    return {
        f'llep_plan_decisions_total{{{ENGINE},decision="{name}"}}': growing(per_minute.get(name, 0)) for name in names
    }


def state(live: str) -> Series:
    return {
        f'llep_engine_state{{{ENGINE},state="{name}"}}': still(name == live) for name in ("starting", "live", "stale")
    }


def idle() -> Series:
    """Nobody asks: counters stand still, gauges keep what they were last, slots in full use among them."""
    series = {
        name: values if "timestamp" in name else f"{values.partition('+')[0]}+0x{MINUTES}"
        for name, values in healthy().items()
    }
    series[f"vllm:num_requests_running{{{VLLM}}}"] = still(0)
    series[f'llep_memory_used_bytes{{{ENGINE},ep_rank="0"}}'] = still(100)
    return series


def another(instance: str = "w", engine: int = 0, per_minute: float = 1000) -> Series:
    """A second API server of the same model, with requests running."""
    labels = f'model_name="m",engine="{engine}",instance="{instance}"'
    tokens = {f"vllm:{name}_tokens_total{{{labels}}}": growing(per_minute) for name in ("prompt", "generation")}
    return {f"vllm:num_requests_running{{{labels}}}": still(3)} | tokens


NONE = "_"  # no sample
FAULTS: dict[str, Series] = {
    "LlepStalled": {
        name: still(5)
        for name in (
            f"vllm:prompt_tokens_total{{{VLLM}}}",
            f"vllm:generation_tokens_total{{{VLLM}}}",
        )
    },
    "LlepNotCounting": {f"llep_steps_total{{{ENGINE}}}": still(9)},
    "LlepTargetDown": {'up{job="llep",instance="c"}': still(0)},
    "LlepMetricsMissing": {"llep_scheduler_up": NONE, 'up{job="llep",instance="c"}': NONE},
    "LlepSchedulerDown": {"llep_scheduler_up": still(0)},
    "LlepStoreClosed": {"llep_scheduler_store_open": still(0)},
    "LlepEngineSilent": state("stale") | {f"llep_engine_last_seen_timestamp_seconds{{{ENGINE}}}": still(1200)},
    "LlepNotHelping": balancedness("prefill", 0.66, 0.68)
    | worth(lent_s=9.9, lent_pairs=900, probed_s=0.1, probed_pairs=9),
    "LlepCostsTime": worth(lent_s=12, lent_pairs=900, probed_s=0.1, probed_pairs=9),
    "LlepImbalanceHigh": {
        f'llep_imbalance_ratio_sum{{{ENGINE},stage="before"}}': growing(600 * 4),
        f'llep_imbalance_ratio_sum{{{ENGINE},stage="after"}}': growing(600 * 1.8),
    },
    "LlepErrors": {f'llep_errors_total{{{ENGINE},component="plan",type="digest"}}': f"_x{MINUTES - 8} 1+0x8"},
    "LlepMemoryRefusals": decisions(lend=200, balanced=200, no_slot=200),
    "LlepMemoryNearBudget": {f'llep_memory_used_bytes{{{ENGINE},ep_rank="0"}}': still(95)},
    "LlepDeviceMemoryLow": {f'llep_device_free_ratio{{{ENGINE},ep_rank="0"}}': still(0.01)},
    "LlepOverheadHigh": {f'llep_phase_seconds_sum{{{ENGINE},phase="lend"}}': growing(20)},
    "LlepSettingsNotApplied": {f"llep_settings_desired_revision{{{ENGINE}}}": still(4)},
    "LlepRevisionsDiffer": {
        'llep_settings_held_revision{model_name="m",engine="f"}': still(2),
        'llep_engine_state{model_name="m",engine="f",state="live"}': still(1),
    },
    "LlepDetailDropped": {f"llep_metrics_levels_dropped{{{ENGINE}}}": still(1)},
}
OTHER_STEPS = 'llep_steps_total{model_name="m",engine="f"}'
ONE_OF_SEVERAL: dict[str, Series] = {
    "LlepStalled": another(per_minute=0),
    "LlepNotCounting": another(),
}
NO_FAULTS: dict[str, Series] = {
    "two engines of one model": healthy() | another() | {OTHER_STEPS: growing(60)},
    "two engines of one model, one of them idle": healthy()
    | another(per_minute=0)
    | {'vllm:num_requests_running{model_name="m",engine="0",instance="w"}': still(0), OTHER_STEPS: still(9)},
    "an API server for each data-parallel rank of one engine": healthy() | another(engine=1),
    "healthy": healthy(),
    "idle": idle(),
    "nothing at all but a control plane": {
        name: values for name, values in healthy().items() if name.startswith(("up", "llep_scheduler"))
    },
    "a mode in which nothing is balanced": healthy()
    | FAULTS["LlepImbalanceHigh"]
    | {f'llep_mode{{{ENGINE},mode="active"}}': still(0)},
    "lending that evens out little and gains all the same": healthy()
    | FAULTS["LlepNotHelping"]
    | worth(lent_s=8, lent_pairs=900, probed_s=0.1, probed_pairs=9),
    "lending that cost time in five probes": healthy()
    | worth(lent_s=12, lent_pairs=900, probed_s=0.1, probed_pairs=9, probed_steps=0.1),
    "decode, in batches too small to balance": healthy()
    | FAULTS["LlepImbalanceHigh"]
    | decisions(lend=10, small_batch=590),
    "prefills that are evened out among much decode that is not, and no gain to be measured": healthy()
    | worth(lent_s=9.9, lent_pairs=900, probed_s=0.1, probed_pairs=9)
    | decisions(lend=45, small_batch=555),
    "an engine that was taken away long ago": healthy()
    | FAULTS["LlepEngineSilent"]
    | {f"llep_engine_last_seen_timestamp_seconds{{{ENGINE}}}": still(-3600)},
    "another revision on an engine that is gone": healthy()
    | FAULTS["LlepRevisionsDiffer"]
    | {'llep_engine_state{model_name="m",engine="f",state="live"}': still(0)},
}


def case(name: str, series: Series, firing: list[str]) -> dict[str, Any]:
    """One case of promtool's: which alerts fire in the last minute."""
    return {
        "name": name,
        "interval": "1m",
        "input_series": [{"series": key, "values": values} for key, values in series.items() if values != NONE],
        "promql_expr_test": [
            {
                "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
                "eval_time": f"{MINUTES - 5}m",
                "exp_samples": [{"labels": f'{{alertname="{alert}"}}', "value": 1} for alert in sorted(firing)],
            }
        ],
    }


def promtool_test(folder: Path, cases: list[dict[str, Any]]) -> subprocess.CompletedProcess[str]:
    (folder / "rules.yaml").write_text(yaml.safe_dump(rules(), sort_keys=False))
    tests = {"rule_files": ["rules.yaml"], "evaluation_interval": "1m", "tests": cases}
    (folder / "tests.yaml").write_text(yaml.safe_dump(tests, sort_keys=False))
    command = [tool("promtool"), "test", "rules", "tests.yaml"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)


def test_promtool_has_nothing_to_say(tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules(), sort_keys=False))
    command = [tool("promtool"), "check", "rules", "rules.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(ALERTS) + len(RECORDINGS)} rules found" in done.stdout


def test_each_alert_fires_alone(tmp_path: Path) -> None:
    assert FAULTS.keys() == {alert.name for alert in ALERTS}
    cases = [case(alert, healthy() | series, [alert]) for alert, series in FAULTS.items()]
    done = promtool_test(tmp_path, cases)
    assert done.returncode == 0, done.stdout + done.stderr


def test_one_engine_of_several_is_not_hidden_by_the_others(tmp_path: Path) -> None:
    cases = [case(alert, healthy() | series, [alert]) for alert, series in ONE_OF_SEVERAL.items()]
    done = promtool_test(tmp_path, cases)
    assert done.returncode == 0, done.stdout + done.stderr


def test_silent_when_well_and_when_idle(tmp_path: Path) -> None:
    done = promtool_test(tmp_path, [case(name, series, []) for name, series in NO_FAULTS.items()])
    assert done.returncode == 0, done.stdout + done.stderr


def test_recorded_numbers(tmp_path: Path) -> None:
    """Worked by hand: balancedness 0.5 -> 0.95 takes away 0.9 of what it lacks to 1; 3 of 33 s are overhead.

    900 pairs a minute would take 10 s at the probes' 0.1 s for 9, and take 8.
    """
    labels = '{engine="e", model_name="m"}'
    expected = {
        "engine:llep_layer_steps:rate5m": 10,
        'engine:llep_balancedness_ratio:mean5m{phase="prefill",stage="after"}': 0.95,
        "engine:llep_unevenness_removed:ratio5m": 0.9,  # in prefill, and nothing in decode
        "engine:llep_overhead:ratio5m": 3 / 33,
        "engine:llep_spilled_tokens:ratio5m": 0.1,
        "engine:llep_lend_bytes:rate5m": 1e5,
        "engine:llep_measured_gain:rate1h": 2 / 60 * 50 / 60,  # of the hour 50 minutes are known
        "engine:llep_measured_gain:ratio1h": 0.2,
        'engine:llep_imbalance_ratio:mean5m{stage="before"}': 2.0,
        'engine:llep_plan_decisions:ratio5m{decision="lend"}': 0.5,
    }
    tests = [
        {
            "expr": f"round(1e6 * sum by (model_name, engine) ({name}))",
            "eval_time": "50m",
            "exp_samples": [{"labels": labels, "value": round(1e6 * value)}],
        }
        for name, value in expected.items()
    ]
    assert {name.partition("{")[0] for name in expected} == {recording.name for recording in RECORDINGS}
    done = promtool_test(tmp_path, [case("numbers", healthy(), []) | {"promql_expr_test": tests}])
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("alert", [alert.name for alert in ALERTS])
def test_runbook_has_a_section(alert: str) -> None:
    sections = re.split(r"^## ", (ROOT / "docs" / "runbook.md").read_text(), flags=re.MULTILINE)
    (section,) = (section for section in sections if section.startswith(f"{alert}\n"))
    for part in ("**Impact**", "**Diagnose**", "**Fix**", "**Switch off**"):
        assert part in section, f"{alert} lacks {part}"


def test_runbook_knows_no_other_alert() -> None:
    named = set(re.findall(r"^## (Llep\w+)$", (ROOT / "docs" / "runbook.md").read_text(), flags=re.MULTILINE))
    assert named == {alert.name for alert in ALERTS}
