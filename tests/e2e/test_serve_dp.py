"""`llep serve` over two data-parallel ranks, one of which idles; then `llep serve` itself is killed."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.client import PROBE, Client, assert_counts_are_exact, prompts
from tests.e2e.stack import DP_EP, EAGER_TO_LEND, VLLM, Stack, Traffic

pytestmark = pytest.mark.e2e

FOLLOW_WITHIN_S = 60.0


@pytest.fixture(scope="module")
def stack(model: Path, folder: Path) -> Iterator[Stack]:
    with Stack(model, folder, *DP_EP, *VLLM, **EAGER_TO_LEND) as stack:
        stack.wait_until_serving()
        yield stack


@pytest.fixture(scope="module")
def client(stack: Stack) -> Iterator[Client]:
    with Client(stack) as client:
        yield client


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


def test_killed_itself_it_leaves_nobody_behind(stack: Stack) -> None:
    assert len(stack.family.alive()) > 10
    stack.process.send_signal(signal.SIGKILL)
    assert stack.wait_for_end(10) == -signal.SIGKILL
    assert stack.family.wait_for_end(60) == []
