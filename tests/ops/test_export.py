"""`llep export` as people run it: what it writes, and what it says when it can't."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import yaml

LLEP = Path(sys.executable).with_name("llep")


def export(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([LLEP, "export", *words], capture_output=True, text=True, timeout=60, check=False)


def test_writes_what_it_names(tmp_path: Path) -> None:
    for what in ("dashboards", "rules", "k8s"):
        done = export(what, tmp_path / what)
        assert done.returncode == 0, done.stderr
        written = [Path(line) for line in done.stdout.splitlines()]
        assert written and all(path.read_text() for path in written)
    assert json.loads((tmp_path / "dashboards" / "llep-overview.json").read_text())["uid"] == "llep-overview"


def test_rules_link_to_the_runbook_that_is_named(tmp_path: Path) -> None:
    export("rules", "--runbook", "https://wiki.example/llep", tmp_path)
    groups = yaml.safe_load((tmp_path / "llep.yaml").read_text())["groups"]
    links = [rule["annotations"]["runbook_url"] for group in groups for rule in group["rules"] if "alert" in rule]
    assert links[0] == "https://wiki.example/llep#llepstalled"
    assert all(link.startswith("https://wiki.example/llep#llep") for link in links)


def test_says_where_it_cannot_write(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    done = export("rules", tmp_path / "file")
    assert done.returncode == 1
    assert "file can't be written" in done.stderr and "another folder" in done.stderr
    assert "Traceback" not in done.stderr
