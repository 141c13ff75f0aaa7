"""Does Prometheus see all that happens? `llep serve` under a load whose domain shifts, watched by a real Prometheus.

Every report that reaches the scheduler is added up beside it; in the end Prometheus, the reports and what the API says
of its tokens must agree to the token, with no scrape missed and none twice. Prints one JSON line.

    python -m bench.monitoring [MODEL] [--seconds 600] [--append]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from bench.record import add_record
from llep.errors import LlepError
from llep.messages import GroupLoads, Report, decode_snapshot
from llep.monitoring.rules import rules
from llep.scheduler.client import SchedulerClient
from llep.tiny_models import write_tiny_model
from tests.e2e.stack import EAGER_TO_LEND, LLEP, TP_EP, VLLM, Stack
from tests.ops.prometheus import Prometheus, prometheus

SCRAPE_S = 5.0  # as in deploy/prometheus
LOOK_EVERY_S = 0.2
SETTLE_S = 3 * SCRAPE_S
RATE = 4.0
START_S = 1200.0  # of vLLM, where others take the cores
FAULTS = ("failed", "missed", "doubled")
COUNTERS = (
    "llep_tokens_total",
    "llep_steps_total",
    "llep_plan_decisions_total",
    "llep_rank_routed_tokens_total",
    "llep_rank_computed_tokens_total",
    "llep_spilled_tokens_total",
    "llep_lends_total",
)


class Tally:
    """What reports add up to, counter by counter: the growth from each report of rank 0 to the next."""

    def __init__(self) -> None:
        self.totals = dict.fromkeys(COUNTERS, 0)
        self.reports = 0
        self._before: dict[str, int] = {}
        self._seen: tuple[str, int] = ("", 0)

    def see(self, report: Report) -> None:
        incarnation, seq = self._seen
        if report.group is None or (report.incarnation == incarnation and report.seq <= seq):
            return
        if report.incarnation != incarnation:
            self._before = dict.fromkeys(COUNTERS, 0)
        self._seen = (report.incarnation, report.seq)
        self.reports += 1
        counted = counters_of(report, report.group)
        for name, value in counted.items():
            self.totals[name] += value - self._before[name]
        self._before = counted


def counters_of(report: Report, group: GroupLoads) -> dict[str, int]:
    return {
        "llep_tokens_total": int(group.tokens_PL.numpy().sum(axis=0).max()),
        "llep_steps_total": sum(report.steps.values()),
        "llep_plan_decisions_total": group.decisions_in_both.total(),
        "llep_rank_routed_tokens_total": int(group.routed_PLR.numpy().sum()),
        "llep_rank_computed_tokens_total": int(group.computed_PLR.numpy().sum()),
        "llep_spilled_tokens_total": int(group.spilled_in_PR.numpy().sum() + group.spilled_out_PR.numpy().sum()),
        "llep_lends_total": int(group.lends_in_PRK.numpy().sum() + group.lends_out_PRK.numpy().sum()),
    }


@contextmanager
def tallied(stack: Stack) -> Iterator[Tally]:
    """Asks the scheduler itself, past the control plane, for as long as the block lasts."""
    tally, ends = Tally(), threading.Event()
    watching = threading.Thread(target=lambda: asyncio.run(_watch(stack, tally, ends)))
    watching.start()
    try:
        yield tally
    finally:
        ends.set()
        watching.join()


async def _watch(stack: Stack, tally: Tally, ends: threading.Event) -> None:
    os.environ |= {name: stack.environment(name) for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")}
    async with SchedulerClient(stack.environment("LLEP_RAY_ADDRESS"), state_folder=stack.folder / "state") as client:
        while not ends.is_set():
            # Late, where others take the cores: counts are totals, so the next report says it all.
            with suppress(LlepError):
                snapshot = decode_snapshot(await client.call("metrics", timeout_s=30.0))
                for engine in snapshot.engines:
                    if engine.speaker is not None:
                        tally.see(engine.speaker)
            await asyncio.sleep(LOOK_EVERY_S)


def scrapes(server: Prometheus, job: str, window_s: int) -> dict[str, Any]:
    """How regular the scrapes of a job were over the window: from the samples themselves."""
    (series,) = server.query(f'up{{job="{job}"}}[{window_s}s]')
    times = [float(at) for at, _ in series["values"]]
    apart = [after - before for before, after in zip(times, times[1:], strict=False)]
    return {
        "scrapes": len(times),
        "failed": sum(value != "1" for _, value in series["values"]),
        "missed": sum(gap > 1.5 * SCRAPE_S for gap in apart),
        "doubled": sum(gap < 0.5 * SCRAPE_S for gap in apart),
    }


def broken_series(server: Prometheus, window_s: int) -> list[str]:
    """Series of counters that fell, or that a scrape lacks between their first and their last sample."""
    found = []
    for series in server.query(f'{{__name__=~"llep_.*_total|llep_.*_(sum|count|bucket)"}}[{window_s}s]'):
        times, values = ([float(pair[part]) for pair in series["values"]] for part in (0, 1))
        fell = any(after < before for before, after in zip(values, values[1:], strict=False))
        lacks = any(after - before > 1.5 * SCRAPE_S for before, after in zip(times, times[1:], strict=False))
        if fell or lacks:
            found.append(str(series["metric"]))
    return found


def run(model: Path, seconds: int, folder: Path) -> dict[str, Any]:
    settings = {**EAGER_TO_LEND, "LLEP_METRICS_LEVEL": "layer_rank", "LLEP_IMBALANCE_THRESHOLD": "1.1"}
    with Stack(model, folder, *TP_EP, *VLLM, **settings) as stack:
        stack.wait_until_serving(START_S)
        hosts = {"llep": stack.control_plane, "vllm": stack.api}
        targets = {job: url.removeprefix("http://") for job, url in hosts.items()}
        with tallied(stack) as tally, prometheus(folder, targets, rules(), scrape_s=SCRAPE_S) as server:
            start_s = time.monotonic()
            sent = load(stack, seconds)
            time.sleep(SETTLE_S)
            window_s = int(time.monotonic() - start_s)
            seen = {name: int(server.value(f"sum({name})")) for name in COUNTERS}
            durations = server.query(f'scrape_duration_seconds{{job="llep"}}[{window_s}s]')[0]["values"]
            found = {
                "seconds": window_s,
                **{job: scrapes(server, job, window_s) for job in targets},
                "series": int(server.value('count({__name__=~"llep_.+"})')),
                "broken_series": broken_series(server, window_s),
                "rejected_samples": rejected(server),
                "scrape_ms": _spread([1e3 * float(value) for _, value in durations]),
                "firing": sorted(server.firing()),
            }
    # A request's last token is given out and not fed back.
    used = sent["tokens"] - sent["answered"]
    agree = {name: [seen[name], tally.totals[name]] for name in COUNTERS}
    return {
        "case": "watched",
        "model": model.name,
        **found,
        "requests": sent["answered"],
        "failed_requests": sent["failed"] + sent["sent"] - sent["answered"],
        "reports": tally.reports,
        "api_tokens": used,
        "prometheus_and_reports": agree,
        "is_exact": seen["llep_tokens_total"] == used and all(one == other for one, other in agree.values()),
    }


def load(stack: Stack, seconds: int) -> dict[str, Any]:
    """`llep demo load`, as people run it."""
    command = [str(LLEP), "demo", "load", "--api", stack.api, "--rate", str(RATE), "--duration", f"{seconds}s"]
    done = subprocess.run([*command, "-o", "json"], capture_output=True, text=True, timeout=seconds + 300, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def rejected(server: Prometheus) -> int:
    """Samples that Prometheus itself counts as doubled, out of order or out of bounds."""
    names = ("duplicate_timestamp", "out_of_order", "out_of_bounds")
    return sum(server.own_metric(f"prometheus_target_scrapes_sample_{name}_total") for name in names)


def _spread(values: list[float]) -> list[float]:
    """Median and highest."""
    return [round(statistics.median(values), 1), round(max(values), 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", help="a tiny random one if not given")
    parser.add_argument("--seconds", type=int, default=600, help="how long to send requests")
    parser.add_argument("--append", action="store_true", help="add the line to bench/results/monitoring.jsonl")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="w-", dir="/tmp") as name:
        model = asked.model or write_tiny_model("gpt-oss", Path(name) / "tiny-gpt-oss", hot=tuple(range(8))).directory
        found = run(model, asked.seconds, Path(name))
    add_record("monitoring", found, append=asked.append)
    # vLLM's page comes from its API server, which is busy with requests at times: that is not for us to judge.
    faults = [found["broken_series"], found["rejected_samples"], *(found["llep"][key] for key in FAULTS)]
    raise SystemExit(0 if found["is_exact"] and not any(faults) else 1)


if __name__ == "__main__":
    main()
