"""`llep bench`: `vllm bench serve` with lending off and on in turn, and whether it pays."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import httpx
import typer

from llep.cli.bench_verdict import MEASURES, Run, counted_between, counters, order, summary
from llep.cli.control import parse_duration
from llep.cli.http import DEFAULT_SERVER, ControlPlane, EngineOption, KeyFileOption, OutputOption, ServerOption
from llep.cli.output import ExitCode, Format, fail, show
from llep.cli.preflight import VllmFlags
from llep.cli.progress import progress
from llep.cli.supervise import end_with_parent
from llep.config import Mode
from llep.errors import LlepError, SettingsError

Row = dict[str, Any]

MOST_PAIRS = 100
NUM_PROMPTS = 50  # vLLM's own default, 1000, takes hours on CPUs
REPORTS_WITHIN = 2.5  # report intervals until the counters hold all of a run
TTL_MARGIN_S = 120.0  # a bench that is killed leaves a mode that goes back by itself this long after its run's limit
BRIEFLY_S = 0.5
API_WITHIN_S = 10.0
LOOK_EVERY_S = 0.2


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
        str | None,
        typer.Option(
            help=f"What decides whether it pays: {', '.join(MEASURES)}.",
            show_default="total_token_throughput; mean_ttft_ms with a --request-rate",
        ),
    ] = None,
    run_timeout: Annotated[str, typer.Option(help="Give up when one run takes longer, such as 90s or 1h.")] = "15m",
    check: Annotated[bool, typer.Option("--check", help="Exit code 4 unless it pays.")] = False,
) -> None:
    """Run `vllm bench serve` with lending off and on in turn; all after -- goes to it.

    Example: llep bench --pairs 5 -- --num-prompts 50 --random-input-len 512. Each mode is warmed up once, then measured
    in pairs whose order alternates; modes are switched live through the control plane, and go back afterwards. Prints
    medians and spread, what llep counted, and whether it pays. Of vLLM's API elsewhere than at http://127.0.0.1:8000
    say where: -- --base-url URL; where it wants a key, put it in OPENAI_API_KEY.
    """
    flags = VllmFlags(context.args)
    measure = measure or ("total_token_throughput" if _is_unlimited(flags) else "mean_ttft_ms")
    if measure not in MEASURES:
        raise SettingsError(f"--measure {measure} is not one of {', '.join(MEASURES)}", param="measure")
    if off is Mode.ACTIVE:
        raise SettingsError("--off active compares lending with itself: choose off, observe or shadow", param="off")
    limit_s = parse_duration("--run-timeout", run_timeout)
    if importlib.util.find_spec("vllm") is None:
        raise LlepError("vllm is not installed here: run `llep bench` where it is, with --server for the control plane")
    modes = (off.value, Mode.ACTIVE.value)
    with ControlPlane(server, key_file) as control_plane:
        measured = _engine(control_plane, engine)
        api = _api(flags)
        arguments = [*context.args, *_left_out(flags, _served(api))]
        _say(f"engine {measured.name}, API {api}, vllm bench serve {' '.join(arguments)}")
        runs = _measure_all(control_plane, measured, order(pairs, modes), arguments, limit_s)
    found = summary(runs, modes, measure)
    _show(found, output)
    if found["failed_requests"]:
        raise typer.Exit(fail(f"{found['failed_requests']} requests failed: see vLLM's log", ExitCode.ERROR))
    if check and found["verdict"] != "pays":
        raise typer.Exit(fail(found["reason"], ExitCode.CHECK_FAILED))


def _measure_all(
    control_plane: ControlPlane, engine: Measured, modes: list[str], arguments: list[str], limit_s: float
) -> list[Run]:
    """One run after the other, without the first of each mode, which warms up."""
    runs: list[Run] = []
    pairs = len(modes) // 2 - 1
    with _mode_goes_back(control_plane, engine), progress("bench") as report:
        for at, mode in enumerate(modes):
            name = f"{f'pair {at // 2} of {pairs}' if at > 1 else 'warm-up'}, {mode}"

            def on_second(
                seconds: float, at: int = at, name: str = name, report: Callable[[str, int, int], None] = report
            ) -> None:
                report(f"{name}, {seconds:.0f} s, run", at + 1, len(modes))

            # Other prompts in every run: vLLM's prefix cache would answer the second time. A --seed of one's own holds.
            run = _run(control_plane, engine, mode, ["--seed", str(at), *arguments], limit_s, on_second)
            _say(f"{name}: {_in_short(run)}")
            if mode == Mode.ACTIVE and not run.counted["tokens"]:
                raise LlepError(
                    f"engine {engine.name} counted none of these requests: name the API that is its own with "
                    "-- --base-url URL, or the engine with --engine"
                )
            if at > 1:
                runs.append(run)
    return runs


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
    settings = _settings(control_plane, name)
    return Measured(name, settings["mode"], float(settings["report_interval_s"]))


def _settings(control_plane: ControlPlane, engine: str) -> Row:
    return {one["key"]: one["value"] for one in control_plane.get("/v1/settings", engine=engine)["settings"]}


def _is_unlimited(flags: VllmFlags) -> bool:
    """Whether requests are sent as fast as they are answered; else throughput is what was asked for."""
    return (flags.value("--request-rate") or "inf") == "inf"


def _api(flags: VllmFlags) -> str:
    if given := flags.value("--base-url"):
        return given.rstrip("/")
    return f"http://{flags.value('--host') or '127.0.0.1'}:{flags.value('--port') or 8000}"


def _served(api: str) -> Row:
    """The first model that the API lists. Raises LlepError where no API of vLLM answers."""
    key = _api_key()
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        answer = httpx.get(f"{api}/v1/models", headers=headers, timeout=API_WITHIN_S, verify=False, trust_env=False)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise LlepError(f"no API at {api} ({error}): name vLLM's with -- --base-url http://HOST:PORT") from None
    if answer.status_code == 401:
        raise LlepError(f"{api} wants an API key: put it in OPENAI_API_KEY")
    try:
        model: Row = answer.json()["data"][0]
        return {"id": str(model["id"]), "root": str(model.get("root") or model["id"])}
    except (ValueError, KeyError, IndexError, TypeError):
        raise LlepError(f"{api} answered {answer.status_code}, and not as vLLM's OpenAI API does") from None


def _api_key() -> str | None:
    return os.environ.get("OPENAI_API_KEY") or os.environ.get("VLLM_API_KEY")


def _left_out(flags: VllmFlags, served: Row) -> list[str]:
    """What vLLM would otherwise choose for a farm of GPUs, or look for on the internet."""
    added = [] if flags.has("--num-prompts") else ["--num-prompts", str(NUM_PROMPTS)]
    model = flags.value("--model")
    if model is None:
        added += ["--model", served["root"], "--served-model-name", served["id"]]
    elif model == served["id"] != served["root"] and not flags.has("--tokenizer", "--skip-tokenizer-init"):
        added += ["--tokenizer", served["root"]]
    return added


@contextmanager
def _mode_goes_back(control_plane: ControlPlane, engine: Measured) -> Iterator[None]:
    """Modes set in the block are temporary; afterwards, also after SIGTERM, the one that held before is back."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        _put_back(control_plane, engine)


