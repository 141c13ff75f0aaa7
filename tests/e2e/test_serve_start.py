"""`llep serve` that never gets to serving: interrupted, or refused by a part that only knows once it has started."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.stack import EAGER_TO_LEND, START_TIMEOUT_S, TP_EP, VLLM, Stack
from tests.vllm.engine import free_port

pytestmark = pytest.mark.e2e

OK, ERROR, USAGE = 0, 1, 2
END_WITHIN_S = 30.0


def assert_nothing_is_left(stack: Stack) -> None:
    assert stack.family.wait_for_end(0) == []
    assert list(stack.folder.glob("llep-????????")) == []


def last_line(stack: Stack) -> str:
    return stack.said().rstrip().rpartition("\n")[2]


@pytest.mark.parametrize(
    ("moment", "times"),
    [("starting Ray", 1), ("starting vLLM", 2), ("Initializing a V1 LLM engine", 1)],
    ids=["at-once", "twice", "while-vllm-starts"],
)
def test_interrupted_while_starting(model: Path, folder: Path, moment: str, times: int) -> None:
    with Stack(model, folder, *TP_EP, *VLLM, **EAGER_TO_LEND) as stack:
        stack.wait_for(lambda: moment in stack.said(), START_TIMEOUT_S)
        stack.family.alive()
        for _ in range(times):
            stack.interrupt()
        assert stack.wait_for_end(END_WITHIN_S) == OK
        assert_nothing_is_left(stack)
        assert "llep: ending everything" in stack.said()


def test_no_ray_is_said_and_keeps_nobody_from_starting(model: Path, folder: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    with Stack(model, folder, *TP_EP, *VLLM, LLEP_RAY_ADDRESS=address) as stack:
        stack.wait_for(lambda: "starting vLLM" in stack.said(), 60)
        assert f"nothing listens at LLEP_RAY_ADDRESS={address}: serving starts all the same" in stack.said()
        assert "starting Ray" not in stack.said()
        stack.interrupt()
        assert stack.wait_for_end(END_WITHIN_S) == OK
        assert_nothing_is_left(stack)


def test_what_the_control_plane_refuses(model: Path, folder: Path) -> None:
    with Stack(model, folder, *TP_EP, *VLLM, LLEP_SERVER_KEYS_FILE="/nowhere/keys") as stack:
        assert stack.wait_for_end(120) == ERROR
        assert_nothing_is_left(stack)
        for word in ("llep: the control plane ended with status 2", "/nowhere/keys", "control-plane.log"):
            assert word in last_line(stack)


def test_what_a_worker_refuses(model: Path, folder: Path) -> None:
    """Known only once the weights are loaded; said where it is found, below vLLM's tracebacks."""
    with Stack(model, folder, *TP_EP, *VLLM, LLEP_SLOTS_PER_RANK="9") as stack:
        assert stack.wait_for_end(START_TIMEOUT_S) == USAGE
        assert_nothing_is_left(stack)
        assert last_line(stack).startswith("llep: ")
        for word in ("slots_per_rank=9", "8 local experts", "lower it"):
            assert word in last_line(stack)
