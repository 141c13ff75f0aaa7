"""A share of `python -m bench.http_fuzz`: whatever is sent, the answer is a documented one, and nobody is let in."""

from __future__ import annotations

import pytest

from bench.http_fuzz import fuzz, guarded

CASES = 420


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of schemathesis' own making
def test_every_answer_is_documented() -> None:
    with guarded() as running:
        answers = fuzz(running, CASES)
    assert answers.total() >= CASES * 0.5
    assert any(name.startswith("admin 2") for name in answers)
    assert {name for name in answers if name.startswith("none")} <= {"none 200", "none 401", "none 503"}
