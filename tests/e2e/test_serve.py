"""The whole of llep as a user runs it: `llep serve` on a skewed model, balanced, seen, steered, hurt and ended."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from bench.monitoring import COUNTERS, tallied
from llep.monitoring.dashboards import dashboards
from llep.monitoring.rules import rules
from llep.traces import Trace, unpacked
from tests.e2e.client import PROBE, Client, assert_counts_are_exact, by_rank, is_all_counted, prompts
from tests.e2e.processes import Process, kill_all
from tests.e2e.stack import EAGER_TO_LEND, LAYERS, LLEP, TOP_K, TP_EP, VLLM, Stack, Traffic, clean_environment
from tests.ops.prometheus import prometheus
from tests.ops.queries import panel_queries
from tests.ops.tools import tool

pytestmark = pytest.mark.e2e

BACK_WITHIN_S = 90.0  # once Ray is there again
RAY_STARTS_WITHIN_S = 240.0  # it gives up and is started again where others take the cores
RESTARTED_WITHIN_S = 60.0  # processes that take a second or two, beside a busy vLLM


@pytest.fixture(scope="module")
def stack(model: Path, folder: Path) -> Iterator[Stack]:
    with Stack(model, folder, *TP_EP, *VLLM, **EAGER_TO_LEND) as stack:
        stack.wait_until_serving()
        yield stack


@pytest.fixture(scope="module")
def client(stack: Stack) -> Iterator[Client]:
    with Client(stack) as client:
        yield client


@pytest.fixture(scope="module")
def expected(client: Client) -> str:
    """What the model says to PROBE, at first."""
    return client.complete(PROBE, max_tokens=12)


def decisions(stack: Stack, decision: str) -> int:
    return int(stack.metric("llep_plan_decisions_total")[("decision", decision),])


def lends(stack: Stack) -> int:
    return int(sum(stack.metric("llep_lends_total").values())) // 2  # each is sent and received


def test_prefills_are_balanced(stack: Stack, client: Client) -> None:
    for prompt in prompts(6, words=150):
        client.complete(prompt)
    # All layers of the last step: a report between two layers has its tokens, not all of its observations.
    stack.wait_for(lambda: is_all_counted(stack, client), 10)
    loads, metrics = stack.loads(window_s=600), stack.metrics()
    assert loads["tokens"] == client.tokens
    assert 1.7 < loads["imbalance_ratio_before"] <= 2.0
    assert 1.0 <= loads["imbalance_ratio_after"] < 1.1
    assert loads["lends"] > 0
    first, second = loads["ranks"]
    assert first["routed_tokens"] > 5 * second["routed_tokens"]
    assert first["computed_tokens"] < 1.2 * second["computed_tokens"]
    for stage in ("before", "after"):
        total, count = (metrics[f"llep_imbalance_ratio_{part}"][("stage", stage),] for part in ("sum", "count"))
        assert total / count == pytest.approx(loads[f"imbalance_ratio_{stage}"])


def test_completions_and_chat_streamed_and_not(client: Client, expected: str) -> None:
    chunks = client.stream(PROBE, max_tokens=12)
    assert "".join(chunks) == expected
    assert len(chunks) > 6
    said = client.chat("Which experts are hot?", max_tokens=24)
    assert said.finish_reason in ("length", "stop")
    assert said.message.content or said.finish_reason == "stop"
    assert client.stream_chat("Which experts are hot?", max_tokens=24) == (said.message.content or "")


def test_every_token_is_counted_once(stack: Stack, client: Client) -> None:
    stack.patch(metrics_level="layer_rank")
    lengths = [1, 2, 7, 30, 64, 3, 90, 1, 11, 40]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda job: client.complete(*job), zip(prompts(10, words=120, seed=1), lengths, strict=True)))
    assert_counts_are_exact(stack, client)
    by_layer = stack.metric("llep_layer_rank_computed_tokens_total")
    for layer in map(str, range(LAYERS)):
        computed = [by_layer[("ep_rank", str(rank)), ("layer", layer)] for rank in range(2)]
        assert sum(computed) == client.tokens * TOP_K
    assert len(by_layer) == 2 * LAYERS
    time.sleep(2.0)  # an idle engine counts nothing
    assert_counts_are_exact(stack, client)


def test_threshold_stops_and_starts_lending(stack: Stack, client: Client, expected: str) -> None:
    change = stack.patch(imbalance_threshold=100)
    assert change["diff"] == {"imbalance_threshold": [1.3, 100.0]}
    assert client.complete(PROBE, max_tokens=12) == expected
    stack.wait_for(lambda: is_all_counted(stack, client), 10)
    assert stack.engine()["live_revision"] == change["revision"]
    lent, balanced = lends(stack), decisions(stack, "balanced")
    for prompt in prompts(3, words=100, seed=2):
        client.complete(prompt)
    stack.wait_for(lambda: is_all_counted(stack, client), 10)
    assert lends(stack) == lent
    assert decisions(stack, "balanced") == balanced + 3 * LAYERS
    stack.patch(imbalance_threshold=1.05)
    assert client.complete(PROBE, max_tokens=12) == expected
    stack.wait_for(lambda: is_all_counted(stack, client), 10)
    assert lends(stack) > lent
    assert decisions(stack, "balanced") == balanced + 3 * LAYERS


def test_command_line(stack: Stack) -> None:
    status = stack.llep_json("status")
    assert [check["ok"] for check in status["checks"]] == [True] * 4, status["checks"]
    assert status["engines"][0]["state"] == "live"
    (loads,) = stack.llep_json("loads", "ranks")
    assert [rank["rank"] for rank in loads["ranks"]] == [0, 1]
    changed = stack.llep_json("settings", "set", "capacity_factor=1.2", "--reason", "a test")
    assert changed["diff"] == {"capacity_factor": [1.0, 1.2]}
    (setting,) = stack.llep_json("settings", "get", "capacity_factor")["settings"]
    assert (setting["value"], setting["source"]) == (1.2, f"revision {changed['revision']}")
    assert stack.llep_json("settings", "set", "capacity_factor=null")["diff"] == {"capacity_factor": [1.2, 1.0]}
    for command in ("status", "loads ranks", "settings get"):
        assert "model" in stack.llep(*command.split()) or "imbalance_threshold" in stack.llep(*command.split())


def test_mode_goes_back_by_itself(stack: Stack, client: Client, expected: str) -> None:
    def mode() -> str:
        return str(stack.engine()["mode"])

    stack.llep("mode", "off", "--ttl", "4s")
    routed = by_rank(stack, "llep_rank_routed_tokens_total")
    sent = client.tokens
    assert client.complete(PROBE, max_tokens=12) == expected
    stack.wait_for(lambda: mode() == "off", 3)
    assert by_rank(stack, "llep_rank_routed_tokens_total") == routed  # off: nothing is counted
    client.tokens = sent
    stack.wait_for(lambda: stack.get("/v1/settings", engine="model")["settings"][0]["value"] == "active", 10)
    time.sleep(0.5)  # until the ranks hold it; it goes live with the next step
    assert client.complete(PROBE, max_tokens=12) == expected
    stack.wait_for(lambda: mode() == "active", 3)
    assert_counts_are_exact(stack, client)
    (event, *_) = stack.get("/v1/events")["data"]
    assert event["kind"] == "mode" and "went back" in event["message"]


@pytest.mark.parametrize(
    ("patch", "words"),
    [
        ({"imbalance_treshold": 2}, ("imbalance_treshold", "did you mean 'imbalance_threshold'")),
        ({"imbalance_threshold": 0.5, "capacity_factor": 2}, ("imbalance_threshold=0.5", "greater than or equal to 1")),
        ({"capacity_factor": 2, "slots_per_rank": 2}, ("slots_per_rank", "LLEP_SLOTS_PER_RANK")),
        ({"mode": "fast"}, ("'fast'", "'off', 'observe', 'shadow' or 'active'")),
    ],
)
def test_bad_setting_changes_nothing(stack: Stack, patch: dict[str, Any], words: tuple[str, ...]) -> None:
    before = stack.get("/v1/settings", engine="model")
    answer = httpx.patch(f"{stack.control_plane}/v1/settings", json=patch, timeout=20)
    assert answer.status_code == 422
    assert answer.json()["error"]["code"] == "invalid_setting"
    told = stack.llep("settings", "set", *(f"{key}={value}" for key, value in patch.items()), expect=2)
    for word in words:
        assert word in answer.json()["error"]["message"]
        assert word in told
    assert "Traceback" not in told
    assert stack.get("/v1/settings", engine="model") == before


def test_printed_commands_work(stack: Stack, client: Client) -> None:
    answers = []
    for command in stack.curls():
        done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        answers.append(json.loads(done.stdout))
    completion, loads, openapi = answers
    assert completion["choices"][0]["text"]
    assert loads["data"][0]["engine"] == "model"
    assert "/v1/loads" in openapi["paths"]
    usage = completion["usage"]
    client.tokens += usage["prompt_tokens"] + usage["completion_tokens"] - 1
    assert_counts_are_exact(stack, client)


def test_every_panel_of_the_dashboard_has_data(stack: Stack, client: Client, tmp_path: Path) -> None:
    """Every query of the dashboard, asked of a Prometheus that watches this engine under load."""
    stack.patch(metrics_level="layer_rank", probe_ratio=0.3)  # what lending is worth shows once some steps don't lend
    targets = {"llep": stack.control_plane, "vllm": stack.api}
    hosts = {job: url.removeprefix("http://") for job, url in targets.items()}
    words_left = iter(prompts(400, words=40, seed=5))
    with prometheus(tmp_path, hosts, rules()) as watcher, tallied(stack) as tally:
        with Traffic(lambda: client.complete(next(words_left), max_tokens=4)) as traffic:
            for query in panel_queries(dashboards()["llep-overview.json"]):
                stack.wait_for(lambda query=query: watcher.has_data(query.expr), 60, query.panel)
        assert not traffic.failures
        stack.wait_for(lambda: is_all_counted(stack, client), 30)
        time.sleep(2.0)  # until it has been scraped again
        assert watcher.value("sum(llep_rank_computed_tokens_total)") == client.tokens * TOP_K * LAYERS
        assert watcher.value("llep_tokens_total") == client.tokens
        # A short share of bench.monitoring: what reports add up to is what Prometheus holds.
        stack.wait_for(lambda: tally.totals["llep_tokens_total"] == client.tokens, 30)
        assert {name: watcher.value(f"sum({name})") for name in COUNTERS} == tally.totals
    stack.patch(metrics_level=None, probe_ratio=None)


def test_the_dashboard_without_a_grafana(stack: Stack, client: Client) -> None:
    """README's way to a dashboard with data where there is no Docker: `llep dashboard` beside the stack."""
    stack.patch(metrics_level="layer_rank", probe_ratio=0.3)
    environment = clean_environment(PATH=f"{os.environ['PATH']}:{Path(tool('prometheus')).parent}")
    command = [str(LLEP), "dashboard", "--server", stack.control_plane, "--api", stack.api, "--port", "0"]
    words_left = iter(prompts(400, words=40, seed=6))
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as shown:
        assert shown.stdout is not None
        found = re.search(r"panels are at (\S+), Prometheus at (\S+);", shown.stdout.readline())
        assert found, shown.communicate()
        address, prometheus = found.groups()
        assert "llep overview" in httpx.get(address, timeout=20).text
        with Traffic(lambda: client.complete(next(words_left), max_tokens=4)) as traffic:
            stack.wait_for(lambda: "no data yet" not in httpx.get(f"{address}/dashboard.svg", timeout=60).text, 90)
        assert not traffic.failures
        picture = stack.folder / "dashboard.svg"
        stack.llep("dashboard", "--prometheus", prometheus, "-o", str(picture))
        assert "no data yet" not in picture.read_text() and "Imbalance ratio before and after" in picture.read_text()
        shown.send_signal(signal.SIGINT)
        assert shown.wait(30) == 0
    stack.wait_for(lambda: not answers(prometheus), 10, "Prometheus ends with it")
    stack.patch(metrics_level=None, probe_ratio=None)


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code < 500
    except httpx.HTTPError:
        return False


