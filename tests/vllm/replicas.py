"""Run by test_replicas.py in a process of its own: a real vLLM engine on two ranks, told one placement after the other.

python -m tests.vllm.replicas MODEL OTHER [captured] -> JSON: what was said in each phase, and what the ranks reported
after it. OTHER is another model of the same shape, whose weights are loaded into the running engine in the midst of it.
captured: decode steps are computed as those are that a CUDA graph holds (tests/vllm/captured.py).
"""

from __future__ import annotations

import json
import random
import sys
from typing import Any

from llep.messages import PROTOCOL, Directive, PlacementOrder, Report, decode_report, encode
from llep.vllm_plugin.worker import WorkerExtension
from tests.vllm.engine import LENGTHS, MAX_TOKENS, VOCABULARY

EXTENSION = "tests.vllm.replicas.Extension"
CAPTURED = "tests.vllm.captured.CapturedExtension"

BALANCING = {"min_batch_tokens": 100_000, "min_chunk_tokens": 8, "imbalance_threshold": 1.05}
FAST = 1 << 40


class Extension(WorkerExtension):
    def warm_up_attention(self) -> None:
        """A forward pass that vLLM makes up, and that looks like one of requests."""
        self.model_runner._dummy_run(200, force_attention=True)  # type: ignore[attr-defined]


class Engine:
    def __init__(self, model: str, extension: str = EXTENSION) -> None:
        from vllm import LLM, SamplingParams

        self._llm = LLM(
            model=model,
            dtype="float32",
            tensor_parallel_size=2,
            enable_expert_parallel=True,
            enforce_eager=True,
            max_model_len=4096,
            max_num_batched_tokens=4096,
            enable_prefix_caching=False,
            worker_extension_cls=extension,
        )
        self._greedy = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True, logprobs=0)
        self._revision = 0
        self.tokens = 0

    def tell(self, placement: PlacementOrder | None, **settings: Any) -> None:
        self._revision += 1
        directive = Directive(
            protocol=PROTOCOL,
            engine="e",
            revision=self._revision,
            settings={**BALANCING, **settings},
            placement=placement,
        )
        self._llm.collective_rpc("llep_offer", args=(encode(directive),))

    def say(self) -> tuple[list[list[int]], list[list[float]]]:
        """Greedy continuations of the prompts, one after the other, and the log-probability of each token."""
        rng = random.Random(0)
        said, logprobs = [], []
        for length in LENGTHS:
            prompt: Any = {"prompt_token_ids": [rng.randrange(300, VOCABULARY - 200) for _ in range(length)]}
            (reply,) = self._llm.generate([prompt], self._greedy, use_tqdm=False)
            tokens = list(reply.outputs[0].token_ids)
            said.append(tokens)
            logprobs.append([at[token].logprob for at, token in zip(reply.outputs[0].logprobs, tokens, strict=True)])
            self.tokens += length + MAX_TOKENS - 1
        return said, logprobs

    def warm_up(self) -> None:
        self._llm.collective_rpc("warm_up_attention")

    def reload(self, model: str) -> None:
        self._llm.collective_rpc("reload_weights", kwargs={"weights_path": model})

    def sleep_and_wake_up(self) -> None:
        """As far as a CPU goes: its worker is told, and keeps its weights."""
        self._llm.sleep(level=1)
        self._llm.wake_up()

    def captured(self) -> list[list[int]]:
        """[R, 2] pairs of captured steps so far that each rank computed at home, and in its room."""
        return list(self._llm.collective_rpc("captured"))

    def reports(self) -> list[Report]:
        return [decode_report(data) for data in self._llm.collective_rpc("llep_report")]


def main(model: str, other: str, captured: str = "") -> None:
    engine = Engine(model, CAPTURED if captured else EXTENSION)
    found: dict[str, Any] = {}

    def note(phase: str) -> None:
        said, logprobs = engine.say()
        reports = engine.reports()
        group = reports[0].group
        assert group is not None
        found[phase] = {
            "said": said,
            "logprobs": logprobs,
            "tokens": engine.tokens,
            "live": [(r.live_revision, r.live_placement, r.filled_placement) for r in reports],
            "errors": [r.last_apply_error for r in reports],
            "replica_bytes": [r.replica_bytes for r in reports],
            "used_bytes": [r.memory_used_bytes for r in reports],
            "captured": engine.captured() if captured else [],
            "decisions": dict(group.decisions_in_both),
            "tokens_PL": group.tokens_PL.numpy().tolist(),
            **{
                name: getattr(group, name).numpy().sum(axis=2).tolist()
                for name in ("routed_PLE", "routed_PLR", "computed_PLR")
            },
        }

    engine.warm_up()
    engine.tell(None, planner="home")
    note("home")
    replicas = tuple((layer, expert, 1) for layer in range(2) for expert in range(4))
    engine.tell(PlacementOrder(2, replicas, FAST))
    note("placed")
    engine.tell(PlacementOrder(3, ((0, 0, 0),), FAST))
    note("refused")
    engine.tell(PlacementOrder(4, replicas[:3], FAST), min_batch_tokens=16)
    note("lending too")
    engine.reload(other)
    note("reloaded")
    engine.sleep_and_wake_up()
    note("woken up")
    engine.tell(None, planner="home")
    note("rolled back")
    note("as at first")
    print("FOUND " + json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
