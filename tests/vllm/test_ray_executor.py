"""vLLM whose workers are Ray's says what one rank says, lends, is seen and steered, as with processes of its own."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.scheduler.conftest import RayHead, wait_for
from tests.scheduler.test_on_ray import Control
from tests.vllm.engine import TP_EP, Reply, serving
from tests.vllm.ray_cpus import as_a_plugin
from tests.vllm.test_exact import BALANCING, assert_equal, gpt_oss, gpt_oss_on_one_rank, prompts

__all__ = ["gpt_oss", "gpt_oss_on_one_rank"]  # fixtures
pytestmark = [pytest.mark.vllm, pytest.mark.ray]

FOLLOW_S = 60.0


@pytest.fixture
def folder() -> Iterator[Path]:
    """With a path short enough for unix sockets."""
    folder = Path(tempfile.mkdtemp(prefix="llep-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def head(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RayHead]:
    """A Ray that has two devices, and knows nothing of llep: what its workers need the engine brings along."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    (folder / "plugin").mkdir()
    monkeypatch.setenv("PYTHONPATH", as_a_plugin(folder / "plugin"))
    head = RayHead(folder, num_gpus=2)
    try:
        head.start()
        yield head
    finally:
        head.kill()


@pytest.mark.timeout(900)
@pytest.mark.parametrize("version", ["1", "2"])
def test_workers_of_ray(
    head: RayHead, gpt_oss: Path, gpt_oss_on_one_rank: list[Reply], version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_llep = {
        "LLEP_RAY_ADDRESS": head.address,
        "LLEP_RAY_NAMESPACE": "llep-test",
        "LLEP_STATE_DIR": str(head.folder / "state"),
        "LLEP_ENGINE": "on-ray",
        "LLEP_REPORT_INTERVAL_S": "0.2",
        **BALANCING,
    }
    for name in ("LLEP_RAY_ADDRESS", "LLEP_RAY_NAMESPACE", "LLEP_STATE_DIR"):
        monkeypatch.setenv(name, of_llep[name])
    control = Control()
    env = {**of_llep, "RAY_ADDRESS": head.address, "VLLM_USE_RAY_V2_EXECUTOR_BACKEND": str(int(version == "2"))}
    flags = (*TP_EP, "--enforce-eager", "--distributed-executor-backend", "ray")
    try:
        wait_for(control.answers, 120)
        with serving(gpt_oss, *flags, log=head.folder / "vllm.log", env=env) as engine:
            assert_equal([engine.greedy(prompt) for prompt in prompts()], gpt_oss_on_one_rank)
            view = wait_for(lambda: control.live_view("on-ray"), FOLLOW_S)
            assert (view["ep_size"], len(view["ranks"])) == (2, 2)
            loads = control.loads_of("on-ray", 600.0)
            assert loads is not None and loads["lends"] > 0
            assert loads["imbalance_ratio_before"] > max(loads["imbalance_ratio_after"], 1.5)
            change = control.call("patch_settings", {"mode": "off"}, "test")
            engine.greedy([300], max_tokens=2)
            wait_for(lambda: _runs(control, change["revision"]), FOLLOW_S)
            assert_equal([engine.greedy(prompt) for prompt in prompts()], gpt_oss_on_one_rank)
    finally:
        control.close()


def _runs(control: Control, revision: int) -> bool:
    view = control.live_view("on-ray")
    return view is not None and view["live_revision"] == revision
