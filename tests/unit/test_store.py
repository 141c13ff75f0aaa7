"""The store loses nothing that it acknowledged, whatever happens to the process, the disk or the file."""

from __future__ import annotations

import random
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from llep.errors import StoreUnavailable
from llep.messages import PlacementOrder
from llep.scheduler.desired import Desired
from llep.scheduler.journal import Journal
from llep.scheduler.store import (
    _MIGRATIONS,
    DAY_S,
    FILE,
    KnownEngine,
    NewDecision,
    NewEvent,
    Revision,
    Store,
    StoredPlacement,
)
from llep.views import EventKind
from tests.scheduler.peer import Workers


def event(message: str = "said", time_s: float | None = None) -> NewEvent:
    now_s = time.time() if time_s is None else time_s
    return NewEvent(kind=EventKind.SETTINGS, message=message, time_s=now_s, data={"a": [1, None]})


def revision(number: int, time_s: float | None = None) -> Revision:
    return Revision(
        number=number,
        time_s=time.time() if time_s is None else time_s,
        author="me",
        reason="because",
        engines=["tiny"],
        patch={"imbalance_threshold": 1 + number / 1000},
        desired=Desired().changed({"imbalance_threshold": 1 + number / 1000}, ["tiny"], number),
    )


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    store = Store(tmp_path)
    written = revision(1)
    store.append(written, event("first"))
    store.add_events([event("second"), event("third")])
    workers = Workers()
    store.put_engines([KnownEngine(workers.info(), "incarnation", 12.5)])
    store.close()
    again = Store(tmp_path)
    assert again.desired() == written.desired
    assert again.revisions(10) == [written]
    assert [e.message for e in again.events(10)] == ["third", "second", "first"]
    assert [e.message for e in again.events(10, before_id=3, after_id=1)] == ["second"]
    assert again.events(1)[0].data == {"a": [1, None]}
    assert again.engines() == [KnownEngine(workers.info(), "incarnation", 12.5)]
    again.close()


def decision(kind: str = "placement", engine: str = "tiny") -> NewDecision:
    return NewDecision(
        time_s=1.5, engine=engine, kind=kind, outcome="nothing", reason="too new", inputs={"windows": 3}, revision=None
    )


def test_what_belongs_to_a_revision_is_stored_with_it(tmp_path: Path) -> None:
    store = Store(tmp_path)
    placed = StoredPlacement(
        number=1, time_s=2.0, engine="tiny", author="llep", reason="hot", replicas=((0, 3, 1), (2, 5, 0))
    )
    store.append(revision(1), event(), decision("placement"), placed)
    store.append(revision(2), event(), placement=replace(placed, number=2, replicas=()))
    store.add_decision(decision("brake", "other"))
    store.close()
    again = Store(tmp_path)
    assert [p.replicas for p in again.placements("tiny", 10)] == [(), placed.replicas]
    assert again.placements("other", 10) == []
    assert [(d.id, d.engine, d.kind) for d in again.decisions(10)] == [(2, "other", "brake"), (1, "tiny", "placement")]
    assert [d.inputs for d in again.decisions(10, engine="tiny", kind="placement")] == [{"windows": 3}]
    assert again.decisions(10, before_id=1) == []
    assert again.changed_by_others("llep", 1) == [(["tiny"], revision(2).patch)]
    assert again.changed_by_others("me", 0) == []
    assert again.revision(2) == revision(2, again.revisions(1)[0].time_s)
    assert again.revision(3) is None
    again.close()


def test_a_file_of_schema_1_is_brought_up_to_date(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / FILE) as db:
        db.executescript(f"{_MIGRATIONS[0]}; PRAGMA user_version = 1;")
        written = revision(7)
        db.execute(
            "INSERT INTO revisions VALUES (?, ?, ?, ?, ?, ?, ?)",
            (
                *(7, written.time_s, "me", "because", '["tiny"]', '{"imbalance_threshold": 1.007}'),
                msgspec.json.encode(written.desired).decode(),
            ),
        )
    db.close()
    store = Store(tmp_path)
    assert store.revisions(10) == [written] and store.desired() == written.desired
    assert list(tmp_path.glob("*.damaged-*")) == []
    store.append(revision(8), event(), decision())
    assert store.decisions(1)[0].reason == "too new"
    store.close()


