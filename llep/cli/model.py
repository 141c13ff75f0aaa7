"""`llep model`: checkpoints to try llep with."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from llep.cli.output import Format, show
from llep.tiny_models import Dtype, Kind, ReportProgress, TinyModel, write_tiny_model
from llep.tiny_models.options import HARMONY_VOCAB, numbers, parse_experts
from llep.training import TrainedModel, parse_options, train_model

PLAIN_LINE_EVERY_S = 2.0
TRAINING_LINE_EVERY_S = 10.0

commands = typer.Typer(help="Make small MoE checkpoints to try llep with.", no_args_is_help=True)


def add_to(app: typer.Typer) -> None:
    app.add_typer(commands, name="model")


@commands.callback()
def _group() -> None: ...


@commands.command()
def tiny(
    kind: Annotated[Kind, typer.Argument(metavar="KIND", help="gpt-oss, deepseek or qwen3.")],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to make.")],
    layers: Annotated[int, typer.Option(help="Layers; DeepSeek's first one is dense.")] = 4,
    hidden: Annotated[int, typer.Option(help="Hidden size, a multiple of 32.")] = 64,
    intermediate: Annotated[int, typer.Option(help="Intermediate size of one expert, a multiple of 32.")] = 64,
    experts: Annotated[int, typer.Option(help="Experts of each MoE layer.")] = 16,
    top_k: Annotated[int, typer.Option(help="Experts that each token chooses.")] = 4,
    heads: Annotated[int, typer.Option(help="Attention heads.")] = 4,
    kv_heads: Annotated[int | None, typer.Option(help="Key-value heads; half of the heads by default.")] = None,
    groups: Annotated[
        int | None, typer.Option(help="DeepSeek: expert groups; a token chooses from half of them.")
    ] = None,
    vocab: Annotated[
        int | None, typer.Option(help=f"Vocabulary; {HARMONY_VOCAB} for gpt-oss, which its chat needs, else 2048.")
    ] = None,
    max_positions: Annotated[int, typer.Option(help="Longest context, a multiple of 64.")] = 8192,
    dtype: Annotated[Dtype, typer.Option(help="Type of the weights.")] = Dtype.FLOAT32,
    seed: Annotated[int, typer.Option(help="The same seed gives the same bytes.")] = 0,
    hot: Annotated[
        str | None, typer.Option(help="Hot experts of every layer, such as 0-7 or 0,3; none by default.")
    ] = None,
    hot_share: Annotated[
        float | None, typer.Option(help="Share of all token-expert pairs for the hot experts; 0.9 by default.")
    ] = None,
    hot_bias: Annotated[
        float | None, typer.Option(help="Instead of --hot-share: what is added to the hot experts' router scores.")
    ] = None,
    reply_tokens: Annotated[int, typer.Option(help="Mean length after which a reply ends; 0 is never.")] = 500,
    force: Annotated[bool, typer.Option("--force", help="Replace a model made earlier.")] = False,
    output: Annotated[Format, typer.Option("--output", "-o", help="How to print the result.")] = Format.TABLE,
) -> None:
    """Write a small random checkpoint with a tokenizer that vLLM loads without a download.

    For one of two ranks to get 93% of the work: --hot 0-7 --hot-share 0.93.
    """
    started_s = time.monotonic()
    with _progress() as progress:
        model = write_tiny_model(
            kind,
            directory,
            force=force,
            progress=progress,
            layers=layers,
            hidden=hidden,
            intermediate=intermediate,
            experts=experts,
            top_k=top_k,
            heads=heads,
            kv_heads=kv_heads,
            groups=groups,
            vocab=vocab,
            max_positions=max_positions,
            dtype=dtype,
            seed=seed,
            hot=parse_experts(hot) if hot is not None else (),
            hot_share=hot_share,
            hot_bias=hot_bias,
            reply_tokens=reply_tokens,
        )
    if output is Format.TABLE:
        print(_describe(model, time.monotonic() - started_s))
    else:
        row = _row(model)
        show([row], output, data=row)


@commands.command()
def train(
    kind: Annotated[Kind, typer.Argument(metavar="KIND", help="gpt-oss, deepseek or qwen3.")],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to make.")],
    text: Annotated[
        list[Path] | None,
        typer.Option(help="A file or folder of text, one domain each; without it, text found on this machine."),
    ] = None,
    minutes: Annotated[float, typer.Option(help="How long to train, over all runs.")] = 5.0,
    steps: Annotated[int | None, typer.Option(help="How many steps to train, instead of minutes.")] = None,
    layers: Annotated[int | None, typer.Option(help="Layers; DeepSeek's first one is dense. [default: 4]")] = None,
    hidden: Annotated[int | None, typer.Option(help="Hidden size, a multiple of 32. [default: 192]")] = None,
    intermediate: Annotated[
        int | None, typer.Option(help="Intermediate size of one expert, a multiple of 32. [default: 192]")
    ] = None,
    experts: Annotated[int | None, typer.Option(help="Experts of each MoE layer. [default: 32]")] = None,
    top_k: Annotated[int | None, typer.Option(help="Experts that each token chooses. [default: 4]")] = None,
    vocab: Annotated[int | None, typer.Option(help="Vocabulary. [default: 4096]")] = None,
    batch: Annotated[int, typer.Option(help="Sequences of a step.")] = 8,
    sequence: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 256,
    learning_rate: Annotated[float, typer.Option(help="Highest learning rate.")] = 3e-3,
    balance: Annotated[float, typer.Option(help="Weight of the loss that evens out experts.")] = 0.002,
    seed: Annotated[int, typer.Option(help="The same seed, text and steps give the same model.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace a model made earlier.")] = False,
    output: Annotated[Format, typer.Option("--output", "-o", help="How to print the result.")] = Format.TABLE,
) -> None:
    """Train a small MoE on this machine's text: its routing is skewed by domain and layer, as real models' is.

    Ctrl-C keeps what was reached, and the same command goes on from there.
    """
    # Threads that spin while they wait take the cores from others: beside other work that is three times as slow.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sizes = {
        "layers": layers,
        "hidden": hidden,
        "intermediate": intermediate,
        "experts": experts,
        "top_k": top_k,
        "vocab": vocab,
        "seed": seed,
    }
    training = {"minutes": minutes, "steps": steps, "batch": batch, "sequence": sequence}
    options = parse_options(kind, text or [], sizes, **training, learning_rate=learning_rate, balance=balance)
    with _training_progress() as (say, on_step), _asked_to_stop() as should_stop:
        model = train_model(directory, options, force=force, say=say, on_step=on_step, should_stop=should_stop)
    if output is Format.TABLE:
        _show_training(model)
    else:
        row = {"directory": str(model.directory), **model.report}
        show([_flat(row)] if output is Format.CSV else [row], output, data=row)


@contextmanager
def _asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Whether somebody asked to stop, by Ctrl-C or SIGTERM: between two steps, not in the middle of one."""
    asked: list[int] = []
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda number, frame: asked.append(number)) for number in signals]
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


