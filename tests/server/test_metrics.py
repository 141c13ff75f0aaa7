"""/metrics: read by Prometheus's own parsers, and right: what is shown adds up to what the engines did."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

import httpx
import msgspec
import pytest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from prometheus_client.registry import Collector
from reporting import BYTES_PER_SLOT, Engine
from running import Running, start

from llep.messages import EngineSnapshot, encode, rank_snapshot, without_experts
from llep_server.config import ServerConfig
from llep_server.families import FAMILIES, SCHEDULER_FAMILIES
from llep_server.metrics import Collection
from llep_server.reference import markdown
from llep_server.samples import ENGINE_LABELS, Level, ScrapedEngine, Shown
from llep_server.text import texts
from tests.ops.tools import tool

HOTTEST = tuple(3.0 - place / 10 for place in range(10))
OPENMETRICS = "application/openmetrics-text; version=1.0.0"


class Scrape:
    """Sums over the samples of a page."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self.families = {family.name: family for family in families}
        self.samples = [sample for family in self.families.values() for sample in family.samples]

    def sum(self, name: str, **labels: str) -> float:
        found = [s.value for s in self.samples if s.name == name and labels.items() <= s.labels.items()]
        assert found, f"no sample of {name} {labels}"
        return sum(found)

    def has(self, name: str) -> bool:
        return any(sample.name == name for sample in self.samples)


def scrape(running: Running) -> Scrape:
    running.app.state.exposition.keep_s = 0.0
    response = running.http.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    return Scrape(parse_text(response.text))


def snapshot_of(engine: Engine, silent: Iterable[int] = (), hot_ratios: tuple[float, ...] = ()) -> EngineSnapshot:
    reports = [report for report in engine.reports() if report.rank not in silent]
    return EngineSnapshot(
        engine=engine.name,
        state="live",
        desired_revision=0,
        last_seen_s=1_700_000_000.0,
        refused={},
        speaker=without_experts(reports[0]) if reports else None,
        ranks=tuple(map(rank_snapshot, reports)),
        hot_ratios=hot_ratios,
    )


def shown_of(engine: ScrapedEngine) -> list[Shown]:
    collection = Collection()
    collection.add(engine)
    return collection.shown


def metrics_of(engine: ScrapedEngine) -> list[Metric]:
    return [shown.metric() for shown in shown_of(engine)]


def families_of(engine: Engine) -> Scrape:
    """What is shown once the engine has done one more step."""
    engine.run()
    return Scrape(metrics_of(ScrapedEngine.of(snapshot_of(engine, hot_ratios=HOTTEST))))


def test_sums_are_those_of_the_engines(running: Running) -> None:
    engines = [Engine(name="a", ep_size=4, num_experts=32), Engine(name="b", ep_size=2, top_k=2, seed=7)]
    for engine, steps in zip(engines, (3, 5), strict=True):
        for _ in range(steps):
            engine.run(tokens=512)
        engine.run(tokens=16, phase="decode")
        assert running.report(engine) == []
    page = scrape(running)
    for engine, steps in zip(engines, (3, 5), strict=True):
        layers = len(engine.layer_numbers)
        pairs = (steps * 512 + 16) * engine.top_k * layers
        assert page.sum("llep_rank_routed_tokens_total", engine=engine.name) == pairs
        assert page.sum("llep_rank_computed_tokens_total", engine=engine.name) == pairs
        for rank in range(engine.ep_size):
            computed = page.sum("llep_rank_computed_tokens_total", engine=engine.name, ep_rank=str(rank))
            assert computed == engine.computed_PLR[:, :, rank].sum()
        assert page.sum("llep_tokens_total", engine=engine.name) == steps * 512 + 16
        assert page.sum("llep_steps_total", engine=engine.name, phase="prefill") == steps
        assert page.sum("llep_steps_total", engine=engine.name, phase="decode") == 1
        layer_steps = layers * (steps + 1)
        assert page.sum("llep_plan_decisions_total", engine=engine.name) == layer_steps
        for stage, index in (("before", 0), ("after", 1)):
            labels = {"engine": engine.name, "stage": stage}
            assert page.sum("llep_imbalance_ratio_count", **labels) == layer_steps
            assert page.sum("llep_imbalance_ratio_bucket", le="+Inf", **labels) == layer_steps
            assert page.sum("llep_imbalance_ratio_sum", **labels) == pytest.approx(
                engine.imbalance_sum_PLS[:, :, index].sum()
            )
        lends = page.sum("llep_lends_total", engine=engine.name, direction="in")
        assert lends == page.sum("llep_lends_total", engine=engine.name, direction="out") > 0
        assert page.sum("llep_lend_bytes_total", engine=engine.name, direction="in") == lends * BYTES_PER_SLOT
        spilled = page.sum("llep_spilled_tokens_total", engine=engine.name, direction="in")
        assert spilled == page.sum("llep_spilled_tokens_total", engine=engine.name, direction="out") > 0
        assert (
            page.sum("llep_mode", engine=engine.name) == page.sum("llep_mode", engine=engine.name, mode="active") == 1
        )
        seconds = 0.25 * sum(range(1, engine.ep_size + 1)) * (steps + 1)
        assert page.sum("llep_phase_seconds_sum", engine=engine.name, phase="lend") == pytest.approx(seconds)
    assert page.sum("llep_scheduler_up") == 1
    assert all(s.labels["model_name"] == "org/tiny-moe" for s in page.samples if s.name not in SCHEDULER_FAMILIES)


