"""How loads look from outside: views made from an engine's windows. Pure; the caller passes its monotonic clock in."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from llep.config import Settings
from llep.loads import imbalance_ratio
from llep.messages import LAYER_PHASES, STEP_PHASES
from llep.planning.replicas import Forecast, Replica
from llep.scheduler.decide_placement import Ground, refusal
from llep.scheduler.evidence import LENT_STEPS, PROBED_PAIRS, PROBED_STEPS, Evidence, measured_gain, saved_s
from llep.scheduler.show import ToUnixTime
from llep.scheduler.totals import DECISIONS, Columns, Window, empty_window
from llep.scheduler.windows import Engine, KeptPlan
from llep.views import (
    EngineLoads,
    HistoryPoint,
    HotExpert,
    LendView,
    LoadMatrix,
    PlanView,
    RankLoads,
    WorthView,
)

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

MOST_POINTS = 2000
PLACEMENT_WINDOWS = 12.0  # of decide_every_s
HOT_PLACES = 10
HOT_WINDOW_S = 60.0
Replicas = Iterable[tuple[int, int, int]]


def loads(
    engine: Engine, window_s: float, now_s: float, desired_interval_s: float = 0.0, phase: str | None = None
) -> EngineLoads:
    """Loads over the last window_s seconds of reports, or what there is of it; nothing if rank 0 has fallen silent."""
    window = window_of(engine, window_s, now_s, desired_interval_s)
    chosen = _chosen(phase)
    layer_steps = float(window.sum("layer_steps_P")[chosen].sum())
    imbalance_S = window.sum("imbalance_sum_PS")[chosen].sum(axis=0) / max(layer_steps, 1.0)
    routed_R, computed_R, decisions_D = (
        window.sum(name)[chosen].sum(axis=0) for name in ("routed_PR", "computed_PR", "decisions_PD")
    )
    return EngineLoads(
        engine=engine.info.engine,
        model_name=engine.info.model_name,
        window_s=window.seconds,
        tokens=int(window.sum("tokens_P")[chosen].sum()),
        layer_steps=int(layer_steps),
        imbalance_ratio_before=float(imbalance_S[0]) if layer_steps else None,
        imbalance_ratio_after=float(imbalance_S[1]) if layer_steps else None,
        lends=int(window.sum("lends_PK")[chosen].sum()),
        lend_bytes=int(window.sum("lend_bytes_P")[chosen].sum()),
        spilled_tokens=int(window.sum("spilled_tokens_P")[chosen].sum()),
        decisions={name: int(n) for name, n in zip(DECISIONS, decisions_D, strict=True) if n},
        layer_seconds=float(window.sum("layer_seconds_P")[chosen].sum()),
        worth=_worth(engine, window, chosen),
        ranks=[
            RankLoads(
                rank=rank,
                routed_tokens=int(routed_R[rank]),
                computed_tokens=int(computed_R[rank]),
                memory_budget_bytes=report.memory_budget_bytes,
                memory_used_bytes=report.memory_used_bytes,
                memory_peak_bytes=report.memory_peak_bytes,
                device_total_bytes=report.device_total_bytes,
                device_free_bytes=report.device_free_bytes,
            )
            for rank, report in sorted(engine.reports.items())
        ],
    )


def _worth(engine: Engine, window: Window, chosen: list[int]) -> WorthView | None:
    worth_PW = window.sum("worth_PW")[chosen]
    if worth_PW[:, PROBED_PAIRS].sum() <= 0:
        return None
    gain = measured_gain(_worth_windows(engine, window)[:, chosen])
    return WorthView(
        saved_s=saved_s(worth_PW),
        gain_ratio=gain.ratio if gain else None,
        error_ratio=gain.error if gain else None,
        lent_steps=int(worth_PW[:, LENT_STEPS].sum()),
        probed_steps=int(worth_PW[:, PROBED_STEPS].sum()),
    )


def window_of(engine: Engine, window_s: float, now_s: float, desired_interval_s: float) -> Window:
    """The last window_s seconds of reports; an empty one if rank 0 has fallen silent."""
    silent_s = now_s - engine.totals.newest_s
    if engine.totals.is_empty or silent_s > engine.silence_limit_s(desired_interval_s):
        return empty_window(engine.info.ep_size, now_s)
    return engine.totals.window(window_s)


def history(
    engine: Engine, window_s: float, step_s: float, to_unix_time: ToUnixTime, phase: str | None = None
) -> list[HistoryPoint]:
    """Points at about every step_s (at least the step that is kept for so long), oldest first."""
    if engine.totals.is_empty:
        return []
    times, rows = engine.totals.series(window_s, max(step_s, window_s / MOST_POINTS))
    columns = engine.totals.columns
    return [
        _point(columns, to_unix_time(float(at_s)), row, before, _chosen(phase))
        for at_s, row, before in zip(times[1:], rows[1:], rows[:-1], strict=True)
    ]


def _point(columns: Columns, time_s: float, newest: Floats, before: Floats, chosen: list[int]) -> HistoryPoint:
    row = newest - before
    worth_PW = columns.read(row, "worth_PW")[chosen]
    is_probed = bool(worth_PW[:, PROBED_PAIRS].sum() > 0)
    layer_steps = float(columns.read(row, "layer_steps_P")[chosen].sum())
    imbalance_S = columns.read(row, "imbalance_sum_PS")[chosen].sum(axis=0) / max(layer_steps, 1.0)
    seconds_F = columns.read(row, "phase_seconds_PF")[chosen].sum(axis=0)
    return HistoryPoint(
        time_s=time_s,
        tokens=int(columns.read(row, "tokens_P")[chosen].sum()),
        layer_steps=int(layer_steps),
        imbalance_ratio_before=float(imbalance_S[0]) if layer_steps else None,
        imbalance_ratio_after=float(imbalance_S[1]) if layer_steps else None,
        routed_R=_ints(columns.read(row, "routed_PR")[chosen].sum(axis=0)),
        computed_R=_ints(columns.read(row, "computed_PR")[chosen].sum(axis=0)),
        lends=int(columns.read(row, "lends_PK")[chosen].sum()),
        lend_bytes=int(columns.read(row, "lend_bytes_P")[chosen].sum()),
        layer_seconds=float(columns.read(row, "layer_seconds_P")[chosen].sum()),
        phase_seconds=dict(zip(LAYER_PHASES, seconds_F.tolist(), strict=True)),
        predicted_gain_s=float(columns.read(row, "predicted_gain_s_P")[chosen].sum()),
        measured_gain_s=saved_s(worth_PW) if is_probed else None,
        memory_used_R=_ints(columns.read(newest, "memory_used_R")),
        memory_free_R=_ints(columns.read(newest, "memory_free_R")),
    )


def matrix(engine: Engine, by: str, stage: str, window_s: float, phase: str | None) -> LoadMatrix:
    """Pairs by layer and rank or expert. `by` expert has the stage before only: experts' loads are not moved."""
    seconds, values_LN = 0.0, np.zeros((len(engine.info.layer_numbers), 0), dtype=np.int64)
    if not engine.totals.is_empty:
        seconds, routed_PLE, computed_PLR, _ = engine.totals.experts(window_s)
        routed_LE, computed_LR = (each[_chosen(phase)].sum(axis=0) for each in (routed_PLE, computed_PLR))
        values_LN = routed_LE if by == "expert" else computed_LR if stage == "after" else _by_rank(engine, routed_LE)
    return LoadMatrix(
        engine=engine.info.engine,
        by=by,
        stage=stage,
        window_s=seconds,
        layers=list(engine.info.layer_numbers),
        values=values_LN.tolist(),
        imbalance_ratio=[imbalance_ratio(row) if row.any() else None for row in values_LN],
    )


