"""The command line, `llep`. One module per group of commands; heavy imports happen inside the commands."""

from __future__ import annotations

import importlib
import sys

import typer

from llep import __version__
from llep.cli.output import ExitCode, fail
from llep.errors import LlepError, SchedulerUnreachable, SettingsError, UnsupportedConfiguration

# Modules in the order in which `llep --help` lists their commands.
COMMANDS = (
    "serve model control_plane control top loads history placement plan simulate record tune report bench "
    "calibrate doctor export dashboard demo with_ray"
).split()

app = typer.Typer(
    name="llep",
    help="Least-Loaded Expert Parallelism for serving MoE models: serve, see and steer.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Print the version."),
) -> None: ...


def _register() -> None:
    """Each module of commands adds its own to `app`, once."""
    if app.registered_commands:
        return
    for name in COMMANDS:
        importlib.import_module(f"llep.cli.{name}").add_to(app)


def main() -> None:
    """Run the command line. Exit codes: 0 ok, 1 error, 2 usage, 3 unreachable, 4 check failed."""
    _register()
    try:
        app()
    except (SettingsError, UnsupportedConfiguration) as error:
        sys.exit(fail(error.message, ExitCode.USAGE))
    except SchedulerUnreachable as error:
        sys.exit(fail(error.message, ExitCode.UNREACHABLE))
    except LlepError as error:
        sys.exit(fail(error.message, ExitCode.ERROR))
