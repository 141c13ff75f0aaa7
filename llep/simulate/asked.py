"""What-if questions as plain JSON values and their answers: one batch, a recording replayed or tuned for."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llep.config import Planner, Settings
from llep.cost import cost_model as find_model
from llep.errors import LlepError, SettingsError
from llep.planning import PlanOptions, warm_up
from llep.planning.question import answer, bytes_per_lend, check_planner, parse_question
from llep.shapes import ModelShape
from llep.simulate import Setup, replay, summary
from llep.simulate.contenders import SettingsPlanner


def answer_question(values: Mapping[str, Any]) -> dict[str, Any]:
    """One batch under one planner: the question of `llep plan simulate` with the planner's name in `planner`.

    Raises SettingsError.
    """
    planner = str(values.get("planner") or "quota")
    check_planner(planner)
    question = parse_question({key: value for key, value in values.items() if key != "planner"})
    found = answer(question, planner)  # one plan: compiling the planners, where nobody has yet, would take far longer
    lends_by_rank = Counter(lend["dst_rank"] for lend in found["lends"])
    each = bytes_per_lend(question.options)
    return {
        "source": "tokens",
        "planner": planner,
        "before": found["before"],
        "after": found["after"],
        "lends": len(found["lends"]),
        "lend_bytes": found["lend_bytes"],
        "peak_memory_bytes": max(lends_by_rank.values(), default=0) * each,
        "predicted_gain_s": found["predicted_gain_us"] / 1e6 if question.options.cost_model else None,
        "detail": found,
    }


def answer_replay(
    recording: Path,
    *,
    settings: Mapping[str, Any],
    max_steps: int,
    cost_model: str | None = None,
    ranks: int | None = None,
    ranks_per_node: int | None = None,
    on_progress: Callable[[float], None] = lambda ratio: None,
) -> dict[str, Any]:
    """At most max_steps of a recording, evenly spread, under plain EP and under settings.

    Raises SettingsError, TraceError.
    """
    from llep.traces import Trace

    wanted = Settings.parse(settings)
    trace = Trace(recording, skip_broken=True)
    setup = make_setup(trace.shape, ranks or trace.num_ranks, wanted.slots_per_rank, cost_model, ranks_per_node)
    every = max(-(-(trace.num_steps() or max_steps) // max_steps), 1)
    planners = {
        "home": SettingsPlanner(Settings(planner=Planner.HOME), setup),
        "settings": SettingsPlanner(wanted, setup),
    }
    warm_up()
    try:
        steps = itertools.islice(trace.steps(), 0, max_steps * every, every)
        found = summary(replay(steps, setup, planners, lambda step: on_progress(min(step / max_steps, 1.0))))
    except LlepError:
        raise
    except ValueError as error:
        raise SettingsError(str(error)) from None
    before, after = found["planners"]
    seconds = [planner["predicted_s_per_step"] for planner in (before, after)]
    return {
        "source": "recording",
        "planner": str(wanted.planner),
        "before": {"imbalance_ratio": before["imbalance_ratio"]["mean"]},
        "after": {"imbalance_ratio": after["imbalance_ratio"]["mean"]},
        "lends": after["lends"],
        "lend_bytes": after["lend_bytes"],
        "peak_memory_bytes": max(after["peak_memory_bytes_by_rank"]),
        "predicted_gain_s": None if None in seconds else seconds[0] - seconds[1],
        "detail": found,
    }


def answer_tuning(
    recording: Path,
    *,
    base: Mapping[str, Any],
    cost_model: str | None = None,
    ranks: int | None = None,
    ranks_per_node: int | None = None,
    on_progress: Callable[[float], None] = lambda ratio: None,
) -> dict[str, Any]:
    """Settings swept over a recording, starting from `base`: llep.tune's answer. Raises SettingsError, TraceError."""
    from llep.traces import Trace
    from llep.tune import Sample, tune

    start = Settings.parse(base)
    trace = Trace(recording, skip_broken=True)
    setup = make_setup(trace.shape, ranks or trace.num_ranks, start.slots_per_rank, cost_model, ranks_per_node)
    warm_up()
    sample = Sample.of(trace.shape, trace.steps())
    try:
        return tune(sample, setup, start, lambda done, total: on_progress(done / total)).as_dict()
    except LlepError:
        raise
    except ValueError as error:
        raise SettingsError(str(error)) from None


def make_setup(
    shape: ModelShape, ranks: int, slots_per_rank: int, cost_model: str | None, ranks_per_node: int | None
) -> Setup:
    """What a recording is replayed on. Raises SettingsError."""
    model = None if cost_model is None else find_model(cost_model)
    try:
        options = PlanOptions(bytes_per_expert=shape.bytes_per_expert, ranks_per_node=ranks_per_node, cost_model=model)
        slots = min(slots_per_rank, shape.num_experts)
        return Setup(shape=shape, num_ranks=ranks, slots_per_rank=slots, options=options)
    except LlepError:
        raise
    except ValueError as error:
        raise SettingsError(str(error)) from None
