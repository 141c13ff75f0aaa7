"""Who may come in: bearer keys from a file that is read again when it changes.

The file has one key per line, `name scope key`, separated by blanks; empty lines and lines that start with # are
skipped. `name` is what the audit trail shows; `scope` is read (look) or admin (look and change); `key` is at least 16
ASCII characters without blanks, or `sha256:` and the 64 hex digits of its SHA-256, so that the file need not hold it:

    # name    scope  key
    grafana   read   sha256:601783805a05ad5e7e19ed8bdd2e868d297d22775a906820a1f973763467309c
    alice     admin  gQ1xkzv0mC3mX5cF8h2r
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from starlette.datastructures import Headers

from llep.errors import UnsupportedConfiguration

logger = logging.getLogger(__name__)

MIN_KEY_CHARACTERS = 16
HASH_PREFIX = "sha256:"
_NAME = re.compile(r"[A-Za-z0-9._@-]{1,64}")
_HASH = re.compile(r"[0-9a-f]{64}")


class Scope(StrEnum):
    READ = "read"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class Principal:
    """Who is asking: the key's name, and what that key may do."""

    name: str
    scope: Scope

    def may(self, scope: Scope) -> bool:
        return self.scope is Scope.ADMIN or scope is Scope.READ


ANONYMOUS = Principal("anonymous", Scope.ADMIN)  # where there are no keys, everybody may do everything


@dataclass(frozen=True, slots=True)
class Key:
    principal: Principal
    digest: bytes  # SHA-256 of the key

    def __repr__(self) -> str:
        return f"Key({self.principal})"


class KeyRing:
    """The keys of one file. A change that can't be read is logged and leaves the keys as they were."""

    def __init__(self, path: Path) -> None:
        """Raises UnsupportedConfiguration, with the line's number and never the key, if the file is not as above."""
        self.path = path
        self.problem = ""  # why the newest content of the file is not in force
        self._seen = _fingerprint(path)
        self._keys = _read(path)

    def find(self, key: str | None) -> Principal | None:
        """Whose key this is, None without one. The time taken tells nothing about how much of a key was right."""
        if key is None:
            return None
        self._refresh()
        digest = _digest(key)
        found = None
        for candidate in self._keys:
            if hmac.compare_digest(candidate.digest, digest):
                found = candidate.principal
        return found

    def _refresh(self) -> None:
        seen = _fingerprint(self.path)
        if seen == self._seen:
            return
        self._seen = seen
        try:
            self._keys = _read(self.path)
        except UnsupportedConfiguration as error:
            self.problem = error.message
            logger.error("the keys in force stay as they were: %s", error.message)
            return
        self.problem = ""
        logger.info("keys read again from %s: %s", self.path, ", ".join(key.principal.name for key in self._keys))


def sent_key(headers: Headers) -> str | None:
    """The bearer key that a request brings; None where it brings none."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else None


def hash_key(key: str) -> str:
    """What to write into the file instead of the key."""
    return HASH_PREFIX + _digest(key).hex()


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _fingerprint(path: Path) -> tuple[int, ...] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return (status.st_ino, status.st_mtime_ns, status.st_size)


def _read(path: Path) -> tuple[Key, ...]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise UnsupportedConfiguration(f"keys file {path} is not UTF-8 text", param="keys_file") from None
    except OSError as error:
        raise UnsupportedConfiguration(
            f"keys file {path} can't be read: {error.strerror}; name another with --keys-file or LLEP_SERVER_KEYS_FILE",
            param="keys_file",
        ) from None
    keys = [
        _parse_line(path, number, line)
        for number, line in enumerate(lines, start=1)
        if line.strip() and not line.lstrip().startswith("#")
    ]
    if not keys:
        raise UnsupportedConfiguration(f"keys file {path} holds no key: add a line 'name scope key'", param="keys_file")
    names = [key.principal.name for key in keys]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UnsupportedConfiguration(f"keys file {path} names {twice!r} twice: names must differ", param="keys_file")
    return tuple(keys)


def _parse_line(path: Path, number: int, line: str) -> Key:
    def refuse(rule: str) -> UnsupportedConfiguration:
        return UnsupportedConfiguration(f"keys file {path}, line {number}: {rule}", param="keys_file")

    fields = line.split()
    if len(fields) != 3:
        raise refuse(f"has {len(fields)} fields, must be 'name scope key'")
    name, scope, key = fields
    if not _NAME.fullmatch(name):
        raise refuse("the name must be 1 to 64 letters, digits, or any of . _ @ -")
    if scope not in tuple(Scope):
        raise refuse(f"the scope of {name!r} must be read or admin")
    if key.startswith(HASH_PREFIX):
        if not _HASH.fullmatch(key.removeprefix(HASH_PREFIX)):
            raise refuse(f"the key of {name!r} must have 64 lower-case hex digits after {HASH_PREFIX}")
        return Key(Principal(name, Scope(scope)), bytes.fromhex(key.removeprefix(HASH_PREFIX)))
    if not key.isascii() or not key.isprintable():
        raise refuse(f"the key of {name!r} must be ASCII, for headers can't carry others")
    if len(key) < MIN_KEY_CHARACTERS:
        raise refuse(f"the key of {name!r} is too short: at least {MIN_KEY_CHARACTERS} characters")
    return Key(Principal(name, Scope(scope)), _digest(key))