def _put_back(control_plane: ControlPlane, engine: Measured) -> None:
    try:
        # A temporary mode lies over the lasting one, and this one takes the place of the last run's.
        _set_mode(control_plane, engine, engine.mode, BRIEFLY_S, "llep bench ends")
        time.sleep(2 * BRIEFLY_S)
        mode = _settings(control_plane, engine.name)["mode"]
    except (LlepError, typer.Exit) as error:
        _say(f"mode {engine.mode} could not be put back ({error}): it comes back by itself, or with `llep mode`")
    else:
        if mode != engine.mode:
            _say(f"the mode is {mode}; before it was {engine.mode} for a while: llep mode {engine.mode} --ttl 10m")


def _set_mode(control_plane: ControlPlane, engine: Measured, mode: str, ttl_s: float, reason: str) -> None:
    control_plane.put("/v1/mode", {"mode": mode, "ttl_s": ttl_s}, engines=[engine.name], reason=reason)


def _run(
    control_plane: ControlPlane,
    engine: Measured,
    mode: str,
    arguments: list[str],
    limit_s: float,
    on_second: Callable[[float], None],
) -> Run:
    _set_mode(control_plane, engine, mode, limit_s + TTL_MARGIN_S, "llep bench")
    before = counters(control_plane.get_bytes("/metrics").decode(), engine.name)
    measured = _measure(arguments, limit_s, on_second)
    time.sleep(REPORTS_WITHIN * engine.report_interval_s)
    after = counters(control_plane.get_bytes("/metrics").decode(), engine.name)
    return Run(mode, measured, counted_between(before, after))


def _measure(arguments: list[str], limit_s: float, on_second: Callable[[float], None]) -> dict[str, float]:
    """What one `vllm bench serve` measured. Raises LlepError with its last words, also where it takes too long."""
    key = _api_key()
    environment = {**os.environ, **({"OPENAI_API_KEY": key} if key else {})}
    with tempfile.TemporaryDirectory(prefix="llep-bench-") as folder:
        log, result = Path(folder) / "log", Path(folder) / "result.json"
        command = [sys.executable, "-m", "llep.vllm_plugin.bench", *arguments, "--disable-tqdm"]
        command += ["--save-result", "--result-dir", folder, "--result-filename", result.name]
        with log.open("wb") as output:
            # Ctrl-C on the terminal is for us.
            process = subprocess.Popen(
                command,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=end_with_parent,
            )
        try:
            started_s = time.monotonic()
            while process.poll() is None:
                seconds = time.monotonic() - started_s
                on_second(seconds)
                if seconds > limit_s:
                    raise LlepError(
                        f"one run took longer than {limit_s:g} s: give vllm bench serve less to do (-- --num-prompts "
                        f"10), or more time (--run-timeout 1h). It said last:\n{_last_words(log)}"
                    )
                time.sleep(LOOK_EVERY_S)
        finally:
            process.kill()
            process.wait()
        if process.returncode or not result.exists():
            raise LlepError(f"vllm bench serve ended with status {process.returncode}:\n{_last_words(log)}")
        values = json.loads(result.read_text())
    wanted = (*MEASURES, "completed", "failed")
    measured = {name: float(values[name]) for name in wanted if isinstance(values.get(name), int | float)}
    if not measured.get("completed"):
        raise LlepError("vllm bench serve completed no request: vLLM's log says why")
    return measured


def _last_words(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").strip().splitlines()[-15:])


def _say(text: str) -> None:
    print(f"llep: bench: {text}", file=sys.stderr, flush=True)


def _in_short(run: Run) -> str:
    measured = run.measured
    words = [f"{measured['duration']:.1f} s, {measured['total_token_throughput']:,.0f} tokens/s"]
    words += [
        f"{name.upper()} {measured[f'mean_{name}_ms']:,.1f} ms"
        for name in ("ttft", "tpot")
        if f"mean_{name}_ms" in measured
    ]
    words += [f"{run.counted['lends']:,.0f} lends"] if run.counted["lends"] else []
    return ", ".join(words)


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
