"""`python -m llep_server.reference`: docs/metrics.md, made from the families themselves."""

from __future__ import annotations

from llep.config import Settings
from llep.messages import IMBALANCE_BUCKETS, SECONDS_BUCKETS
from llep_server.families import FAMILIES, SCHEDULER_FAMILIES
from llep_server.samples import ENGINE_LABELS, Family, Level

INTRODUCTION = """\
# Metrics

Made from the code by `python -m llep_server.reference > docs/metrics.md`; a test keeps it so.

The control plane shows all engines at `/metrics`, as Prometheus text or OpenMetrics. `llep export rules DIR` writes
recording rules and alerts for it, `llep export dashboards DIR` the Grafana dashboards. To scrape it:

```yaml
scrape_configs:
  - job_name: llep
    static_configs: [{targets: ["127.0.0.1:8088"]}]
    # authorization: {credentials_file: /etc/prometheus/llep-key}   # where the control plane has a keys file
```

## What the numbers mean

- **Tokens are token-expert pairs** wherever a rank or an expert counts them: a token counts top-k times in
  every layer. Routed is what plain expert parallelism would compute on a rank, computed is what the rank did;
  over all ranks both add up to tokens x top-k x layers, exactly. `llep_tokens_total` alone counts each token
  once.
- Padding, dummy, profiling and warm-up steps are not counted. In mode `off` steps are counted, loads are not;
  in mode `shadow` the stage `after` is what the plan would have brought, while computed equals routed.
- Time and memory are each rank's own; all else is held alike by the ranks of an engine and told by rank 0.
- **What lending is worth is measured**, by a control group: a share of the steps that would lend, `probe_ratio`,
  is computed by plain EP instead. Over any span of time lending saved, in seconds inside MoE layers, pairs lent x
  (seconds probed / pairs probed) - seconds lent, of `llep_worth_pairs_total` and `llep_worth_seconds_total`;
  pairs are those of the most loaded rank under plain EP, so that sizes of batches cancel out.
  `llep_measured_gain_seconds` is that since the engine's start: a gauge, since a gain can turn into a loss and an
  estimate is corrected, while the counters it is made of never fall. It is absent before the first probe.
- `llep_predicted_gain_seconds_total` is what plans promised, also those of mode shadow: compare it with the
  measured gain.
- `link="network"` is shown for engines that span nodes only.
- A page is made from the newest reports, at most once a second. An engine that falls silent keeps its last
  values for a day: look at `llep_engine_state` and `llep_engine_last_seen_timestamp_seconds` before believing
  gauges.
- **Counters start at 0 when an engine starts**, as Prometheus expects; a restart of the agent, the scheduler,
  the control plane or Ray changes nothing. `llep_engine_start_timestamp_seconds` tells since when an engine
  counts, so that a restart between two scrapes is seen.
"""
CLOSING = """\
## How many series

`metrics_level` (`off`, `rank`, `layer`, `layer_rank`) chooses the detail; at `rank`, the default, an engine
with 8 ranks shows at most 300 series. An engine that would show more than `metrics_max_series` ({most}) drops
to the level below, says so in the control plane's log, and `llep_metrics_levels_dropped` is above 0 (alert
LlepDetailDropped).

## What may change

Names, types and labels are kept within a minor version. A family that goes is marked "deprecated" in its help text and
in CHANGELOG.md for one minor version before, and is shown next to what replaces it for so long; new families and new
values of labels that are sets (`decision`, `type`) may come with any version. `tests/server/metric_names.txt` holds all
names: a change that does not touch it on purpose fails.
"""


def markdown() -> str:
    """The whole page."""
    shared = " and ".join(f"`{label}`" for label in ENGINE_LABELS)
    parts = [
        INTRODUCTION,
        f"## Families\n\nAll but the first {len(SCHEDULER_FAMILIES)} have the labels {shared} too.\n",
    ]
    parts += [_table(level) for level in Level]
    parts += [
        f"Buckets of `llep_imbalance_ratio`: {_list(IMBALANCE_BUCKETS)}. "
        f"Buckets of `llep_phase_seconds`: {_list(SECONDS_BUCKETS)}.\n",
        CLOSING.format(most=Settings().metrics_max_series),
    ]
    return "\n".join(parts)


def _table(level: Level) -> str:
    title = "Always" if level is Level.ALWAYS else f"From `metrics_level` {level.name.lower()}"
    families = [_row(family) for family in FAMILIES if family.level is level]
    if level is Level.ALWAYS:
        families = [f"| `{name}` | gauge | | {help} |" for name, help in SCHEDULER_FAMILIES.items()] + families
    return "\n".join([f"### {title}\n", "| name | type | labels | what it is |", "|---|---|---|---|", *families, ""])


def _row(family: Family) -> str:
    labels = ", ".join(f"`{label}`" for label in family.labels)
    return f"| `{family.name}` | {family.type_name} | {labels} | {family.help} |"


def _list(bounds: tuple[float, ...]) -> str:
    return ", ".join(f"{bound:g}" for bound in bounds)


if __name__ == "__main__":
    print(markdown(), end="")
