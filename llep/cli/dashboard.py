"""`llep dashboard`: a Prometheus that watches the stack on this machine, and the panels of the Grafana dashboard, drawn
without a Grafana.
"""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
import yaml

from llep.cli.control import parse_duration
from llep.cli.demo import DEFAULT_API
from llep.cli.http import DEFAULT_SERVER, ControlPlane, KeyFileOption, ServerOption
from llep.cli.output import ExitCode, fail
from llep.cli.preflight import check_port, free_ports
from llep.cli.supervise import Child, StopRequested, StopSignals
from llep.errors import LlepError, UnsupportedConfiguration
from llep.monitoring.dashboards import dashboards
from llep.monitoring.picture import Series, legend, picture
from llep.monitoring.queries import filled
from llep.monitoring.rules import rules

SCRAPE_S = 5
POINTS = 150  # of a line
PROMETHEUS_START_S = 30.0
LOOK_EVERY_S = 0.2


def add_to(app: typer.Typer) -> None:
    app.command()(dashboard)


def dashboard(
    server: ServerOption = DEFAULT_SERVER,
    key_file: KeyFileOption = None,
    api: Annotated[str, typer.Option(help="Where vLLM's OpenAI API is, for its own metrics.")] = DEFAULT_API,
    prometheus: Annotated[
        str, typer.Option("--prometheus", help="One that runs already, such as http://127.0.0.1:9090.")
    ] = "",
    port: Annotated[int, typer.Option(help="Where the page is, on 127.0.0.1; 0 takes a free one.")] = 3000,
    since: Annotated[str, typer.Option(help="How far back panels look.")] = "15m",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Draw one picture (SVG) of --prometheus, and end.")
    ] = None,
) -> None:
    """Show the Grafana dashboard's panels in a browser without a Grafana: on one machine, to look at llep.

    Starts a Prometheus (one in PATH) that watches the control plane and vLLM, with llep's rules; ends it with Ctrl-C.
    """
    seconds = parse_duration("--since", since)
    if output is not None:
        if not prometheus:
            raise UnsupportedConfiguration("-o draws what a running Prometheus has: name it with --prometheus URL")
        _write(output, drawn(prometheus, seconds))
        return
    check_port("127.0.0.1", port, "the page", "choose another with --port (0 takes a free one)")
    if not prometheus:
        with ControlPlane(server, key_file) as control_plane:
            control_plane.get_bytes("/metrics")  # what Prometheus will ask for: better to hear here why it can't be had
    signals = StopSignals()
    with signals.heeded(), tempfile.TemporaryDirectory(prefix="llep-") as folder:
        try:
            with _watcher(prometheus, Path(folder), server, key_file, api, signals) as url:
                with page(functools.partial(drawn, url, seconds), port) as address:
                    print(f"llep: the dashboard's panels are at {address}, Prometheus at {url}; Ctrl-C ends both")
                    print(
                        f"llep: they fill once requests come, such as those of: llep demo load --api {api}", flush=True
                    )
                    while True:
                        signals.pause(3600.0)
        except StopRequested:
            pass


def drawn(prometheus: str, seconds: float) -> str:
    """The dashboard as Prometheus answers it now: SVG. Ends the command where there is none."""
    try:
        with httpx.Client(base_url=prometheus, timeout=20.0, trust_env=False) as client:
            client.get("/-/ready").raise_for_status()
            return picture(dashboards()["llep-overview.json"], functools.partial(answers, client, seconds))
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        reason = str(error) or type(error).__name__
        raise typer.Exit(fail(f"no Prometheus at {prometheus}: {reason}", ExitCode.UNREACHABLE)) from None


def answers(client: httpx.Client, seconds: float, target: dict[str, Any], rate_interval: str = "20s") -> list[Series]:
    """What a Prometheus says to a panel's query over the last `seconds`. Raises httpx.HTTPError."""
    now_s = time.time()
    query: dict[str, Any] = {"query": filled(target["expr"], rate_interval)}
    if target["instant"]:
        response = client.get("/api/v1/query", params=query | {"time": now_s})
    else:
        span = {"start": now_s - seconds, "end": now_s, "step": max(seconds / POINTS, 1.0)}
        response = client.get("/api/v1/query_range", params=query | span)
    response.raise_for_status()
    rows = response.json()["data"]["result"]
    return [(legend(target["legendFormat"], row["metric"]), _points(row)) for row in rows]


