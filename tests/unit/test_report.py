"""The report: what it says follows from the loads, and the page stands by itself."""

from __future__ import annotations

import base64
import io
import re
import tarfile
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from llep.config import Settings
from llep.cost import cost_model
from llep.errors import SettingsError
from llep.generate import Workload, generate_steps
from llep.planning import PlanOptions
from llep.report import Findings, analyse, page
from llep.report.figures import heatmap
from llep.shapes import ModelShape
from llep.simulate import Setup
from llep.traces import Trace, TraceError, unpacked, write_trace
from tests.unit.commands import run_llep

NATURAL = Path(__file__).parents[2] / "bench" / "natural" / "traces"
SHAPE = ModelShape(
    name="a<b",
    layer_numbers=(3, 4, 5),
    num_experts=16,
    top_k=2,
    hidden_size=2880,
    intermediate_size=2880,
    bytes_per_expert=13_000_000,
)


def findings(workload: str, tokens_per_rank: int = 16384, start: Settings | None = None) -> Findings:
    steps = generate_steps(
        Workload.parse(workload), SHAPE, num_ranks=4, tokens_per_rank=tokens_per_rank, steps=12, seed=0, phase="prefill"
    )
    setup = Setup(shape=SHAPE, num_ranks=4, options=PlanOptions(cost_model=cost_model("h200")))
    return analyse(steps, setup, source="x <y>", recorded_ranks=4, start=start)


class Reader(HTMLParser):
    """Checks that tags nest, and gathers what could be fetched."""

    VOID = ("meta", "link", "img", "br", "image", "rect", "line", "circle", "polyline")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.tables: list[int] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "action", "srcset")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize(
    ("workload", "tokens_per_rank", "verdict", "words"),
    [
        ("zipf:ratio=2", 16384, "worth_it", "Worth enabling"),
        ("balanced", 16384, "not_worth_it", "Loads are balanced as they are"),
        ("zipf:ratio=2", 8, "not_worth_it", "Batches are too small"),
    ],
)
def test_the_verdict_follows_from_the_loads(workload: str, tokens_per_rank: int, verdict: str, words: str) -> None:
    found = findings(workload, tokens_per_rank)
    assert found.tuning.verdict == verdict
    assert words in page(found)


def test_numbers_are_those_of_the_loads() -> None:
    found = findings("hot_rank:ratio=2")
    assert found.course.before_LR.sum() == found.course.after_LR.sum() == found.loads_LE.sum()
    assert found.course.ratio_before_L == pytest.approx([2, 2, 2], rel=0.02)
    assert (found.course.ratio_after_L < 1.2).all()
    assert found.course.lends_in_R.sum() == found.course.lends_out_R.sum() > 0
    assert sum(found.course.decisions.values()) == 12 * 3
    hottest = found.hot[0]
    assert found.loads_LE[hottest.layer - 3].argmax() == hottest.expert and hottest.home_rank == hottest.expert // 4
    recorded = next(one for one in found.by_ranks if one.is_recorded)
    assert recorded.ranks == 4 and recorded.gain_ratio == pytest.approx(found.tuning.proposed.gain_ratio, abs=0.02)
    assert [one.ranks for one in found.by_ranks] == [2, 4, 8, 16]


def test_the_page_stands_by_itself_and_says_what_to_set() -> None:
    text = page(findings("zipf:ratio=2", start=Settings(imbalance_threshold=20)))
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    assert all(link.startswith("data:image/png;base64,") for link in reader.links)
    assert not re.search(r"https?://", text) and len(text) < 300_000
    assert "x &lt;y&gt;" in text and "a&lt;b" in text and "<y>" not in text
    assert re.search(r"llep settings set imbalance_threshold=[\d.]+", text)
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ET.fromstring(svg)


def test_a_heatmap_carries_its_numbers() -> None:
    values = np.array([[0.0, 1.0, 2.5], [1.0, 1.0, 700.0]])
    found = ET.fromstring(heatmap(values, ["3", "4"], "rank", 2.0, "times the mean"))
    numbers = np.frombuffer(base64.b64decode(found.attrib["data-values"]), dtype="<u2")
    assert numbers.tolist() == [0, 100, 250, 100, 100, 65535]
    (image,) = (each for each in found if each.tag.endswith("image"))
    assert base64.b64decode(image.attrib["href"].partition(",")[2]).startswith(b"\x89PNG\r\n")


def test_nothing_to_report_is_an_error() -> None:
    setup = Setup(shape=SHAPE, num_ranks=4)
    with pytest.raises(SettingsError, match="no step with a token"):
        analyse([], setup, source="x", recorded_ranks=4)


def test_a_tar_is_a_recording_too(tmp_path: Path) -> None:
    steps = list(Trace(NATURAL / "python-decode").steps())[:3]
    write_trace(tmp_path / "rec", Trace(NATURAL / "python-decode").shape, 2, steps)
    tar = tmp_path / "rec.tar"
    with tarfile.open(tar, "w") as file:
        file.add(tmp_path / "rec" / "part-000000.parquet", "id/part-000000.parquet")
        evil = tarfile.TarInfo("../../evil.parquet")
        evil.size = 4
        file.addfile(evil, io.BytesIO(b"evil"))
    with unpacked(tar) as folder:
        assert [path.name for path in folder.iterdir()] == ["part-000000.parquet"]
        assert Trace(folder).num_steps() == 3
    assert not folder.exists()
    (tmp_path / "no.tar").write_bytes(b"nothing of the kind")
    with pytest.raises(TraceError, match="no recording"), unpacked(tmp_path / "no.tar"):
        pass


def test_the_command_writes_the_page(tmp_path: Path) -> None:
    target = tmp_path / "report.html"
    options = ("--ranks", "8", "--sizes-of", "gpt-oss-20b", "--tokens-per-rank", "8192")
    done = run_llep("report", str(NATURAL / "python-prefill"), "-o", str(target), *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("worth_it: ") and f"wrote {target}" in done.stdout
    text = target.read_text()
    assert "gpt-oss-20b" in text and "scaled to 8,192 tokens per rank" in text


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("nowhere",), "nowhere does not exist"),
        ((str(NATURAL / "python-prefill"), "-o", "report.pdf"), "must be an .html file"),
        ((str(NATURAL / "python-prefill"), "--ranks", "64"), "ranks must be between 1 and"),
        ((str(NATURAL / "python-prefill"), "--cost-model", "h300"), "neither a preset"),
        ((str(NATURAL / "python-prefill"), "--set", "imbalance_treshold=2"), "imbalance_threshold"),
    ],
)
def test_bad_arguments_are_named(arguments: tuple[str, ...], told: str, tmp_path: Path) -> None:
    done = run_llep("report", *arguments, cwd=tmp_path)
    assert done.returncode in (1, 2) and told in done.stderr and "Traceback" not in done.stderr
