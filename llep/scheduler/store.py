"""The scheduler's truth on disk: revisions, decisions, placements, events and known engines in SQLite.

What was acknowledged is durable.

One scheduler writes a state folder at a time (a lock says so). A damaged file is set aside, never deleted or repaired.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from llep.errors import StoreUnavailable
from llep.messages import EngineInfo
from llep.scheduler.desired import Desired
from llep.views import DecisionView, Event, EventKind

FILE = "scheduler.sqlite"
LOCK = "scheduler.lock"
DAMAGED_KEPT = 3
DAY_S = 86400.0
PROBE_BYTES = 64 << 10

# One entry per schema version: what makes version n + 1 out of version n.
_MIGRATIONS = (
    """
    CREATE TABLE revisions (
        number INTEGER PRIMARY KEY, time_s REAL NOT NULL, author TEXT NOT NULL, reason TEXT NOT NULL,
        engines TEXT, patch TEXT NOT NULL, desired TEXT NOT NULL
    );
    CREATE TABLE events (
        id INTEGER PRIMARY KEY AUTOINCREMENT, time_s REAL NOT NULL, kind TEXT NOT NULL, engine TEXT,
        author TEXT NOT NULL, message TEXT NOT NULL, data TEXT NOT NULL
    );
    CREATE TABLE engines (
        name TEXT PRIMARY KEY, incarnation TEXT NOT NULL, last_seen_s REAL NOT NULL, info TEXT NOT NULL
    );
    """,
    """
    ALTER TABLE revisions ADD COLUMN diff TEXT NOT NULL DEFAULT '{}';
    CREATE TABLE decisions (
        id INTEGER PRIMARY KEY AUTOINCREMENT, time_s REAL NOT NULL, engine TEXT NOT NULL, kind TEXT NOT NULL,
        outcome TEXT NOT NULL, reason TEXT NOT NULL, expected_gain_ratio REAL, inputs TEXT NOT NULL, revision INTEGER
    );
    CREATE INDEX decisions_by_engine ON decisions (engine, kind, id);
    CREATE TABLE placements (
        number INTEGER PRIMARY KEY, time_s REAL NOT NULL, engine TEXT NOT NULL, author TEXT NOT NULL,
        reason TEXT NOT NULL, replicas TEXT NOT NULL
    );
    CREATE INDEX placements_by_engine ON placements (engine, number);
    """,
    # Only the newest revision is asked for placements and recordings; those of many engines are large.
    """
    UPDATE revisions SET desired = json_remove(desired, '$.placements', '$.recordings')
    WHERE number < (SELECT max(number) FROM revisions);
    """,
)
# What is pruned, and by which key it is in order of age.
_KEYS = {"revisions": "number", "events": "id", "decisions": "id", "placements": "number"}
# What is never pruned: what holds, and what a placement can be taken back to.
_KEPT = {
    "revisions": " AND number < (SELECT max(number) FROM revisions)",
    "placements": " AND number NOT IN (SELECT number FROM (SELECT number, row_number() OVER "
    "(PARTITION BY engine ORDER BY number DESC) AS place FROM placements) WHERE place <= 2)",
}
_TEXTS = {
    "revisions": ("patch", "desired", "diff"),
    "events": ("message", "data"),
    "decisions": ("reason", "inputs"),
    "placements": ("replicas",),
}
MAX_AGE_S = {"revisions": 365 * DAY_S, "events": 30 * DAY_S, "decisions": 30 * DAY_S, "placements": 365 * DAY_S}


@dataclass(frozen=True, slots=True, kw_only=True)
class Revision:
    """One accepted change. engines None: all, also those still to come.

    `desired` is all that holds after it; placements and recordings are left out of all but the newest.
    """

    number: int
    time_s: float
    author: str
    reason: str
    engines: list[str] | None
    patch: dict[str, Any]
    desired: Desired
    diff: dict[str, list[Any]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class NewEvent:
    """An event before the store gives it its id."""

    kind: EventKind
    message: str
    time_s: float
    engine: str | None = None
    author: str = "llep"
    data: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class NewDecision:
    """A decision of the scheduler before the store gives it its id. revision: the one that it made."""

    time_s: float
    engine: str
    kind: str
    outcome: str
    reason: str
    expected_gain_ratio: float | None = None
    inputs: dict[str, Any]
    revision: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredPlacement:
    """Resident replicas that were ordered. replicas: (place of the layer, expert, rank); number: the revision."""

    number: int
    time_s: float
    engine: str
    author: str
    reason: str
    replicas: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True)
class KnownEngine:
    info: EngineInfo
    incarnation: str
    last_seen_s: float


class Damaged(Exception):
    """The file is not what we wrote."""


class Store:
    """An open state folder. Every method raises StoreUnavailable if the disk fails; then nothing was changed."""

    def __init__(
        self,
        folder: Path,
        *,
        max_age_s: dict[str, float] | None = None,
        max_bytes: int = 64 << 20,
        on_set_aside: Callable[[Path | None], None] = lambda path: None,
    ) -> None:
        """Open or make the store. Raises StoreUnavailable: not writable, in use, or written by a newer llep.

        on_set_aside: called with where a damaged file went as soon as it is there; None for an empty one, which is not
        kept.
        """
        self.path = folder / FILE
        self._on_set_aside = on_set_aside
        self._max_age_s = MAX_AGE_S | (max_age_s or {})
        self._max_bytes = max_bytes
        self._lock = _take_lock(folder)
        try:
            self._db = self._open_or_set_aside()
        except BaseException:
            os.close(self._lock)
            raise

    def close(self) -> None:
        with contextlib.suppress(sqlite3.Error):
            self._db.close()
        os.close(self._lock)

    def desired(self) -> Desired:
        """What the newest revision says; revision 0 if there is none."""
        rows = self._read("SELECT desired FROM revisions ORDER BY number DESC LIMIT 1")
        return msgspec.json.decode(rows[0][0], type=Desired) if rows else Desired()

    def append(
        self,
        revision: Revision,
        event: NewEvent,
        decision: NewDecision | None = None,
        placement: StoredPlacement | None = None,
    ) -> None:
        """Store a revision and what belongs to it, all or nothing; on return it survives a crash of the machine.

        Placements and recordings are kept of the newest revision only: going back to an older one leaves them alone.
        """
        row = (revision.number, revision.time_s, revision.author, revision.reason)
        contents = (_json_or_null(revision.engines), _json(revision.patch), _json(revision.desired))
        self._write(
            (
                "UPDATE revisions SET desired = json_remove(desired, '$.placements', '$.recordings') "
                "WHERE number = (SELECT max(number) FROM revisions)",
                (),
            ),
            # Or replace: a revision whose write failed halfway was not acknowledged, and its number is used again.
            (
                "INSERT OR REPLACE INTO revisions VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (*row, *contents, _json(revision.diff)),
            ),
            _insert(event),
            *([_insert_decision(decision)] if decision else []),
            *([_insert_placement(placement)] if placement else []),
        )
        self._check_newest(revision.number)

    def revisions(self, limit: int, before: int | None = None) -> list[Revision]:
        """Revisions, newest first; with `before` only those below that number."""
        upper = before if before is not None else 1 << 62
        rows = self._read("SELECT * FROM revisions WHERE number < ? ORDER BY number DESC LIMIT ?", upper, limit)
        return [_revision(row) for row in rows]

    def revision(self, number: int) -> Revision | None:
        """The revision of that number, if it is still kept."""
        rows = self._read("SELECT * FROM revisions WHERE number = ?", number)
        return _revision(rows[0]) if rows else None

    def changed_by_others(self, author: str, since: int) -> list[tuple[list[str] | None, dict[str, Any]]]:
        """(engines, patch) of the revisions after `since` that somebody else than the author made."""
        rows = self._read("SELECT engines, patch FROM revisions WHERE number > ? AND author != ?", since, author)
        return [
            (None if engines is None else msgspec.json.decode(engines), msgspec.json.decode(patch))
            for engines, patch in rows
        ]

    def add_decision(self, decision: NewDecision) -> None:
        self._write(_insert_decision(decision))

    def decisions(
        self, limit: int, *, engine: str | None = None, kind: str | None = None, before_id: int | None = None
    ) -> list[DecisionView]:
        """Decisions, newest first, of one engine or all, of one kind or all."""
        names = (*("id", "time_s", "engine", "kind", "outcome", "reason", "expected_gain_ratio", "inputs", "revision"),)
        rows = self._read(
            f"SELECT {', '.join(names)} FROM decisions WHERE id < ? AND (? IS NULL OR engine = ?) "
            "AND (? IS NULL OR kind = ?) ORDER BY id DESC LIMIT ?",
            *(before_id if before_id is not None else 1 << 62, engine, engine, kind, kind, limit),
        )
        found = (dict(zip(names, row, strict=True)) for row in rows)
        return [DecisionView(**{**row, "inputs": msgspec.json.decode(row["inputs"])}) for row in found]

    def placements(self, engine: str, limit: int) -> list[StoredPlacement]:
        """What was ordered for an engine, newest first."""
        rows = self._read(
            "SELECT number, time_s, engine, author, reason, replicas FROM placements WHERE engine = ? "
            "ORDER BY number DESC LIMIT ?",
            *(engine, limit),
        )
        return [_placement(row) for row in rows]

    def add_events(self, events: Iterable[NewEvent]) -> None:
        self._write(*map(_insert, events))

    def events(
        self,
        limit: int,
        *,
        before_id: int | None = None,
        after_id: int | None = None,
        engine: str | None = None,
        kinds: Sequence[str] | None = None,
    ) -> list[Event]:
        """Events newest first. before_id: only older ones; after_id: only newer ones; of an engine, of some kinds."""
        conditions = "id < ? AND id > ?" + (" AND engine = ?" if engine is not None else "")
        if kinds is not None:
            conditions += f" AND kind IN ({', '.join('?' * len(kinds))})"
        rows = self._read(
            f"SELECT * FROM events WHERE {conditions} ORDER BY id DESC LIMIT ?",
            *(before_id if before_id is not None else 1 << 62, after_id if after_id is not None else -1),
            *(() if engine is None else (engine,)),
            *(() if kinds is None else kinds),
            limit,
        )
        names = ("id", "time_s", "kind", "engine", "author", "message", "data")
        return [Event(**{**dict(zip(names, row, strict=True)), "data": msgspec.json.decode(row[-1])}) for row in rows]

    def put_engines(self, engines: Iterable[KnownEngine]) -> None:
        self._write(*map(_put_engine, engines))

    def forget_engine(self, name: str) -> None:
        self._write(("DELETE FROM engines WHERE name = ?", (name,)))

    def engines(self) -> list[KnownEngine]:
        """The engines known when the last scheduler ended; those that another version of llep wrote are left out."""
        known = []
        for incarnation, last_seen_s, info in self._read("SELECT incarnation, last_seen_s, info FROM engines"):
            with contextlib.suppress(msgspec.MsgspecError):
                known.append(KnownEngine(msgspec.json.decode(info, type=EngineInfo), incarnation, last_seen_s))
        return known

    def probe(self) -> None:
        """Raises StoreUnavailable unless there is room for a change."""
        room = ("INSERT INTO probe VALUES (zeroblob(?))", (PROBE_BYTES,))
        self._write(("CREATE TABLE IF NOT EXISTS probe (content BLOB)", ()), room)
        self._write(("DROP TABLE probe", ()))

    @property
    def is_too_large(self) -> bool:
        return self._used_bytes() > self._max_bytes

    def prune(self, now_s: float) -> None:
        """Drop what is too old, then the oldest quarters of what takes most until the size fits."""
        for table, max_age_s in self._max_age_s.items():
            self._drop(table, "time_s < ?", now_s - max_age_s)
        for _ in range(100):
            if not self.is_too_large:
                break
            table = max(_KEYS, key=self._bytes_of)
            ((count,),) = self._read(f"SELECT count(*) FROM {table}")
            if count <= 1:
                break
            key = _KEYS[table]
            self._drop(table, f"{key} IN (SELECT {key} FROM {table} ORDER BY {key} LIMIT ?)", count // 4 + 1)

    def _drop(self, table: str, condition: str, value: float) -> None:
        self._write((f"DELETE FROM {table} WHERE {condition}{_KEPT.get(table, '')}", (value,)))

    def _bytes_of(self, table: str) -> int:
        """What its texts take."""
        lengths = " + ".join(f"length({column})" for column in _TEXTS[table])
        return int(self._read(f"SELECT coalesce(sum({lengths}), 0) FROM {table}")[0][0])

    def _used_bytes(self) -> int:
        pages, free, size = (
            self._read(f"PRAGMA {name}")[0][0] for name in ("page_count", "freelist_count", "page_size")
        )
        return int((pages - free) * size)

    def _open_or_set_aside(self) -> sqlite3.Connection:
        try:
            return self._open()
        except Damaged:
            self._on_set_aside(_set_aside(self.path))
        try:
            return self._open()
        except Damaged as error:
            raise StoreUnavailable(f"a new {self.path} is damaged at once: {error}; check the disk") from None

    def _open(self) -> sqlite3.Connection:
        if not self.path.exists() and Path(f"{self.path}-wal").exists():
            raise Damaged("the file is gone, its journal is left")  # SQLite would take the journal for a new file's
        if self.path.exists() and not self.path.stat().st_size:
            raise Damaged("empty file")
        was_there = self.path.exists()
        db = sqlite3.connect(self.path, timeout=2.0, isolation_level=None, check_same_thread=False)
        try:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")
            self._migrate(db)
            _check(db)
        except Damaged:
            db.close()
            raise
        except sqlite3.DatabaseError as error:
            db.close()
            if _is_damage(error):
                raise Damaged(str(error)) from None
            if not was_there:
                _remove_if_empty(self.path)  # what a full disk left is no file of ours
            raise StoreUnavailable(_way_out(self.path, error)) from None
        except BaseException:
            db.close()
            raise
        self._inode = self.path.stat().st_ino
        return db

    def _migrate(self, db: sqlite3.Connection) -> None:
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version > len(_MIGRATIONS):
            raise StoreUnavailable(
                f"{self.path} has schema version {version}, above {len(_MIGRATIONS)}: install the newer "
                "llep that wrote it, or set LLEP_STATE_DIR to another folder"
            )
        for number, script in enumerate(_MIGRATIONS[version:], start=version + 1):
            db.executescript(f"BEGIN; {script}; PRAGMA user_version = {number}; COMMIT;")

    def _read(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        try:
            return self._db.execute(sql, values).fetchall()
        except sqlite3.Error as error:
            raise self._failed(error) from None

    def _write(self, *statements: tuple[str, tuple[Any, ...]]) -> None:
        if not statements:
            return
        self._check_still_there()
        try:
            self._db.execute("BEGIN IMMEDIATE")
            for sql, values in statements:
                self._db.execute(sql, values)
            self._db.execute("COMMIT")
        except sqlite3.Error as error:
            with contextlib.suppress(sqlite3.Error):
                self._db.execute("ROLLBACK")
            raise self._failed(error) from None

    def _check_still_there(self) -> None:
        """Raises Damaged if somebody removed the file: SQLite would go on writing into nothing."""
        try:
            inode = self.path.stat().st_ino
        except OSError as error:
            raise Damaged(str(error)) from None
        if inode != self._inode:
            raise Damaged("another file has taken its place")

    def _check_newest(self, number: int) -> None:
        """Raises Damaged unless the file itself holds the revision: our connection would read from its own cache."""
        try:
            with contextlib.closing(sqlite3.connect(self.path, timeout=2.0)) as fresh:
                found = fresh.execute("SELECT max(number) FROM revisions").fetchone()
        except sqlite3.Error as error:
            raise self._failed(error) from None
        if found != (number,):
            raise Damaged(f"revision {number} was written but can't be read")

    def _failed(self, error: sqlite3.Error) -> Exception:
        return Damaged(str(error)) if _is_damage(error) else StoreUnavailable(_way_out(self.path, error))


def _take_lock(folder: Path) -> int:
    """An open descriptor that holds the folder; the kernel lets go of it when the process ends, however it ends."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StoreUnavailable(_way_out(folder, error)) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise StoreUnavailable(
            f"the state folder {folder} is in use by another scheduler: set LLEP_STATE_DIR to a folder of its own"
        ) from None
    return lock


