"""The PromQL that panels are made of: selections by the dashboard's variables, rates, means and quantiles."""

from __future__ import annotations

SELECT = 'model_name=~"$model_name", engine=~"$engine"'
VLLM = 'model_name=~"$model_name"'  # there `engine` is a number of vLLM's own
RATE = "$__rate_interval"
BEFORE, AFTER = f'stage="before", {SELECT}', f'stage="after", {SELECT}'
PREFILL = 'phase="prefill"'
RANK = f'ep_rank=~"$ep_rank", {SELECT}'
RECEIVED = f'direction="in", {SELECT}'
OVERHEAD = f'phase=~"plan|lend", {SELECT}'


def filled(expr: str, rate_interval: str) -> str:
    """The expression as Grafana sends it while everything is chosen above the dashboard."""
    for name in ("model_name", "engine", "ep_rank", "layer"):
        expr = expr.replace(f"${name}", ".*")
    return expr.replace(RATE, rate_interval)


def rate(metric: str, select: str = SELECT, by: str = "") -> str:
    return f"sum{f' by ({by}) ' if by else ' '}(rate({metric}{{{select}}}[{RATE}]))"


def mean(summary: str, select: str = SELECT, by: str = "") -> str:
    return f"({rate(f'{summary}_sum', select, by)} / ({rate(f'{summary}_count', select, by)} > 0))"


def _worth(unit: str, side: str) -> str:
    # Probes are few: an hour of them, whatever the panel's time range.
    return f'sum by (engine, phase) (rate(llep_worth_{unit}_total{{side="{side}", {SELECT}}}[1h]))'


# Seconds per second, by engine and phase: what the layers that lent took, and would have taken under plain EP.
LENT_S = _worth("seconds", "lent")
PLAIN_S = f"({_worth('pairs', 'lent')} * {_worth('seconds', 'probed')} / ({_worth('pairs', 'probed')} > 0))"
MEASURED_GAIN = f"({PLAIN_S} - {LENT_S})"


def newest(metric: str, by: str = "engine", select: str = SELECT) -> str:
    return f"max by ({by}) ({metric}{{{select}}})"


def quantile(q: float, buckets: str, by: str = "") -> str:
    """buckets: a selector of a histogram's buckets."""
    return f"histogram_quantile({q:g}, sum by (le{f', {by}' if by else ''}) (rate({buckets}[{RATE}])))"