def test_demo_load(stack: Stack, client: Client) -> None:
    load = ["--rate", "4", "--duration", "3s", "--period", "1s", "--prompt-characters", "200", "--max-tokens", "4"]
    done = subprocess.run(
        [str(LLEP), "demo", "load", "--api", stack.api, *load, "-o", "json"], capture_output=True, text=True, timeout=90
    )
    assert done.returncode == 0, done.stderr
    sent = json.loads(done.stdout)
    assert sent["answered"] == sent["sent"] > 3
    client.tokens += sent["tokens"] - sent["answered"]  # a request's last token is not fed back
    assert_counts_are_exact(stack, client)


def test_a_recording_through_a_killed_agent_to_a_verdict(stack: Stack, client: Client, tmp_path: Path) -> None:
    id = stack.llep_json("record", "start", "--duration", "10m", "--reason", "e2e")["id"]
    client.complete(prompts(1, words=150)[0], max_tokens=4)

    def recording() -> dict[str, Any]:
        return dict(stack.get(f"/v1/recordings/{id}"))

    stack.wait_for(lambda: recording()["state"] == "running", 60)
    stack.child("llep.scheduler.agent").kill()
    client.complete(prompts(2, words=150)[1], max_tokens=4)
    stack.llep("record", "stop", id)
    ended = stack.wait_for(lambda: (found := recording())["ended_s"] and found, 90)
    assert (ended["state"], ended["problem"]) == ("done", "") and ended["steps"] >= 8
    tar = tmp_path / "rec.tar"
    stack.llep("record", "export", id, "-o", str(tar))
    with unpacked(tar) as folder:
        trace = Trace(folder)
        steps = list(trace.steps())
    assert (trace.shape.num_layers, trace.shape.top_k, trace.num_ranks) == (LAYERS, TOP_K, 2)
    assert len(steps) == ended["steps"] and {step.phase for step in steps} == {"prefill", "decode"}
    for step in steps:
        pairs_L = step.counts_LRE.sum(axis=(1, 2))
        assert (pairs_L == pairs_L[0]).all() and pairs_L[0] % TOP_K == 0
    assert stack.llep_json("tune", id, "--ranks", "2")["verdict"] == "not_enough_evidence"  # few steps
    report = tmp_path / "report.html"
    command = [str(LLEP), "report", str(tar), "-o", str(report)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0 and "Hottest experts" in report.read_text(), run.stderr
    assert stack.engine()["id"] in stack.llep("top", "--once")
    stack.llep("record", "delete", id)


def is_live_since(stack: Stack, since_s: float) -> bool:
    """Whether the engine has reported after `since_s`, and the control plane knows."""
    try:
        answer = httpx.get(f"{stack.control_plane}/v1/engines", timeout=20)
    except httpx.TransportError:
        return False
    engines = answer.json()["data"] if answer.status_code == 200 else []
    return bool(engines) and engines[0]["state"] == "live" and engines[0]["last_seen_s"] > since_s


def kill_and_watch(
    stack: Stack,
    client: Client,
    expected: str,
    victims: list[Process],
    until_s: float,
    meanwhile: Callable[[], Any] = int,
) -> None:
    """SIGKILL them; requests are answered all the while, and the engine is seen again with all its counts."""
    replies: list[str] = []
    with Traffic(lambda: replies.append(client.complete(PROBE, max_tokens=4))) as traffic:
        stack.wait_for(lambda: traffic.answered, 30)
        kill_all(victims)
        killed_s = time.time()
        meanwhile()
        stack.wait_for(lambda: is_live_since(stack, killed_s + 1), until_s)
    assert not traffic.failures
    (reply,) = set(replies)
    assert reply and expected.startswith(reply)
    assert_counts_are_exact(stack, client)
    change = stack.patch(capacity_factor=1.1)
    assert change["applied"][0]["state"] in ("live", "held")
    assert stack.patch(capacity_factor=None)["applied"][0]["state"] in ("live", "held")


def test_killed_agent(stack: Stack, client: Client, expected: str) -> None:
    agent = stack.child("llep.scheduler.agent")
    kill_and_watch(stack, client, expected, [agent], RESTARTED_WITHIN_S)
    assert stack.child("llep.scheduler.agent").pid != agent.pid


def test_killed_scheduler(stack: Stack, client: Client, expected: str) -> None:
    scheduler = stack.child("ray::Scheduler")
    kill_and_watch(stack, client, expected, [scheduler], RESTARTED_WITHIN_S)
    assert stack.child("ray::Scheduler").pid != scheduler.pid


def test_killed_control_plane(stack: Stack, client: Client, expected: str) -> None:
    with Traffic(lambda: client.complete(PROBE, max_tokens=4)) as traffic:
        (server,) = [p for p in stack.children("-m llep_server") if not p.command.endswith(".job")]
        server.kill()
        stack.wait_for(lambda: is_live_since(stack, time.time() - 2), RESTARTED_WITHIN_S)
    assert not traffic.failures
    assert client.complete(PROBE, max_tokens=12) == expected
    assert_counts_are_exact(stack, client)


def test_killed_ray(stack: Stack, client: Client, expected: str) -> None:
    settings = stack.get("/v1/settings", engine="model")["settings"]
    head = stack.child("ray.scripts.scripts start --head")
    ray = [process for process in stack.family.alive() if process.session == head.pid]
    assert len(ray) > 3
    starts = stack.ray_starts()

    def meanwhile() -> None:
        answer = httpx.patch(f"{stack.control_plane}/v1/settings", json={"capacity_factor": 3}, timeout=20)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "scheduler_unreachable")
        stack.wait_for(lambda: stack.ray_starts() > starts, RAY_STARTS_WITHIN_S)

    kill_and_watch(stack, client, expected, ray, BACK_WITHIN_S, meanwhile)
    after = stack.get("/v1/settings", engine="model")["settings"]
    assert {s["key"]: s["value"] for s in after} == {s["key"]: s["value"] for s in settings}
    threshold = next(s for s in after if s["key"] == "imbalance_threshold")
    assert threshold["value"] == 1.05 and threshold["source"].startswith("revision")


def test_interrupt_ends_everything(stack: Stack) -> None:
    stack.interrupt()
    stack.interrupt()
    assert stack.wait_for_end(30) == 0
    assert stack.family.wait_for_end(0) == []
    # Ours: what vLLM says when its engine ends before its API server does begins with the name of a process.
    assert not re.search(r"^Traceback", stack.said(), re.MULTILINE)
    assert {path.name for path in stack.folder.glob("llep-*")} <= {f"llep-{os.getuid()}"}