def test_each_layers_sums_at_level_layer_rank() -> None:
    engine = Engine(ep_size=4, start={"metrics_level": "layer_rank"})
    for _ in range(3):
        engine.run(tokens=1024)
    page = families_of(engine)
    for index, layer in enumerate(engine.layer_numbers):
        assert page.sum("llep_layer_rank_computed_tokens_total", layer=str(layer)) == 4 * 1024 * engine.top_k
        for rank in range(4):
            value = page.sum("llep_layer_rank_computed_tokens_total", layer=str(layer), ep_rank=str(rank))
            assert value == engine.computed_PLR[:, index, rank].sum()
        for stage in (0, 1):
            labels = {"layer": str(layer), "stage": ("before", "after")[stage]}
            assert page.sum("llep_layer_imbalance_ratio_count", **labels) == 4
            assert page.sum("llep_layer_imbalance_ratio_sum", **labels) == pytest.approx(
                engine.imbalance_sum_PLS[:, index, stage].sum()
            )


@pytest.mark.parametrize(
    ("level", "highest"),
    [("off", Level.ALWAYS), ("rank", Level.RANK), ("layer", Level.LAYER), ("layer_rank", Level.LAYER_RANK)],
)
def test_metrics_level_decides_the_families(level: str, highest: Level) -> None:
    engine = Engine(start={"metrics_level": level}, errors={"transport/timeout": 2})
    engine.run()
    shown = set(families_of(engine).families)
    assert shown == {family.name.removesuffix("_total") for family in FAMILIES if family.level <= highest}


def test_too_many_series_drop_a_level_and_say_so() -> None:
    engine = Engine(ep_size=8, layer_numbers=tuple(range(61)), num_experts=64, top_k=8)
    within = {}
    for most in (200_000, 900, 400, 100):
        engine.settings = engine.settings.changed({"metrics_level": "layer_rank", "metrics_max_series": most})
        page = families_of(engine)
        within[most] = (
            page.has("llep_layer_rank_computed_tokens_total"),
            page.has("llep_layer_imbalance_ratio_sum"),
            page.has("llep_rank_computed_tokens_total"),
            page.sum("llep_metrics_levels_dropped"),
        )
        assert most == 100 or len(page.samples) <= most
    assert within == {
        200_000: (True, True, True, 0),
        900: (False, True, True, 1),
        400: (False, False, True, 2),
        100: (False, False, False, 3),
    }


@pytest.mark.parametrize("ranks_per_node", [0, 4])
def test_at_most_300_series_per_engine_at_ep_8(ranks_per_node: int) -> None:
    errors = {"transport/timeout": 1, "plan/digest": 1}
    engine = Engine(ep_size=8, num_experts=64, errors=errors, ranks_per_node=ranks_per_node)
    for phase in ("prefill", "decode", "prefill", "decode"):
        engine.run(phase=phase)
    page = families_of(engine)
    assert page.sum("llep_measured_gain_seconds", phase="decode") > 0
    assert 150 < len(page.samples) <= 300


def test_lends_go_over_links_that_there_are() -> None:
    for ranks_per_node, links in ((0, {"node"}), (8, {"node"}), (4, {"node", "network"})):
        engine = Engine(ep_size=8, num_experts=64, ranks_per_node=ranks_per_node)
        page = families_of(engine)
        lent = [sample for sample in page.samples if sample.name == "llep_lends_total"]
        assert {sample.labels["link"] for sample in lent} == links and len(lent) == 16 * len(links)
        for link, place in (("node", 0), ("network", 1)):
            if link in links:
                assert (
                    page.sum("llep_lends_total", direction="in", link=link)
                    == engine.lends_in_PRK[:, :, place].sum()
                    > 0
                )
                size = page.sum("llep_lend_bytes_total", direction="out", link=link)
                assert size == engine.lends_out_PRK[:, :, place].sum() * BYTES_PER_SLOT


