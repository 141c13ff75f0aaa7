"""Real vLLM on two expert-parallel ranks gives what one rank gives, while weights are lent under its feet.

DeepSeek is compared with itself, plan on against plan off: vLLM's MLA attention on CPU depends on the batch by itself.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from llep.tiny_models import write_tiny_model
from tests.vllm.engine import DP_EP, ONE_RANK, SWITCHABLE, TP_DP_EP, TP_EP, Reply, serving

pytestmark = pytest.mark.vllm

TOLERANCE = 1e-4
VOCABULARY = 2048
LENGTHS = (40, 700, 1, 300, 2100)
BALANCING = {"LLEP_MIN_BATCH_TOKENS": "16", "LLEP_MIN_CHUNK_TOKENS": "8", "LLEP_IMBALANCE_THRESHOLD": "1.05"}
LENT = "llep: first step that lends"


def prompts() -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(300, VOCABULARY - 200) for _ in range(length)] for length in LENGTHS]


def replies(model: Path, log: Path, *flags: str, env: dict[str, str] | None = None) -> list[Reply]:
    """One request at a time: in DP-EP the other rank then idles through dummy batches."""
    with serving(model, *flags, log=log, env=env) as engine:
        return [engine.greedy(prompt) for prompt in prompts()]


def assert_equal(found: list[Reply], expected: list[Reply]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.tokens == other.tokens
        assert max(abs(a - b) for a, b in zip(one.logprobs, other.logprobs, strict=True)) < TOLERANCE


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 93% of the pairs go to experts 0-7, which live on rank 0."""
    folder = tmp_path_factory.mktemp("gpt-oss") / "model"
    return write_tiny_model("gpt-oss", folder, hot=tuple(range(8)), hot_share=0.93, vocab=VOCABULARY).directory


@pytest.fixture(scope="module")
def gpt_oss_on_one_rank(gpt_oss: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Reply]:
    return replies(gpt_oss, tmp_path_factory.mktemp("log") / "vllm.log", *ONE_RANK)


@pytest.mark.parametrize(
    ("flags", "planner"),
    [
        (TP_EP, "quota"),
        ((*DP_EP, "--enforce-eager"), "least_loaded"),
        ((*TP_DP_EP, "--enforce-eager"), "quota"),
    ],
    ids=["tp-compiled", "dp", "tp-dp"],
)
def test_gpt_oss_equals_one_rank(
    gpt_oss: Path, gpt_oss_on_one_rank: list[Reply], flags: tuple[str, ...], planner: str, tmp_path: Path
) -> None:
    found = replies(gpt_oss, tmp_path / "vllm.log", *flags, env={**BALANCING, "LLEP_PLANNER": planner})
    assert_equal(found, gpt_oss_on_one_rank)
    log = (tmp_path / "vllm.log").read_text()
    assert LENT in log
    # vLLM sizes its KV cache by what is in use then: tests/unit/test_slots.py shows that the pool is.
    assert -1 < log.index("lending pool reserved: 199680 bytes per rank") < log.index("for KV cache")


def test_all_tokens_to_one_expert(tmp_path: Path) -> None:
    """Top-1 with one expert far ahead: rank 1 has no token of its own, and half of them by lending.

    Tensor-parallel ranks share their tokens, data-parallel ones exchange them: both say the same, by every step's check
    what plain EP says.
    """
    model = write_tiny_model(
        "gpt-oss", tmp_path / "model", experts=4, top_k=1, hot=(0,), hot_bias=1000.0, vocab=VOCABULARY
    ).directory
    env = {**BALANCING, "LLEP_SLOTS_PER_RANK": "1", "LLEP_VERIFY_SAMPLE_RATIO": "1"}
    expected = replies_by_lending(model, tmp_path / "tp.log", TP_EP, env)
    assert_equal(replies_by_lending(model, tmp_path / "dp.log", DP_EP, env), expected)


def test_qwen3_equals_one_rank(tmp_path: Path) -> None:
    model = write_tiny_model("qwen3", tmp_path / "model", hot=tuple(range(8)), hot_share=0.9).directory
    expected = replies(model, tmp_path / "one.log", *ONE_RANK)
    for layout in (TP_EP, DP_EP):
        assert_equal(replies_by_lending(model, tmp_path / "two.log", layout, BALANCING), expected)


def replies_by_lending(model: Path, log: Path, layout: tuple[str, ...], env: dict[str, str]) -> list[Reply]:
    """Of two ranks that lend, and whose lending has not been found wrong."""
    found = replies(model, log, *layout, "--enforce-eager", env=env)
    said = log.read_text()
    assert LENT in said and "LENDING IS OFF" not in said
    return found


@pytest.mark.parametrize("layout", [TP_EP, DP_EP], ids=["tp", "dp"])
def test_deepseek_with_plans_equals_itself_without(layout: tuple[str, ...], tmp_path: Path) -> None:
    model = write_tiny_model("deepseek", tmp_path / "model", hot=tuple(range(8)), hot_share=0.9).directory
    log = tmp_path / "vllm.log"
    with serving(model, *layout, "--enforce-eager", *SWITCHABLE, log=log, env=BALANCING) as engine:
        engine.switch(planner="home")
        expected = [engine.greedy(prompt) for prompt in prompts()]
        assert LENT not in log.read_text()
        engine.switch(planner="quota")
        assert_equal([engine.greedy(prompt) for prompt in prompts()], expected)
    assert LENT in log.read_text()
