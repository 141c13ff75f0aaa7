"""The cost model: predictions worked by hand, files that go round, and errors that name what is wrong."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from llep.cost import PRESETS, CostModel, Link, cost_model, predict_s
from llep.errors import SettingsError
from llep.placement import Placement
from llep.plan import Decision, Plan, Segment
from llep.planning.home import plan_home

MODEL = CostModel(
    name="by-hand",
    source="made up",
    expert_bytes=1000,
    gemm_curve=((1, 2.0), (11, 3.0), (21, 5.0)),
    gemm_launch_s=0.5,
    node_link=Link(0.25, 1000.0),
    network_link=Link(1.0, 100.0),
    plan_s=0.125,
)


@pytest.mark.parametrize(
    ("tokens", "seconds"), [(0, 0.0), (1, 2.0), (6, 2.5), (11, 3.0), (16, 4.0), (21, 5.0), (31, 7.0)]
)
def test_an_experts_work_is_read_off_the_curve(tokens: int, seconds: float) -> None:
    assert MODEL.expert_s(tokens) == pytest.approx(seconds)
    assert MODEL.expert_s(tokens, bytes_per_expert=500) == pytest.approx(seconds / 2)


def test_no_load_is_worked_off_faster_than_at_the_curves_best() -> None:
    assert MODEL.least_token_s == pytest.approx(0.2)
    for tokens in (1, 5, 11, 21, 500):
        assert MODEL.expert_s(tokens) >= tokens * MODEL.least_token_s


def test_plain_ep_takes_as_long_as_its_slowest_rank() -> None:
    """Rank 0: launch 0.5, 11 tokens 3.0, 1 token 2.0. Rank 1 has one expert of 1 token."""
    plan = plan_home([11, 1, 1, 0], Placement.linear(4, 2, 1))
    assert predict_s(plan, MODEL) == pytest.approx(5.5)


def test_a_lend_delays_the_work_on_it_but_not_what_it_hides_behind() -> None:
    """Rank 1 works 0.5 + 2.0 on its own, then 0.5 + 3.0 on the lend, which arrives after 0.25 + 1000 / 1000."""
    segments = (Segment(0, 0, 0, 11), Segment(0, 1, 11, 22), Segment(1, 1, 0, 1))
    plan = Plan(Decision.LEND, Placement.linear(2, 2, 1), segments)
    assert predict_s(plan, MODEL) == pytest.approx(2.5 + 3.5 + 1.25 + 0.125)
    assert predict_s(plan, replace(MODEL, overlap_ratio=0.4)) == pytest.approx(2.5 + 3.5 + 0.25 + 0.125)
    assert predict_s(plan, replace(MODEL, overlap_ratio=1.0)) == pytest.approx(2.5 + 3.5 + 0.125)
    away = Plan(Decision.LEND, Placement.linear(2, 2, 1), segments, ranks_per_node=1)
    assert predict_s(away, MODEL) == pytest.approx(2.5 + 3.5 + 1.0 + 10.0 + 0.125)


def test_one_sender_serves_few_receivers_one_after_the_other_and_many_through_relays() -> None:
    """3 receivers: one round of 3 sends. 7 receivers: three rounds of one send each, 1, 2 and 4 of them at once."""
    for receivers, arrival_s in ((3, 0.25 + 3.0), (7, 3 * 1.25)):
        segments = [Segment(0, rank, rank, rank + 1) for rank in range(receivers + 1)]
        plan = Plan(Decision.LEND, Placement.linear(1, receivers + 1, 1), segments)
        assert predict_s(plan, MODEL) == pytest.approx(0.5 + 2.0 + arrival_s + 0.125)


def test_a_resident_replica_costs_no_transfer() -> None:
    placement = Placement((0,), (0, 0), replicas=((0, 1),))
    plan = Plan(Decision.REPLICA, placement, (Segment(0, 0, 0, 11), Segment(0, 1, 11, 22)))
    assert predict_s(plan, MODEL) == pytest.approx(0.5 + 3.0 + 0.125)


def test_a_file_goes_round(tmp_path: Path) -> None:
    for model in (MODEL, *PRESETS.values()):
        model.dump(tmp_path / "cost.yaml")
        assert cost_model(str(tmp_path / "cost.yaml")) == model


def test_numbers_without_a_dot_are_numbers_too(tmp_path: Path) -> None:
    MODEL.dump(tmp_path / "cost.yaml")
    text = (tmp_path / "cost.yaml").read_text().replace("plan_s: 0.125", "plan_s: 125e-3")
    (tmp_path / "cost.yaml").write_text(text)
    assert cost_model(str(tmp_path / "cost.yaml")) == MODEL


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"plan_s": math.nan}, "plan_s must be a number of seconds >= 0, got nan"),
        ({"gemm_launch_s": -1.0}, "gemm_launch_s must be a number of seconds >= 0, got -1.0"),
        ({"node_link": Link(0.0, 0.0)}, r"node_link.bytes_per_s must be a number > 0, got 0.0"),
        ({"network_link": Link(math.inf, 1.0)}, r"network_link.latency_s must be a number of seconds >= 0, got inf"),
        ({"overlap_ratio": 1.5}, r"overlap_ratio must be a number in 0\.\.1, got 1.5"),
        ({"expert_bytes": 0}, "expert_bytes must be an integer >= 1, got 0"),
        ({"gemm_curve": ((1, 1.0),)}, "gemm_curve must be at least 2 points"),
        ({"gemm_curve": ((1, 1.0), (1, 2.0))}, "gemm_curve must be increasing tokens"),
        ({"gemm_curve": ((1, 1.0), (2, 0.5))}, "seconds that do not fall"),
        ({"gemm_curve": ((1, 1.0), (2, math.nan))}, r"pairs \[tokens, seconds\]"),
        ({"gemm_curve": ((1, -1.0), (2, 1.0))}, "seconds that do not fall"),
    ],
)
def test_bad_costs_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        replace(MODEL, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values.pop("plan_s"), "plan_s is missing"),
        (lambda values: values.update(speed=1), "unknown key speed; known are"),
        (lambda values: values["node_link"].pop("latency_s"), "node_link.latency_s is missing"),
        (lambda values: values.update(node_link=3), "node_link must have the keys latency_s and bytes_per_s, got 3"),
        (lambda values: values.update(gemm_curve="fast"), "gemm_curve must be a list"),
        (lambda values: values.update(plan_s="soon"), "plan_s must be a number of seconds >= 0, got 'soon'"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, change, message: str) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "cost.yaml"
    MODEL.dump(path)
    values = yaml.safe_load(path.read_text())
    change(values)
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(SettingsError, match=f"cost model .*cost.yaml: {message}"):
        cost_model(str(path))


def test_an_unknown_name_is_told_what_there_is() -> None:
    with pytest.raises(SettingsError, match="'h300' is neither a preset .h100, h200, b200. nor a file"):
        cost_model("h300")


def test_presets_agree_with_their_datasheets() -> None:
    """A large batch runs at 70% of the peak, and a single token reads the weights at 80% of the memory's rate."""
    for name, flops, memory in (("h100", 989e12, 3.35e12), ("h200", 989e12, 4.8e12), ("b200", 2250e12, 8e12)):
        model = cost_model(name)
        tokens = 100_000
        assert tokens * 2 * model.expert_bytes / 2 / model.expert_s(tokens) == pytest.approx(0.7 * flops, rel=0.01)
        assert model.expert_bytes / model.expert_s(1) == pytest.approx(0.8 * memory, rel=0.01)