def _by_rank(engine: Engine, routed_LE: Counts) -> Counts:
    """Pairs that plain EP would compute on each rank [L, R]."""
    home_rank_LE, R = engine.home_rank_LE, engine.info.ep_size
    assert home_rank_LE is not None
    L = len(routed_LE)
    cell_LE = np.arange(L)[:, None] * R + home_rank_LE
    loads = np.bincount(cell_LE.reshape(-1), routed_LE.reshape(-1), L * R)
    return loads.reshape(L, R).astype(np.int64)


def hot(engine: Engine, limit: int, window_s: float, replicas: Replicas, phase: str | None = None) -> list[HotExpert]:
    """The experts with the largest shares of their layers' pairs over the window, hottest first."""
    home_rank_LE = engine.home_rank_LE
    if engine.totals.is_empty or home_rank_LE is None:
        return []
    _, routed_PLE, *_ = engine.totals.experts(window_s)
    routed_LE = routed_PLE[_chosen(phase)].sum(axis=0)
    since_LE = engine.hot_since_VLE[0 if phase is None else 1 + STEP_PHASES.index(phase)]
    share_LE = routed_LE / np.maximum(routed_LE.sum(axis=1, keepdims=True), 1)
    count = min(limit, share_LE.size)
    candidates = np.argpartition(-share_LE.reshape(-1), count - 1)[:count].tolist()
    hottest = sorted((at for at in candidates if share_LE.flat[at] > 0), key=lambda at: (-share_LE.flat[at], at))
    copies: dict[tuple[int, int], list[int]] = {}
    for layer, expert, rank in replicas:
        copies.setdefault((layer, expert), []).append(rank)
    found = []
    for at in hottest:
        layer, expert = divmod(at, engine.info.num_experts)
        since_s = float(since_LE[layer, expert])
        found.append(
            HotExpert(
                engine=engine.info.engine,
                layer=engine.info.layer_numbers[layer],
                expert=expert,
                home_rank=int(home_rank_LE[layer, expert]),
                tokens=int(routed_LE[layer, expert]),
                share=float(share_LE[layer, expert]),
                load_ratio=float(share_LE[layer, expert]) * engine.info.num_experts,
                hot_for_s=max(engine.totals.newest_s - since_s, 0.0) if math.isfinite(since_s) else 0.0,
                replica_ranks=sorted(copies.get((layer, expert), [])),
            )
        )
    return found