def test_what_lending_is_worth() -> None:
    engine = Engine(ep_size=4, num_experts=32)
    for _ in range(4):
        engine.run()
    page = families_of(engine)
    seconds, pairs = (
        {side: page.sum(f"llep_worth_{unit}_total", phase="prefill", side=side) for side in ("lent", "probed")}
        for unit in ("seconds", "pairs")
    )
    gain_s = pairs["lent"] * seconds["probed"] / pairs["probed"] - seconds["lent"]
    assert page.sum("llep_measured_gain_seconds") == pytest.approx(gain_s)
    assert 0 < gain_s == pytest.approx(page.sum("llep_predicted_gain_seconds_total"))
    assert page.sum("llep_worth_steps_total", phase="prefill", side="lent") == 5 * 3
    assert page.sum("llep_worth_steps_total", phase="decode") == 0
    engine.lend_s = 1.0
    assert families_of(engine).sum("llep_measured_gain_seconds", phase="prefill") < 0, "lending can cost time"


def test_balancedness_by_stage_and_phase() -> None:
    engine = Engine(ep_size=4, num_experts=32)
    for phase in ("prefill", "decode"):
        engine.run(phase=phase)
    page = families_of(engine)
    for stage, at in (("before", 0), ("after", 1)):
        for place, phase in enumerate(("prefill", "decode")):
            labels = {"stage": stage, "phase": phase}
            assert page.sum("llep_balancedness_ratio_count", **labels) == engine.layer_steps_PL[place].sum() > 0
            shown = page.sum("llep_balancedness_ratio_sum", **labels)
            assert shown == pytest.approx(engine.balancedness_sum_PLS[place, :, at].sum())


def test_memory_and_placement() -> None:
    engine = Engine(ep_size=2)
    engine.live_placement, engine.filled_placement = 7, 3
    page = families_of(engine)
    assert (page.sum("llep_placement_revision"), page.sum("llep_placement_filled_copies")) == (7, 3)
    assert page.sum("llep_device_free_ratio", ep_rank="1") == 0.5
    assert page.sum("llep_memory_replica_bytes") == 2 * BYTES_PER_SLOT


def test_families_are_as_documented(running: Running) -> None:
    engine = Engine(ep_size=3, start={"metrics_level": "layer_rank"}, errors={"transport/timeout": 2})
    running.report(engine)
    scrape(running)
    engine.run()
    engine.run()
    running.report(engine)
    page = scrape(running)
    documentation = running.http.get("/docs").text
    by_name = {family.name.removesuffix("_total"): family for family in FAMILIES}
    assert set(page.families) == {*by_name, *SCHEDULER_FAMILIES}
    for name, metric in page.families.items():
        assert metric.documentation
        assert name in documentation
        assert ":" not in name and not any(sample.name.endswith("_created") for sample in metric.samples)
        if name in by_name:
            assert metric.type == by_name[name].type_name
            expected = {"model_name", "engine", *by_name[name].labels}
            assert all(set(sample.labels) - {"le"} == expected for sample in metric.samples)
    assert page.sum("llep_errors_total", component="transport", type="timeout") == 2 * engine.ep_size


def test_openmetrics_too(running: Running) -> None:
    engine = Engine()
    engine.run()
    running.report(engine)
    response = running.http.get("/metrics", headers={"Accept": OPENMETRICS})
    assert response.headers["content-type"].startswith(OPENMETRICS)
    page = Scrape(parse_openmetrics(response.text))
    assert page.sum("llep_rank_computed_tokens_total") == 1024 * engine.top_k * len(engine.layer_numbers)


@pytest.mark.parametrize("accept", ["", OPENMETRICS])
def test_the_text_is_what_prometheus_client_would_write(accept: str) -> None:
    engine = Engine(name='a"b\\c\n', start={"metrics_level": "layer_rank"}, errors={"transport/timeout": 2})
    engine.run()
    shown = shown_of(ScrapedEngine.of(snapshot_of(engine)))

    class Collected(Collector):
        def collect(self) -> list[Metric]:
            return [family.metric() for family in shown]

    encoder, content_type = choose_encoder(accept)
    parse = parse_openmetrics if accept else parse_text
    theirs = encoder(Collected()).decode()
    ours = "".join(texts(shown, is_openmetrics=bool(accept)))
    assert list(parse(ours)) == list(parse(theirs))
    assert content_type.startswith("application/openmetrics-text") == bool(accept)
    assert names_of(ours) == names_of(theirs)


