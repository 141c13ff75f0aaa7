"""`llep serve`: Ray, the scheduler, the control plane and vLLM with the plugin, in one command."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import typer

from llep.cli.preflight import (
    VllmFlags,
    check_flags,
    check_model,
    check_order,
    check_packages,
    check_plugins,
    check_port,
    check_settings,
    check_state_dir,
    check_vllm,
    is_cpu_build,
    is_listening,
)
from llep.cli.stack import Place, Stack, find_place, plan_stack, summary
from llep.cli.supervise import Child, StopRequested, StopSignals, sweep
from llep.errors import LlepError, UnsupportedConfiguration
from llep.scheduler.client import DEFAULT_ADDRESS, DEFAULT_STATE_DIR, check_address

CONTROL_PLANE_START_S = 60.0
LOOK_EVERY_S = 0.5
LONGEST_TEMP_DIR = 20  # bytes: Ray makes unix sockets far below it, whose paths must stay under 108


def add_to(app: typer.Typer) -> None:
    app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(serve)


def serve(
    context: typer.Context,
    model: str = typer.Argument(help="A checkpoint's folder, or a name that vLLM can load."),
    control_plane_port: int = typer.Option(
        8088, "--control-plane-port", envvar="LLEP_SERVER_PORT", help="0 takes a free one."
    ),
    control_plane_host: str = typer.Option("127.0.0.1", "--control-plane-host", envvar="LLEP_SERVER_HOST"),
    state_dir: str = typer.Option(
        DEFAULT_STATE_DIR, envvar=["LLEP_STATE_DIR", "LLEP_SERVER_STATE_DIR"], help="Settings, events and logs."
    ),
    engine: str = typer.Option("", envvar="LLEP_ENGINE", help="This engine's name; the model's if not given."),
) -> None:
    """Serve MODEL with vLLM and llep: Ray, scheduler, control plane and engine. All other flags are vLLM's.

    Give vLLM --enable-expert-parallel and --tensor-parallel-size or --data-parallel-size; Ctrl-C ends everything.
    """
    flags = VllmFlags(context.args)
    check_order(model, flags)
    check_plugins(os.environ)
    check_vllm()
    check_packages()
    check_settings(flags)
    check_flags(flags)
    found = check_model(model, flags)
    folder = Path(state_dir).expanduser().absolute()
    check_state_dir(folder)
    if flags.ep_size == 1:
        _say("nothing to balance: give --enable-expert-parallel with --tensor-parallel-size or --data-parallel-size")
    _check_ray()
    with _temporary_folder() as temporary:
        place = find_place(found, flags, control_plane_host, control_plane_port, folder, temporary)
        _check_ports(place)
        _run(plan_stack(place, flags, engine, os.environ), place)


def _check_ports(place: Place) -> None:
    way_out = "choose another with --control-plane-port or LLEP_SERVER_PORT"
    if place.port == place.control_plane_port:
        raise UnsupportedConfiguration(f"port {place.port} is for both the API and the control plane: {way_out}")
    check_port(place.host, place.port, "the API", "choose another with --port (0 takes a free one)")
    check_port(place.control_plane_host, place.control_plane_port, "the control plane", way_out)


def _check_ray() -> None:
    """An address that can't be one is refused; a Ray that is away is a warning, for serving goes on without."""
    address = os.environ.get("LLEP_RAY_ADDRESS")
    if address and check_address(address) != DEFAULT_ADDRESS and not is_listening(address):
        _say(
            f"nothing listens at LLEP_RAY_ADDRESS={address}: serving starts all the same, with the settings given at "
            "start; scheduler, loads and changes of settings will be there once Ray is. Unset it to have a Ray started"
        )


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    """For sockets, and what else nobody wants to find later."""
    base = tempfile.gettempdir()
    try:
        folder = Path(
            tempfile.mkdtemp(prefix="llep-", dir=base if len(os.fsencode(base)) <= LONGEST_TEMP_DIR else "/tmp")
        )
    except OSError as error:
        raise LlepError(
            f"no temporary folder can be made ({error.strerror}: {error.filename}): set TMPDIR to one with room"
        ) from None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run(stack: Stack, place: Place) -> None:
    """Start all and keep them running until somebody asks to stop.

    Raises LlepError if vLLM ends by itself, or a part of the stack can't be started.
    """
    try:
        _serve(stack, place, StopSignals())
    except LlepError as error:
        raise (_refusal(place) or error) from None


