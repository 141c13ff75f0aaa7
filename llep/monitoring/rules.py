"""Recording rules and alerts as Prometheus reads them: plain data, written out by `llep export rules`.

Recording rules are named level:metric:operation. Every alert has a section in docs/runbook.md.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from llep.monitoring.through_ray import through_ray
from llep.monitoring.vllm import vllm

BY = "namespace, model_name, engine"  # an engine; without Kubernetes there is no namespace, which does no harm
JOB = "llep"
RUNBOOK = "docs/runbook.md"


@dataclass(frozen=True, slots=True)
class Recording:
    name: str
    expr: str

    def as_rule(self) -> dict[str, Any]:
        return {"record": self.name, "expr": self.expr}


@dataclass(frozen=True, slots=True, kw_only=True)
class Alert:
    """minutes: how long expr must hold. severity: critical, people wait; warning, look today; info, when you like."""

    name: str
    expr: str
    minutes: int
    severity: str
    summary: str
    description: str

    def as_rule(self, runbook: str) -> dict[str, Any]:
        return {
            "alert": self.name,
            "expr": self.expr,
            "for": f"{self.minutes}m",
            "labels": {"severity": self.severity},
            "annotations": {
                "summary": self.summary,
                "description": self.description,
                "runbook_url": f"{runbook}#{self.name.lower()}",
            },
        }


def _rate(metric: str, by: str = BY, window: str = "5m") -> str:
    return f"sum by ({by}) (rate({metric}[{window}]))"


def _worth(unit: str, side: str) -> str:
    return _rate(f'llep_worth_{unit}_total{{side="{side}"}}', f"{BY}, phase", "1h")


RECORDINGS = (
    Recording("engine:llep_layer_steps:rate5m", _rate("llep_plan_decisions_total")),
    Recording(
        "engine:llep_imbalance_ratio:mean5m",
        f"{_rate('llep_imbalance_ratio_sum', BY + ', stage')} / "
        f"({_rate('llep_imbalance_ratio_count', BY + ', stage')} > 0)",
    ),
    Recording(
        "engine:llep_balancedness_ratio:mean5m",
        f"{_rate('llep_balancedness_ratio_sum', BY + ', phase, stage')} / "
        f"({_rate('llep_balancedness_ratio_count', BY + ', phase, stage')} > 0)",
    ),
    # Of what balancedness lacks to 1, by phase: decode, left alone on purpose, must not hide what happens in prefill.
    Recording(
        "engine:llep_unevenness_removed:ratio5m",
        '(engine:llep_balancedness_ratio:mean5m{stage="after"} - ignoring (stage) '
        'engine:llep_balancedness_ratio:mean5m{stage="before"}) / ignoring (stage) '
        '((1 - engine:llep_balancedness_ratio:mean5m{stage="before"}) > 0)',
    ),
    Recording(
        "engine:llep_plan_decisions:ratio5m",
        f"{_rate('llep_plan_decisions_total', BY + ', decision')} / ignoring (decision) group_left () "
        "(engine:llep_layer_steps:rate5m > 0)",
    ),
    Recording(
        "engine:llep_overhead:ratio5m",
        _rate('llep_phase_seconds_sum{phase=~"plan|lend"}') + f" / ({_rate('llep_phase_seconds_sum')} > 0)",
    ),
    Recording(
        "engine:llep_spilled_tokens:ratio5m",
        _rate('llep_spilled_tokens_total{direction="in"}') + f" / ({_rate('llep_rank_routed_tokens_total')} > 0)",
    ),
    # Seconds saved per second, and as a share of what plain EP would have taken; probes are few.
    Recording(
        "engine:llep_measured_gain:rate1h",
        f"sum by ({BY}) ({_worth('pairs', 'lent')} * {_worth('seconds', 'probed')} / ({_worth('pairs', 'probed')} > 0) "
        f"- {_worth('seconds', 'lent')})",
    ),
    Recording(
        "engine:llep_measured_gain:ratio1h",
        "engine:llep_measured_gain:rate1h / ((engine:llep_measured_gain:rate1h + "
        f"sum by ({BY}) ({_worth('seconds', 'lent')} and on ({BY}, phase) ({_worth('pairs', 'probed')} > 0))) > 0)",
    ),
    Recording("engine:llep_lend_bytes:rate5m", _rate('llep_lend_bytes_total{direction="in"}')),
)

_MODEL = "namespace, model_name"
_SERVER = f"{_MODEL}, pod, instance"  # an API server of vLLM's: of one model there may be several
_IS_LIVE = f'max by ({BY}) (llep_engine_state{{state="live"}}) == 1'
_IS_ACTIVE = f'max by ({BY}) (llep_mode{{mode="active"}}) == 1'
_WHO = "engine {{ $labels.engine }} of {{ $labels.model_name }}"
_SHARE = "{{ $value | humanizePercentage }}"

ALERTS = (
    Alert(
        name="LlepStalled",
        expr=(
            f"(sum by ({_SERVER}) ({vllm('num_requests_running')}) > 0) "
            f"and on ({_SERVER}) (sum by ({_SERVER}) (rate({vllm('generation_tokens_total')}[5m])) == 0) "
            f"and on ({_SERVER}) (sum by ({_SERVER}) (rate({vllm('prompt_tokens_total')}[5m])) == 0) "
            f"and on ({_MODEL}) group by ({_MODEL}) (llep_info)"
        ),
        minutes=2,
        severity="critical",
        summary="{{ $labels.model_name }} at {{ $labels.instance }} has requests running and makes no tokens",
        description="{{ $value }} requests run, none got a token in 5 minutes: a rank may wait for the others.",
    ),
    # vLLM's label `engine` numbers data-parallel ranks: where each has an API server of its own, llep sees one engine.
    Alert(
        name="LlepNotCounting",
        expr=(
            f"max by ({_MODEL}) (count by ({_MODEL}, engine) "
            f"(sum by ({_SERVER}, engine) (rate({vllm('prompt_tokens_total')}[5m])) > 0)) "
            f"> sum by ({_MODEL}) (sum by ({BY}) (rate(llep_steps_total[5m])) > bool 0)"
        ),
        minutes=5,
        severity="warning",
        summary="engines of {{ $labels.model_name }} serve, but llep counts no steps of theirs",
        description="vLLM reads prompts on {{ $value }} engines; on fewer of them reports say so.",
    ),
    Alert(
        name="LlepTargetDown",
        expr=f'up{{job="{JOB}"}} == 0',
        minutes=2,
        severity="warning",
        summary="the control plane at {{ $labels.instance }} can't be scraped",
        description="Serving goes on; nobody can see or steer it.",
    ),
    Alert(
        name="LlepMetricsMissing",
        expr=f'absent(llep_scheduler_up) unless on () (up{{job="{JOB}"}} == 0)',
        minutes=5,
        severity="warning",
        summary="no control plane shows metrics",
        description="Prometheus has no series llep_scheduler_up: no target, a wrong key, or another path.",
    ),
    Alert(
        name="LlepSchedulerDown",
        expr="llep_scheduler_up == 0",
        minutes=2,
        severity="warning",
        summary="the control plane at {{ $labels.instance }} does not reach the scheduler",
        description="Engines go on with the settings they have; loads and changes of settings wait.",
    ),
    Alert(
        name="LlepStoreClosed",
        expr="llep_scheduler_store_open == 0",
        minutes=2,
        severity="warning",
        summary="the scheduler can't store settings",
        description="Changes of settings are refused until its state folder can be written.",
    ),
    Alert(
        name="LlepEngineSilent",
        expr=(
            f'(max by ({BY}) (llep_engine_state{{state="stale"}}) == 1) '
            f"and on ({BY}) (time() - max by ({BY}) (llep_engine_last_seen_timestamp_seconds) < 3600)"
        ),
        minutes=2,
        severity="warning",
        summary=f"{_WHO} has fallen silent",
        description="A rank has sent no report for several intervals. The alert ends after an hour.",
    ),
    Alert(
        name="LlepNotHelping",
        expr=(
            f"(max by ({BY}) (engine:llep_unevenness_removed:ratio5m) < 0.1) "
            f'and on ({BY}) (sum by ({BY}) (engine:llep_plan_decisions:ratio5m{{decision=~"lend|replica"}}) > 0.05) '
            f"and on ({BY}) ({_IS_ACTIVE}) unless on ({BY}) (engine:llep_measured_gain:ratio1h > 0.02)"
        ),
        minutes=15,
        severity="warning",
        summary=f"{_WHO} lends, and ranks are no more even for it",
        description=f"Lends take away {_SHARE} of what balancedness lacks to 1, and no gain is measured.",
    ),
    Alert(
        name="LlepCostsTime",
        expr=(
            "(engine:llep_measured_gain:ratio1h < 0) "
            f'and on ({BY}) (sum by ({BY}) (increase(llep_worth_steps_total{{side="probed"}}[1h])) > 20) '
            f"and on ({BY}) ({_IS_ACTIVE})"
        ),
        minutes=15,
        severity="warning",
        summary=f"lending makes {_WHO} slower",
        description=f"Measured over an hour, layers that lent saved {_SHARE} of plain expert parallelism's time.",
    ),
    Alert(
        name="LlepImbalanceHigh",
        expr=(
            '(engine:llep_imbalance_ratio:mean5m{stage="after"} > 1.5) '
            f'and on ({BY}) (sum by ({BY}) (engine:llep_plan_decisions:ratio5m{{decision=~"small_batch|off"}}) < 0.5) '
            f"and on ({BY}) ({_IS_ACTIVE})"
        ),
        minutes=15,
        severity="warning",
        summary=f"{_WHO} stays uneven after balancing",
        description="The slowest rank still has {{ $value | humanize }} times the mean load, over layers and steps.",
    ),
    Alert(
        name="LlepErrors",
        expr=(
            f"(sum by ({BY}, component, type) (increase(llep_errors_total[10m])) > 0) "
            f"or sum by ({BY}, component, type) ((llep_errors_total > 0) unless llep_errors_total offset 10m)"
        ),
        minutes=0,
        severity="warning",
        summary=f"{_WHO}: errors of type {{{{ $labels.type }}}} in {{{{ $labels.component }}}}",
        description="{{ $value | humanize }} in 10 minutes.",
    ),
    Alert(
        name="LlepMemoryRefusals",
        expr=f'sum by ({BY}) (engine:llep_plan_decisions:ratio5m{{decision=~"memory|no_slot"}}) > 0.2',
        minutes=15,
        severity="warning",
        summary=f"{_WHO} lacks memory to balance",
        description=f"{_SHARE} of the decisions are not to lend, for want of slots or bytes.",
    ),
    Alert(
        name="LlepMemoryNearBudget",
        expr=(
            f"(max by ({BY}) (avg_over_time(llep_memory_used_bytes[15m]) / llep_memory_budget_bytes) > 0.9) "
            f"and on ({BY}) (engine:llep_layer_steps:rate5m > 0)"
        ),
        minutes=15,
        severity="info",
        summary=f"{_WHO} uses nearly all its slots",
        description=f"A rank has {_SHARE} of its lending pool in use on average; larger lends won't fit.",
    ),
    Alert(
        name="LlepDeviceMemoryLow",
        expr=f"(min by ({BY}) (llep_device_free_ratio) < 0.02) and on ({BY}) ({_IS_LIVE})",
        minutes=5,
        severity="warning",
        summary=f"a device of {_WHO} is nearly full",
        description=f"{_SHARE} of the memory is free; what grows next ends the engine.",
    ),
    Alert(
        name="LlepOverheadHigh",
        expr="engine:llep_overhead:ratio5m > 0.25",
        minutes=15,
        severity="warning",
        summary=f"{_WHO} spends much time on balancing",
        description=f"{_SHARE} of the time in MoE layers goes into planning and waiting for weights.",
    ),
    Alert(
        name="LlepSettingsNotApplied",
        expr=(
            f"((max by ({BY}) (llep_settings_desired_revision) > max by ({BY}) (llep_settings_held_revision)) "
            f"or (min by ({BY}) (llep_settings_last_apply_successful) == 0)) and on ({BY}) ({_IS_LIVE})"
        ),
        minutes=2,
        severity="warning",
        summary=f"{_WHO} does not take its settings",
        description="It is told a settings revision that not all of its ranks hold, or one refused it.",
    ),
    Alert(
        name="LlepRevisionsDiffer",
        expr=(
            f"(max by ({_MODEL}) (llep_settings_held_revision and on ({BY}) ({_IS_LIVE})) "
            f"- min by ({_MODEL}) (llep_settings_held_revision and on ({BY}) ({_IS_LIVE}))) > 0"
        ),
        minutes=10,
        severity="info",
        summary="engines of {{ $labels.model_name }} hold different settings revisions",
        description="The same model runs with different settings; fine while somebody tries something on one engine.",
    ),
    Alert(
        name="LlepDetailDropped",
        expr=f"max by ({BY}) (llep_metrics_levels_dropped) > 0",
        minutes=15,
        severity="info",
        summary=f"{_WHO} shows less detail than metrics_level asks for",
        description="{{ $value }} levels are left out, since metrics_max_series would be exceeded.",
    ),
)


def rules(runbook: str = RUNBOOK, *, is_through_ray: bool = False) -> dict[str, Any]:
    """The content of a Prometheus rules file. runbook: where docs/runbook.md can be read, as a link's beginning.

    is_through_ray: for metrics that come through Ray's agents.
    """
    groups = {
        "llep.recordings": [recording.as_rule() for recording in RECORDINGS],
        "llep.alerts": [alert.as_rule(runbook) for alert in ALERTS],
    }
    for rule in itertools.chain(*groups.values()) if is_through_ray else ():
        rule["expr"] = through_ray(rule["expr"])
    return {"groups": [{"name": name, "rules": of_group} for name, of_group in groups.items()]}


def prometheus_rule(runbook: str = RUNBOOK, *, is_through_ray: bool = False) -> dict[str, Any]:
    """The same as an object for the Prometheus operator."""
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "llep"},
        "spec": rules(runbook, is_through_ray=is_through_ray),
    }
