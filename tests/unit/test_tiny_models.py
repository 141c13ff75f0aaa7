"""Tiny models as files: names, shapes, determinism, skew, and what happens when something is wrong."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors import deserialize
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from llep.errors import LlepError, SettingsError
from llep.tiny_models import Kind, write_tiny_model
from llep.tiny_models.options import numbers, parse_experts
from llep.tiny_models.tensors import RESERVED
from llep.tiny_models.tokenizer import HARMONY
from tests.unit.commands import run_llep

Weights = dict[str, npt.NDArray[Any]]

KINDS = list(Kind)
HOT = tuple(range(8))
FILES = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


def write(kind: str, folder: Path, **options: Any) -> Weights:
    """The weights of a model, with a small vocabulary unless told otherwise."""
    return load_file(write_tiny_model(kind, folder, **{"vocab": 1024, **options}).directory / "model.safetensors")


def same_bytes(one: Path, other: Path) -> bool:
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in FILES)


def read_json(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text())
    return value


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_follow_the_options(kind: Kind, tmp_path: Path) -> None:
    weights = write(kind, tmp_path / "m", layers=3, hidden=96, intermediate=32, experts=8, top_k=2, heads=2)
    config = read_json(tmp_path / "m" / "config.json")
    assert {path.name for path in (tmp_path / "m").iterdir()} == FILES
    assert config["hidden_size"] == 96 and config["num_experts_per_tok"] == 2 and config["num_hidden_layers"] == 3
    assert weights["model.embed_tokens.weight"].shape == weights["lm_head.weight"].shape == (1024, 96)
    mlp = "model.layers.2.mlp"
    if kind is Kind.GPT_OSS:
        assert weights[f"{mlp}.experts.gate_up_proj"].shape == (8, 96, 64)
        assert weights[f"{mlp}.experts.down_proj"].shape == (8, 32, 96)
        assert weights[f"{mlp}.router.weight"].shape == (8, 96)
    else:
        assert weights[f"{mlp}.gate.weight"].shape == (8, 96)
        assert weights[f"{mlp}.experts.7.up_proj.weight"].shape == (32, 96)
        assert weights[f"{mlp}.experts.7.down_proj.weight"].shape == (96, 32)
        assert f"{mlp}.experts.8.up_proj.weight" not in weights
    for name, array in weights.items():
        assert array.dtype == np.float32 and np.isfinite(array).all(), name


@pytest.mark.parametrize("kind", KINDS)
def test_no_layer_writes_to_reserved_dimensions(kind: Kind, tmp_path: Path) -> None:
    written = 0
    for name, array in write(kind, tmp_path / "m").items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            assert not array[:RESERVED].any(), name
            assert array[RESERVED:].all(), name
            written += 1
        elif name.endswith(("o_proj.bias", "down_proj", "down_proj_bias")):
            assert not array[..., :RESERVED].any(), name
            written += 1
    assert written >= 8


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_bytes_in_another_process(kind: Kind, tmp_path: Path) -> None:
    write(kind, tmp_path / "one", hot=HOT, seed=3)
    options = "--vocab 1024 --hot 0-7 --seed 3".split()
    assert run_llep("model", "tiny", kind, str(tmp_path / "two"), *options).returncode == 0
    write(kind, tmp_path / "three", hot=HOT, seed=4)
    assert same_bytes(tmp_path / "one", tmp_path / "two")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "three")]
    assert weights[0] != weights[1]


@pytest.mark.parametrize("kind", KINDS)
def test_skew_changes_only_the_hot_experts_scores(kind: Kind, tmp_path: Path) -> None:
    flat = write(kind, tmp_path / "flat")
    skewed = write(kind, tmp_path / "skewed", hot=(1, 5), hot_bias=0.75)
    changed = {name for name in flat if not np.array_equal(flat[name], skewed[name])}
    suffix = {"gpt-oss": "router.bias", "deepseek": "gate.e_score_correction_bias", "qwen3": "gate.weight"}[kind]
    moe_layers = [1, 2, 3] if kind is Kind.DEEPSEEK else [0, 1, 2, 3]
    assert changed == {f"model.layers.{layer}.mlp.{suffix}" for layer in moe_layers}
    for name in changed:
        added = skewed[name] - flat[name]
        scores = added[:, 0] if kind is Kind.QWEN3 else added
        assert np.flatnonzero(scores).tolist() == [1, 5]
        assert np.allclose(scores[[1, 5]], 0.75)
        assert np.count_nonzero(added) == 2


@pytest.mark.parametrize("share", [0.3, 0.5, 0.93, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_the_stated_share_is_met(kind: Kind, share: float, tmp_path: Path) -> None:
    model = write_tiny_model(kind, tmp_path / "m", hot=HOT, hot_share=share, vocab=1024)
    assert model.hot_share == pytest.approx(share, abs=0.005)


def test_more_share_takes_more_bias(tmp_path: Path) -> None:
    biases = [
        write_tiny_model("qwen3", tmp_path / f"{share}", hot=(0, 3), hot_share=share).hot_biases
        for share in (0.1, 0.2, 0.4)
    ]
    assert all(low < middle < high for low, middle, high in zip(*biases, strict=True))


def test_bfloat16_is_float32_rounded_to_nearest_even(tmp_path: Path) -> None:
    exact = write("qwen3", tmp_path / "float32")
    path = write_tiny_model("qwen3", tmp_path / "bfloat16", vocab=1024, dtype="bfloat16").directory
    assert read_json(path / "config.json")["torch_dtype"] == "bfloat16"
    for name, tensor in deserialize((path / "model.safetensors").read_bytes()):
        assert tensor["dtype"] == "BF16"
        upper = np.frombuffer(tensor["data"], dtype="<u2").astype(np.uint32) << 16
        rounded = upper.view(np.float32).reshape(tensor["shape"])
        half_step = np.ldexp(np.float32(1), np.frexp(exact[name])[1] - 9)
        error = np.abs(rounded - exact[name])
        assert (error <= half_step).all(), name
        ties = error == half_step
        assert (upper.reshape(ties.shape)[ties] >> 16 & 1 == 0).all(), name


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokenizer_gives_text_back(kind: Kind, tmp_path: Path) -> None:
    folder = write_tiny_model(kind, tmp_path / "m").directory
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    config = read_json(folder / "config.json")
    text = "def f(x):\n    return x  # ünïcödé, 人, \t and   spaces"
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text
    assert len(ids) < len(text.encode())
    assert max(tokenizer.get_vocab().values()) < config["vocab_size"]
    special = read_json(folder / "tokenizer_config.json")["eos_token"]
    assert tokenizer.encode(special).ids == [tokenizer.token_to_id(special)]
    assert tokenizer.token_to_id(special) in config["eos_token_id"]


def test_gpt_oss_has_harmonys_tokens_at_their_ids(tmp_path: Path) -> None:
    folder = write_tiny_model("gpt-oss", tmp_path / "m").directory
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert {text: tokenizer.token_to_id(text) for text in HARMONY} == HARMONY
    assert read_json(folder / "config.json")["vocab_size"] == 201088
    assert HARMONY["<|return|>"] in read_json(folder / "generation_config.json")["eos_token_id"]


def test_only_printable_tokens_are_said(tmp_path: Path) -> None:
    """Whatever the last hidden state, tokens without a row of their own stay far below the others."""
    head = write("qwen3", tmp_path / "m", reply_tokens=0)["lm_head.weight"]
    tokenizer = Tokenizer.from_file(str(tmp_path / "m" / "tokenizer.json"))
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((200, head.shape[1])).astype(np.float32)
    hidden[:, :RESERVED] = 0
    hidden[:, 0] = 0.5
    said = set((hidden @ head.T).argmax(axis=1).tolist())
    assert len(said) > 100
    assert all(tokenizer.decode([token]).isprintable() for token in said)


def test_options_left_alone_keep_their_weights(tmp_path: Path) -> None:
    two, three = (write("gpt-oss", tmp_path / f"{layers}", layers=layers) for layers in (2, 3))
    assert all(np.array_equal(array, three[name]) for name, array in two.items())


def test_defaults_are_small(tmp_path: Path) -> None:
    assert write_tiny_model("qwen3", tmp_path / "qwen3").size_bytes < 10e6
    assert write_tiny_model("deepseek", tmp_path / "deepseek").size_bytes < 20e6
    model = write_tiny_model("gpt-oss", tmp_path / "gpt-oss", vocab=2048)
    assert model.size_bytes < 10e6
    assert model.size_bytes == sum(path.stat().st_size for path in model.directory.iterdir())


def test_no_torch_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys; from llep.tiny_models import write_tiny_model; "
        f"write_tiny_model('deepseek', {str(tmp_path / 'm')!r}, hot=(0,)); "
        "print({'torch', 'vllm', 'transformers', 'ray'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "set()", result.stderr


BAD_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"kind": "llama"}, "'llama'.*gpt-oss, deepseek, qwen3"),
    ({"colour": 1}, "'colour'.*layers"),
    ({"layers": 0}, "layers 0 .*from 1 to"),
    ({"kind": "deepseek", "layers": 1}, "layers 1 .*from 2 to"),
    ({"hidden": 100}, "hidden 100 .*multiple of 32.*96 and 128"),
    ({"intermediate": 40}, "intermediate 40 .*multiple of 32"),
    ({"max_positions": 1000}, "max-positions 1000 .*multiple of 64"),
    ({"top_k": 17}, "top-k 17 .*to 16, the number of experts"),
    ({"top_k": 0}, "top-k 0 "),
    ({"heads": 0}, "heads 0 "),
    ({"kv_heads": 3}, "kv-heads 3 .*divide the number of heads, 4"),
    ({"kind": "deepseek", "kv_heads": 2}, "kv-heads 2 .*leave --kv-heads out"),
    ({"groups": 2}, "groups 2 .*leave --groups out"),
    ({"kind": "deepseek", "groups": 3}, "groups 3 .*divide the number of experts, 16"),
    ({"kind": "deepseek", "groups": 16}, "groups 16 .*2 or more"),
    ({"kind": "deepseek", "groups": 8, "top_k": 9}, "top-k 9 .*4 of 8 groups, 8 experts"),
    ({"vocab": 10}, "vocab 10 .*from 512"),
    ({"seed": -1}, "seed -1 "),
    ({"reply_tokens": -1}, "reply-tokens -1 "),
    ({"dtype": "int8"}, "dtype int8 .*float32, bfloat16"),
    ({"hot": (3, 16)}, "hot 16 .*0 to 15"),
    ({"hot": tuple(range(16))}, "hot 16 experts .*fewer"),
    ({"hot_share": 0.9}, "hot-share 0.9 .*--hot 0-7"),
    ({"hot_bias": 1.0}, "hot-bias 1.0 .*--hot 0-7"),
    ({"hot": HOT, "hot_share": 0.9, "hot_bias": 1.0}, "hot-bias 1.0 .*one of the two"),
    ({"hot": (0, 1), "hot_share": 0.6}, "hot-share 0.6 .*0.00 to 0.50"),
    ({"hot": HOT, "hot_share": math.nan}, "hot-share nan"),
    ({"hot": HOT, "hot_bias": math.inf}, "hot-bias inf"),
    ({"kind": "deepseek", "hot": (0, 4, 8, 12), "hot_share": 0.9}, "hot-share 0.9 .*2 of 4 expert groups.*0.500"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS)
def test_bad_options_are_refused_before_anything_is_written(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match=message):
        write_tiny_model(**{"kind": "qwen3", "directory": tmp_path / "m", **options})
    assert list(tmp_path.iterdir()) == []


def test_a_model_is_replaced_only_with_force(tmp_path: Path) -> None:
    write("qwen3", tmp_path / "m")
    before = (tmp_path / "m" / "model.safetensors").read_bytes()
    with pytest.raises(SettingsError, match="already holds a model.*--force"):
        write("qwen3", tmp_path / "m", seed=1)
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == before
    write("qwen3", tmp_path / "m", seed=1, force=True)
    assert (tmp_path / "m" / "model.safetensors").read_bytes() != before
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_what_is_no_model_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    (tmp_path / "file").write_text("plain")
    (tmp_path / "link").symlink_to(tmp_path / "home")
    with pytest.raises(SettingsError, match=r"letter\.txt.*another folder"):
        write("qwen3", tmp_path / "home", force=True)
    for name in ("file", "link"):
        with pytest.raises(SettingsError, match=f"{name} is not a folder"):
            write("qwen3", tmp_path / name, force=True)
    assert (tmp_path / "home" / "letter.txt").read_text() == "dear"


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    write("qwen3", tmp_path / "m")
    (tmp_path / "made by mkdir").mkdir()
    assert os.stat(tmp_path / "m").st_mode == os.stat(tmp_path / "made by mkdir").st_mode


class Interrupted(Exception):
    pass


def _interrupt(done_bytes: int, total_bytes: int) -> None:
    if done_bytes > total_bytes / 2:
        raise Interrupted


@pytest.mark.parametrize("exists", [False, True])
def test_a_broken_run_leaves_what_was_there(exists: bool, tmp_path: Path) -> None:
    if exists:
        write("qwen3", tmp_path / "m")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(Interrupted):
        write("qwen3", tmp_path / "m", seed=1, force=True, progress=_interrupt)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == (["m"] if exists else [])


def test_a_folder_that_cant_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match="can't be written.*another folder"):
        write("qwen3", tmp_path / "file" / "m")


def test_more_than_the_disk_holds(tmp_path: Path) -> None:
    huge = {"hidden": 65536, "intermediate": 65536, "experts": 1024, "layers": 200, "vocab": 1 << 20}
    with pytest.raises(LlepError, match="needs .* GB .*free: make a smaller model"):
        write_tiny_model("gpt-oss", tmp_path / "m", **huge)
    assert list(tmp_path.iterdir()) == []


def test_progress_counts_every_byte(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    model = write_tiny_model("qwen3", tmp_path / "m", progress=lambda done, total: seen.append((done, total)))
    done = [bytes_done for bytes_done, _ in seen]
    assert done == sorted(set(done))
    assert {total for _, total in seen} == {done[-1]} == {4 * model.parameters}


@pytest.mark.parametrize(
    ("text", "experts"), [("0", (0,)), ("0,1", (0, 1)), ("3-5, 9", (3, 4, 5, 9)), ("5,0-1,1", (0, 1, 5))]
)
def test_hot_experts_are_read(text: str, experts: tuple[int, ...]) -> None:
    assert parse_experts(text) == experts
    assert parse_experts(numbers(experts)) == experts


@pytest.mark.parametrize("text", ["", "a", "-1", "3-", "5-3", "1,,2", "1.5", "0-99999"])
def test_garbled_hot_experts_are_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="hot"):
        parse_experts(text)


def test_command_line_prints_where_how_big_how_hot_and_how_to_serve(tmp_path: Path) -> None:
    folder = tmp_path / "my model"
    options = "--vocab 1024 --hot 0-7 --hot-share 0.8 --layers 2 --seed 5 -o json".split()
    result = run_llep("model", "tiny", "gpt-oss", str(folder), *options)
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    assert answer["size_bytes"] == sum(path.stat().st_size for path in folder.iterdir())
    assert answer["hot"] == "0-7" and answer["hot_share"] == pytest.approx(0.8, abs=0.005)
    plain = run_llep("model", "tiny", "gpt-oss", str(folder), "--vocab", "1024", "--hot", "0-7", "--force")
    assert f"llep serve '{folder}' " in plain.stdout
    assert "hot experts 0-7 get 90.0%" in plain.stdout
    assert "chat needs --vocab 201088" in plain.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["llama"], ["'llama'", "'qwen3'"]),
        (["qwen3", "--top-k", "17"], ["--top-k 17", "1 to 16"]),
        (["qwen3", "--hot", "x"], ["--hot x", "0-7"]),
        (["qwen3", "--hidden", "big"], ["--hidden"]),
    ],
)
def test_command_line_refuses_with_exit_code_2(arguments: list[str], words: list[str], tmp_path: Path) -> None:
    result = run_llep("model", "tiny", arguments[0], str(tmp_path / "m"), *arguments[1:])
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert all(word in result.stderr for word in words), result.stderr
    assert list(tmp_path.iterdir()) == []
