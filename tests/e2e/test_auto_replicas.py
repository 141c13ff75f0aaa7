"""The scheduler by itself: under one topic's load it orders copies of that topic's experts, keeps them while the load
stays, and orders another's when that comes; all of it on a real engine, decided every second."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from llep.tiny_models import write_tiny_model
from llep.tiny_models.tensors import ENDER
from tests.e2e.client import Client, assert_counts_are_exact
from tests.e2e.stack import EAGER_TO_LEND, LAYERS, TOP_K, TP_EP, VLLM, Stack, Traffic

pytestmark = pytest.mark.e2e

VOCABULARY = 2048
TOPICS = (range(4), range(8, 12))  # hot experts of even tokens, at home on rank 0; of odd ones, on rank 1
FOLLOW_WITHIN_S = 120.0
ROUNDS = 8


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A token's topic stands in a dimension of its embedding that no layer writes to, and every router reads it."""
    folder = tmp_path_factory.mktemp("topics") / "model"
    write_tiny_model("gpt-oss", folder, layers=LAYERS, top_k=TOP_K, vocab=VOCABULARY)
    path = folder / "model.safetensors"
    tensors = {name: tensor.copy() for name, tensor in load_file(path).items()}
    tensors["model.embed_tokens.weight"][0::2, ENDER] = 4.0
    tensors["model.embed_tokens.weight"][1::2, ENDER] = -4.0
    tensors["lm_head.weight"][:, ENDER] = 0.0  # no reply is ended
    for layer in range(LAYERS):
        router = tensors[f"model.layers.{layer}.mlp.router.weight"]
        router[TOPICS[0], ENDER] = 2.0
        router[TOPICS[1], ENDER] = -2.0
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def stack(model: Path, folder: Path) -> Iterator[Stack]:
    by_itself = {"LLEP_REPLICAS": "apply", "LLEP_REPLICA_SLOTS_PER_RANK": "8", "LLEP_DECIDE_EVERY_S": "1"}
    with Stack(model, folder, *TP_EP, *VLLM, **EAGER_TO_LEND, **by_itself) as stack:
        stack.wait_until_serving()
        yield stack


def prompt(topic: int, seed: int, length: int = 200) -> list[int]:
    rng = random.Random(seed)
    return [2 * rng.randrange(150, VOCABULARY // 2 - 100) + topic for _ in range(length)]


def placement(stack: Stack) -> dict[str, Any]:
    (view,) = stack.get("/v1/placement")["data"]
    return dict(view)


def has_copies_of(view: dict[str, Any], topic: int) -> bool:
    """Live, of experts of this topic in every layer, each on the rank that is not its home. Others may stay where they
    are in nobody's way."""
    copies = [copy for copy in view["replicas"] if copy["expert"] in TOPICS[topic]]
    is_elsewhere = all(copy["rank"] == 1 - topic for copy in copies)
    return view["state"] == "live" and is_elsewhere and len({copy["layer"] for copy in copies}) == LAYERS


def lent_bytes_per_token(stack: Stack, window_s: float) -> float:
    loads = stack.loads(window_s=window_s)
    return float(loads["lend_bytes"]) / max(int(loads["tokens"]), 1)


def placement_decisions(stack: Stack) -> list[dict[str, Any]]:
    return [each for each in stack.get("/v1/decisions", limit=200)["data"] if each["kind"] == "placement"]


@pytest.fixture
def client(stack: Stack) -> Iterator[Client]:
    with Client(stack) as client:
        yield client


def test_hot_experts_get_copies_that_stay_with_the_load(stack: Stack, client: Client) -> None:
    seeds = iter(range(1_000_000))
    replies: dict[int, set[str]] = {0: set(), 1: set()}

    def send(topic: int) -> None:
        client.complete(prompt(topic, next(seeds)))
        replies[topic].add(client.complete(prompt(topic, -1), max_tokens=6))

    with Traffic(lambda: send(0), pause_s=0.0) as traffic:
        stack.wait_for(lambda: [each for each in stack.get("/v1/loads")["data"] if each["lends"] > 20], FOLLOW_WITHIN_S)
        lent = lent_bytes_per_token(stack, window_s=60)
        first = stack.wait_for(lambda: (view := placement(stack)) and has_copies_of(view, 0) and view, FOLLOW_WITHIN_S)
        sent = traffic.answered
        stack.wait_for(lambda: traffic.answered > sent + 3 * ROUNDS, FOLLOW_WITHIN_S)
        assert lent_bytes_per_token(stack, window_s=4) < lent / 4
        for phase, after in (("prefill", 1.2), ("decode", 1.7)):
            (loads,) = stack.get("/v1/loads", window_s=4, phase=phase)["data"]
            assert loads["imbalance_ratio_before"] > 1.8 and loads["imbalance_ratio_after"] < after, (phase, loads)
        assert placement(stack)["number"] == first["number"], "the same load, and it was moved again"
    ordered = next(each for each in placement_decisions(stack) if each["revision"] == first["number"])
    assert ordered["outcome"] == "order" and ordered["expected_gain_ratio"] > 0.0
    assert "copies added" in ordered["reason"] and ordered["inputs"]["saving_s"] > ordered["inputs"]["cost_s"]
    assert f"{len(first['replicas'])} resident replicas" in str(stack.get("/v1/events", limit=50)["data"])

    with Traffic(lambda: send(1), pause_s=0.0) as traffic:
        second = stack.wait_for(lambda: (view := placement(stack)) and has_copies_of(view, 1) and view, FOLLOW_WITHIN_S)
        sent = traffic.answered
        stack.wait_for(lambda: traffic.answered > sent + 3 * ROUNDS, FOLLOW_WITHIN_S)
        assert lent_bytes_per_token(stack, window_s=4) < lent / 4
    assert second["number"] > first["number"]
    assert not traffic.failures
    assert [len(said) for said in replies.values()] == [1, 1], "copies change no reply"
    assert_counts_are_exact(stack, client)
    assert "live" in stack.llep("placement", "show")
