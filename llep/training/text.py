"""Text that is on any machine, by domain: Python sources, C and C++ headers, manuals, prose; or text of one's own."""

from __future__ import annotations

import gzip
import hashlib
import random
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from llep.errors import SettingsError

MOST_CHARACTERS = 2_000_000  # of a domain: a training of minutes reads no more
LEAST_CHARACTERS = 20_000  # with less there is nothing to learn
PIECE_CHARACTERS = 12_000
SHORTEST_FILE = 200
HELD_OUT_EVERY = 20  # one piece in so many is never trained on


@dataclass(frozen=True, slots=True)
class Domain:
    """Pieces of text of one kind. held_out: what the model is judged by."""

    name: str
    trained: tuple[str, ...]
    held_out: tuple[str, ...]


def find_domains(paths: Sequence[Path], seed: int) -> tuple[Domain, ...]:
    """One domain per path (a file, or a folder with all its text files); without paths those found on this machine.

    The same seed and the same files give the same pieces in the same order. Raises SettingsError for a path that is
    missing or holds too little text, and where this machine has too little.
    """
    if paths:
        domains = [_domain(_name(path, paths), _own_files(path), seed) for path in paths]
        for path, domain in zip(paths, domains, strict=True):
            if domain is None:
                raise SettingsError(
                    f"--text {path} has fewer than {LEAST_CHARACTERS:,} characters of UTF-8 text: name more",
                    param="text",
                )
    else:
        domains = [_domain(name, find(), seed) for name, find in _FINDERS.items()]
    found = tuple(domain for domain in domains if domain is not None)
    if not found:
        raise SettingsError("there is no text to train on here: name files or folders with --text", param="text")
    return found


def digest(domains: Iterable[Domain]) -> str:
    """Equal for the same pieces in the same order."""
    whole = hashlib.sha256()
    for domain in domains:
        for piece in (domain.name, *domain.trained, *domain.held_out):
            data = piece.encode()
            whole.update(len(data).to_bytes(8, "little") + data)
    return whole.hexdigest()[:16]


def _name(path: Path, paths: Sequence[Path]) -> str:
    """The path's last part, or all of it where two have the same."""
    names = [other.resolve().stem for other in paths]
    stem = path.resolve().stem
    return stem if names.count(stem) == 1 else str(path)


def _own_files(path: Path) -> list[Path]:
    if not path.exists():
        raise SettingsError(f"--text {path} does not exist: name a file or a folder", param="text")
    return [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())


def _python() -> list[Path]:
    """The standard library; installed packages may lie below it."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    left_out = ("site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data", "encodings")
    return sorted(path for path in stdlib.rglob("*.py") if not set(path.relative_to(stdlib).parts) & set(left_out))


def _headers() -> list[Path]:
    paths = sysconfig.get_paths()
    folders = (Path(paths["purelib"]) / "numpy", Path(paths["purelib"]) / "torch" / "include", Path(paths["include"]))
    return sorted(path for folder in folders for path in folder.rglob("*.h"))


def _manuals() -> list[Path]:
    """Python's reference manual, which comes with the interpreter, and the English man pages, where there are any."""
    topics = Path(sysconfig.get_paths()["stdlib"]) / "pydoc_data" / "topics.py"
    pages = (path for section in (1, 7, 8) for path in Path(f"/usr/share/man/man{section}").glob("*.gz"))
    return [path for path in (topics, *sorted(pages)) if path.exists()]


def _prose() -> list[Path]:
    """What packages say of themselves, and licences."""
    packages = Path(sysconfig.get_paths()["purelib"])
    patterns = ("*.dist-info/METADATA", "*.dist-info/**/LICENSE*", "*.dist-info/**/NOTICE*", "**/README*")
    found = {path for pattern in patterns for path in packages.glob(pattern) if path.is_file()}
    return sorted(found | {path for path in Path("/usr/share/common-licenses").glob("*") if path.is_file()})


_FINDERS: dict[str, Callable[[], list[Path]]] = {
    "python": _python,
    "headers": _headers,
    "manuals": _manuals,
    "prose": _prose,
}


def _domain(name: str, files: list[Path], seed: int) -> Domain | None:
    """Pieces of files in random order, up to MOST_CHARACTERS; None where there are too few."""
    order = random.Random(f"{seed} {name}")
    order.shuffle(files)
    pieces: list[str] = []
    size, seen = 0, set[int]()
    for piece in _pieces(files):
        if hash_of(piece) in seen:  # the same licence lies in many packages
            continue
        seen.add(hash_of(piece))
        pieces.append(piece)
        size += len(piece)
        if size >= MOST_CHARACTERS:
            break
    if size < LEAST_CHARACTERS:
        return None
    order.shuffle(pieces)
    count = max(len(pieces) // HELD_OUT_EVERY, 1)
    return Domain(name, tuple(pieces[count:]) or tuple(pieces), tuple(pieces[:count]))


def hash_of(piece: str) -> int:
    return int.from_bytes(hashlib.blake2b(piece.encode(), digest_size=8).digest(), "little")


def _pieces(files: Iterable[Path]) -> Iterator[str]:
    for file in files:
        text = _read(file)
        if len(text) >= SHORTEST_FILE:
            yield from (text[start : start + PIECE_CHARACTERS] for start in range(0, len(text), PIECE_CHARACTERS))


def _read(file: Path) -> str:
    """The file's text; '' for what is no UTF-8 text or can't be read."""
    try:
        data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        text = data.decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError):
        return ""
    return "" if "\0" in text else text
