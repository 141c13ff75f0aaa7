"""A small MoE trained in seconds: the same by seed, taken up again where it was stopped, loaded by transformers."""

from __future__ import annotations

import gzip
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from llep.cli.model import add_to
from llep.errors import SettingsError
from llep.tiny_models import Kind
from llep.training import Stopped, TrainedModel, parse_options, state_path, train_model
from llep.training import trainer as training
from llep.training.text import digest, find_domains

SIZES = {"layers": 2, "hidden": 64, "intermediate": 32, "experts": 8, "top_k": 2, "vocab": 512, "max_positions": 2048}
FILES = {
    *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    "training.json",
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other take ten times as long where the cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two domains: sums in words, and a made-up programming language."""
    folder = tmp_path_factory.mktemp("texts")
    rng = random.Random(0)
    words = "one two three four five six seven eight nine ten".split()
    sums = [
        f"{words[a]} and {words[b]} are {a + b + 2}." for a, b in (rng.choices(range(10), k=2) for _ in range(4000))
    ]
    calls = [f"call f{rng.randrange(9)}(x{rng.randrange(9)}) -> y{rng.randrange(9)};" for _ in range(4000)]
    (folder / "sums.txt").write_text("\n".join(sums))
    (folder / "calls.src").write_text("\n".join(calls))
    return [folder / "sums.txt", folder / "calls.src"]


def train(directory: Path, texts: list[Path], kind: str = "gpt-oss", **more: Any) -> TrainedModel:
    sizes = {**SIZES, "seed": more.pop("seed", 0)}
    control = {key: more.pop(key) for key in ("should_stop", "on_step", "force") if key in more}
    options = parse_options(kind, texts, sizes, **{"steps": 6, "batch": 4, "sequence": 32, **more})
    return train_model(directory, options, **control)


def weights(directory: Path) -> bytes:
    return (directory / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def trained(texts: list[Path], tmp_path_factory: pytest.TempPathFactory) -> TrainedModel:
    return train(tmp_path_factory.mktemp("trained") / "m", texts)


@pytest.mark.parametrize("kind", list(Kind))
def test_it_learns_and_transformers_loads_it(kind: Kind, texts: list[Path], tmp_path: Path) -> None:
    found = train(tmp_path / "m", texts, kind, steps=40)
    assert {path.name for path in found.directory.iterdir()} == FILES
    assert not state_path(found.directory).exists()
    model = AutoModelForCausalLM.from_pretrained(found.directory, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(found.directory)
    text = "three and four are 7.\ncall f1(x2) -> y3;"
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == text
    loss = model(input_ids=ids, labels=ids).loss.item()
    assert loss < 0.6 * math.log(SIZES["vocab"]), "better than guessing by far"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert [domain["domain"] for domain in found.report["domains"]] == ["sums", "calls"]
    layers = 1 if kind is Kind.DEEPSEEK else 2
    for domain in found.report["domains"]:
        assert domain["loss"] < 0.6 * math.log(SIZES["vocab"])
        by_ranks = domain["imbalance_ratio_by_ranks_and_layer"]
        assert list(by_ranks) == ["2", "4", "8"]
        assert all(len(ratios) == layers and min(ratios) >= 1 for ratios in by_ranks.values())


def test_the_same_seed_gives_the_same_model(trained: TrainedModel, texts: list[Path], tmp_path: Path) -> None:
    train(tmp_path / "same", texts)
    train(tmp_path / "other", texts, seed=1)
    for name in FILES - {"training.json"}:
        assert (tmp_path / "same" / name).read_bytes() == (trained.directory / name).read_bytes(), name
    assert weights(tmp_path / "other") != weights(trained.directory)


@pytest.mark.parametrize("stop_after", [1, 4])
def test_a_stopped_training_goes_on(stop_after: int, trained: TrainedModel, texts: list[Path], tmp_path: Path) -> None:
    steps: list[int] = []

    def note(progress: training.Progress) -> None:
        steps.append(progress.step)

    with pytest.raises(Stopped, match=f"step {stop_after}.*same command goes on"):
        train(tmp_path / "m", texts, on_step=note, should_stop=lambda: len(steps) == stop_after)
    assert [path.name for path in tmp_path.iterdir()] == ["m.unfinished"]
    train(tmp_path / "m", texts, on_step=note)
    assert steps == [1, 2, 3, 4, 5, 6]
    assert weights(tmp_path / "m") == weights(trained.directory)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_minutes_end_and_steps_repeat_them(texts: list[Path], tmp_path: Path) -> None:
    by_minutes = train(tmp_path / "minutes", texts, steps=None, minutes=0.02)
    assert by_minutes.report["seconds"] >= 0.01 * 60
    train(tmp_path / "steps", texts, steps=by_minutes.report["steps"])
    assert weights(tmp_path / "steps") == weights(tmp_path / "minutes")


def test_the_learning_rate_is_the_same_whenever_the_end_was_settled() -> None:
    steady, whole = training.STEADY_SHARE
    for steps_so_far in range(1, 400):
        total = -(-steps_so_far * whole // steady)
        for step in range(steps_so_far):
            assert training.rate(step, None) == training.rate(step, total)
    rates = [training.rate(step, 500) for step in range(500)]
    assert max(rates) == 1.0 and rates[0] < 0.1 and rates[-1] < 0.1
    assert rates[400:] == sorted(rates[400:], reverse=True)


def test_a_state_of_another_training_is_refused(texts: list[Path], tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        train(tmp_path / "m", texts, should_stop=lambda: True)
    kept = state_path(tmp_path / "m").read_bytes()
    with pytest.raises(SettingsError, match="with seed 0, this one has 1.*remove it"):
        train(tmp_path / "m", texts, seed=1)
    with pytest.raises(SettingsError, match="with text .*same options"):
        train(tmp_path / "m", texts[:1])
    assert state_path(tmp_path / "m").read_bytes() == kept
    state_path(tmp_path / "m").write_bytes(kept[:1000])
    with pytest.raises(SettingsError, match="can't be read.*remove it to begin anew"):
        train(tmp_path / "m", texts)


def test_a_model_is_replaced_only_with_force(trained: TrainedModel, texts: list[Path]) -> None:
    with pytest.raises(SettingsError, match="already holds a model.*--force"):
        train(trained.directory, texts)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"steps": 0}, "--steps 0 .*between 1 and"),
        ({"steps": None, "minutes": 0}, "--minutes 0 .*between 0.01"),
        ({"batch": 0}, "--batch 0 "),
        ({"sequence": 4096}, "--sequence 4096 .*between 16 and 2048"),
        ({"learning_rate": math.nan}, "--learning-rate nan"),
        ({"balance": -1}, "--balance -1 "),
        ({"kind": "llama"}, "'llama'.*gpt-oss, deepseek, qwen3"),
    ],
)
def test_bad_options_are_refused(more: dict[str, Any], message: str, texts: list[Path], tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=message):
        train(tmp_path / "m", texts, **more)
    assert list(tmp_path.iterdir()) == []


def test_text_of_ones_own(texts: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    (folder / "page.gz").write_bytes(gzip.compress(texts[0].read_bytes()))
    (folder / "broken.gz").write_bytes(b"no gzip")
    (folder / "picture.bin").write_bytes(bytes(range(256)) * 100)
    (domain,) = find_domains([folder], seed=0)
    assert domain.name == "mixed"
    assert set(domain.trained) | set(domain.held_out) <= set(_pieces(texts[0].read_text()))
    assert not set(domain.trained) & set(domain.held_out)
    assert find_domains([folder], seed=0) == (domain,)
    assert digest([domain]) != digest(find_domains([folder], seed=1))


def _pieces(text: str) -> list[str]:
    return [text[start : start + 12_000] for start in range(0, len(text), 12_000)]


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short").write_text("short")
    with pytest.raises(SettingsError, match="short has fewer than 20,000 characters"):
        find_domains([tmp_path / "short"], seed=0)
    with pytest.raises(SettingsError, match="nowhere does not exist"):
        find_domains([tmp_path / "nowhere"], seed=0)


def test_this_machine_has_text_enough() -> None:
    domains = find_domains([], seed=0)
    names = [domain.name for domain in domains]
    assert {"python", "manuals", "prose"} <= set(names), "what comes with Python and with packages"
    for domain in domains:
        assert sum(map(len, domain.trained)) > 100_000
        assert not set(domain.trained) & set(domain.held_out)


def test_counts_are_of_what_was_routed(texts: list[Path]) -> None:
    options = parse_options("qwen3", texts, SIZES, steps=1, batch=2, sequence=32)
    torch.manual_seed(0)
    model = training.make_model(options, [511])
    routing = training.Routing(model)
    model(input_ids=torch.randint(0, 500, (2, 32)))
    counts_LE = routing.counts()
    assert counts_LE.shape == (2, 8) and (counts_LE.sum(axis=1) == 2 * 32 * 2).all()
    assert routing.balance_loss().item() == pytest.approx(1.0, abs=0.2)
    ratios = training.ratios(np.array([[8, 0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1]]))
    assert ratios == {2: [2.0, 1.0], 4: [4.0, 1.0], 8: [8.0, 1.0]}


def test_the_command(texts: list[Path], tmp_path: Path) -> None:
    options = (
        "--steps 2 --layers 1 --hidden 64 --intermediate 32 --experts 4 --vocab 512 --batch 2 --sequence 32".split()
    )
    command = [sys.executable, "-c", "from llep.cli import main; main()", "model", "train", "gpt-oss"]
    made = subprocess.run(
        [*command, str(tmp_path / "m"), "--text", str(texts[0]), *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert made.returncode == 0, made.stderr
    assert "serve it: llep serve" in made.stdout and "sums" in made.stdout
    assert re.search(r"llep: training gpt-oss with 0\.\d million parameters, 4 experts", made.stderr)
    assert json.loads((tmp_path / "m" / "training.json").read_text())["steps"] == 2
    app = typer.Typer()
    add_to(app)
    again = CliRunner().invoke(app, ["model", "train", "gpt-oss", str(tmp_path / "m")])
    assert isinstance(again.exception, SettingsError) and "--force" in again.exception.message


def test_ctrl_c_keeps_what_was_reached(texts: list[Path], tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-c",
        "from llep.cli import main; main()",
        "model",
        "train",
        "qwen3",
        str(tmp_path / "m"),
    ]
    sizes = "--layers 1 --hidden 64 --intermediate 32 --experts 4 --vocab 512 --batch 2 --sequence 32".split()
    with subprocess.Popen(
        [*command, "--text", str(texts[0]), "--steps", "1000000", *sizes],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "training qwen3" in line:
                break
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
        assert process.wait(60) == 1
    assert re.search(r"stopped at step \d+, kept in .*m\.unfinished: the same command goes on from there", said)
    assert "Traceback" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["m.unfinished"]
