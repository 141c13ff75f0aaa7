"""How engines and settings look from outside: views made from what the scheduler knows. Pure."""

from __future__ import annotations

from collections.abc import Callable

from llep.config import Settings, is_hot
from llep.messages import EngineInfo, Report
from llep.scheduler.desired import Desired, sources
from llep.scheduler.windows import Engine
from llep.views import AppliedView, EngineState, EngineView, RankView, SettingsView, SettingView

ToUnixTime = Callable[[float], float]


def engine_view(engine: Engine, desired_revision: int, to_unix_time: ToUnixTime) -> EngineView:
    """One engine. `to_unix_time` turns the windows' monotonic seconds into unix time."""
    info, newest = engine.info, _newest(engine)
    return EngineView(
        id=info.engine,
        model_name=info.model_name,
        state=engine.state,
        ep_size=info.ep_size,
        tp_size=info.tp_size,
        dp_size=info.dp_size,
        backend=info.backend,
        quantization=info.quantization,
        dtype=info.dtype,
        vllm_version=info.vllm_version,
        llep_version=info.llep_version,
        num_layers=len(info.layer_numbers),
        num_experts=info.num_experts,
        top_k=info.top_k,
        slots_per_rank=info.slots_per_rank,
        bytes_per_slot=info.bytes_per_slot,
        mode=engine.live_settings.mode,
        planner=str(engine.live_settings.planner),
        desired_revision=desired_revision,
        held_revision=engine.held_revision,
        live_revision=engine.live_revision,
        live_since_step=newest.live_since_step if newest else 0,
        last_apply_error=engine.last_apply_error,
        steps=newest.steps if newest else {},
        last_seen_s=to_unix_time(engine.last_seen_s),
        ranks=[
            _rank_view(report, to_unix_time(engine.seen_s[rank])) for rank, report in sorted(engine.reports.items())
        ],
    )


def settings_view(engine: Engine | None, desired: Desired) -> SettingsView:
    """Effective settings of an engine, or of one that would start with defaults. Raises SettingsError."""
    name = engine.info.engine if engine else None
    effective = desired.effective(name, engine.start if engine else Settings()).dump()
    source = sources(desired, name, _info(engine).setting_sources if engine else {})
    return SettingsView(
        revision=desired.revision,
        engine=name,
        settings=[
            SettingView(
                key=key, value=effective[key], source=source[key], hot=is_hot(key), description=info.description or ""
            )
            for key, info in Settings.model_fields.items()
        ],
    )


def applied_view(engine: Engine, revision: int) -> AppliedView:
    """Where the revision stands on an engine."""
    newest = _newest(engine)
    if engine.live_revision >= revision:
        state = "live"
    elif engine.held_revision >= revision:
        state = "held"
    else:
        state = "away" if engine.state is EngineState.STALE else "sent"
    step = newest.live_since_step if newest and state == "live" else None
    return AppliedView(engine=engine.info.engine, state=state, revision=engine.live_revision, step=step)


def _info(engine: Engine) -> EngineInfo:
    """Of the lowest rank, too: sources of settings may differ between machines."""
    newest = _newest(engine)
    return newest.info if newest else engine.info


def _newest(engine: Engine) -> Report | None:
    """The report of the lowest rank, which speaks for the group."""
    return engine.reports[min(engine.reports)] if engine.reports else None


def _rank_view(report: Report, last_seen_s: float) -> RankView:
    return RankView(
        rank=report.rank,
        last_seen_s=last_seen_s,
        held_revision=report.held_revision,
        live_revision=report.live_revision,
        memory_budget_bytes=report.memory_budget_bytes,
        memory_used_bytes=report.memory_used_bytes,
        memory_peak_bytes=report.memory_peak_bytes,
    )
