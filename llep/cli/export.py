"""`llep export`: dashboards, rules and manifests as files, as this version of llep makes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

import llep
from llep.cli.output import ExitCode, fail
from llep.monitoring.dashboards import dashboards as make_dashboards
from llep.monitoring.rules import RUNBOOK, prometheus_rule
from llep.monitoring.rules import rules as make_rules

MADE_BY = "# Made by `llep export rules`: change llep/monitoring/rules.py, not this file.\n"

# In a wheel, and in a checkout.
PACKAGE = Path(llep.__file__).parent
MANIFESTS = (PACKAGE / "packaged" / "k8s", PACKAGE.parent / "k8s")

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
    operator: Annotated[bool, typer.Option("--operator", help="As a PrometheusRule, for the operator.")] = False,
    ray: Annotated[
        bool, typer.Option("--through-ray", help="For metrics that Prometheus gets from Ray's nodes, as ray_llep_...")
    ] = False,
) -> None:
    """Recording rules and alerts, as a rules file of Prometheus or an object for its operator."""
    if operator:
        _write(folder, {"rules.yaml": rules_text(prometheus_rule(runbook, is_through_ray=ray))})
    else:
        _write(folder, {"llep.yaml": rules_text(make_rules(runbook, is_through_ray=ray))})


@export_app.command()
def k8s(folder: Folder) -> None:
    """Manifests for Kubernetes, with all they are made of: `kubectl apply -k DIR/overlays/...`."""
    source = next((place for place in MANIFESTS if place.is_dir()), None)
    if source is None:
        raise typer.Exit(fail(f"this llep was installed without its manifests: they are in none of {MANIFESTS}"))
    files = (path for path in sorted(source.rglob("*")) if path.is_file())
    _write(folder, {str(path.relative_to(source)): path.read_text() for path in files})


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