@contextmanager
def _training_progress() -> Iterator[tuple[Callable[[str], None], Callable[[Any], None]]]:
    """(say, on_step): a bar on a terminal, else a line now and then; on standard error."""
    if not sys.stderr.isatty():
        yield lambda text: print(f"llep: {text}", file=sys.stderr, flush=True), _plain_training_progress()
        return
    columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=None)

        def on_step(progress: Any) -> None:
            bar.update(task, completed=progress.step, total=progress.total_steps, description=_state_of(progress))

        yield lambda text: bar.console.print(f"llep: {text}", highlight=False, markup=False), on_step


def _plain_training_progress() -> Callable[[Any], None]:
    last_s = time.monotonic()

    def on_step(progress: Any) -> None:
        nonlocal last_s
        if time.monotonic() - last_s >= TRAINING_LINE_EVERY_S:
            last_s = time.monotonic()
            total = progress.total_steps or "?"
            print(f"llep: step {progress.step} of {total}, {_state_of(progress)}", file=sys.stderr, flush=True)

    return on_step


def _state_of(progress: Any) -> str:
    skew = ", ".join(f"{ratio:.2f} at {ranks}" for ranks, ratio in progress.ratios.items())
    return f"loss {progress.loss:.2f}, imbalance {skew} ranks"


