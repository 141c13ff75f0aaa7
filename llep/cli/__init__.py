"""The command line, `llep`. One module per group of commands; heavy imports happen inside the commands."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

import typer

from llep import __version__
from llep.cli.output import ExitCode, fail
from llep.errors import LlepError, SchedulerUnreachable, SettingsError, UnsupportedConfiguration

# Modules in the order in which `llep --help` lists their commands.
COMMANDS = (
    "serve model control_plane control top loads history placement plan simulate record tune report bench "
    "calibrate doctor export dashboard demo with_ray"
).split()
# By command, what it is made of: the one module of its name, but for a few.
MODULES: dict[str, Sequence[str]] = {name.replace("_", "-"): (name,) for name in COMMANDS} | {
    "status": ("control",),
    "mode": ("control",),
    "loads": ("control", "loads"),
    "settings": ("control", "history"),
    "advice": ("placement",),
    "control": COMMANDS,  # no commands
    "history": COMMANDS,
}

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


_added: set[str] = set()


def _register(command: str = "") -> None:
    """Each module of commands adds its own to `app`, once; where the command is known, its own modules alone: to import
    the others is a third of the time that a short command takes.
    """
    for name in modules_of(command):
        if name not in _added:
            _added.add(name)
            importlib.import_module(f"llep.cli.{name}").add_to(app)


def modules_of(command: str) -> Sequence[str]:
    """The modules that make up a command; all of them if there is no such command."""
    return MODULES.get(command, COMMANDS)


def _asked_for() -> str:
    """The command on the command line, or on that which the shell completes; '' while it is not whole yet."""
    line = os.environ.get("COMP_WORDS") or os.environ.get("_TYPER_COMPLETE_ARGS")  # bash; zsh and fish
    if line is None:
        return sys.argv[1] if len(sys.argv) > 1 else ""
    words = line.split()
    return words[1] if len(words) > 2 or (len(words) == 2 and line[-1].isspace()) else ""


def main() -> None:
    """Run the command line. Exit codes: 0 ok, 1 error, 2 usage, 3 unreachable, 4 check failed."""
    _register(_asked_for())
    try:
        app()
    except (SettingsError, UnsupportedConfiguration) as error:
        sys.exit(fail(error.message, ExitCode.USAGE))
    except SchedulerUnreachable as error:
        sys.exit(fail(error.message, ExitCode.UNREACHABLE))
    except LlepError as error:
        sys.exit(fail(error.message, ExitCode.ERROR))
