"""`llep export`: dashboards, rules and manifests as files, as this version of llep makes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from llep.cli.output import ExitCode, fail
from llep.monitoring.dashboards import dashboards as make_dashboards
from llep.monitoring.rules import RUNBOOK
from llep.monitoring.rules import rules as make_rules

MADE_BY = "# Made by `llep export rules`: change llep/monitoring/rules.py, not this file.\n"

export_app = typer.Typer(help="Write dashboards, rules or manifests, as packaged.", no_args_is_help=True)
Folder = Annotated[Path, typer.Argument(help="Folder to write to; made if need be. Files of these names are replaced.")]


def add_to(app: typer.Typer) -> None:
    app.add_typer(export_app, name="export")


@export_app.command()
def dashboards(folder: Folder) -> None:
    """Grafana's dashboards, as JSON to import or to provision from files."""
    _write(folder, {name: dashboard_text(content) for name, content in make_dashboards().items()})


@export_app.command()
def rules(
    folder: Folder,
    runbook: Annotated[
        str, typer.Option(help="Where docs/runbook.md can be read: the beginning of alerts' links.")
    ] = RUNBOOK,
) -> None:
    """Recording rules and alerts, as a rules file of Prometheus."""
    _write(folder, {"llep.yaml": rules_text(make_rules(runbook))})


def dashboard_text(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=1) + "\n"


def rules_text(content: dict[str, Any]) -> str:
    text: str = yaml.safe_dump(content, sort_keys=False, width=110)
    return MADE_BY + text


def _write(folder: Path, texts: dict[str, str]) -> None:
    """All files; prints what was written. Exits with 1 where the folder can't be written."""
    try:
        for name, text in texts.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            print(path)
    except OSError as error:
        reason = f"{folder} can't be written ({error.strerror}: {error.filename}): choose another folder"
        raise typer.Exit(fail(reason, ExitCode.ERROR)) from None