def _check(db: sqlite3.Connection) -> None:
    """Raises Damaged unless every page is whole and the newest revision can be read."""
    (verdict,) = db.execute("PRAGMA quick_check(1)").fetchone()
    if verdict != "ok":
        raise Damaged(verdict)
    try:
        for row in db.execute("SELECT * FROM revisions ORDER BY number DESC LIMIT 1").fetchall():
            _revision(row)
        db.execute("SELECT id, time_s, kind, engine, author, message, data FROM events LIMIT 1")
        db.execute("SELECT name, incarnation, last_seen_s, info FROM engines LIMIT 1")
        db.execute("SELECT id, time_s, engine, kind, outcome, reason, inputs, revision FROM decisions LIMIT 1")
        db.execute("SELECT number, time_s, engine, author, reason, replicas FROM placements LIMIT 1")
    except (sqlite3.OperationalError, msgspec.MsgspecError, ValueError) as error:
        raise Damaged(str(error)) from None


def _is_damage(error: sqlite3.Error) -> bool:
    # Operational: disk full, read-only, locked, I/O. What is left is SQLITE_CORRUPT and SQLITE_NOTADB.
    return isinstance(error, sqlite3.DatabaseError) and not isinstance(
        error, sqlite3.OperationalError | sqlite3.IntegrityError | sqlite3.ProgrammingError
    )


