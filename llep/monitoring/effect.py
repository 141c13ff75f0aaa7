"""Rows of the overview about what balancing does: the verdict, imbalance, ranks, layers and experts."""

from __future__ import annotations

from llep.monitoring.grafana import Kind, Panel, Query, Row, Unit
from llep.monitoring.queries import (
    AFTER,
    BEFORE,
    MEASURED_GAIN,
    OVERHEAD,
    PLAIN_S,
    PREFILL,
    RANK,
    SELECT,
    mean,
    newest,
    rate,
)

BAD_LOW = ((None, "red"), (0.6, "orange"), (0.8, "green"))

VERDICT = Row(
    "Verdict",
    [
        Panel(
            kind=Kind.STAT,
            title="Prefill balancedness",
            description="Mean / max of rank loads after balancing, in prefill, where most of the time is to be saved; "
            "100% is perfectly even. Below 80%: see decisions. Decode: see balancedness by phase.",
            queries=[Query(mean("llep_balancedness_ratio", f"{PREFILL}, {AFTER}"))],
            unit=Unit.RATIO,
            steps=BAD_LOW,
            width=3,
            height=5,
        ),
        Panel(
            kind=Kind.STAT,
            title="Prefill peak removed",
            description="How much smaller the largest rank load became in prefill, over layers and steps. 0% where "
            "routing is even already; near 0% while the imbalance before is high: see decisions.",
            queries=[
                Query(
                    f"1 - {mean('llep_balancedness_ratio', f'{PREFILL}, {BEFORE}')} "
                    f"/ {mean('llep_balancedness_ratio', f'{PREFILL}, {AFTER}')}"
                )
            ],
            unit=Unit.RATIO,
            width=3,
            height=5,
        ),
        Panel(
            kind=Kind.STAT,
            title="Time saved",
            description="How much shorter lending made the layers that lent, measured in the last hour by probes "
            "(probe_ratio). Below 0% it costs time: raise min_chunk_tokens or imbalance_threshold. Empty: no probe.",
            queries=[Query(f"sum ({MEASURED_GAIN}) / (sum ({PLAIN_S}) > 0)")],
            unit=Unit.RATIO,
            steps=((None, "red"), (0, "orange"), (0.02, "green")),
            width=3,
            height=5,
        ),
        Panel(
            kind=Kind.STAT,
            title="Overhead",
            description="Share of the time in MoE layers spent on planning and on waiting for weights. Above 25%: "
            "raise min_chunk_tokens or min_batch_tokens.",
            queries=[Query(f"{rate('llep_phase_seconds_sum', OVERHEAD)} / ({rate('llep_phase_seconds_sum')} > 0)")],
            unit=Unit.RATIO,
            steps=((None, "green"), (0.15, "orange"), (0.25, "red")),
            width=3,
            height=5,
        ),
        Panel(
            kind=Kind.STAT,
            title="Mode",
            description="active balances; shadow plans and moves nothing; observe counts; off does nothing.",
            queries=[Query(f"max by (engine, mode) (llep_mode{{{SELECT}}}) == 1", "{{engine}}: {{mode}}", True)],
            shows_name=True,
            width=3,
            height=5,
        ),
        Panel(
            kind=Kind.STAT,
            title="Settings revision",
            description="The revision that every step runs under. Different numbers on engines of one model: see the "
            "row control plane.",
            queries=[Query(newest("llep_settings_revision"), "{{engine}}", True)],
            width=3,
            height=5,
        ),
        Panel(
            kind=Kind.STAT,
            title="Placement",
            description="The revision in which the resident replicas that are switched on were ordered; 0: none. It "
            "changes when experts stay hot for minutes and the setting replicas is apply.",
            queries=[Query(newest("llep_placement_revision"), "{{engine}}", True)],
            width=3,
            height=5,
        ),
        Panel(
            kind=Kind.STAT,
            title="Engines",
            description="Engines by state. stale: a rank has sent no report for several intervals; what is shown of it "
            "is old.",
            queries=[Query(f"sum by (state) (llep_engine_state{{{SELECT}}})", "{{state}}", True)],
            width=3,
            height=5,
        ),
    ],
)
IMBALANCE = Row(
    "Imbalance",
    [
        Panel(
            kind=Kind.TIMESERIES,
            title="Imbalance ratio before and after",
            description="Max / mean of rank loads in prefill, harmonic mean over layers and steps: the slowest rank's "
            "load in units of an even one. Good: after stays at the threshold or below.",
            queries=[
                Query(
                    f"1 / {mean('llep_balancedness_ratio', f'{PREFILL}, {SELECT}', 'engine, stage')}",
                    "{{engine}} {{stage}}",
                ),
                Query(newest("llep_settings_imbalance_threshold"), "{{engine}} threshold", is_dashed=True),
            ],
            low=1,
        ),
        Panel(
            kind=Kind.TIMESERIES,
            title="Balancedness by phase",
            description="Mean / max of rank loads, mean over layers and steps. Good: prefill after lies near 100%. "
            "Decode is left alone by step plans, since small batches gain nothing; only resident replicas lift it.",
            queries=[Query(mean("llep_balancedness_ratio", SELECT, "phase, stage"), "{{phase}} {{stage}}")],
            unit=Unit.RATIO,
            high=1,
        ),
        Panel(
            kind=Kind.TIMESERIES,
            title="Decisions",
            description="Decisions per second, one per layer and step. lend: balanced by lending; balanced: was even "
            "enough; small_batch: too few tokens; no_gain: would cost more than it brings; no_slot, memory: no room.",
            queries=[Query(f"{rate('llep_plan_decisions_total', by='decision')} > 0", "{{decision}}")],
            unit=Unit.PER_S,
            is_stacked=True,
        ),
        *(
            Panel(
                kind=Kind.HEATMAP,
                title=f"Imbalance ratio {stage} balancing, all layer-steps",
                description=f"How many layers of how many steps had which imbalance ratio {stage} balancing. {good}",
                queries=[Query(rate("llep_imbalance_ratio_bucket", select, "le"), "{{le}}")],
                is_bucketed=True,
                width=12,
            )
            for stage, select, good in (
                ("before", BEFORE, "A band that lies high is what llep is for."),
                ("after", AFTER, "Good: one band at the bottom; a second band above it is what could not be balanced."),
            )
        ),
    ],
)
RANKS = Row(
    "Ranks",
    [
        Panel(
            kind=Kind.TIMESERIES,
            title="Routed to each rank",
            description="Token-expert pairs per second that plain expert parallelism would compute on each rank. Lines "
            "far apart are a lasting skew.",
            queries=[
                Query(
                    rate("llep_rank_routed_tokens_total", RANK, "engine, ep_rank"),
                    "{{engine}} rank {{ep_rank}}",
                )
            ],
            unit=Unit.PER_S,
        ),
        Panel(
            kind=Kind.TIMESERIES,
            title="Computed on each rank",
            description="Token-expert pairs per second that each rank really computed. Good: the lines lie on each "
            "other.",
            queries=[
                Query(
                    rate("llep_rank_computed_tokens_total", RANK, "engine, ep_rank"),
                    "{{engine}} rank {{ep_rank}}",
                )
            ],
            unit=Unit.PER_S,
        ),
        Panel(
            kind=Kind.HEATMAP,
            title="Load of each rank over its fair share",
            description="Computed pairs of a rank / the mean over ranks. 1 everywhere is even; a row that stays dark "
            "is a rank that is always hot: its experts are too many or too hot for the slots there are.",
            queries=[
                Query(
                    f"{rate('llep_rank_computed_tokens_total', by='engine, ep_rank')} / on (engine) group_left () "
                    f"(avg by (engine) ({rate('llep_rank_computed_tokens_total', by='engine, ep_rank')}) > 0)",
                    "{{engine}} rank {{ep_rank}}",
                )
            ],
        ),
    ],
)
LAYERS = Row(
    "Layers and experts (metrics_level layer or layer_rank)",
    [
        Panel(
            kind=Kind.TABLE,
            title="Load of each rank in each layer over its fair share",
            description="Computed pairs / mean over ranks, in the last 5 minutes; needs metrics_level layer_rank. A "
            "layer with one dark cell is one that can't be balanced with the slots there are.",
            queries=[
                Query(
                    'sum by (layer, ep_rank) (rate(llep_layer_rank_computed_tokens_total{layer=~"$layer", '
                    f"{SELECT}}}[5m])) / on (layer) group_left () (avg by (layer) (sum by (layer, ep_rank) "
                    f'(rate(llep_layer_rank_computed_tokens_total{{layer=~"$layer", {SELECT}}}[5m]))) > 0)',
                    "{{layer}} {{ep_rank}}",
                    True,
                )
            ],
            steps=((None, "green"), (1.3, "orange"), (2, "red")),
            row_by="layer",
            column_by="ep_rank",
            height=10,
        ),
        Panel(
            kind=Kind.BARGAUGE,
            title="Ten worst layers after balancing",
            description="Mean imbalance ratio after balancing in the last 5 minutes, of decode too, which lifts all "
            "layers alike; needs metrics_level layer. One far above the others: more slots, or look at its experts.",
            queries=[
                Query(
                    f"topk(10, sum by (engine, layer) (rate(llep_layer_imbalance_ratio_sum{{{AFTER}}}[5m])) / "
                    f"(sum by (engine, layer) (rate(llep_layer_imbalance_ratio_count{{{AFTER}}}[5m])) > 0))",
                    "{{engine}} layer {{layer}}",
                    True,
                )
            ],
            steps=((None, "green"), (1.3, "orange"), (2, "red")),
            low=1,
            height=10,
        ),
        Panel(
            kind=Kind.BARGAUGE,
            title="Hottest experts",
            description="Load / fair load of the ten hottest experts over all layers in the last minute. One "
            "that has more than a whole rank's fair share (num_experts / ep_size) must be split over ranks.",
            queries=[Query(newest("llep_hot_expert_load_ratio", "engine, place"), "{{engine}} place {{place}}", True)],
            steps=((None, "green"), (4, "orange"), (16, "red")),
            low=0,
            link=("Which experts these are", "$page/"),
            height=10,
        ),
    ],
)
