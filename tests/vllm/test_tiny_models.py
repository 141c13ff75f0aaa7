"""Tiny models in real vLLM on one rank, without llep's plugin: they load, talk sense enough, and route as stated."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import openai
import pytest

from llep.tiny_models import Kind, write_tiny_model
from llep.tiny_models.tokenizer import HARMONY, HARMONY_ASSISTANT, HARMONY_FINAL, HARMONY_PRINTABLE
from tests.vllm.engine import ONE_RANK, serving

pytestmark = pytest.mark.vllm

STOCK = {"VLLM_PLUGINS": ""}
HOT = tuple(range(8))
SHARE = 0.93


WITHOUT_SKEW = "without skew"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What vLLM, started once, makes of each model in turn."""
    folder = tmp_path_factory.mktemp("models")
    models = {kind.value: write_tiny_model(kind, folder / kind, hot=HOT, hot_share=SHARE) for kind in Kind}
    models[WITHOUT_SKEW] = write_tiny_model("gpt-oss", folder / "even", vocab=2048, dtype="bfloat16")
    environment = {
        **os.environ,
        **STOCK,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "0-1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", "tests.vllm.routing", *(str(model.directory) for model in models.values())]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr[-4000:]
    return dict(zip(models, json.loads(result.stdout.splitlines()[-1]), strict=True))


def hot_share(counts: list[int]) -> float:
    return sum(counts[expert] for expert in HOT) / sum(counts)


@pytest.mark.parametrize("kind", list(Kind))
def test_vllm_loads_it_and_routes_as_stated(found: dict[str, Any], kind: Kind) -> None:
    of_model = found[kind.value]
    assert len(of_model["counts"]) == (3 if kind is Kind.DEEPSEEK else 4)
    for counts in of_model["counts"]:
        assert hot_share(counts) == pytest.approx(SHARE, abs=0.04)
        assert min(counts) > 0, "every expert is chosen by some token"
    assert statistics.mean(map(hot_share, of_model["counts"])) == pytest.approx(SHARE, abs=0.02)
    assert_talks(of_model)


def test_without_skew_two_ranks_are_nearly_balanced(found: dict[str, Any]) -> None:
    for counts in found[WITHOUT_SKEW]["counts"]:
        assert hot_share(counts) == pytest.approx(0.5, abs=0.06)
    assert_talks(found[WITHOUT_SKEW])


def assert_talks(found: dict[str, Any]) -> None:
    """Greedy tokens vary, differ between prompts, and stand out from the second best beyond float32 noise."""
    replies = found["token_ids"]
    assert all(len(reply) == 48 and len(set(reply)) > 24 for reply in replies)
    assert len({tuple(reply) for reply in replies}) == len(replies)
    assert statistics.median(found["margins"]) > 0.2
    assert min(found["margins"]) > 1e-4


def test_gpt_oss_chats_through_harmony(tmp_path: Path) -> None:
    """Prompt and reply go through harmony's own vocabulary, which vLLM's dependencies bring along: no download."""
    model = write_tiny_model("gpt-oss", tmp_path / "model", hot=HOT, reply_tokens=40).directory
    with serving(model, *ONE_RANK, log=tmp_path / "vllm.log", env=STOCK) as engine:
        client = openai.OpenAI(base_url=f"{engine.url}/v1", api_key="none")
        assert_chats(client)
        for index in range(5):  # sampled at temperature 1, and ended by the model itself
            messages: Any = [{"role": "user", "content": f"question {index}"}]
            (choice,) = client.chat.completions.create(model="model", messages=messages).choices
            assert choice.finish_reason == "stop"
            assert choice.message.content and choice.message.content.isprintable()


def test_qwen3_chats_by_its_template(tmp_path: Path) -> None:
    model = write_tiny_model("qwen3", tmp_path / "model").directory
    with serving(model, *ONE_RANK, log=tmp_path / "vllm.log", env=STOCK) as engine:
        assert_chats(openai.OpenAI(base_url=f"{engine.url}/v1", api_key="none"))


def assert_chats(client: openai.OpenAI) -> None:
    completion = client.completions.create(model="model", prompt="Hello, world", max_tokens=16)
    assert completion.choices[0].text
    messages: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Grüße! 你好"}]
    request: dict[str, Any] = {"model": "model", "messages": messages, "max_tokens": 24, "temperature": 0}
    whole = client.chat.completions.create(**request).choices[0].message.content
    assert whole and whole.isprintable() and len(whole) > 24
    pieces = [chunk.choices[0].delta.content for chunk in client.chat.completions.create(**request, stream=True)]
    assert "".join(piece or "" for piece in pieces) == whole
    assert len([piece for piece in pieces if piece]) > 8, "the reply comes piece by piece"


def test_harmonys_ids_are_the_librarys() -> None:
    harmony = pytest.importorskip("openai_harmony")
    encoding = harmony.load_harmony_encoding(harmony.HarmonyEncodingName.HARMONY_GPT_OSS)
    assert {text: encoding.encode(text, allowed_special="all") for text in HARMONY} == {
        text: [id] for text, id in HARMONY.items()
    }
    assert encoding.encode("assistant") == [HARMONY_ASSISTANT]
    assert encoding.encode("final") == [HARMONY_FINAL]
    printable = [id for id in range(2048) if HARMONY_PRINTABLE >> id & 1]
    assert len(printable) > 1000
    assert all(encoding.decode([id]).isascii() and encoding.decode([id]).isprintable() for id in printable)
