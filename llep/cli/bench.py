"""`llep bench`: `vllm bench serve` with lending off and on in turn, and whether it pays."""

from __future__ import annotations

import importlib.util
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from llep.cli.http import DEFAULT_SERVER, ControlPlane, EngineOption, KeyFileOption, OutputOption, ServerOption
from llep.cli.output import ExitCode, Format, fail, show
from llep.cli.progress import progress
from llep.config import Mode
from llep.errors import LlepError, SettingsError

Row = dict[str, Any]

# What is compared, and whether more of it is better.
MEASURES = {
    "total_token_throughput": True,
    "output_throughput": True,
    "request_throughput": True,
    "mean_ttft_ms": False,
    "p99_ttft_ms": False,
    "mean_tpot_ms": False,
    "mean_itl_ms": False,
    "p99_itl_ms": False,
    "duration": False,
}
COUNTERS = {
    "lends": "llep_lends_total",
    "lend_bytes": "llep_lend_bytes_total",
    "layer_seconds": "llep_layer_seconds_total",
}
SAMPLE = re.compile(r"^(llep_\w+)\{(.*)\} ([-+.\deE]+|NaN)$", re.MULTILINE)
TTL_S = 3600.0  # a bench that is killed leaves a mode that goes back by itself
REPORTS_WITHIN = 2.5  # report intervals until the counters hold all of a run
LEAST_GAIN = 0.01
SURE_RATIO = 0.8  # of the pairs that must agree
MOST_PAIRS = 100


@dataclass(frozen=True, slots=True)
class Run:
    """One `vllm bench serve`: what it measured, and what llep counted meanwhile."""

    mode: str
    measured: dict[str, float]
    counted: dict[str, float]


@dataclass(frozen=True, slots=True)
class Measured:
    """The engine that is measured, as it was before."""

    name: str
    mode: str
    report_interval_s: float


def add_to(app: typer.Typer) -> None:
    app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(bench)


def bench(
    context: typer.Context,
    server: ServerOption = DEFAULT_SERVER,
    key_file: KeyFileOption = None,
    output: OutputOption = Format.TABLE,
    engine: EngineOption = None,
    pairs: Annotated[int, typer.Option(min=1, max=MOST_PAIRS, help="How often each mode is measured.")] = 5,
    off: Annotated[Mode, typer.Option("--off", help="The mode to compare with: off, observe or shadow.")] = Mode.OFF,
    measure: Annotated[
        str, typer.Option(help=f"What decides whether it pays: {', '.join(MEASURES)}.")
    ] = "total_token_throughput",
    check: Annotated[bool, typer.Option("--check", help="Exit code 4 unless it pays.")] = False,
) -> None:
    """Run `vllm bench serve` with lending off and on in turn; all after -- goes to it.

    Example: llep bench --pairs 5 -- --model MODEL --dataset-name random --num-prompts 50. Each mode is warmed up once,
    then measured in pairs whose order alternates; modes are switched live through the control plane, and go back
    afterwards. Prints medians and spread, what llep counted, and whether it pays.
    """
    if measure not in MEASURES:
        raise SettingsError(f"--measure {measure} is not one of {', '.join(MEASURES)}", param="measure")
    if off is Mode.ACTIVE:
        raise SettingsError("--off active compares lending with itself: choose off, observe or shadow", param="off")
    if importlib.util.find_spec("vllm") is None:
        raise LlepError("vllm is not installed here: run `llep bench` where it is, with --server for the control plane")
    modes = (off.value, Mode.ACTIVE.value)
    runs: list[Run] = []
    with ControlPlane(server, key_file) as control_plane, progress("bench") as report:
        measured = _engine(control_plane, engine)
        with _mode_goes_back(control_plane, measured):
            for at, mode in enumerate(order(pairs, modes)):
                report(f"mode {mode}, run", at + 1, 2 * pairs + 2)
                run = _run(control_plane, measured, mode, context.args)
                if at >= 2:  # the first of each mode warms up
                    runs.append(run)
    found = summary(runs, modes, measure)
    _show(found, output)
    if found["failed_requests"]:
        raise typer.Exit(fail(f"{found['failed_requests']} requests failed: see vLLM's log", ExitCode.ERROR))
    if check and found["verdict"] != "pays":
        raise typer.Exit(fail(found["reason"], ExitCode.CHECK_FAILED))