def _remove_if_empty(path: Path) -> bool:
    """Remove a file without contents, whose journal has none either."""
    files = [Path(f"{path}{suffix}") for suffix in ("", "-wal", "-shm")]
    with contextlib.suppress(OSError):
        if files[0].exists() and not any(file.stat().st_size for file in files[:2] if file.exists()):
            for file in files:
                file.unlink(missing_ok=True)
            return True
    return False


def _set_aside(path: Path) -> Path | None:
    """Move the file and its journals away; returns where to, None if it was empty. Only the newest few are kept."""
    if _remove_if_empty(path):
        return None
    kept = path.with_name(f"{path.name}.damaged-{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 10**9:09d}")
    try:
        for suffix in ("-wal", "-shm", ""):
            with contextlib.suppress(FileNotFoundError):
                os.replace(f"{path}{suffix}", f"{kept}{suffix}")
    except OSError as error:
        raise StoreUnavailable(_way_out(path, error)) from None
    found = sorted(p for p in path.parent.glob(f"{path.name}.damaged-*") if not p.name.endswith(("-wal", "-shm")))
    for old in found[:-DAMAGED_KEPT]:
        for suffix in ("-wal", "-shm", ""):
            Path(f"{old}{suffix}").unlink(missing_ok=True)
    return kept


