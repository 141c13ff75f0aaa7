"""`llep model`: checkpoints to try llep with."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from llep.cli.output import Format, show
from llep.tiny_models import Dtype, Kind, ReportProgress, TinyModel, write_tiny_model
from llep.tiny_models.options import HARMONY_VOCAB, numbers, parse_experts

PLAIN_LINE_EVERY_S = 2.0

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