def hot_ratios(engine: Engine, now_s: float, desired_interval_s: float = 0.0) -> list[float]:
    """Load / fair load of the HOT_PLACES hottest (layer, expert) over HOT_WINDOW_S, in falling order; layers without a
    pair are left out, and nothing is hot once rank 0 has fallen silent.
    """
    if engine.totals.is_empty or now_s - engine.totals.newest_s > engine.silence_limit_s(desired_interval_s):
        return []
    routed_LE = engine.totals.routed(HOT_WINDOW_S)
    fair_L1 = routed_LE.sum(axis=1, keepdims=True) / engine.info.num_experts
    ratios = (routed_LE / np.where(fair_L1 > 0, fair_L1, 1.0)).reshape(-1)
    count = min(HOT_PLACES, ratios.size)
    hottest = np.sort(np.partition(ratios, ratios.size - count)[-count:])[::-1]
    return [float(ratio) for ratio in hottest if ratio > 0]


def plan_view(engine: Engine, kept: KeptPlan) -> PlanView:
    sample, info = kept.sample, engine.info
    return PlanView(
        engine=info.engine,
        id=kept.id,
        step=sample.step,
        layer=info.layer_numbers[sample.layer],
        phase=sample.phase,
        time_s=sample.time_s,
        decision=sample.decision,
        tokens=sample.tokens,
        routed=list(sample.routed_R),
        computed=list(sample.computed_R),
        imbalance_ratio_before=imbalance_ratio(sample.routed_R),
        imbalance_ratio_after=imbalance_ratio(sample.computed_R),
        lends=[
            LendView(expert=expert, src_rank=src_rank, dst_rank=dst_rank, tokens=tokens)
            for expert, src_rank, dst_rank, tokens in sample.lends
        ],
        lend_bytes=len(sample.lends) * info.bytes_per_slot,
        predicted_gain_s=sample.predicted_gain_s,
        layer_seconds=sample.layer_seconds,
    )