def names_of(page: str) -> list[str]:
    """Without numbers, which may be written in several ways, and the order of labels, which says nothing."""
    heads = [line if line.startswith("#") else line.rpartition(" ")[0] for line in page.splitlines()]
    return [",".join(sorted(head.strip("}").replace("{", ",").split(","))) for head in heads]


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 1e300, 5e-324, 0.1 + 0.2, 10**18 + 1])
def test_any_number_is_read_back_as_it_was(value: float) -> None:
    shown = Shown("llep_x", GaugeMetricFamily, "x", ("a",), [(("m%s", "e"), [(("%d",), value), (("b",), 2)])])
    for is_openmetrics, parse in ((True, parse_openmetrics), (False, parse_text)):
        (family,) = parse("".join(texts([shown], is_openmetrics=is_openmetrics)))
        first, second = family.samples
        assert repr(float(first.value)) == repr(float(value)) and second.value == 2.0
        assert first.labels == {"model_name": "m%s", "engine": "e", "a": "%d"}


def test_an_engines_lines_follow_its_labels() -> None:
    def sums(*labels: str) -> dict[str, float]:
        shown = Shown(
            "llep_y", GaugeMetricFamily, "y", ("a",), [(("m", "e"), [((a,), i) for i, a in enumerate(labels)])]
        )
        (family,) = parse_text("".join(texts([shown], is_openmetrics=False)))
        return {sample.labels["a"]: sample.value for sample in family.samples}

    assert sums("p", "q") == {"p": 0, "q": 1}
    assert sums("q", "p") == {"q": 0, "p": 1}
    assert sums("r") == {"r": 0}


def test_names_that_need_escaping(running: Running) -> None:
    engine = Engine(name='a"b\\c', model_name="/models/ö 中")
    running.report(engine)
    page = scrape(running)
    assert page.sum("llep_info", engine='a"b\\c', model_name="/models/ö 中", ep_size="2") == 1


def test_refused_reports_and_refused_settings_are_seen(running: Running) -> None:
    engine = Engine()
    engine.run()
    running.report(engine)
    engine.seq -= 1
    assert len(running.report(engine)) == 2
    engine.apply_error = "no such layer"
    engine.run()
    running.report(engine)
    page = scrape(running)
    assert page.sum("llep_errors_total", component="scheduler", type="report_order") == 2
    assert page.sum("llep_settings_last_apply_successful") == 0


def test_refused_reports_of_nobody_are_seen_too(running: Running) -> None:
    engine = Engine()
    old = encode(msgspec.structs.replace(engine.reports()[0], protocol=9))
    bad = encode(msgspec.structs.replace(engine.reports()[0], step=-1))
    answer = running.await_(running.caller.scheduler.report([b"nonsense", old, bad], 0))
    assert [why.partition(":")[0] for why in answer["refused"]] == ["garbled", "protocol", "count"]
    page = scrape(running)
    for reason in ("garbled", "protocol", "count"):
        nobody = {"model_name": "", "engine": "", "component": "scheduler"}
        assert page.sum("llep_errors_total", type=f"report_{reason}", **nobody) == 1
    running.report(engine)
    running.await_(running.caller.scheduler.report([old], 0))
    page = scrape(running)
    assert page.sum("llep_errors_total", type="report_protocol", engine=engine.name) == 1
    assert page.sum("llep_errors_total", type="report_protocol", engine="") == 1


def test_the_revision_that_is_wanted_held_and_live(running: Running) -> None:
    engine = Engine()
    running.report(engine)
    change = running.await_(
        running.caller.scheduler.patch_settings({"capacity_factor": 2}, author="a", reason="", wait_s=0)
    )
    names = ("llep_settings_desired_revision", "llep_settings_held_revision", "llep_settings_revision")
    page = scrape(running)
    assert [page.sum(name) for name in names] == [change["revision"], 0, 0]
    running.report(engine)  # takes the directive
    running.report(engine)
    page = scrape(running)
    assert [page.sum(name) for name in names] == [change["revision"]] * 3
    assert page.sum("llep_settings_capacity_factor") == 2


