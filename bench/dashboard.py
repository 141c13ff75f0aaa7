"""Draws docs/dashboard.svg: the dashboard's panels from its own queries, answered by a real Prometheus.

`python -m bench.dashboard` plays two engines for a while before a real control plane; what they route is recorded
(bench/natural), and one of them is kept from balancing for a third of the time. It shows what panels hold, not how
Grafana paints them.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import numpy.typing as npt

from bench.natural.compare import TRACES
from llep.cli.dashboard import answers
from llep.monitoring.dashboards import dashboards
from llep.monitoring.picture import picture
from llep.simulate import split_sources
from llep.traces import Trace
from llep_server.config import ServerConfig
from tests.ops.prometheus import prometheus, wait_for

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "server"))
from reporting import Engine
from running import Running, start

DOCS = Path(__file__).parents[1] / "docs"


class NaturalEngine(Engine):
    """Routes what a trained model did in vLLM: a recorded workload, step by step and round again, on eight ranks."""

    def __init__(self, name: str, workload: str) -> None:
        self._steps = {
            phase: itertools.cycle(list(Trace(TRACES / f"{workload}-{phase}").steps()))
            for phase in ("prefill", "decode")
        }
        shape = Trace(TRACES / f"{workload}-prefill").shape
        start_settings = {"metrics_level": "layer_rank", "imbalance_threshold": 1.1}
        super().__init__(
            name=name,
            ep_size=8,
            layer_numbers=shape.layer_numbers,
            num_experts=shape.num_experts,
            top_k=shape.top_k,
            start=start_settings,
        )

    def next_step(self, phase: str) -> None:
        self._step = next(self._steps[phase])
        self.run(tokens=int(self._step.counts_LRE[0].sum()) // self.top_k, phase=phase)

    def counts(self, layer: int, tokens: int, hot_share: float) -> npt.NDArray[np.int64]:
        return split_sources(self._step.counts_LRE[layer], self.ep_size)


def play(running: Running, seconds: float) -> None:
    """Two engines under natural skew; the first balances nothing for the middle third."""
    engines = [NaturalEngine("a", "shifting"), NaturalEngine("b", "manuals")]
    started_s = time.monotonic()
    while (part := (time.monotonic() - started_s) / seconds) < 1:
        engines[0].settings = engines[0].settings.changed({"imbalance_threshold": 5 if 1 / 3 < part < 2 / 3 else 1.1})
        for engine in engines:
            engine.next_step("prefill")
            engine.next_step("decode")
            running.report(engine)
        time.sleep(0.3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=90.0, help="how long to play")
    seconds = parser.parse_args().seconds
    with tempfile.TemporaryDirectory() as name, contextmanager(start)(ServerConfig(), Path(name) / "state") as running:
        with prometheus(Path(name), {"llep": running.url.removeprefix("http://")}) as server:
            playing = threading.Thread(target=play, args=(running, seconds))
            playing.start()
            wait_for(lambda: server.query("llep_info"), 60)
            playing.join()
            with httpx.Client(base_url=server.url, timeout=20, trust_env=False) as client:
                ask = functools.partial(answers, client, seconds - 12, rate_interval="10s")
                text = picture(dashboards()["llep-overview.json"], ask, "from vLLM, which is not played here")
    path = DOCS / "dashboard.svg"
    path.write_text(text)
    print(path)


if __name__ == "__main__":
    main()