def evidence_of(engine: Engine, window_s: float, now_s: float, desired_interval_s: float = 0.0) -> Evidence:
    """What the last window_s say, for a decision."""
    window = window_of(engine, window_s, now_s, desired_interval_s)
    info, layer_steps_P = engine.info, window.sum("layer_steps_P")
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio_PS = window.sum("imbalance_sum_PS") / layer_steps_P[:, None]
    return Evidence(
        settings=engine.live_settings,
        window_s=window.seconds,
        ep_size=info.ep_size,
        num_layers=len(info.layer_numbers),
        top_k=info.top_k,
        bytes_per_expert=info.bytes_per_slot,
        is_one_node=not 0 < info.ranks_per_node < info.ep_size,
        cost_model=info.cost_model,
        tokens_P=window.sum("tokens_P"),
        layer_steps_P=layer_steps_P,
        before_P=ratio_PS[:, 0],
        after_P=ratio_PS[:, 1],
        layer_seconds_P=window.sum("layer_seconds_P"),
        phase_seconds=dict(zip(LAYER_PHASES, window.sum("phase_seconds_PF").sum(axis=0).tolist(), strict=True)),
        lends=window.total("lends_PK"),
        lend_bytes=window.total("lend_bytes_P"),
        decisions=dict(zip(DECISIONS, window.sum("decisions_PD").sum(axis=0).tolist(), strict=True)),
        predicted_gain_s=window.total("predicted_gain_s_P"),
        worth_NPW=_worth_windows(engine, window),
    )


def ground_of(
    engine: Engine,
    settings: Settings,
    present: Iterable[Replica],
    room_R: Sequence[int],
    now_s: float,
    desired_interval_s: float = 0.0,
) -> Ground:
    """What a placement is planned on. rank 0 of the engine must have reported."""
    home_rank_LE = engine.home_rank_LE
    assert home_rank_LE is not None
    _, routed_NLE = engine.totals.routed_windows()
    pairs_NL = routed_NLE.sum(axis=2)
    window_s = min(placement_window_s(engine), now_s - engine.placed_s)  # what was before says nothing about it
    *_, lends_PL = engine.totals.experts(window_s)
    return Ground(
        forecast=Forecast(routed_NLE / np.maximum(pairs_NL, 1.0)[:, :, None], pairs_NL, None),
        home_rank_LE=home_rank_LE.astype(np.int64),
        present=tuple(present),
        room_R=tuple(room_R),
        bytes_per_expert=engine.info.bytes_per_slot,
        bytes_per_s=settings.replica_bytes_per_s,
        lends_L=lends_PL.sum(axis=0).astype(np.float64),
        evidence=evidence_of(engine, window_s, now_s, desired_interval_s),
    )


def placement_window_s(engine: Engine) -> float:
    """Over which a placement is weighed."""
    return PLACEMENT_WINDOWS * engine.start.decide_every_s


def misfit(engine: Engine, replicas: Iterable[tuple[int, int, int]]) -> str | None:
    """Why these replicas don't fit the engine as it was started, the rule's name first; None if they do."""
    home_rank_LE = engine.home_rank_LE
    if home_rank_LE is None:
        return "no_report: rank 0 of this engine has not reported yet"
    return refusal(replicas, home_rank_LE, (engine.info.replica_slots_per_rank,) * engine.info.ep_size)


def _worth_windows(engine: Engine, window: Window) -> Floats:
    if window.seconds <= 0:
        return np.zeros((0, *window.sum("worth_PW").shape))
    _, rows = engine.totals.series(window.seconds, 10.0)
    return np.diff(engine.totals.columns.read(rows, "worth_PW"), axis=0)


def _chosen(phase: str | None) -> list[int]:
    return list(range(len(STEP_PHASES))) if phase is None else [STEP_PHASES.index(phase)]


def _ints(values: Floats | Sequence[float]) -> list[int]:
    return [int(value) for value in values]