def _serve(stack: Stack, place: Place, signals: StopSignals) -> None:
    """Nothing is left behind, however it ends."""
    with signals.heeded():
        try:
            _start(stack, place, signals)
            _keep_running(stack, signals)
            raise LlepError(f"vLLM ended with status {stack.vllm.status}, so everything else was ended too")
        except StopRequested:
            _say("ending everything; once more to end it at once")
        finally:
            _end(stack, place, signals)


def _end(stack: Stack, place: Place, signals: StopSignals) -> None:
    """Also what has a session of its own, such as agents: the refusal file's name marks all that belongs here."""
    for child in (stack.vllm, stack.control_plane, stack.ray):
        if child is not None:
            child.stop(lambda: signals.is_urgent)
    sweep("LLEP_REFUSAL_FILE", str(place.refusal), lambda: signals.is_urgent)


def _refusal(place: Place) -> LlepError | None:
    """What a worker refused to do: the reason of vLLM's end, which nobody would find between its tracebacks."""
    try:
        return UnsupportedConfiguration(place.refusal.read_text())
    except OSError:
        return None


def _start(stack: Stack, place: Place, signals: StopSignals) -> None:
    if stack.ray is not None:
        _say("starting Ray")
        stack.ray.start()
    _say(f"starting the control plane on {place.control_plane}")
    stack.control_plane.start()
    _say("starting vLLM" + ("; on CPU this takes about a minute" if is_cpu_build() else ""))
    stack.vllm.start()
    _wait_for(stack.control_plane, f"{place.control_plane}/livez", CONTROL_PLANE_START_S, stack, signals)
    _wait_for(stack.vllm, f"{place.api}/health", None, stack, signals)
    _say(summary(place))


def _wait_for(child: Child, url: str, timeout_s: float | None, stack: Stack, signals: StopSignals) -> None:
    """Until `url` answers 200. Raises LlepError if the child or vLLM ends before, or there is no answer in time."""
    deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
    # Only this machine is asked: neither a proxy nor a certificate's name matters.
    with httpx.Client(trust_env=False, verify=False, timeout=2.0) as client:
        while not _answers(client, url):
            for needed in (child, stack.vllm):
                if needed.status is not None:
                    raise LlepError(_how_ended(needed))
            if deadline_s is not None and time.monotonic() > deadline_s:
                raise LlepError(f"{child.name} did not answer on {url} within {timeout_s:.0f} s: see {child.log}")
            signals.pause(LOOK_EVERY_S)


def _answers(client: httpx.Client, url: str) -> bool:
    try:
        return client.get(url).status_code == 200
    except httpx.HTTPError:
        return False


def _how_ended(child: Child) -> str:
    if child.log is None:
        return f"{child.name} ended with status {child.status}; what it printed above says why"
    last_words = child.last_words().removeprefix("llep: ")
    return f"{child.name} ended with status {child.status}: {last_words} (all of it: {child.log})"


def _keep_running(stack: Stack, signals: StopSignals) -> None:
    """Until vLLM ends. The others are started again when they die: serving goes on meanwhile."""
    while stack.vllm.status is None:
        for child in stack.restarted:
            if child.status is not None and child.is_due_again():
                _say(f"{_how_ended(child)}; serving goes on, and it is started again")
                child.restart()
        signals.pause(LOOK_EVERY_S)


def _say(text: str) -> None:
    print(f"llep: {text}", flush=True)
