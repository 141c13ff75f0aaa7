"""`llep model`: checkpoints to try llep with."""

from __future__ import annotations

import typer


def add_to(app: typer.Typer) -> None:
    app.add_typer(typer.Typer(help="Make small MoE checkpoints to try llep with.", no_args_is_help=True), name="model")