def test_calibrate_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    from llep.cli import _register, app

    _register()
    for arguments, message in (
        (["--device", "tpu"], "--device must be cpu or cuda, got 'tpu'"),
        (["--dtype", "int3", "--device", "cpu"], "--dtype must be one of float32, bfloat16, float16, got 'int3'"),
        (["--network-gbit", "0"], "must be a number > 0, got 0"),
    ):
        done = CliRunner().invoke(app, ["calibrate", str(tmp_path / "cost.yaml"), *arguments])
        assert isinstance(done.exception, SettingsError) and message in str(done.exception)
    done = CliRunner().invoke(app, ["calibrate", str(tmp_path / "nowhere" / "cost.yaml")])
    assert isinstance(done.exception, SettingsError) and "is not a folder" in str(done.exception)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_calibrate_measures_this_machine(tmp_path: Path) -> None:
    """Real GEMMs and real lends between two processes; more tokens and more bytes take longer."""
    from llep.cli import _register, app

    _register()
    path = tmp_path / "cost.yaml"
    arguments = [str(path), "--device", "cpu", "--hidden", "256", "--intermediate", "256", "--threads", "1"]
    done = CliRunner().invoke(app, ["calibrate", *arguments, "-o", "json"])
    assert done.exit_code == 0, done.output
    model = cost_model(str(path))
    assert model.expert_bytes == 3 * 256 * 256 * 4
    assert model.expert_s(2048) > model.expert_s(1) > 0
    assert model.node_link.bytes_per_s > 1e6
    assert 0 < model.plan_s < 1
    counts = np.array([[40_000, 0], [40_000, 0]])
    assert predict_s(plan_home(counts.sum(axis=0), Placement.linear(2, 2, 1)), model) > model.expert_s(40_000)
