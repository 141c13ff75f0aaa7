"""What README and docs say to type, against a stack like that of `make serve`; `llep bench` to its end; and
the page from a recording to settings that are better.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from llep.tiny_models import write_tiny_model
from tests.documented import LIVE, PAGES, ROOT, begins, typed
from tests.e2e.client import Client, prompts
from tests.e2e.stack import LLEP, TP_EP, Stack, Traffic, clean_environment

sys.path.insert(0, str(ROOT / "tests" / "server"))

from playwright.sync_api import expect

from tests.page.browsing import chromium, visits

pytestmark = pytest.mark.e2e

NAME = "tiny-gpt-oss"
BENCH = ("--num-prompts", "4", "--random-input-len", "128", "--random-output-len", "4")
RUN_WITHIN_S = 500


@pytest.fixture(scope="module")
def stack(folder: Path) -> Iterator[Stack]:
    """The model and the settings that `make serve` takes."""
    model = write_tiny_model("gpt-oss", folder / NAME, hot=tuple(range(8)), hot_share=0.85).directory
    settings = dict(re.findall(r"^serve: export (LLEP_\w+) \?= (\S+)", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert "LLEP_IMBALANCE_THRESHOLD" in settings
    with Stack(model, folder, *TP_EP, "--enforce-eager", **settings) as stack:
        stack.wait_until_serving()
        yield stack


@contextmanager
def traffic(stack: Stack) -> Iterator[Traffic]:
    words = prompts(1, words=150)[0]
    with Client(stack, NAME) as client, Traffic(lambda: client.complete(words, max_tokens=4)) as traffic:
        yield traffic
    assert not traffic.failures


def value_of(stack: Stack, key: str) -> Any:
    return next(one["value"] for one in stack.get("/v1/settings", engine=NAME)["settings"] if one["key"] == key)


def environment(stack: Stack) -> dict[str, str]:
    path = f"{LLEP.parent}{os.pathsep}{os.environ['PATH']}"
    return clean_environment(PATH=path, LLEP_SERVER=stack.control_plane, ENGINE=NAME)


def as_it_is_here(stack: Stack, command: str) -> str:
    """With this stack's addresses, a recording, a revision that are there, and shorter times."""
    command = command.replace("http://127.0.0.1:8000", stack.api).replace("http://127.0.0.1:8088", stack.control_plane)
    command = re.sub(r"--duration \w+", "--duration 4s", command).replace('"duration_s": 60', '"duration_s": 4')
    if re.search(r"\bID\b", command):
        newest = stack.llep_json("record", "list")[0]["id"]
        stack.wait_for(lambda: stack.get(f"/v1/recordings/{newest}")["ended_s"], 120, "the end of the recording")
        command = re.sub(r"\bID\b", newest, command)
    revision = stack.get("/v1/settings")["revision"]
    for given, here in (
        ("llep top", "llep top --once"),
        ("llep demo load", f"llep demo load --api {stack.api} --max-tokens 4 --duration 4s"),
        ("copies.json --dry-run", "copies.json"),  # so that there is something to roll back
        ("--text src/ --text letters/", f"--text {ROOT}/llep --text {ROOT}/docs"),
        ("--if-revision 3", f"--if-revision {revision}"),
        ("settings rollback 12", f"settings rollback {revision - 1}"),
        ("curl -N", "curl -N --max-time 3"),
    ):
        command = command.replace(given, here)
    return command


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands(stack: Stack, page: Path, tmp_path: Path) -> None:
    """Each page's in their order, in a shell."""
    stack.patch(mode=None, replicas=None)
    (tmp_path / "copies.json").write_text(json.dumps([{"layer": 0, "expert": 0, "rank": 1}]))
    commands = [command for command in typed(page) if begins(command, LIVE)]
    with traffic(stack):
        for command in commands:
            here = as_it_is_here(stack, command)
            done = subprocess.run(
                here, shell=True, cwd=tmp_path, env=environment(stack), capture_output=True, text=True,
                timeout=RUN_WITHIN_S,
            )  # fmt: skip
            is_over = done.returncode == 28 and "--max-time" in here  # a stream has no end
            assert done.returncode == 0 or is_over, f"{here}\n{done.stdout}\n{done.stderr}"
            assert '"error":' not in done.stdout, f"{here}\n{done.stdout}"


def bench(stack: Stack, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(LLEP), "bench", "--pairs", "1", *arguments, "--", "--base-url", stack.api, *BENCH]
    return subprocess.run(command, env=environment(stack), capture_output=True, text=True, timeout=RUN_WITHIN_S)


def test_bench_to_its_end(stack: Stack) -> None:
    stack.patch(mode=None)
    done = bench(stack, "-o", "json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["verdict"] == "not_enough_evidence" and "measure 3 --pairs or more; llep made" in found["reason"]
    assert (found["pairs"], found["failed_requests"], len(found["runs"])) == (1, 0, 2)
    measures = {row["measure"]: row for row in found["measures"]}
    assert {"total_token_throughput", "mean_ttft_ms", "mean_tpot_ms"} <= measures.keys()
    assert all(row["on"] > 0 and row["off"] > 0 for row in measures.values())
    off, on = found["counted"]["off"], found["counted"]["active"]
    assert off["lends"] == 0 and on["lends"] > 0 and on["lend_bytes"] > on["lends"]
    assert on["imbalance_before"] > 1.3 and on["imbalance_before"] > on["imbalance_after"] >= 1
    for line in ("warm-up, off: ", "warm-up, active: ", "pair 1 of 1, off: ", "pair 1 of 1, active: "):
        assert f"llep: bench: {line}" in done.stderr
    assert value_of(stack, "mode") == "active"


def test_a_recording_tuned_for_on_the_page(stack: Stack) -> None:
    """Record under load, tune, look at what was found, apply it: as a person does, and it is live on the engine."""
    stack.patch(mode=None, imbalance_threshold=50)  # which leaves all as it is: something better will be found
    with chromium() as browser, visits(browser) as visit, traffic(stack) as load:
        page = visit(f"{stack.control_plane}/#/recordings")
        page.locator("#record-duration").select_option("10")
        page.locator("#record-reason").fill("to tune for")
        page.get_by_role("button", name="Start recording").click()
        row = page.locator("#recordings tbody tr", has_text="to tune for")
        expect(row).to_contain_text("done", timeout=90_000)
        page.locator("#tuning-costs").select_option("")  # the tiny model's experts would not pay on any GPU
        row.get_by_role("button", name="Tune").click()
        card = page.locator("#operations .advice").first
        expect(card).to_contain_text("Worth it: ", timeout=240_000)
        expect(card.locator("code")).to_contain_text("imbalance_threshold=")
        card.get_by_role("button", name="Look at it in Settings").click()
        outcome = page.locator("#settings-outcome")
        expect(outcome).to_contain_text("Dry run: nothing has changed yet", timeout=30_000)
        page.get_by_role("button", name="Apply", exact=True).click()
        expect(outcome).to_contain_text(re.compile(r"Revision \d+ is live on tiny-gpt-oss since step"), timeout=60_000)
        assert load.answered
    assert value_of(stack, "imbalance_threshold") < 50
    stack.patch(imbalance_threshold=None)
