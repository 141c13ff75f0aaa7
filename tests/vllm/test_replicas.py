"""Real vLLM on two ranks with resident replicas: the same tokens before, with, and after them; and what is counted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llep.tiny_models import write_tiny_model
from tests.vllm.engine import VOCABULARY

pytestmark = pytest.mark.vllm

TOP_K = 4


def told(folder: Path, *options: str) -> dict[str, Any]:
    """What tests.vllm.replicas found, and its log."""
    # Not gpt-oss: vLLM 0.32's reload leaves its experts' weights as they were.
    model, other = (
        write_tiny_model("qwen3", folder / name, hot=tuple(range(8)), hot_share=0.93, vocab=VOCABULARY, seed=seed)
        for seed, name in enumerate(("model", "other"))
    )
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("LLEP_")},
        "VLLM_CPU_OMP_THREADS_BIND": "0|1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "LLEP_REPLICA_SLOTS_PER_RANK": "8",
        "LLEP_PROBE_RATIO": "0",
    }
    with (folder / "log").open("w") as log:
        done = subprocess.run(
            [sys.executable, "-m", "tests.vllm.replicas", str(model.directory), str(other.directory), *options],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            timeout=600,
        )
    assert done.returncode == 0, (folder / "log").read_text()[-4000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("FOUND "))
    phases: dict[str, Any] = json.loads(line.removeprefix("FOUND "))
    phases["home"]["log"] = done.stdout + (folder / "log").read_text()
    return phases


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return told(tmp_path_factory.mktemp("replicas"))


def test_the_same_tokens_whatever_is_resident(found: dict[str, Any]) -> None:
    """Until the weights are another model's; from then on those of that model."""
    phases = list(found)
    assert phases == [
        *("home", "placed", "refused", "lending too", "reloaded", "woken up", "rolled back", "as at first"),
    ]
    for phase in phases[:4]:
        assert found[phase]["said"] == found["home"]["said"], phase
    for phase in phases[4:]:
        assert found[phase]["said"] == found["rolled back"]["said"] != found["home"]["said"], phase


def test_placements_go_live_are_refused_and_rolled_back(found: dict[str, Any]) -> None:
    assert found["home"]["live"] == [[1, 0, 0]] * 2
    assert found["placed"]["live"] == [[2, 2, 8]] * 2
    assert found["refused"]["live"] == [[2, 2, 8]] * 2
    assert all("a copy at home: expert 0 lives on rank 0" in error for error in found["refused"]["errors"])
    assert found["lending too"]["live"] == [[4, 4, 3]] * 2 and found["lending too"]["errors"] == ["", ""]
    assert found["reloaded"]["live"] == [[4, 4, 3]] * 2
    assert found["woken up"]["live"] == [[4, 4, 3]] * 2
    assert found["rolled back"]["live"] == [[5, 0, 0]] * 2


def test_weights_that_may_have_changed_drop_all_replicas(found: dict[str, Any]) -> None:
    """After the reload and after the wake-up, on both ranks; and they are copied anew."""
    assert found["home"]["log"].count("or woken up: all 3 resident replicas are dropped") == 4
    assert found["home"]["log"].count("placement 4 is switched on: 3 resident replicas") == 6


def test_replicas_act_in_small_batches_and_beside_lending(found: dict[str, Any]) -> None:
    assert "replica" not in found["home"]["decisions"]
    placed = found["placed"]["decisions"]
    assert placed["replica"] > 50 and "lend" not in placed
    assert found["lending too"]["decisions"]["lend"] > 0


def test_room_is_in_the_report(found: dict[str, Any]) -> None:
    (room, _) = found["home"]["replica_bytes"]
    assert room and found["home"]["replica_bytes"] == [room] * 2
    home, placed = found["home"]["used_bytes"], found["placed"]["used_bytes"]
    assert placed[1] - home[1] == room and placed[0] == home[0]


def test_sums_agree_and_nothing_but_real_tokens_counts(found: dict[str, Any]) -> None:
    """In every phase and layer computed = routed = tokens x top-k, and tokens are those of the requests."""
    for seen in found.values():
        tokens_PL = np.array(seen["tokens_PL"])
        for name in ("routed_PLE", "routed_PLR", "computed_PLR"):
            assert (np.array(seen[name]) == TOP_K * tokens_PL).all(), name
        assert (tokens_PL.sum(axis=0) == seen["tokens"]).all()
        assert (tokens_PL > 0).all(), "both phases have been seen"
