"""`python -m llep_server`: the control plane as a process, told what to do by LLEP_SERVER_* and LLEP_RAY_*."""

from __future__ import annotations

import errno
import os
import signal
import socket
import sys

from llep.errors import UnsupportedConfiguration
from llep_server import logs
from llep_server.config import ServerConfig

EXIT_ERROR = 1
EXIT_USAGE = 2


def main() -> int:
    try:
        config = ServerConfig.from_env()
        return serve(config)
    except UnsupportedConfiguration as error:
        return _fail(error.message, EXIT_USAGE)
    except ModuleNotFoundError as error:
        if error.name and error.name.partition(".")[0] in ("fastapi", "uvicorn", "prometheus_client", "starlette"):
            return _fail(f"{error.name} is not installed: pip install 'llep[server]'", EXIT_ERROR)
        raise


def serve(config: ServerConfig) -> int:
    """Serve until SIGINT or SIGTERM; returns the exit code."""
    import uvicorn

    from llep_server.app import create_app
    from llep_server.connections import UVICORN_OPTIONS, give_up_the_unread, settle

    logs.set_up(config.log_format)
    app = create_app(config)
    try:
        listener = listen(config.host, config.port)
        give_up_the_unread(listener)
    except OSError as error:
        return _fail(explain_listen_error(error, config), EXIT_ERROR)
    # uvicorn ends in good order and then raises the signal again: by then there is nothing left to do.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit(0))
    url = url_of(config.host, listener.getsockname()[1])
    keys = "keys from " + str(config.keys_file) if config.keys_file else "no keys: open to all who reach it"
    print(f"llep control plane at {url}, its docs at {url}/docs ({keys})", flush=True)
    server = uvicorn.Server(uvicorn.Config(app, **UVICORN_OPTIONS))
    settle()
    server.run(sockets=[listener])
    return 0 if server.started else EXIT_ERROR


def listen(host: str, port: int) -> socket.socket:
    """A bound TCP socket. Raises OSError where there can't be one."""
    family, kind, protocol, _, address = socket.getaddrinfo(
        host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)  # bound alone does not keep a second process off the port
    except OSError:
        listener.close()
        raise
    return listener


def explain_listen_error(error: OSError, config: ServerConfig) -> str:
    if error.errno == errno.EADDRINUSE:
        return (
            f"port {config.port} on {config.host} is in use: stop what listens there, or choose another with --port or "
            "LLEP_SERVER_PORT (0 takes a free one)"
        )
    if error.errno == errno.EACCES:
        return f"port {config.port} needs more rights: choose one above 1023 with --port or LLEP_SERVER_PORT"
    reason = error.strerror or os.strerror(error.errno or 0)
    return f"host {config.host} can't be listened on ({reason}): choose an address of this machine with --host"


def url_of(host: str, port: int) -> str:
    name = host.strip("[]")
    return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"


def _fail(message: str, code: int) -> int:
    print(f"llep: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