def order(pairs: int, modes: tuple[str, str]) -> list[str]:
    """One run of each to warm up, then pairs whose order alternates, so that a drift of the machine cancels out."""
    first, second = modes
    return [first, second] + [mode for at in range(pairs) for mode in (modes if at % 2 == 0 else (second, first))]


def summary(runs: Sequence[Run], modes: tuple[str, str], measure: str) -> Row:
    """Medians and spread of both modes, their ratio pair by pair, and the verdict on `measure`."""
    before, after = ([run for run in runs if run.mode == mode] for mode in modes)
    rows = [_compared(name, before, after) for name in MEASURES if all(name in run.measured for run in runs)]
    deciding = next((row for row in rows if row["measure"] == measure), None)
    if deciding is None:
        raise LlepError(f"vllm bench serve did not measure {measure}: choose another --measure")
    verdict, reason = judge(deciding, measure)
    counted = {mode: _medians(of) for mode, of in zip(modes, (before, after), strict=True)}
    return {
        "verdict": verdict,
        "reason": reason,
        "measure": measure,
        "pairs": len(before),
        "modes": list(modes),
        "failed_requests": int(sum(run.measured.get("failed", 0) for run in runs)),
        "measures": rows,
        "counted": counted,
        "runs": [{"mode": run.mode, **run.measured, **run.counted} for run in runs],
    }


def judge(deciding: Row, measure: str) -> tuple[str, str]:
    """(pays, no_difference or costs, why): the median gain counts if most pairs agree on its sign."""
    gains: list[float] = deciding["gains"]
    median = statistics.median(gains)
    agree = sum(gain * median > 0 for gain in gains) / len(gains)
    words = f"{measure} {'better' if median > 0 else 'worse'} by {abs(median):.1%} (pairs: {_spread(gains)})"
    if abs(median) < LEAST_GAIN:
        return "no_difference", f"{words}: within the noise"
    if agree < SURE_RATIO:
        return "no_difference", f"{words}: {agree:.0%} of the pairs agree, which is too few; measure more --pairs"
    return ("pays" if median > 0 else "costs"), words


def counters(text: str, engine: str) -> dict[str, float]:
    """Of one engine, from the text of /metrics: sums over labels, and pairs by rank as routed and computed."""
    found: dict[str, float] = dict.fromkeys(COUNTERS, 0.0)
    routed: dict[str, float] = {}
    computed: dict[str, float] = {}
    for name, labels, value in SAMPLE.findall(text):
        if f'engine="{engine}"' not in labels:
            continue
        rank = (re.search(r'ep_rank="(\d+)"', labels) or ["", ""])[1]
        if name == "llep_rank_routed_tokens_total":
            routed[rank] = float(value)
        elif name == "llep_rank_computed_tokens_total":
            computed[rank] = float(value)
        for key, metric in COUNTERS.items():
            if name == metric and 'direction="out"' not in labels:
                found[key] += float(value)
    return {
        **found,
        **{f"routed_{rank}": value for rank, value in routed.items()},
        **{f"computed_{rank}": value for rank, value in computed.items()},
    }