def test_an_engine_that_starts_anew_says_since_when_it_counts(running: Running) -> None:
    engine = Engine()
    engine.run()
    running.report(engine)
    before = scrape(running)
    running.report(engine)
    assert scrape(running).sum("llep_engine_start_timestamp_seconds") == before.sum(
        "llep_engine_start_timestamp_seconds"
    )
    again = Engine(incarnation="second", counting_since_s=engine.counting_since_s + 3600)
    running.report(again)
    after = scrape(running)
    assert after.sum("llep_tokens_total") == 0 < before.sum("llep_tokens_total")
    started = [page.sum("llep_engine_start_timestamp_seconds") for page in (before, after)]
    assert started[1] - started[0] == 3600
    states = {state: after.sum("llep_engine_state", state=state) for state in ("starting", "live", "stale")}
    assert states == {"starting": 0, "live": 1, "stale": 0}


def test_a_store_that_is_not_open_is_seen(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file where a folder should be")
    for running in start(ServerConfig(), tmp_path / "state"):
        running.report(Engine())
        page = scrape(running)
        assert (page.sum("llep_scheduler_up"), page.sum("llep_scheduler_store_open")) == (1, 0)


def test_names_types_and_labels_change_only_on_purpose() -> None:
    """What goes is announced one minor version before, in CHANGELOG.md; then write this file anew from `shown`."""
    shown = [f"{name} gauge" for name in SCHEDULER_FAMILIES]
    shown += [f"{f.name} {f.type_name} {' '.join((*ENGINE_LABELS, *f.labels))}" for f in FAMILIES]
    golden = Path(__file__).with_name("metric_names.txt").read_text().splitlines()
    assert sorted(shown) == golden


def test_the_documentation_is_made_from_the_code() -> None:
    path = Path(__file__).parents[2] / "docs" / "metrics.md"
    assert path.read_text() == markdown(), "write it anew: python -m llep_server.reference > docs/metrics.md"


def test_goes_on_without_a_scheduler(running: Running) -> None:
    running.report(Engine())
    running.caller.is_up = False
    page = scrape(running)
    assert [(sample.name, sample.value) for sample in page.samples] == [("llep_scheduler_up", 0)]
    running.caller.is_up = True
    assert scrape(running).sum("llep_info") == 1


def test_many_scrapes_ask_the_scheduler_once(running: Running) -> None:
    running.report(Engine())
    running.app.state.exposition.keep_s = 60.0
    running.caller.calls.clear()

    async def ask_all() -> set[bytes]:
        async with httpx.AsyncClient(base_url=running.url, trust_env=False) as http:
            return {response.content for response in await asyncio.gather(*(http.get("/metrics") for _ in range(20)))}

    assert len(asyncio.run(ask_all())) == 1
    assert running.caller.calls == ["metrics"]


def test_hot_experts_are_the_hottest_lately(running: Running) -> None:
    engine = Engine(seed=3, counting_since_s=time.time())
    assert not scrape_of(running, engine).has("llep_hot_expert_load_ratio")  # nothing was routed yet
    engine.run(tokens=4096, hot_share=0.9)  # experts 0 and 1 take 0.45 each of 16
    page = scrape_of(running, engine)
    ratios = [page.sum("llep_hot_expert_load_ratio", place=str(place)) for place in range(10)]
    assert ratios == sorted(ratios, reverse=True)
    assert ratios[:6] == pytest.approx([0.45 * 16] * 6, rel=0.1)
    again = Engine(seed=3, incarnation="second", counting_since_s=time.time())
    assert not scrape_of(running, again).has("llep_hot_expert_load_ratio")


def scrape_of(running: Running, engine: Engine) -> Scrape:
    assert running.report(engine) == []
    return scrape(running)


def test_an_engine_whose_rank_0_is_silent_shows_what_the_others_know() -> None:
    engine = Engine(ep_size=2)
    engine.run()
    page = Scrape(metrics_of(ScrapedEngine.of(snapshot_of(engine, silent=[0]))))
    assert page.sum("llep_memory_budget_bytes", ep_rank="1") == 4 * BYTES_PER_SLOT
    assert not page.has("llep_rank_computed_tokens_total")


def test_promtool_has_nothing_to_say(running: Running) -> None:
    promtool = tool("promtool")
    engine = Engine(start={"metrics_level": "layer_rank"}, errors={"transport/timeout": 2})
    engine.run()
    running.report(engine)
    page = running.http.get("/metrics").content
    checked = subprocess.run([promtool, "check", "metrics"], input=page, capture_output=True, timeout=30, check=False)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")
