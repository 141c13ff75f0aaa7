"""The PromQL that panels are made of: selections by the dashboard's variables, rates, means and quantiles."""

from __future__ import annotations

SELECT = 'model_name=~"$model_name", engine=~"$engine"'
VLLM = 'model_name=~"$model_name"'  # there `engine` is a number of vLLM's own
RATE = "$__rate_interval"
BEFORE, AFTER = f'stage="before", {SELECT}', f'stage="after", {SELECT}'
RANK = f'ep_rank=~"$ep_rank", {SELECT}'
RECEIVED = f'direction="in", {SELECT}'
OVERHEAD = f'phase=~"plan|lend", {SELECT}'


def rate(metric: str, select: str = SELECT, by: str = "") -> str:
    return f"sum{f' by ({by}) ' if by else ' '}(rate({metric}{{{select}}}[{RATE}]))"


def mean_imbalance(select: str, by: str = "") -> str:
    above, below = rate("llep_imbalance_ratio_sum", select, by), rate("llep_imbalance_ratio_count", select, by)
    return f"({above} / ({below} > 0))"


def newest(metric: str, by: str = "engine", select: str = SELECT) -> str:
    return f"max by ({by}) ({metric}{{{select}}})"


def quantile(q: float, buckets: str, by: str = "") -> str:
    """buckets: a selector of a histogram's buckets."""
    return f"histogram_quantile({q:g}, sum by (le{f', {by}' if by else ''}) (rate({buckets}[{RATE}])))"
