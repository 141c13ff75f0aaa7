"""Where the control plane listens, who may come in and where the scheduler is: read once from the environment."""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llep.errors import UnsupportedConfiguration
from llep.scheduler.client import DEFAULT_ADDRESS, DEFAULT_NAMESPACE, DEFAULT_STATE_DIR

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 8088
SERVER_PREFIX = "LLEP_SERVER_"
SERVER_VARIABLES = tuple(
    SERVER_PREFIX + name
    for name in ("HOST", "PORT", "KEYS_FILE", "STATE_DIR", "INSECURE", "ALLOWED_HOSTS", "LOG", "RAY_METRICS")
)
_HOST_NAME = re.compile(r"[a-z0-9_.-]+|\[[0-9a-f:.]+\]")
LOG_FORMATS = ("text", "json")
TRUE_WORDS = ("1", "true", "yes", "on")
FALSE_WORDS = ("", "0", "false", "no", "off")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """What the control plane is told at start. Raises UnsupportedConfiguration where it would be open to the net."""

    host: str = DEFAULT_HOST
    port: int = DEFAULT_PORT  # 0 takes a free one
    keys_file: Path | None = None  # None: everybody who reaches the port may do everything
    state_dir: Path = Path(DEFAULT_STATE_DIR).expanduser()  # of the scheduler, should it have to be started
    ray_address: str = DEFAULT_ADDRESS
    ray_namespace: str = DEFAULT_NAMESPACE
    insecure: bool = False  # listen beyond loopback without keys
    allowed_hosts: tuple[str, ...] = ()  # names that requests may address it by, beside loopback's
    ray_metrics: bool = False  # show metrics through Ray's own agents too, as ray_llep_...
    log_format: str = "text"  # json: an object per line

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise UnsupportedConfiguration(
                f"port {self.port} is not in 0..65535 (0 takes a free one): set --port or LLEP_SERVER_PORT",
                param="port",
            )
        for name in self.allowed_hosts:
            if not _HOST_NAME.fullmatch(name):
                raise UnsupportedConfiguration(
                    f"LLEP_SERVER_ALLOWED_HOSTS: {name!r} is not a host's name or address: give them without port, "
                    "with commas between",
                    param="allowed_hosts",
                )
        if self.log_format not in LOG_FORMATS:
            raise UnsupportedConfiguration(
                f"LLEP_SERVER_LOG={self.log_format!r} is unknown: give {' or '.join(LOG_FORMATS)}", param="log"
            )
        if self.keys_file is None and not self.insecure and not is_loopback(self.host):
            raise UnsupportedConfiguration(
                f"host {self.host} is reachable from other machines and there are no keys: name a keys file with "
                "--keys-file or LLEP_SERVER_KEYS_FILE, stay on 127.0.0.1, or open it to everybody with --insecure",
                param="host",
            )

    @property
    def checks_host(self) -> bool:
        """Whether requests must address it by a name that is known: else, where there are no keys, a web page that a
        browser has loaded could point its own name at the control plane and change things.
        """
        return bool(self.allowed_hosts) or (self.keys_file is None and not self.insecure)

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> ServerConfig:
        """The configuration from LLEP_SERVER_*, LLEP_STATE_DIR and LLEP_RAY_*; unknown LLEP_SERVER_* are refused."""
        environ = os.environ if environ is None else environ
        _refuse_unknown(environ)
        keys_file = environ.get("LLEP_SERVER_KEYS_FILE")
        state_dir = environ.get("LLEP_SERVER_STATE_DIR") or environ.get("LLEP_STATE_DIR") or DEFAULT_STATE_DIR
        return cls(
            host=environ.get("LLEP_SERVER_HOST") or DEFAULT_HOST,
            port=_parse_port(environ.get("LLEP_SERVER_PORT") or str(DEFAULT_PORT)),
            keys_file=Path(keys_file).expanduser() if keys_file else None,
            state_dir=Path(state_dir).expanduser(),
            ray_address=environ.get("LLEP_RAY_ADDRESS") or DEFAULT_ADDRESS,
            ray_namespace=environ.get("LLEP_RAY_NAMESPACE") or DEFAULT_NAMESPACE,
            log_format=environ.get("LLEP_SERVER_LOG") or "text",
            insecure=_parse_switch("LLEP_SERVER_INSECURE", environ.get("LLEP_SERVER_INSECURE", "")),
            allowed_hosts=_parse_names(environ.get("LLEP_SERVER_ALLOWED_HOSTS", "")),
            ray_metrics=_parse_switch("LLEP_SERVER_RAY_METRICS", environ.get("LLEP_SERVER_RAY_METRICS", "")),
        )


def is_loopback(host: str) -> bool:
    """Whether every address that `host` stands for is on this machine only. A name that has none is not."""
    try:
        addresses = [ipaddress.ip_address(host.strip("[]"))]
    except ValueError:
        try:
            found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            return False
        addresses = [ipaddress.ip_address(str(address[4][0]).partition("%")[0]) for address in found]
    return all(address.is_loopback for address in addresses)


def _refuse_unknown(environ: Mapping[str, str]) -> None:
    for name in environ:
        if name.startswith(SERVER_PREFIX) and name not in SERVER_VARIABLES:
            nearest = difflib.get_close_matches(name, SERVER_VARIABLES, n=1, cutoff=0.0)[0]
            raise UnsupportedConfiguration(f"unknown variable {name}; did you mean {nearest}?", param=name)


def _parse_port(text: str) -> int:
    if not text.isascii() or not text.isdecimal():
        raise UnsupportedConfiguration(
            f"LLEP_SERVER_PORT={text!r} is not a port: give a number in 0..65535 (0 takes a free one)", param="port"
        )
    return int(text)


def _parse_names(text: str) -> tuple[str, ...]:
    return tuple(name.strip().lower() for name in text.split(",") if name.strip())


def _parse_switch(name: str, text: str) -> bool:
    if text.lower() not in TRUE_WORDS + FALSE_WORDS:
        raise UnsupportedConfiguration(f"{name}={text!r} is neither true nor false: give 1 or 0", param=name)
    return text.lower() in TRUE_WORDS
