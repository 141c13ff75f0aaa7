"""The findings as one page: HTML with inline pictures, styles and a small script; nothing is fetched from anywhere."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

from llep import __version__
from llep.report.figures import bar, heatmap, layers, legend, lines, most_of
from llep.report.findings import Findings
from llep.report.style import SCRIPT, STYLE

VERDICTS = {
    "worth_it": ("Worth enabling", "good"),
    "not_worth_it": ("Not worth enabling", "bad"),
    "not_enough_evidence": ("Not enough evidence", "unsure"),
}
GIB, MIB = 1 << 30, 1 << 20


def page(found: Findings) -> str:
    """One self-contained document."""
    title = escape(f"llep report: {found.source}")
    sections = [
        _head(found),
        _verdict(found),
        _section("What to set", _settings(found)),
        _section("On how many ranks", _ranks(found)),
        _section("By batch size", _classes(found)),
        _section("Imbalance by layer", _by_layer(found)),
        _section("Imbalance over time", _over_time(found)),
        _section("Layers and ranks", _layer_rank(found)),
        _section("Layers and experts", _layer_expert(found)),
        _section("Hottest experts", _hot(found)),
        _section("Planners side by side", _planners(found)),
        _section("Lends, bytes, memory", _lends(found)),
        _section("What was tried", _cases(found)),
        _section("How to read this", _method(found)),
    ]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>\n<body>\n'
        f"<main>\n{chr(10).join(sections)}\n</main>\n"
        f'<div id="tip" role="status"></div><script>{SCRIPT}</script></body></html>\n'
    )


def _head(found: Findings) -> str:
    shape = found.shape
    phases = ", ".join(f"{one.steps:,} {name} steps" for name, one in found.phases.items())
    tokens = sum(sum(one.tokens_of_step) for one in found.phases.values())
    facts = (
        f"{shape.num_layers} MoE layers, {shape.num_experts} experts, top-{shape.top_k}; recorded on "
        f"{found.recorded_ranks} ranks, judged on {found.setup.num_ranks}; {phases}; {tokens:,} tokens"
    )
    return f"<header><h1>{escape(found.source)}</h1><p>{escape(shape.name)}: {escape(facts)}.</p></header>"


def _verdict(found: Findings) -> str:
    tuning = found.tuning
    words, kind = VERDICTS[tuning.verdict]
    proposed = tuning.proposed
    model = found.setup.options.cost_model
    saved = "time in MoE layers" if model else "load of the fullest rank"
    tiles = [
        ("imbalance, plain EP", f"{proposed.imbalance_ratio_before:.2f}", "max / mean of rank loads; 1 is even"),
        ("with lending", f"{proposed.imbalance_ratio:.2f}", "weighted by load"),
        (saved, _saved(proposed.gain_ratio), f"predicted: {model.name}" if model else "no cost model: pairs only"),
        ("lent per step", _bytes(proposed.lend_bytes_per_step), f"{proposed.lends_per_layer_step:.2f} experts a layer"),
        ("memory per rank", _bytes(_pool_bytes(found)), f"{proposed.slots_per_rank} slots, shared by all layers"),
    ]
    cells = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{value}</dd><small>{escape(note)}</small></div>"
        for name, value, note in tiles
    )
    sentence = f"{_on(found)}: {tuning.reason}."
    return (
        f'<section class="verdict {kind}"><h2>{words}</h2><p>{escape(sentence)} {escape(_advice(found))}</p>'
        f"<dl>{cells}</dl></section>"
    )


def _on(found: Findings) -> str:
    return f"On {found.setup.num_ranks} ranks"


def _advice(found: Findings) -> str:
    """What to do, in a sentence or two."""
    tuning, best = found.tuning, max(found.by_ranks, key=lambda one: one.gain_ratio)
    others = f"On {best.ranks} ranks it would be worth most: {best.gain_ratio:.0%}." if best.gain_ratio > 0.03 else ""
    if tuning.verdict == "not_enough_evidence":
        return "Record more before you decide."
    if tuning.verdict == "not_worth_it" and tuning.slots_reason:
        return f"Too few slots are reserved: {tuning.slots_reason}."
    if tuning.verdict == "not_worth_it":
        why = (
            "Loads are balanced as they are."
            if tuning.proposed.imbalance_ratio_before < 1.1
            else "Batches are too small, or experts too large, for a copy of their weights to pay."
        )
        return f"{why} Leave lending off, or in mode observe. {'' if best.ranks == found.setup.num_ranks else others}"
    has_gain = {one.phase for one in tuning.proposed.classes if one.is_planned and one.gain_ratio > 0.01}
    idle = {one.phase for one in tuning.proposed.classes} - has_gain
    only = f"{' and '.join(sorted(idle)).capitalize()} steps gain nothing and are left to plain EP. " if idle else ""
    return only + ("" if best.ranks == found.setup.num_ranks else others)


def _settings(found: Findings) -> str:
    tuning = found.tuning
    at_start = ""
    if tuning.slots_reason:
        config = json.dumps({"llep": tuning.config_at_start})
        at_start = f"<p>Slots: {tuning.slots_reason}.</p>" + _code(f"--additional-config {shlex.quote(config)}")
    if tuning.verdict != "worth_it":
        return "<p>Nothing to change. To keep counting without lending:</p>" + _code("llep mode observe") + at_start
    parts = []
    if tuning.patch:
        assignments = " ".join(shlex.quote(f"{key}={_plain(value)}") for key, value in tuning.patch.items())
        parts.append("<p>While engines serve:</p>" + _code(f"llep settings set {assignments}"))
        parts.append("<p>The same as a patch:</p>" + _code(json.dumps(tuning.patch)))
    else:
        parts.append("<p>The settings that hold are as good as any that were tried with as many slots.</p>")
    parts.append(at_start)
    parts.append(
        "<p>Try it without moving anything first (<code>llep mode shadow</code>); "
        "<code>llep bench</code> measures what it is worth on your traffic.</p>"
    )
    return "".join(parts)


def _ranks(found: Findings) -> str:
    highest = max(max(one.imbalance_ratio_before for one in found.by_ranks), 1.01)
    rows = []
    for one in found.by_ranks:
        name = f"<b>{one.ranks}</b>" if one.is_recorded else str(one.ranks)
        rows.append(
            [
                name,
                f"{one.imbalance_ratio_before:.2f} {bar(one.imbalance_ratio_before / highest, 'before')}",
                f"{one.imbalance_ratio:.2f} {bar(one.imbalance_ratio / highest)}",
                _saved(one.gain_ratio),
                f"{one.lends_per_layer_step:.2f}",
            ]
        )
    note = (
        "The same tokens on more ranks: fewer experts each, so that popularity evens out less. Experts are taken to "
        "live in contiguous blocks, as vLLM places them."
    )
    saved = "saved in MoE layers" if found.setup.options.cost_model else "saved on the fullest rank"
    return f"<p>{note}</p>" + _table(["ranks", "plain EP", "with lending", saved, "lends a layer"], rows)


def _classes(found: Findings) -> str:
    rows = [
        [
            one.phase,
            f"{one.tokens:,} to {2 * one.tokens - 1:,}",
            f"{one.steps:,}",
            f"{one.imbalance_ratio_before:.2f}",
            f"{one.imbalance_ratio:.2f}",
            _saved(one.gain_ratio) if one.is_planned else "left alone",
        ]
        for one in found.tuning.proposed.classes
    ]
    return "<p>Large batches pay for a copy of an expert's weights, small ones don't.</p>" + _table(
        ["phase", "tokens in the step", "steps", "plain EP", "with lending", "saved"], rows
    )


def _by_layer(found: Findings) -> str:
    course, threshold = found.course, found.tuning.proposed.settings.imbalance_threshold
    names = [str(number) for number in found.shape.layer_numbers]
    return (
        f"{_key(threshold)}{layers(names, course.ratio_before_L, course.ratio_after_L, threshold)}"
        '<p class="axis">layer</p>'
    )


def _over_time(found: Findings) -> str:
    course, threshold = found.course, found.tuning.proposed.settings.imbalance_threshold
    series = [("plain EP", "before", course.before), ("with lending", "after", course.after)]
    shown, of = len(course.steps), found.phases[course.phase].steps
    note = f"{course.phase.capitalize()} steps{'' if shown == of else f', {shown} of {of:,}'}; mean of the layers."
    return f"<p>{note}</p>{_key(threshold)}{lines(series, course.steps, threshold)}" + ('<p class="axis">step</p>')


def _layer_rank(found: Findings) -> str:
    course, names = found.course, [str(number) for number in found.shape.layer_numbers]
    sides = [_relative(side) for side in (course.before_LR, course.after_LR)]
    most = most_of(sides[0])
    figures = "".join(
        f"<figure><figcaption>{name}</figcaption>{heatmap(side, names, 'rank', most, 'times the mean', 430)}</figure>"
        for name, side in zip(("plain EP", "with lending"), sides, strict=True)
    )
    return f'<p>Load of each rank (across) in each layer (down).</p>{legend(most)}<div class="pair">{figures}</div>'


def _layer_expert(found: Findings) -> str:
    values = _relative(found.loads_LE.astype(float))
    names, most = [str(number) for number in found.shape.layer_numbers], most_of(values)
    note = f"Pairs of each expert (across) in each layer (down), over all {found.tuning.steps:,} steps."
    return f"<p>{note}</p>{legend(most)}{heatmap(values, names, 'expert', most, 'times the fair share')}"


def _hot(found: Findings) -> str:
    highest = max((one.load_ratio for one in found.hot), default=1.0)
    rows = [
        [
            str(one.layer),
            str(one.expert),
            str(one.home_rank),
            f"{one.share:.1%}",
            f"{one.load_ratio:.2f} {bar(one.load_ratio / highest, 'before')}",
            f"{one.hottest_ratio:.0%}",
        ]
        for one in found.hot
    ]
    steady = np.mean([one.hottest_ratio for one in found.hot]) if found.hot else 0.0
    note = (
        "The same experts are hot most of the time: resident replicas would serve them too."
        if steady > 0.6
        else "Which expert is hot changes from step to step: that is what lending per step is for."
    )
    columns = ["layer", "expert", "home rank", "of its layer", "times the fair share", "hottest in steps"]
    return f"<p>{note}</p>{_table(columns, rows)}"


def _planners(found: Findings) -> str:
    is_timed = found.setup.options.cost_model is not None
    home = next(planner for planner in found.planners if planner["planner"] == "home")
    rows = []
    for one in found.planners:
        ratio = one["imbalance_ratio"]
        key = "predicted_s_per_step" if is_timed else "ideal_load_ratio"
        gain = 1 - one[key] / home[key] if is_timed else 1 - home[key] / one[key]
        rows.append(
            [
                f"<code>{one['planner']}</code>",
                f"{ratio['mean']:.2f}",
                f"{ratio['p95']:.2f}",
                f"{one['lends_per_layer_step']:.2f}",
                f"{one['moved_copies']:,}",
                _bytes(max(one["peak_memory_bytes_by_rank"])),
                _saved(gain),
                f"{one['plan_us']['p50']:.0f}",
            ]
        )
    columns = ["planner", "imbalance", "p95", "lends a layer", "copies moved", "peak of a rank", "saved", "plan, us"]
    note = (
        "<code>home</code> is plain EP, <code>quota</code> llep's own, <code>least_loaded</code> the paper's; "
        "<code>eplb</code>, <code>replicas</code>: copies planned from windows of past loads, +K for K more copies per "
        "rank. Over a sample of the steps in their order, every batch planned; peak: borrowed weights and activations."
    )
    return f"<p>{note}</p>{_table(columns, rows)}"


def _lends(found: Findings) -> str:
    course, size = found.course, found.setup.bytes_per_expert
    total = max(sum(course.decisions.values()), 1)
    decisions = [
        [f"<code>{name}</code>", f"{n:,}", f"{n / total:.1%} {bar(n / total)}"] for name, n in course.decisions.items()
    ]
    most = max(int(course.lends_in_R.max()), int(course.lends_out_R.max()), 1)
    ranks = [
        [
            str(rank),
            f"{borrowed:,} {bar(borrowed / most)}",
            f"{lent:,} {bar(lent / most, 'before')}",
            _bytes(borrowed * size),
        ]
        for rank, (borrowed, lent) in enumerate(
            zip(course.lends_in_R.tolist(), course.lends_out_R.tolist(), strict=True)
        )
    ]
    peak = found.tuning.proposed.peak_lend_bytes
    note = (
        f"One expert of one layer is {_bytes(size)}; the pool of {found.tuning.proposed.slots_per_rank} slots takes "
        f"{_bytes(_pool_bytes(found))} of each rank, for all layers together. At most {_bytes(peak)} of it was used at "
        "once."
    )
    return (
        f'<p>{note}</p><div class="pair">'
        f"<figure>{_table(['decision', 'layer-steps', 'share'], decisions)}</figure>"
        f"<figure>{_table(['rank', 'borrowed', 'lent', 'received'], ranks[:64])}</figure></div>"
    )


def _cases(found: Findings) -> str:
    keys = ("planner", "imbalance_threshold", "min_chunk_tokens", "capacity_factor", "min_batch_tokens", "phases")
    rows = []
    for case in found.tuning.cases:
        values = case.settings.dump()
        mark = "proposed" if case is found.tuning.proposed else "as it is" if case is found.tuning.start else ""
        rows.append(
            [
                *(str(values[key]) for key in keys),
                str(case.slots_per_rank),
                f"{case.imbalance_ratio:.2f}",
                f"{case.lends_per_layer_step:.2f}",
                _saved(case.gain_ratio),
                mark,
            ]
        )
    heads = ["planner", "threshold", "min chunk", "capacity", "min batch", "phases", "slots"]
    table = _table([*heads, "imbalance", "lends a layer", "saved", ""], rows)
    return f"<details><summary>{len(rows)} choices of settings, best first</summary>{table}</details>"


def _method(found: Findings) -> str:
    model, tuning = found.setup.options.cost_model, found.tuning
    costs = (
        f"Seconds are predicted, not measured: cost model <code>{escape(model.name)}</code> ({escape(model.source)})."
        if model
        else "No cost model was given: what is saved is counted in pairs on the fullest rank, and copies cost nothing."
    )
    notes = "".join(f"<li>{escape(note)}</li>" for note in found.notes)
    return (
        f"<ul><li>Loads are token-expert pairs, as the router chose them; imbalance is max / mean of rank loads.</li>"
        f"<li>Popularity comes from all {tuning.steps:,} steps; what lending would do was replayed over "
        f"{tuning.sampled_steps:,} of them, spread evenly over time within each batch size.</li><li>{costs}</li>"
        f"<li>Proposed is what holds now where that gains at least 98% of the best; else the gentlest value that does."
        f"</li>{notes}<li>Written by llep {__version__}; nothing in this page is loaded from elsewhere.</li></ul>"
    )


def _pool_bytes(found: Findings) -> int:
    return found.tuning.proposed.slots_per_rank * found.setup.bytes_per_expert


def _relative(values: Any) -> Any:
    """Each row by its mean; rows without anything stay even."""
    means = values.mean(axis=1, keepdims=True)
    return np.where(means > 0, values / np.where(means > 0, means, 1), 1.0)


def _key(threshold: float) -> str:
    return (
        '<p class="legend"><i class="before"></i> plain EP <i class="after"></i> with lending '
        f'<i class="dash"></i> threshold {threshold:g}</p>'
    )


def _section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{name}</th>" for name in heads)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _code(text: str) -> str:
    return f"<pre><code>{escape(text)}</code></pre>"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _saved(ratio: float) -> str:
    return "0%" if abs(ratio) < 0.0005 else f"{ratio:.1%}"


def _bytes(size: float) -> str:
    if size >= GIB:
        return f"{size / GIB:.2f} GiB"
    return f"{size / MIB:.1f} MiB" if size >= MIB / 10 else f"{size:,.0f} B"