def _show_training(model: TrainedModel) -> None:
    """Skew by domain as a table, what the model writes, and how to serve it."""
    report = model.report
    show([_skew_row(domain) for domain in report["domains"]], Format.TABLE, title="max / mean of rank loads, by layer")
    for domain in report["domains"]:
        print(f"\n{domain['domain']}: {domain['prompt'][-60:]!r}\n  -> {domain['sample'][:160]!r}")
    print(
        f"\n{model.directory}: {report['kind']} with {model.parameters:,} parameters, loss {report['loss']:.2f} after "
        f"{report['steps']} steps in {report['seconds']:.0f} s"
    )
    print(f"serve it: llep serve {shlex.quote(str(model.directory))} --tensor-parallel-size 2 --enable-expert-parallel")


def _skew_row(domain: dict[str, Any]) -> dict[str, Any]:
    ratios = domain["imbalance_ratio_by_ranks_and_layer"]
    by_ranks = {
        f"{ranks} ranks": " ".join(f"{ratio:.2f}" for ratio in of_layers) for ranks, of_layers in ratios.items()
    }
    return {"domain": domain["domain"], "loss": domain["loss"], **by_ranks}


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if not isinstance(value, list | dict)}


@contextmanager
def _progress() -> Iterator[ReportProgress]:
    """A bar on a terminal, else a line now and then; on standard error, so that standard output is the result alone."""
    if not sys.stderr.isatty():
        yield _plain_progress()
        return
    columns = (TextColumn("weights"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("weights", total=None)
        yield lambda done_bytes, total_bytes: bar.update(task, completed=done_bytes, total=total_bytes)


def _plain_progress() -> ReportProgress:
    last_s = time.monotonic()

    def report(done_bytes: int, total_bytes: int) -> None:
        nonlocal last_s
        if time.monotonic() - last_s >= PLAIN_LINE_EVERY_S:
            last_s = time.monotonic()
            print(f"weights: {done_bytes / 1e6:,.0f} of {total_bytes / 1e6:,.0f} MB", file=sys.stderr, flush=True)

    return report


def _row(model: TinyModel) -> dict[str, Any]:
    return {
        "kind": model.options.kind.value,
        "directory": str(model.directory),
        "parameters": model.parameters,
        "size_bytes": model.size_bytes,
        "hot": numbers(model.options.hot),
        "hot_share": model.hot_share,
        "serve": _serve_command(model),
    }


def _describe(model: TinyModel, took_s: float) -> str:
    options = model.options
    lines = [
        f"{model.directory}: {options.kind} with {options.layers} layers, {options.experts} experts, "
        f"top-{options.top_k}, {model.parameters:,} parameters; {model.size_bytes / 1e6:,.1f} MB in {took_s:.1f} s"
    ]
    if model.hot_share is not None:
        lines.append(
            f"hot experts {numbers(options.hot)} get {model.hot_share:.1%} of the token-expert pairs, "
            "by simulated routing; real prompts move that by a few points"
        )
    if options.kind is Kind.GPT_OSS and not options.has_harmony:
        lines.append(f"completions only: gpt-oss chat needs --vocab {HARMONY_VOCAB} or more (or leave --vocab out)")
    lines.append(f"serve it: {_serve_command(model)}")
    return "\n".join(lines)


def _serve_command(model: TinyModel) -> str:
    flags = f"--dtype {model.options.dtype} --tensor-parallel-size 2 --enable-expert-parallel"
    return f"llep serve {shlex.quote(str(model.directory))} {flags}"