def _way_out(path: Path, error: Exception) -> str:
    return f"the scheduler's state at {path} can't be written: {error}; free or repair the disk, or set LLEP_STATE_DIR"


def _insert(event: NewEvent) -> tuple[str, tuple[Any, ...]]:
    row = (event.time_s, str(event.kind), event.engine, event.author, event.message, _json(event.data))
    return "INSERT INTO events (time_s, kind, engine, author, message, data) VALUES (?, ?, ?, ?, ?, ?)", row


def _insert_decision(made: NewDecision) -> tuple[str, tuple[Any, ...]]:
    return (
        "INSERT INTO decisions (time_s, engine, kind, outcome, reason, expected_gain_ratio, inputs, revision) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (
            *(made.time_s, made.engine, made.kind, made.outcome, made.reason, made.expected_gain_ratio),
            *(_json(made.inputs), made.revision),
        ),
    )


def _insert_placement(placement: StoredPlacement) -> tuple[str, tuple[Any, ...]]:
    row = (placement.number, placement.time_s, placement.engine, placement.author, placement.reason)
    return "INSERT OR REPLACE INTO placements VALUES (?, ?, ?, ?, ?, ?)", (*row, _json(placement.replicas))


def _put_engine(known: KnownEngine) -> tuple[str, tuple[Any, ...]]:
    row = (known.info.engine, known.incarnation, known.last_seen_s, _json(known.info))
    return "INSERT OR REPLACE INTO engines VALUES (?, ?, ?, ?)", row


def _revision(row: tuple[Any, ...]) -> Revision:
    number, time_s, author, reason, engines, patch, desired, diff = row
    return Revision(
        number=number,
        time_s=time_s,
        author=author,
        reason=reason,
        engines=None if engines is None else msgspec.json.decode(engines, type=list[str]),
        patch=msgspec.json.decode(patch, type=dict[str, Any]),
        desired=msgspec.json.decode(desired, type=Desired),
        diff=msgspec.json.decode(diff, type=dict[str, list[Any]]),
    )


def _placement(row: tuple[Any, ...]) -> StoredPlacement:
    number, time_s, engine, author, reason, replicas = row
    return StoredPlacement(
        number=number,
        time_s=time_s,
        engine=engine,
        author=author,
        reason=reason,
        replicas=msgspec.json.decode(replicas, type=tuple[tuple[int, int, int], ...]),
    )


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def _json_or_null(value: Any) -> str | None:
    return None if value is None else _json(value)
