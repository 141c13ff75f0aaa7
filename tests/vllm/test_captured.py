"""Real vLLM whose decode steps are computed as captured ones are, with and without replicas: the same tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose

from tests.vllm.engine import LENGTHS, MAX_TOKENS
from tests.vllm.test_replicas import TOP_K, told

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return told(tmp_path_factory.mktemp("captured"), "captured")


def test_the_same_tokens_whatever_is_resident(found: dict[str, Any]) -> None:
    """Also where weights are loaded anew: the copies of the old ones are out of use before the next step."""
    phases = list(found)
    assert phases == [
        *("home", "placed", "refused", "lending too", "reloaded", "woken up", "rolled back", "as at first"),
    ]
    for phase in phases:
        alike = "home" if phase in phases[:4] else "as at first"
        assert found[phase]["said"] == found[alike]["said"], phase
        assert_allclose(found[phase]["logprobs"], found[alike]["logprobs"], atol=1e-4, err_msg=phase)
    assert found["home"]["said"] != found["as at first"]["said"]


def test_every_pair_is_computed_once_and_by_replicas_too(found: dict[str, Any]) -> None:
    pairs_XR2 = np.array([seen["captured"] for seen in found.values()])
    layers = len(found["home"]["tokens_PL"][0])
    wanted = (len(LENGTHS) * (MAX_TOKENS - 1) + LENGTHS.count(1)) * layers * TOP_K
    assert np.diff(pairs_XR2.sum(axis=(1, 2))).tolist() == [wanted] * (len(found) - 1)
    in_room = dict(zip(list(found)[1:], np.diff(pairs_XR2[:, 1, 1]).tolist(), strict=True))
    assert min(in_room[phase] for phase in ("placed", "refused", "lending too")) > 0
    assert in_room["as at first"] == 0 and not pairs_XR2[:, 0, 1].any()
