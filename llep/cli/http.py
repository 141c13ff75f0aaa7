"""The command line's way to the control plane: one client, the same options on every command, errors as exit codes."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Self

import httpx
import typer

from llep import __version__
from llep.cli import complete
from llep.cli.output import ExitCode, Format, fail
from llep.errors import ERRORS_BY_CODE, LlepError, SettingsError, UnsupportedConfiguration

DEFAULT_SERVER = "http://127.0.0.1:8088"
TIMEOUT_S = 15.0
DOWNLOAD_TRIES = 5

ServerOption = Annotated[str, typer.Option("--server", envvar="LLEP_SERVER", help="Where the control plane is.")]
KeyFileOption = Annotated[
    Path | None,
    typer.Option("--key-file", envvar="LLEP_KEY_FILE", help="File that holds your key, where one is needed."),
]
OutputOption = Annotated[Format, typer.Option("-o", "--output", help="What to print.", case_sensitive=False)]
EngineOption = Annotated[
    str | None, typer.Option("--engine", help="Only this engine.", autocompletion=complete.engines)
]


class ControlPlane:
    """Asks the control plane at `server`. Failures that it names are raised as the errors of llep.errors.

    Where it can't be reached at all, ends the command with exit code 3. Raises UnsupportedConfiguration for a bad
    address or key file.
    """

    def __init__(self, server: str, key_file: Path | None, timeout_s: float = TIMEOUT_S) -> None:
        url = _parse_url(server)
        self.server = server.rstrip("/")
        headers = {"User-Agent": f"llep/{__version__}"}
        if key_file is not None:
            headers["Authorization"] = f"Bearer {_read_key(key_file)}"
        # A proxy meant for the outside would only be in the way on this machine.
        is_local = url.host in ("localhost", "127.0.0.1", "::1")
        self._client = httpx.Client(base_url=self.server, headers=headers, timeout=timeout_s, trust_env=not is_local)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._client.close()

    def get(self, path: str, **query: Any) -> Any:
        return self._ask("GET", path, query)

    def patch(self, path: str, body: Any, headers: dict[str, str] | None = None, **query: Any) -> Any:
        return self._ask("PATCH", path, query, body, headers)

    def put(self, path: str, body: Any, **query: Any) -> Any:
        return self._ask("PUT", path, query, body)

    def post(self, path: str, body: Any, **query: Any) -> Any:
        return self._ask("POST", path, query, body)

    def delete(self, path: str) -> Any:
        return self._ask("DELETE", path, {})

    def get_bytes(self, path: str, **query: Any) -> bytes:
        """The answer's body, whatever it is."""
        return self._request("GET", path, query).content

    def download(self, path: str, target: Path, size: int, etag: str, on_bytes: Callable[[int], None]) -> None:
        """Fetch `size` bytes into `target`; goes on with what an earlier try for the same etag left beside it.

        on_bytes is called with the bytes that are there. Raises LlepError, OSError.
        """
        version = etag.strip('"')
        partial = target.with_name(f"{target.name}.{version}.partial")  # what another one left is not part of this
        for attempt in range(DOWNLOAD_TRIES):
            have = partial.stat().st_size if partial.exists() else 0
            if have >= size:
                break
            headers = {"Range": f"bytes={have}-", "If-Range": etag} if have else {}
            try:
                with self._client.stream("GET", path, headers=headers) as response:
                    if not response.is_success:
                        response.read()
                        raise _named(response, self.server)
                    with partial.open("ab" if response.status_code == 206 else "wb") as file:
                        for chunk in response.iter_bytes(1 << 18):
                            file.write(chunk)
                            on_bytes(file.tell())
            except httpx.HTTPError as error:
                if attempt == DOWNLOAD_TRIES - 1:
                    raise typer.Exit(fail(_unreachable(self.server, error), ExitCode.UNREACHABLE)) from None
                time.sleep(attempt + 1.0)
        if partial.stat().st_size != size:
            partial.unlink()
            raise LlepError(f"{self.server} sent another number of bytes than {size}: try again")
        partial.replace(target)

    def _ask(
        self, method: str, path: str, query: dict[str, Any], body: Any = None, headers: dict[str, str] | None = None
    ) -> Any:
        return _json(self._request(method, path, query, body, headers), self.server)

    def _request(
        self, method: str, path: str, query: dict[str, Any], body: Any = None, headers: dict[str, str] | None = None
    ) -> httpx.Response:
        params = {key: value for key, value in query.items() if value is not None}
        try:
            response = self._client.request(method, path, params=params, json=body, headers=headers)
        except httpx.HTTPError as error:
            raise typer.Exit(fail(_unreachable(self.server, error), ExitCode.UNREACHABLE)) from None
        if response.is_success:
            return response
        raise _named(response, self.server)


def _parse_url(server: str) -> httpx.URL:
    try:
        url = httpx.URL(server)
    except httpx.InvalidURL as error:
        raise UnsupportedConfiguration(f"--server {server!r} is not a URL: {error}", param="server") from None
    if url.scheme not in ("http", "https") or not url.host:
        raise UnsupportedConfiguration(
            f"--server {server!r} is not a URL: give one such as {DEFAULT_SERVER}, also in LLEP_SERVER", param="server"
        )
    return url


def _read_key(path: Path) -> str:
    try:
        key = path.expanduser().read_text(encoding="ascii").strip()
    except OSError as error:
        raise UnsupportedConfiguration(
            f"key file {path} can't be read: {error.strerror}; name another with --key-file or LLEP_KEY_FILE",
            param="key_file",
        ) from None
    except UnicodeDecodeError:
        key = ""
    if not key or len(key.split()) != 1:
        raise UnsupportedConfiguration(
            f"key file {path} must hold one key and nothing else (the server's list is --keys-file)", param="key_file"
        )
    return key


def _unreachable(server: str, error: httpx.HTTPError) -> str:
    if isinstance(error, httpx.TimeoutException):
        return f"the control plane at {server} did not answer within {TIMEOUT_S:.0f} s: see its log"
    reason = str(error) or type(error).__name__
    return (
        f"no control plane at {server} ({reason}): start it with 'llep control-plane', "
        "or name another with --server or LLEP_SERVER"
    )


def _json(response: httpx.Response, server: str) -> Any:
    try:
        return response.json()
    except ValueError:
        raise LlepError(f"{server} answered something else than JSON: is it llep's control plane?") from None


def _named(response: httpx.Response, server: str) -> LlepError:
    """The error that the body names, as the exception that this code has."""
    try:
        error = response.json()["error"]
        message, code, param = str(error["message"]), str(error["code"]), error.get("param")
    except (ValueError, KeyError, TypeError):
        return LlepError(f"{server} answered {response.status_code}, and not as llep's control plane does")
    if response.status_code == 401:
        message += "; name a file that holds your key with --key-file or LLEP_KEY_FILE"
    if response.status_code == 422 and param == "engine":
        message += "; name one with --engine"
    otherwise = SettingsError if response.status_code == 422 else LlepError
    return ERRORS_BY_CODE.get(code, otherwise)(message, param=param)
