"""The dashboard llep-overview: from the verdict down to what users feel."""

from __future__ import annotations

from llep.monitoring.effect import IMBALANCE, LAYERS, RANKS, VERDICT
from llep.monitoring.grafana import Annotation, Dashboard, Variable
from llep.monitoring.operation import CONTROL, COST, USERS
from llep.monitoring.queries import SELECT

OVERVIEW = Dashboard(
    uid="llep-overview",
    title="llep overview",
    description="Least-loaded expert parallelism: is it worth it, what does it do, what does it cost.",
    page="http://127.0.0.1:8088",
    variables=[
        Variable("model_name", "model", "label_values(llep_info, model_name)"),
        Variable("engine", "engine", 'label_values(llep_info{model_name=~"$model_name"}, engine)'),
        Variable("ep_rank", "rank", f"label_values(llep_rank_routed_tokens_total{{{SELECT}}}, ep_rank)"),
        Variable("layer", "layer", f"label_values(llep_layer_imbalance_ratio_count{{{SELECT}}}, layer)"),
    ],
    annotations=[
        Annotation(
            "settings", f"changes(llep_settings_revision{{{SELECT}}}[1m]) > 0", "blue", "new settings on {{engine}}"
        ),
        Annotation(
            "mode",
            f"llep_mode{{{SELECT}}} == 1 unless on (engine, mode) llep_mode{{{SELECT}}} offset 1m == 1",
            "purple",
            "{{engine}} is in mode {{mode}}",
        ),
        Annotation(
            "placements",
            f"changes(llep_placement_revision{{{SELECT}}}[1m]) > 0",
            "green",
            "new placement on {{engine}}",
        ),
        Annotation(
            "starts",
            f"changes(llep_engine_start_timestamp_seconds{{{SELECT}}}[1m]) > 0",
            "orange",
            "{{engine}} started anew",
        ),
        Annotation(
            "errors",
            f"sum by (engine, component, type) (increase(llep_errors_total{{{SELECT}}}[1m])) > 0",
            "red",
            "{{engine}}: {{component}} {{type}}",
        ),
    ],
    rows=[VERDICT, IMBALANCE, RANKS, LAYERS, COST, USERS, CONTROL],
)