def counted_between(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """What was counted meanwhile; the fullest rank against the mean, as plain EP would load it and as it was."""
    spent = {key: value - before.get(key, 0.0) for key, value in after.items()}
    result = {key: spent[key] for key in COUNTERS}
    for kind in ("routed", "computed"):
        of_ranks = [value for key, value in spent.items() if key.startswith(f"{kind}_")]
        mean = sum(of_ranks) / len(of_ranks) if of_ranks else 0.0
        if mean > 0:
            result[f"{kind}_imbalance"] = max(of_ranks) / mean
    return result


def _engine(control_plane: ControlPlane, wanted: str | None) -> Measured:
    """The engine to measure. Raises LlepError."""
    engines = {one["id"]: one for one in control_plane.get("/v1/engines")["data"]}
    if wanted is None and len(engines) != 1:
        known = ", ".join(sorted(engines)) or "none has reported yet"
        raise LlepError(f"which engine is measured? Name it with --engine: {known}")
    name = wanted or next(iter(engines))
    if name not in engines:
        raise LlepError(f"no engine named {name!r}: {', '.join(sorted(engines))}")
    if engines[name]["state"] != "live":
        raise LlepError(f"engine {name} is {engines[name]['state']}: measure it when it is live")
    settings = {one["key"]: one["value"] for one in control_plane.get("/v1/settings", engine=name)["settings"]}
    return Measured(name, engines[name]["mode"], float(settings["report_interval_s"]))


@contextmanager
def _mode_goes_back(control_plane: ControlPlane, engine: Measured) -> Iterator[None]:
    """Modes set in the block are temporary; afterwards the one that holds for good is back."""
    try:
        yield
    finally:
        control_plane.put(
            "/v1/mode", {"mode": Mode.ACTIVE.value, "ttl_s": 0.5}, engines=[engine], reason="llep bench ends"
        )


def _run(control_plane: ControlPlane, engine: Measured, mode: str, arguments: list[str]) -> Run:
    body = {"mode": mode, "ttl_s": TTL_S}
    control_plane.put("/v1/mode", body, engines=[engine.name], reason="llep bench")
    before = counters(control_plane.get_bytes("/metrics").decode(), engine.name)
    measured = _measure(arguments)
    time.sleep(REPORTS_WITHIN * engine.report_interval_s)
    after = counters(control_plane.get_bytes("/metrics").decode(), engine.name)
    return Run(mode, measured, counted_between(before, after))


def _measure(arguments: list[str]) -> dict[str, float]:
    """What one `vllm bench serve` measured. Raises LlepError with its last words."""
    with tempfile.TemporaryDirectory(prefix="llep-bench-") as folder:
        command = [sys.executable, "-m", "llep.vllm_plugin.bench", *arguments, "--disable-tqdm"]
        command += ["--save-result", "--result-dir", folder, "--result-filename", "result.json"]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        result = Path(folder) / "result.json"
        if done.returncode or not result.exists():
            words = "\n".join(done.stdout.strip().splitlines()[-15:])
            raise LlepError(f"vllm bench serve ended with status {done.returncode}:\n{words}")
        values = json.loads(result.read_text())
    wanted = (*MEASURES, "completed", "failed")
    measured = {name: float(values[name]) for name in wanted if isinstance(values.get(name), int | float)}
    if not measured.get("completed"):
        raise LlepError("vllm bench serve completed no request: does vLLM serve at its --host and --port?")
    return measured


def _compared(name: str, before: Sequence[Run], after: Sequence[Run]) -> Row:
    is_more_better = MEASURES[name]
    pairs = [(b.measured[name], a.measured[name]) for b, a in zip(before, after, strict=True)]
    # As a ratio of speeds in either case, so that 2 is twice as good.
    gains = [(a / b if is_more_better else b / a) - 1 if a and b else 0.0 for b, a in pairs]
    return {
        "measure": name,
        "off": statistics.median(b for b, _ in pairs),
        "off_min_max": [min(b for b, _ in pairs), max(b for b, _ in pairs)],
        "on": statistics.median(a for _, a in pairs),
        "on_min_max": [min(a for _, a in pairs), max(a for _, a in pairs)],
        "gain": statistics.median(gains),
        "gains": gains,
    }


def _medians(runs: Sequence[Run]) -> dict[str, float]:
    keys = {key: None for run in runs for key in run.counted}
    return {key: statistics.median(run.counted[key] for run in runs if key in run.counted) for key in keys}


def _spread(gains: Sequence[float]) -> str:
    return f"{min(gains):+.1%} to {max(gains):+.1%}"


def _show(found: Row, output: Format) -> None:
    off, on = found["modes"]
    rows = [
        {
            "measure": row["measure"],
            off: row["off"],
            f"{off} spread": "{:.4g} to {:.4g}".format(*row["off_min_max"]),
            on: row["on"],
            f"{on} spread": "{:.4g} to {:.4g}".format(*row["on_min_max"]),
            "gain %": 100 * row["gain"],
        }
        for row in found["measures"]
    ]
    show(rows, output, data=found, title=f"{found['pairs']} pairs, medians")
    if output is not Format.TABLE:
        return
    counted = [
        {"llep counted": key, **{mode: found["counted"][mode].get(key) for mode in (off, on)}}
        for key in dict.fromkeys(key for mode in (off, on) for key in found["counted"][mode])
    ]
    print()
    show(counted, output)
    print(f"\n{found['verdict']}: {found['reason']}")