WRITER = """
import sys
from pathlib import Path
from llep.scheduler.store import Store
from tests.unit.test_store import event, revision
store = Store(Path(sys.argv[1]))
number = store.desired().revision
while True:
    number += 1
    store.append(revision(number), event(str(number)))
    print(number, flush=True)
"""


def test_kill_9_loses_no_acknowledged_revision(tmp_path: Path) -> None:
    rng = random.Random(0)
    for _ in range(4):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        acknowledged = [int(writer.stdout.readline())]
        deadline_s = time.monotonic() + rng.uniform(0.01, 0.2)
        while time.monotonic() < deadline_s:
            acknowledged.append(int(writer.stdout.readline()))
        writer.send_signal(signal.SIGKILL)
        acknowledged += [int(line) for line in writer.stdout.read().splitlines()]
        writer.wait()
        writer.stdout.close()
        store = Store(tmp_path)
        assert list(tmp_path.glob("*.damaged-*")) == []
        number = store.desired().revision
        # One more may have been stored just before its number could be printed.
        assert acknowledged[-1] <= number <= acknowledged[-1] + 1
        assert [r.number for r in store.revisions(number)] == list(range(number, 0, -1))
        assert len(store.events(10_000)) == number
        store.close()


def overwrite_all(path: Path) -> None:
    path.write_bytes(b"not a database at all" * 100)