def _points(row: dict[str, Any]) -> list[tuple[float, float]]:
    values = row["values"] if "values" in row else [row["value"]]
    return [(float(at), float(value)) for at, value in values if value not in ("NaN", "+Inf", "-Inf")]


@contextmanager
def _watcher(
    prometheus: str, folder: Path, server: str, key_file: Path | None, api: str, signals: StopSignals
) -> Iterator[str]:
    """Where Prometheus is: the one that was named, or one that is started, and ended with the block."""
    if prometheus:
        yield prometheus
        return
    program = shutil.which("prometheus")
    if program is None:
        raise LlepError(
            "no prometheus in PATH: install one (Debian: apt-get install prometheus), run `make dashboard` in llep's "
            "checkout, which unpacks one, or name a running one with --prometheus URL"
        )
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    (folder / "rules.yaml").write_text(yaml.safe_dump(rules()))
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(prometheus_config(server, key_file, api)))
    command = [program, f"--config.file={folder / 'prometheus.yaml'}", f"--storage.tsdb.path={folder / 'data'}"]
    log = folder / "prometheus.log"
    child = Child("Prometheus", [*command, f"--web.listen-address=127.0.0.1:{port}"], os.environ, log)
    try:
        child.start()
        deadline_s = time.monotonic() + PROMETHEUS_START_S
        while not _is_ready(url):
            if child.status is not None or time.monotonic() > deadline_s:
                raise LlepError(f"Prometheus does not start: {child.last_words()}")
            signals.pause(LOOK_EVERY_S)
        yield url
    finally:
        child.stop()


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/-/ready", trust_env=False, timeout=2.0).status_code == 200
    except httpx.HTTPError:
        return False


def prometheus_config(server: str, key_file: Path | None, api: str) -> dict[str, Any]:
    """What Prometheus scrapes, and how often."""
    control_plane: dict[str, Any] = _scrape("llep", server)
    if key_file is not None:
        control_plane["authorization"] = {"credentials_file": str(key_file.expanduser().absolute())}
    every = {"scrape_interval": f"{SCRAPE_S}s", "evaluation_interval": f"{SCRAPE_S}s"}
    return {"global": every, "rule_files": ["rules.yaml"], "scrape_configs": [control_plane, _scrape("vllm", api)]}


def _scrape(job: str, url: str) -> dict[str, Any]:
    parsed = httpx.URL(url)
    target = f"{parsed.host}:{parsed.port or (443 if parsed.scheme == 'https' else 80)}"
    return {"job_name": job, "scheme": parsed.scheme, "static_configs": [{"targets": [target]}]}


PAGE = """<!doctype html>
<title>llep overview</title>
<link rel="icon" href="data:,">
<style>body { margin: 8px auto; max-width: 1280px; font: 14px sans-serif; background: #f4f5f5 }</style>
<p>The panels of Grafana's dashboard <b>llep overview</b>, drawn anew every 5 seconds. Point at one to read what
good and bad look like. <span id=state></span></p>
<div id=panels></div>
<script>
async function draw() {
  const state = document.getElementById("state");
  try {
    const answer = await fetch("/dashboard.svg");
    if (!answer.ok) throw new Error(await answer.text());
    document.getElementById("panels").innerHTML = await answer.text();
    state.textContent = "";
  } catch (error) {
    state.textContent = error.message;
  }
  setTimeout(draw, 5000);
}
draw();
</script>
"""


@contextmanager
def page(draw: Callable[[], str], port: int) -> Iterator[str]:
    """Its address, as long as the block lasts."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            match self.path:
                case "/":
                    self._answer(200, "text/html", PAGE)
                case "/dashboard.svg":
                    try:
                        self._answer(200, "image/svg+xml", draw())
                    except (typer.Exit, LlepError):
                        self._answer(502, "text/plain", "Prometheus does not answer.")
                case _:
                    self._answer(404, "text/plain", "The dashboard is at /.")

        def _answer(self, status: int, kind: str, text: str) -> None:
            data = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise typer.Exit(fail(f"{path} can't be written: {error.strerror}", ExitCode.ERROR)) from None
    print(path)
