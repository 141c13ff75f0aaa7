"""A draft model's layers are computed for its own tokens, also where the model itself is replayed from graphs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from llep.config import Settings
from llep.planning.policy import Step

# vLLM and what it imports are not written for warnings as errors.
pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("is_replicated", [True, False])
def test_rows_are_those_of_its_own_batch(is_replicated: bool) -> None:
    """The last eager step of the model was a small one; since then 64 tokens a step were replayed."""
    from llep.vllm_plugin.rank import Rank, RankLayer, RankStep

    agreed = RankStep(Step("prefill", 5), Settings(), rows=5, is_real=True)
    rank: Any = object.__new__(Rank)
    rank.__dict__.update(
        _current=agreed, _info=SimpleNamespace(layer_numbers=(0, 1)), is_replicated=is_replicated, _part=0
    )
    batch = SimpleNamespace(num_actual_tokens=60, max_query_len=1)
    context: Any = SimpleNamespace(attn_metadata={"draft": batch})
    model, draft = (RankLayer(index, index, SimpleNamespace(), SimpleNamespace()) for index in (1, 2))  # type: ignore[arg-type]
    assert rank.begin_layer(model, context, 5) is agreed
    found = rank.begin_layer(draft, context, 64)
    assert found.rows == 60 and found.is_real
    # Other ranks' tokens are known only where they are the same; else the ranks go by what they agreed on last.
    assert found.step == (Step("decode", 60) if is_replicated else agreed.step)
    made_up = rank.begin_layer(draft, SimpleNamespace(attn_metadata=None), 64)
    assert (made_up.rows, made_up.is_real) == ((64, False) if is_replicated else (0, True))