def overwrite_pages(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[4096:] = b"\xa5" * (len(data) - 4096)
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5000])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def drop_table(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("DROP TABLE events")
    db.close()


def spoil_contents(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("UPDATE revisions SET desired = '{'")
    db.close()


@pytest.mark.parametrize("damage", [overwrite_all, overwrite_pages, truncate, drop_table, spoil_contents])
def test_a_damaged_file_is_set_aside(tmp_path: Path, damage) -> None:
    store = Store(tmp_path)
    store.append(revision(1), event())
    store.close()
    damage(tmp_path / FILE)
    spoiled = (tmp_path / FILE).read_bytes()
    kept: list[Path | None] = []
    store = Store(tmp_path, on_set_aside=kept.append)
    assert [path.read_bytes() for path in kept if path is not None] == [spoiled]
    assert store.desired() == Desired() and store.events(10) == []
    store.append(revision(1), event())
    store.close()


def test_only_the_newest_damaged_files_are_kept(tmp_path: Path) -> None:
    for _ in range(5):
        Store(tmp_path).close()
        overwrite_all(tmp_path / FILE)
    kept: list[Path | None] = []
    store = Store(tmp_path, on_set_aside=kept.append)
    assert kept[0] is not None and kept[0].exists()
    assert len(list(tmp_path.glob("*.damaged-*"))) == 3
    store.close()


def test_an_emptied_file_is_noticed_and_not_kept(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.append(revision(1), event())
    store.close()
    (tmp_path / FILE).write_bytes(b"")
    kept: list[Path | None] = []
    store = Store(tmp_path, on_set_aside=kept.append)
    assert kept == [None] and store.desired() == Desired()
    assert list(tmp_path.glob("*.damaged-*")) == []
    store.close()


ON_A_FULL_DISK = """
import resource, sys
from pathlib import Path
from llep.scheduler.journal import Journal
journal = Journal(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
for _ in range(6):
    journal.keep()
    assert journal.problem
"""


def test_a_full_disk_does_not_push_out_the_damaged_file(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.append(revision(1), event())
    store.close()
    overwrite_all(tmp_path / FILE)
    spoiled = (tmp_path / FILE).read_bytes()
    subprocess.run([sys.executable, "-c", ON_A_FULL_DISK, str(tmp_path)], check=True, capture_output=True)
    (kept,) = tmp_path.glob("*.damaged-*")
    assert kept.read_bytes() == spoiled


def overwrite_with_journal(path: Path) -> None:
    overwrite_all(path)
    wal = Path(f"{path}-wal")
    wal.write_bytes(b"\xa5" * wal.stat().st_size)


@pytest.mark.parametrize("harm", [Path.unlink, overwrite_with_journal])
def test_a_file_lost_or_damaged_in_use_is_written_again(tmp_path: Path, harm) -> None:
    journal = Journal(tmp_path)
    assert journal.problem
    journal.keep()
    assert not journal.problem
    change(journal, 1)
    harm(tmp_path / FILE)
    change(journal, 2)
    assert journal.desired.revision == 2
    found = sqlite3.connect(tmp_path / FILE)
    assert found.execute("SELECT max(number) FROM revisions").fetchall() == [(2,)]
    found.close()
    kinds = [e.kind for e in journal.events(100, before_id=None, after_id=None)]
    assert EventKind.STORE_SET_ASIDE in kinds
    journal._close("over")


def change(journal: Journal, number: int) -> None:
    new = revision(number)
    journal.commit(new.desired, event(), author="me", reason="", engines=None, patch=new.patch)


def test_a_full_disk_refuses_the_change_and_keeps_the_last_state(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.keep()
    change(journal, 1)
    store = journal._store
    assert store is not None
    store._db.execute("PRAGMA max_page_count = 1")  # SQLite's own: what it does when the disk is full
    number = 1
    with pytest.raises(StoreUnavailable, match="full.*free or repair the disk"):
        for number in range(2, 1000):
            change(journal, number)
    assert journal.desired.revision == number - 1
    assert store.desired() == journal.desired
    journal.keep()
    assert "full" in journal.problem
    journal.note(EventKind.ENGINE_UP, "kept in memory", engine="tiny", data={"filler": "x" * 100_000})
    store._db.execute("PRAGMA max_page_count = 100000")
    change(journal, number)
    journal.note(EventKind.ENGINE_UP, "next", engine="tiny", data={})
    assert [e.message for e in store.events(2)] == ["next", "kept in memory"]
    assert not journal.problem
    journal._close("over")


def test_a_disk_that_has_room_again_is_noticed_without_a_change(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.keep()
    store = journal._store
    assert store is not None
    store._db.execute("PRAGMA max_page_count = 1")
    with pytest.raises(StoreUnavailable):
        for number in range(1, 1000):
            change(journal, number)
    before = journal.desired
    journal.keep()
    assert journal.problem
    store._db.execute("PRAGMA max_page_count = 100000")
    journal.keep()
    assert not journal.problem and store.desired() == journal.desired == before
    journal._close("over")


def test_a_folder_has_one_scheduler(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(StoreUnavailable, match="in use by another scheduler: set LLEP_STATE_DIR"):
        Store(tmp_path)
    store.close()
    Store(tmp_path).close()


def test_a_folder_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreUnavailable, match="file.*set LLEP_STATE_DIR"):
        Store(tmp_path / "file" / "below")


def test_a_newer_schema_is_left_alone(tmp_path: Path) -> None:
    Store(tmp_path).close()
    with sqlite3.connect(tmp_path / FILE) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    before = (tmp_path / FILE).read_bytes()
    with pytest.raises(StoreUnavailable, match="schema version 99.*install the newer llep"):
        Store(tmp_path)
    assert (tmp_path / FILE).read_bytes() == before


def test_what_is_old_goes_but_never_the_newest_revision(tmp_path: Path) -> None:
    store = Store(tmp_path, max_age_s={"revisions": 10 * DAY_S, "events": 5 * DAY_S})
    for days in range(20, 0, -1):
        store.append(revision(21 - days, time.time() - days * DAY_S), event(f"{days} days", time.time() - days * DAY_S))
    store.prune(time.time() + 60)
    assert [r.number for r in store.revisions(100)] == list(range(20, 11, -1))
    assert [e.message for e in store.events(100)] == [f"{days} days" for days in range(1, 5)]
    store.prune(time.time() + 100 * DAY_S)
    assert [r.number for r in store.revisions(100)] == [20] and store.events(100) == []
    store.close()


def test_what_is_too_much_goes_oldest_first(tmp_path: Path) -> None:
    store = Store(tmp_path, max_bytes=300_000)
    store.append(revision(1), event())
    for _ in range(20):
        store.add_events([event("x" * 1000) for _ in range(50)])
    newest = store.events(1)[0].id
    assert store._used_bytes() > 1_000_000
    store.prune(time.time())
    assert store._used_bytes() <= 300_000
    assert store.desired().revision == 1
    kept = [e.id for e in store.events(10_000)]
    assert kept == list(range(newest, newest - len(kept), -1)) and len(kept) > 50
    store.close()


def test_many_events_push_out_no_revision(tmp_path: Path) -> None:
    store = Store(tmp_path, max_bytes=400_000)
    for number in range(1, 41):
        store.append(revision(number), event())
    for _ in range(40):
        store.add_events([event("x" * 1000) for _ in range(50)])
    store.prune(time.time())
    assert not store.is_too_large
    assert len(store.revisions(100)) == 40 and len(store.events(10_000)) > 50
    store.close()


def placed(number: int, engine: str, copies: int) -> Revision:
    replicas = tuple((at, 0, 1) for at in range(copies))
    made = revision(number)
    return replace(made, desired=made.desired.placed(engine, PlacementOrder(number, replicas, 1), number))


def test_placements_are_kept_of_the_newest_revision_only(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.append(placed(1, "tiny", 1000), event())
    first = store._used_bytes()
    for number in range(2, 50):
        store.append(placed(number, "tiny", 1000), event())
    assert store._used_bytes() < first + 200_000
    older = store.revision(40)
    assert older is not None and older.desired.placements == {}
    assert older.desired.permanent == placed(40, "tiny", 1).desired.permanent
    assert len(store.desired().placements["tiny"].replicas) == 1000
    store.close()


def test_a_file_of_schema_2_loses_the_placements_of_older_revisions(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / FILE) as db:
        db.executescript(f"{_MIGRATIONS[0]}; {_MIGRATIONS[1]}; PRAGMA user_version = 2;")
        for number in (1, 2):
            made = placed(number, "tiny", 3)
            desired = msgspec.json.encode(made.desired).decode()
            db.execute(
                "INSERT INTO revisions VALUES (?, ?, 'me', 'because', NULL, '{}', ?, '{}')",
                (number, made.time_s, desired),
            )
    db.close()
    store = Store(tmp_path)
    assert [len(found.desired.placements) for found in store.revisions(2)] == [1, 0]
    assert store.desired() == placed(2, "tiny", 3).desired
    store.close()


def test_what_a_placement_can_be_taken_back_to_stays(tmp_path: Path) -> None:
    store = Store(tmp_path, max_bytes=50_000)
    copies = tuple((at, 0, 1) for at in range(500))
    for number in range(1, 101):
        engine = "quiet" if number <= 2 else "busy"
        order = StoredPlacement(number=number, time_s=0.0, engine=engine, author="llep", reason="hot", replicas=copies)
        store.append(revision(number), event(), placement=order)
    store.prune(time.time())
    assert [len(store.placements(engine, 100)) for engine in ("quiet", "busy")] == [2, 2]
    store.close()


def test_a_journal_prunes_what_another_scheduler_left_and_what_grows(tmp_path: Path, monkeypatch) -> None:
    store = Store(tmp_path)
    store.append(revision(1), event("old", time.time() - 400 * DAY_S))
    store.append(revision(2), event())
    store.close()
    journal = Journal(tmp_path)
    journal.keep()
    journal.keep()
    assert [e.message for e in journal.events(10, before_id=None, after_id=None)] == ["said"]
    assert journal._store is not None
    journal._store._max_bytes = 300_000
    monkeypatch.setattr("llep.scheduler.journal.PRUNE_AGAIN_S", 0.0)
    for _ in range(20):
        for _ in range(50):
            journal.note(EventKind.ENGINE_UP, "x" * 1000, engine="tiny", data={})
        journal.keep()
    assert not journal._store.is_too_large
    journal._close("over")
