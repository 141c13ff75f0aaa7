"""`llep serve` over two data-parallel ranks, one of which idles; then `llep serve` itself is killed."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.client import PROBE, Client, assert_counts_are_exact, prompts
from tests.e2e.stack import DP_EP, EAGER_TO_LEND, VLLM, Stack, Traffic

pytestmark = pytest.mark.e2e

FOLLOW_WITHIN_S = 60.0


@pytest.fixture(scope="module")
def stack(model: Path, folder: Path) -> Iterator[Stack]:
    room = {"LLEP_REPLICAS": "suggest", "LLEP_REPLICA_SLOTS_PER_RANK": "8"}
    with Stack(model, folder, *DP_EP, *VLLM, **EAGER_TO_LEND, **room) as stack:
        stack.wait_until_serving()
        yield stack


@pytest.fixture(scope="module")
def client(stack: Stack) -> Client:
    return Client(stack)


def test_loads_of_both_ranks(stack: Stack, client: Client) -> None:
    for prompt in prompts(4, words=150):
        client.complete(prompt)
    assert_counts_are_exact(stack, client)
    loads = stack.loads()
    assert loads["tokens"] == client.tokens
    assert [rank["rank"] for rank in loads["ranks"]] == [0, 1]
    assert loads["imbalance_ratio_before"] > 1.7
    assert loads["imbalance_ratio_after"] < 1.1
    engine = stack.engine()
    assert (engine["ep_size"], engine["tp_size"], engine["dp_size"]) == (2, 1, 2)


def test_settings_change_on_both_ranks_while_one_idles(stack: Stack, client: Client) -> None:
    """One request at a time keeps one rank busy; the other runs dummy batches, so that both reach the agreed step."""
    replies = [client.complete(PROBE, max_tokens=100)]
    with Traffic(lambda: replies.append(client.complete(PROBE, max_tokens=100)), pause_s=0.0) as traffic:
        stack.wait_for(lambda: traffic.answered, FOLLOW_WITHIN_S)
        change = stack.patch(imbalance_threshold=100)
        ranks = stack.wait_for(lambda: stack.ranks_at(change["revision"]), FOLLOW_WITHIN_S)
    assert [rank["rank"] for rank in ranks] == [0, 1]
    assert not traffic.failures
    assert len(set(replies)) == 1 and len(replies) > 1
    assert_counts_are_exact(stack, client)


def test_resident_replicas_on_both_ranks_while_one_idles(stack: Stack, client: Client) -> None:
    """Ordered over HTTP, filled between steps, switched on together, rolled back: the text stays, the sums agree."""
    engine = stack.engine()["id"]
    replicas = [{"layer": layer, "expert": expert, "rank": 1} for layer in range(2) for expert in range(4)]
    stack.patch(imbalance_threshold=1.05)
    replies = [client.complete(PROBE, max_tokens=100)]

    def placement() -> dict[str, Any]:
        (view,) = stack.get("/v1/placement", engine=engine)["data"]
        return dict(view)

    def is_balanced_without_lends(phase: str) -> bool:
        (loads,) = stack.get("/v1/loads", window_s=5, phase=phase)["data"]
        before, after = (loads[f"imbalance_ratio_{stage}"] for stage in ("before", "after"))
        return loads["lends"] == 0 and before is not None and after < before - 0.1

    with Traffic(lambda: replies.append(client.complete(PROBE, max_tokens=100)), pause_s=0.0) as traffic:
        ordered = stack.post("/v1/placement/apply", engine=engine, replicas=replicas)
        live = stack.wait_for(lambda: (view := placement())["state"] == "live" and view, FOLLOW_WITHIN_S)
        assert (live["number"], live["live_number"], live["filled"]) == (ordered["number"], ordered["number"], 8)
        answered = traffic.answered
        stack.wait_for(lambda: traffic.answered > answered, FOLLOW_WITHIN_S)
        stack.patch(min_batch_tokens=100_000)  # nothing is lent: what is balanced now, replicas balance
        for phase in ("prefill", "decode"):
            stack.wait_for(lambda phase=phase: is_balanced_without_lends(phase), FOLLOW_WITHIN_S, phase)
        stack.post("/v1/placement/rollback", engine=engine, reason="the test goes on")
        stack.wait_for(lambda: placement()["live_number"] == 0, FOLLOW_WITHIN_S)
    assert not traffic.failures
    assert len(set(replies)) == 1 and len(replies) > 2
    assert stack.loads(window_s=600)["decisions"].get("replica", 0) > 0
    assert_counts_are_exact(stack, client)


def test_killed_itself_it_leaves_nobody_behind(stack: Stack) -> None:
    assert len(stack.family.alive()) > 10
    stack.process.send_signal(signal.SIGKILL)
    assert stack.wait_for_end(10) == -signal.SIGKILL
    assert stack.family.wait_for_end(60) == []
