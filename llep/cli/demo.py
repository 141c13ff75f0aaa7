"""`llep demo`: load whose domain shifts over time, so that skew can be seen moving, and llep following it."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console
from rich.live import Live
from rich.text import Text

from llep.cli.control import parse_duration
from llep.cli.output import ExitCode, Format, fail, show
from llep.errors import LlepError, SettingsError, UnsupportedConfiguration
from llep.training.text import Domain, find_domains

DEFAULT_API = "http://127.0.0.1:8000"
PLAIN_LINE_EVERY_S = 5.0
REQUEST_TIMEOUT_S = 120.0
LATENCIES_KEPT = 200

commands = typer.Typer(help="Show what llep does.", no_args_is_help=True)


def add_to(app: typer.Typer) -> None:
    app.add_typer(commands, name="demo")


@commands.callback()
def _group() -> None: ...


@commands.command()
def load(
    api: Annotated[str, typer.Option(help="Where vLLM's OpenAI API is.")] = DEFAULT_API,
    model: Annotated[str | None, typer.Option(help="The model's name; the first that the API lists.")] = None,
    rate: Annotated[float, typer.Option(help="Requests per second.")] = 2.0,
    duration: Annotated[str, typer.Option(help="When to stop, such as 90s or 10m.")] = "5m",
    period: Annotated[str, typer.Option(help="How long until the next domain has taken over.")] = "60s",
    text: Annotated[
        list[Path] | None,
        typer.Option(help="A file or folder of text, one domain each; without it, text found on this machine."),
    ] = None,
    prompt_characters: Annotated[int, typer.Option(help="Length of a prompt.")] = 800,
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate per request.")] = 16,
    most_in_flight: Annotated[int, typer.Option(help="Requests under way at once; more are left out.")] = 32,
    seed: Annotated[int, typer.Option(help="The same seed sends the same prompts.")] = 0,
    output: Annotated[Format, typer.Option("--output", "-o", help="How to print the result.")] = Format.TABLE,
) -> None:
    """Send prompts whose domain shifts over time (code, headers, manuals, prose, and again) at a set rate.

    Watch `llep loads ranks`, the control plane's page or Grafana meanwhile. Ctrl-C ends it early. With an API key in
    VLLM_API_KEY that is sent along.
    """
    for name, value, least in (
        ("rate", rate, 0.01),
        ("prompt-characters", prompt_characters, 1),
        ("max-tokens", max_tokens, 1),
        ("most-in-flight", most_in_flight, 1),
    ):
        if not value >= least:
            raise SettingsError(f"--{name} {value:g} is not possible: it must be at least {least:g}", param=name)
    duration_s, period_s = _positive("--duration", duration), _positive("--period", period)
    domains = find_domains(text or [], seed)
    client = _client(api)
    plan = LoadPlan(domains, rate, duration_s, period_s, prompt_characters, max_tokens, most_in_flight, seed)
    with _progress() as on_tick:
        sent = asyncio.run(_send_all(client, api, model, plan, on_tick))
    row = sent.as_dict()
    show([row], output, data=row)
    if not sent.answered:
        why = sent.last_failure or "it was ended before"
        raise LlepError(f"none of {sent.sent} requests was answered ({why}): see vLLM's log")


def _positive(name: str, text: str) -> float:
    seconds = parse_duration(name, text)
    if not seconds > 0:
        raise SettingsError(f"{name} {text} is not possible: it must be more than 0", param=name)
    return seconds


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """What is sent: `rate` requests a second, prompts of that many characters, never more than so many under way."""

    domains: Sequence[Domain]
    rate: float
    duration_s: float
    period_s: float
    prompt_characters: int
    max_tokens: int
    most_in_flight: int
    seed: int

    def domain_at(self, elapsed_s: float, chance: float) -> Domain:
        """One domain for the first half of a period, then the next one more and more often; chance: 0 to 1."""
        place, into = divmod(elapsed_s / self.period_s, 1.0)
        is_next = chance < max(0.0, 2.0 * into - 1.0)
        return self.domains[(int(place) + is_next) % len(self.domains)]

    def prompt(self, elapsed_s: float, rng: random.Random) -> tuple[str, str]:
        """(domain's name, text): a passage of it, from a random place on."""
        domain = self.domain_at(elapsed_s, rng.random())
        piece = rng.choice(domain.trained)
        start = rng.randrange(max(len(piece) - self.prompt_characters, 1))
        return domain.name, piece[start : start + self.prompt_characters]


@dataclass(slots=True)
class Sent:
    """What has been sent so far, and what came back."""

    plan: LoadPlan
    domain: str = ""
    sent: int = 0
    answered: int = 0
    failed: int = 0
    left_out: int = 0
    tokens: int = 0
    elapsed_s: float = 0.0
    last_failure: str = ""
    latencies_s: list[float] = field(default_factory=list)

    def line(self) -> str:
        median = f", {1000 * sorted(self.latencies_s)[len(self.latencies_s) // 2]:.0f} ms" if self.latencies_s else ""
        trouble = f", {self.failed} failed ({self.last_failure})" if self.failed else ""
        late = f", {self.left_out} left out: the engine is slower than --rate" if self.left_out else ""
        return (
            f"{self.elapsed_s:.0f} of {self.plan.duration_s:.0f} s: {self.domain}; {self.answered} of {self.sent} "
            f"answered{median}, {self.tokens / max(self.elapsed_s, 1e-9):.0f} tokens/s{trouble}{late}"
        )

    def as_dict(self) -> dict[str, Any]:
        return {
            "sent": self.sent,
            "answered": self.answered,
            "failed": self.failed,
            "left_out": self.left_out,
            "tokens": self.tokens,
            "seconds": round(self.elapsed_s, 1),
        }


def _client(api: str) -> httpx.AsyncClient:
    try:
        url = httpx.URL(api)
    except httpx.InvalidURL:
        url = httpx.URL()
    if url.scheme not in ("http", "https") or not url.host:
        raise UnsupportedConfiguration(f"--api {api!r} is not a URL: give one such as {DEFAULT_API}", param="api")
    key = os.environ.get("VLLM_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    is_local = url.host in ("localhost", "127.0.0.1", "::1")
    return httpx.AsyncClient(base_url=api, headers=headers, timeout=REQUEST_TIMEOUT_S, trust_env=not is_local)


async def _send_all(
    client: httpx.AsyncClient, api: str, model: str | None, plan: LoadPlan, on_tick: Callable[[Sent], None]
) -> Sent:
    """One request after the other at the plan's rate, whether or not others are under way; then wait for those.

    A signal ends it at once wherever it is.
    """
    sent = Sent(plan)
    rng = random.Random(plan.seed)
    under_way: set[asyncio.Task[None]] = set()
    ended = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    async with client:
        if model is None:
            asked = asyncio.create_task(_first_model(client, api))
            await _first_of(ended, asked)
            if not asked.done():
                asked.cancel()
                return sent
            model = asked.result()
        start_s = time.monotonic()
        while not ended.is_set() and sent.elapsed_s < plan.duration_s:
            sent.domain, prompt = plan.prompt(sent.elapsed_s, rng)
            if len(under_way) >= plan.most_in_flight:
                sent.left_out += 1
            else:
                sent.sent += 1
                task = asyncio.create_task(_send(client, model, prompt, plan.max_tokens, sent))
                under_way.add(task)
                task.add_done_callback(under_way.discard)
            on_tick(sent)
            next_s = start_s + (sent.sent + sent.left_out) / plan.rate
            await _first_of(ended, timeout_s=min(next_s, start_s + plan.duration_s) - time.monotonic())
            sent.elapsed_s = time.monotonic() - start_s
        if under_way:
            answered = asyncio.gather(*under_way, return_exceptions=True)
            await _first_of(ended, answered, timeout_s=REQUEST_TIMEOUT_S)
        for task in under_way:
            task.cancel()
    return sent


async def _first_of(ended: asyncio.Event, *others: asyncio.Future[Any], timeout_s: float | None = None) -> None:
    """Returns when it has ended, when one of the others is done, or after that time."""
    end = asyncio.create_task(ended.wait())
    await asyncio.wait((end, *others), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    end.cancel()


async def _first_model(client: httpx.AsyncClient, api: str) -> str:
    """Ends the command with exit code 3 where nothing answers."""
    try:
        response = await client.get("/v1/models")
    except httpx.HTTPError as error:
        reason = str(error) or type(error).__name__
        message = f"no API at {api} ({reason}): start one with 'llep serve', or name another with --api"
        raise typer.Exit(fail(message, ExitCode.UNREACHABLE)) from None
    if response.status_code == 401:
        raise LlepError(f"{api} wants an API key: put it in VLLM_API_KEY")
    try:
        return str(response.json()["data"][0]["id"])
    except (ValueError, KeyError, IndexError, TypeError):
        raise LlepError(
            f"{api} answered {response.status_code}, and not as vLLM's OpenAI API does: see --api"
        ) from None


async def _send(client: httpx.AsyncClient, model: str, prompt: str, max_tokens: int, sent: Sent) -> None:
    start_s = time.monotonic()
    try:
        body = {"model": model, "prompt": prompt, "max_tokens": max_tokens}
        response = await client.post("/v1/completions", json=body)
        response.raise_for_status()
        usage = response.json()["usage"]
        sent.tokens += int(usage["prompt_tokens"]) + int(usage["completion_tokens"])
    except httpx.HTTPStatusError as error:
        sent.failed += 1
        sent.last_failure = f"HTTP {error.response.status_code}"
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        sent.failed += 1
        sent.last_failure = str(error) or type(error).__name__
    else:
        sent.answered += 1
        sent.latencies_s = [*sent.latencies_s[-LATENCIES_KEPT:], time.monotonic() - start_s]


@contextmanager
def _progress() -> Iterator[Callable[[Sent], None]]:
    """One line that changes on a terminal, else a line now and then; on standard error."""
    if sys.stderr.isatty():
        with Live(console=Console(stderr=True), refresh_per_second=4, transient=True) as live:
            yield lambda sent: live.update(Text(sent.line()))
        return
    last_s = 0.0

    def report(sent: Sent) -> None:
        nonlocal last_s
        if time.monotonic() - last_s >= PLAIN_LINE_EVERY_S:
            last_s = time.monotonic()
            print(f"llep: {sent.line()}", file=sys.stderr, flush=True)

    yield report
