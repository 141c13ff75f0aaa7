"""What `llep bench` makes of its runs: order, counters, medians, verdict. The real thing is in tests/e2e."""

from __future__ import annotations

import pytest

from llep.cli.bench_verdict import Run, counted_between, counters, judge, order, summary
from llep.errors import LlepError
from tests.unit.commands import run_llep

METRICS = """\
# HELP llep_lends_total experts lent
llep_lends_total{engine="a",model_name="m",ep_rank="0",direction="in",link="node"} 3.0
llep_lends_total{engine="a",model_name="m",ep_rank="1",direction="in",link="node"} 4.0
llep_lends_total{engine="a",model_name="m",ep_rank="0",direction="out",link="node"} 7.0
llep_lends_total{engine="b",model_name="m",ep_rank="0",direction="in",link="node"} 100.0
llep_lend_bytes_total{engine="a",model_name="m",ep_rank="0",direction="in",link="node"} 1e+06
llep_imbalance_ratio_bucket{engine="a",model_name="m",stage="before",le="1.0"} 0
llep_imbalance_ratio_sum{engine="a",model_name="m",stage="before"} 9
llep_imbalance_ratio_count{engine="a",model_name="m",stage="before"} 5
llep_imbalance_ratio_sum{engine="a",model_name="m",stage="after"} 5
llep_imbalance_ratio_count{engine="a",model_name="m",stage="after"} 5
llep_plan_decisions_total{engine="a",model_name="m",decision="lend"} 4
llep_plan_decisions_total{engine="a",model_name="m",decision="no_gain"} 1
llep_plan_decisions_total{engine="a",model_name="m",decision="off"} 0
llep_tokens_total{engine="a",model_name="m"} 100
llep_layer_seconds_total{engine="a",model_name="m",ep_rank="0"} 1.5
"""


def runs_of(*pairs: tuple[float, float]) -> list[Run]:
    counted = {"lend_bytes": 3e6, "imbalance_before": 1.8, "imbalance_after": 1.1}
    return [
        Run(
            mode,
            {"total_token_throughput": value, "mean_ttft_ms": 1000 / value, "completed": 5.0},
            counted | {"lends": value} if mode == "active" else {"decision_off": 5},
        )
        for pair in pairs
        for mode, value in zip(("off", "active"), pair, strict=True)
    ]


def test_each_mode_is_warmed_up_and_the_order_of_pairs_alternates() -> None:
    assert order(3, ("off", "active")) == ["off", "active", "off", "active", "active", "off", "off", "active"]


def test_counters_of_one_engine() -> None:
    found = counters(METRICS, "a")
    assert (found["lends"], found["lend_bytes"], found["layer_seconds"], found["tokens"]) == (7, 1e6, 1.5, 100)
    spent = counted_between(counters("", "a"), found)
    assert (spent["imbalance_before"], spent["imbalance_after"]) == (1.8, 1.0)
    assert (spent["decision_lend"], spent["decision_no_gain"], "decision_off" in spent) == (4, 1, False)
    assert counted_between(found, found) == {"tokens": 0, "lends": 0, "lend_bytes": 0, "layer_seconds": 0}


@pytest.mark.parametrize(
    ("pairs", "verdict"),
    [
        ([(100, 120), (100, 118), (90, 110), (100, 119), (100, 121)], "pays"),
        ([(120, 100), (118, 100), (110, 90)], "costs"),
        ([(100, 100.5), (100, 100.2), (100, 100.4)], "no_difference"),
        ([(100, 120), (100, 80), (100, 119), (100, 85), (100, 110)], "no_difference"),
        ([(100, 3000), (100, 3000)], "not_enough_evidence"),
    ],
)
def test_the_verdict_needs_a_gain_and_pairs_that_agree(pairs: list[tuple[float, float]], verdict: str) -> None:
    found = summary(runs_of(*pairs), ("off", "active"), "total_token_throughput")
    assert found["verdict"] == verdict and found["pairs"] == len(pairs) and found["failed_requests"] == 0


def test_a_latency_that_falls_is_a_gain() -> None:
    found = summary(runs_of((100, 200), (100, 200), (100, 200)), ("off", "active"), "mean_ttft_ms")
    (row,) = (row for row in found["measures"] if row["measure"] == "mean_ttft_ms")
    assert (row["off"], row["on"], row["gain"]) == (10, 5, 1.0) and found["verdict"] == "pays"
    assert found["counted"]["off"] == {"decision_off": 5} and found["counted"]["active"]["lends"] == 200
    assert found["reason"].endswith("; llep made an imbalance of 1.80 into 1.10 with 200 lends, 3 MB, a run")


def test_why_nothing_was_lent_is_said() -> None:
    lazy = {"lends": 0.0, "decision_small_batch": 3.0, "decision_balanced": 1.0}
    runs = [Run(mode, {"total_token_throughput": 100.0}, lazy) for mode in ("off", "active")]
    found = summary(runs, ("off", "active"), "total_token_throughput")
    assert found["reason"].endswith("; llep lent nothing: small_batch in 75% of its decisions")


def test_what_was_not_measured_cant_decide() -> None:
    with pytest.raises(LlepError, match="did not measure p99_itl_ms"):
        summary(runs_of((1, 2)), ("off", "active"), "p99_itl_ms")
    assert judge({"gains": [0.5, 0.4, 0.6]}, "x")[0] == "pays"


@pytest.mark.parametrize(
    ("arguments", "told", "code"),
    [
        (("--measure", "happiness"), "is not one of total_token_throughput", 2),
        (("--off", "active"), "compares lending with itself", 2),
        (("--server", "http://127.0.0.1:1", "--", "--model", "m"), "no control plane at", 3),
    ],
)
def test_what_cant_be_measured_is_refused(arguments: tuple[str, ...], told: str, code: int) -> None:
    done = run_llep("bench", *arguments)
    assert (done.returncode, told in done.stderr) == (code, True), done.stderr
