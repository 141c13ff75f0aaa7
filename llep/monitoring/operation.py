"""Rows of the overview about what balancing costs, what users feel, and whether llep itself is well."""

from __future__ import annotations

from llep.monitoring.grafana import Kind, Panel, Query, Row, Unit
from llep.monitoring.queries import MEASURED_GAIN, RANK, RATE, RECEIVED, SELECT, VLLM, newest, quantile, rate
from llep.monitoring.vllm import vllm

COST = Row(
    "Cost",
    [
        Panel(
            kind=Kind.TIMESERIES,
            title="Time of each phase, 99th percentile",
            description="Per rank, layer and step. plan should stay in microseconds; lend is what waiting for weights "
            "costs, and stays small where transfers hide behind the home experts' work.",
            queries=[Query(quantile(0.99, f"llep_phase_seconds_bucket{{{SELECT}}}", "phase"), "{{phase}}")],
            unit=Unit.SECONDS,
        ),
        Panel(
            kind=Kind.TIMESERIES,
            title="Share of each phase in MoE layers",
            description="Where MoE layers spend their time. Good: compute takes nearly all.",
            queries=[
                Query(
                    f"{rate('llep_phase_seconds_sum', by='phase')} / ignoring (phase) group_left () "
                    f"({rate('llep_phase_seconds_sum')} > 0)",
                    "{{phase}}",
                )
            ],
            unit=Unit.RATIO,
            is_stacked=True,
            low=0,
            high=1,
        ),
        Panel(
            kind=Kind.TIMESERIES,
            title="Time in MoE layers by rank",
            description="Seconds per second, waiting for others included. All ranks wait for the slowest: equal lines "
            "alone say little; falling lines at equal traffic are the gain.",
            queries=[Query(rate("llep_layer_seconds_total", by="engine, ep_rank"), "{{engine}} rank {{ep_rank}}")],
            unit=Unit.SECONDS,
        ),
        Panel(
            kind=Kind.TIMESERIES,
            title="Weights lent",
            description="Bytes of expert weights received per second, by rank and link. Compare it with what the link "
            "can carry; much over the network: set lend_scope=node.",
            queries=[
                Query(
                    rate("llep_lend_bytes_total", RECEIVED, "engine, ep_rank, link"),
                    "{{engine}} rank {{ep_rank}} {{link}}",
                )
            ],
            unit=Unit.BYTES_PER_S,
        ),
        Panel(
            kind=Kind.TIMESERIES,
            title="Spilled share",
            description="Share of the pairs computed off their home rank: what had to move to be even.",
            queries=[
                Query(
                    f"{rate('llep_spilled_tokens_total', RECEIVED, 'engine')} / "
                    f"({rate('llep_rank_routed_tokens_total', by='engine')} > 0)",
                    "{{engine}}",
                )
            ],
            unit=Unit.RATIO,
            low=0,
        ),
        Panel(
            kind=Kind.TIMESERIES,
            title="Slots in use against the budget",
            description="Bytes of the lending pool in use in the last step that lent, on the fullest rank. The budget "
            "is fixed at start. Always full, with decisions no_slot: more slots may pay.",
            queries=[
                Query(newest("llep_memory_used_bytes"), "{{engine}} used"),
                Query(newest("llep_memory_peak_bytes"), "{{engine}} peak"),
                Query(newest("llep_memory_budget_bytes"), "{{engine}} budget", is_dashed=True),
            ],
            unit=Unit.BYTES,
            low=0,
        ),
        Panel(
            kind=Kind.TIMESERIES,
            title="Gain, predicted and measured",
            description="Seconds saved per second inside MoE layers. Predicted needs a cost model; measured comes from "
            "probes of the last hour. Measured below 0: lending costs time. Far below predicted: calibrate anew.",
            queries=[
                Query(rate("llep_predicted_gain_seconds_total", by="engine"), "{{engine}} predicted", is_dashed=True),
                Query(f"sum by (engine) ({MEASURED_GAIN})", "{{engine}} measured"),
            ],
            unit=Unit.SECONDS,
        ),
        Panel(
            kind=Kind.TIMESERIES,
            title="Device memory free",
            description="Share of each rank's device that is free. llep takes its buffers at start and nothing later; "
            "below 2% whatever grows next ends the engine: lower gpu_memory_utilization or slots_per_rank.",
            queries=[Query(newest("llep_device_free_ratio", "engine, ep_rank", RANK), "{{engine}} rank {{ep_rank}}")],
            unit=Unit.RATIO,
            low=0,
        ),
        Panel(
            kind=Kind.TIMESERIES,
            title="Resident replicas",
            description="Copies whose weights are in place, of the placement under way, and that placement's revision. "
            "Copies that stop rising: weights are moved between steps only, at most replica_bytes_per_s.",
            queries=[
                Query(newest("llep_placement_filled_copies"), "{{engine}} copies filled"),
                Query(newest("llep_placement_revision"), "{{engine}} placement", is_dashed=True),
            ],
            low=0,
        ),
    ],
)
USERS = Row(
    "What users feel (vLLM)",
    [
        *(
            Panel(
                kind=Kind.TIMESERIES,
                title=title,
                description=description,
                queries=[
                    Query(quantile(q, vllm(f"{metric}_bucket", VLLM)), name)
                    for q, name in ((0.99, "p99"), (0.5, "median"))
                ],
                unit=Unit.SECONDS,
            )
            for title, metric, description in (
                (
                    "Time to first token",
                    "time_to_first_token_seconds",
                    "Queueing and prefill. This is where balancing shows: compare before and after a change of mode.",
                ),
                (
                    "Time between tokens",
                    "inter_token_latency_seconds",
                    "Decode. Balancing leaves small batches alone: if this rises with it, raise min_batch_tokens.",
                ),
            )
        ),
        Panel(
            kind=Kind.TIMESERIES,
            title="Tokens",
            description="Tokens per second read (prompt) and written (generation).",
            queries=[
                Query(f"sum (rate({vllm('prompt_tokens_total', VLLM)}[{RATE}]))", "prompt"),
                Query(f"sum (rate({vllm('generation_tokens_total', VLLM)}[{RATE}]))", "generation"),
            ],
            unit=Unit.PER_S,
        ),
        Panel(
            kind=Kind.TIMESERIES,
            title="Requests",
            description="Running and waiting. Waiting that grows: more traffic than the engines can serve.",
            queries=[
                Query(f"sum ({vllm('num_requests_running', VLLM)})", "running"),
                Query(f"sum ({vllm('num_requests_waiting', VLLM)})", "waiting"),
            ],
            width=12,
        ),
        Panel(
            kind=Kind.TIMESERIES,
            title="KV cache in use",
            description="At 100% requests are preempted. The lending pool takes its bytes from here.",
            queries=[Query(f"max by (engine) ({vllm('kv_cache_usage_perc', VLLM)})", "engine {{engine}}")],
            unit=Unit.RATIO,
            low=0,
            high=1,
            width=12,
        ),
    ],
)
CONTROL = Row(
    "Control plane",
    [
        Panel(
            kind=Kind.STAT,
            title="Scheduler reached",
            description="1: the scheduler answers the control plane. 0: serving goes on, loads and changes wait.",
            queries=[Query("min (llep_scheduler_up)", is_instant=True)],
            steps=((None, "red"), (1, "green")),
            width=4,
        ),
        Panel(
            kind=Kind.STAT,
            title="Settings can be stored",
            description="0: the scheduler's state folder can't be written; changes are refused.",
            queries=[Query("min (llep_scheduler_store_open)", is_instant=True)],
            steps=((None, "red"), (1, "green")),
            width=4,
        ),
        Panel(
            kind=Kind.TIMESERIES,
            title="Age of the newest report",
            description="Seconds since any rank of the engine reported. Good: about report_interval_s and the scrape "
            "interval.",
            queries=[
                Query(f"time() - {newest('llep_engine_last_seen_timestamp_seconds')}", "{{engine}}"),
            ],
            unit=Unit.SECONDS,
        ),
        Panel(
            kind=Kind.TIMESERIES,
            title="Settings revisions",
            description="Wanted, held by all ranks, live. They differ for a second or two after a change; an idle "
            "engine holds a revision that goes live with its next step.",
            queries=[
                Query(newest("llep_settings_desired_revision"), "{{engine}} wanted", is_dashed=True),
                Query(newest("llep_settings_held_revision"), "{{engine}} held"),
                Query(newest("llep_settings_revision"), "{{engine}} live"),
            ],
        ),
        Panel(
            kind=Kind.TIMESERIES,
            title="Steps",
            description="Forward passes with real tokens per second, by phase.",
            queries=[Query(rate("llep_steps_total", by="engine, phase"), "{{engine}} {{phase}}")],
            unit=Unit.PER_S,
        ),
        Panel(
            kind=Kind.TIMESERIES,
            title="Errors",
            description="Errors per second by component and type; none is good. What each means is in the runbook.",
            queries=[
                Query(
                    f"{rate('llep_errors_total', by='engine, component, type')} or vector(0)",
                    "{{engine}} {{component}} {{type}}",
                )
            ],
            unit=Unit.PER_S,
        ),
        Panel(
            kind=Kind.TIMESERIES,
            title="Time of a scrape",
            description="What Prometheus waits for /metrics. Good: below 0.1 s.",
            queries=[Query('max by (instance) (scrape_duration_seconds{job="llep"})', "{{instance}}")],
            unit=Unit.SECONDS,
        ),
    ],
)
