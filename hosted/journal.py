"""What was sent to the hosted service and what became of it, in an SQLite file that outlives a crash.

A row is written before a request leaves, so that whatever happens afterwards, somebody can tell. At most one row of a
digest stands at a time, over all threads and processes; that is what keeps one picture from being bought twice. Who
sends holds the digest's lock (service.py) meanwhile: a PREPARED row that is found with the lock free was left by
somebody who has died. A row with a seed of its own stands also after its pictures have come.

    PREPARED ─┬─> SUBMITTED ─┬─> COMPLETED ──> DOWNLOADED
              │              ├─> CANCEL_REQUESTED (may still come to COMPLETED or FAILED)
              ├─> AMBIGUOUS  └─> FAILED (the service or the model said so)
              └─> FAILED (not wholly sent, or refused)

The standard library only, since `run.py hosted` reads it too.
"""

import itertools
import os
import shutil
import sqlite3
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Literal, get_args

from .errors import HostedError, HostedLimit

Open = Literal["PREPARED", "SUBMITTED", "COMPLETED", "CANCEL_REQUESTED", "AMBIGUOUS"]
State = Open | Literal["DOWNLOADED", "FAILED", "FORGOTTEN"]
OPEN: tuple[str, ...] = get_args(Open)
STANDS = f"(state IN {OPEN!r} OR (state = 'DOWNLOADED' AND kept))"

JOURNAL_FILE, PICTURES_FOLDER = "hosted.sqlite", "results"
BUSY_SECONDS = 10  # to wait for another process's write
DAY = 24 * 3600
STEP = 60  # seconds that a clock may be set back by and rows still count as past
VERSION = 1  # of the table; others that older files hold are passed over
SCHEMA = f"""CREATE TABLE requests (
    name TEXT PRIMARY KEY, digest TEXT NOT NULL, state TEXT NOT NULL, run TEXT NOT NULL, pictures INTEGER NOT NULL,
    kept INTEGER NOT NULL, payer TEXT NOT NULL, webhook TEXT NOT NULL, request_id TEXT, note TEXT,
    created REAL NOT NULL, updated REAL NOT NULL);
CREATE UNIQUE INDEX one_stands ON requests (digest) WHERE {STANDS};
CREATE INDEX by_request ON requests (request_id);
PRAGMA user_version = {VERSION}"""


@dataclass(frozen=True)
class Row:
    """One request."""

    digest: str
    run: str = ""
    pictures: int = 1
    kept: bool = True  # it has a seed of its own, so that its pictures answer every equal request
    payer: str = ""  # a name of the account
    webhook: str = ""  # a hash of the address that is called
    state: State = "PREPARED"
    request_id: str | None = None
    note: str = ""
    created: float = 0
    name: str = field(default_factory=lambda: f"local-{uuid.uuid4().hex[:12]}")  # until the service has named it
    is_owner: bool = False  # for who sends it, and so has a say over it

    @property
    def id(self) -> str:
        """What users name it by."""
        return self.request_id or self.name


COLUMNS = [column.name for column in fields(Row) if column.name != "is_owner"]


@dataclass(frozen=True)
class Guard:
    """How many pictures may be asked for in one run of a workflow and in one day."""

    pictures_per_run: float = 8
    pictures_per_day: float = 100
    ceiling_per_run: float = 32  # which nothing in a workflow lifts
    ceiling_per_day: float = 200
    lifted: bool = False  # the first two, by the user's word


@dataclass(frozen=True)
class Journal:
    """Opened anew for each step: a step is short, and any thread or process may take it."""

    path: Path
    now: Callable[[], float] = time.time

    @contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        """One step that is written wholly or not at all. Raises HostedError where the disk does not take it."""
        inode = None
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not self.path.exists():
                os.close(os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600))
            inode = self.path.stat().st_ino
            with closing(sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None)) as connection:
                connection.row_factory = sqlite3.Row
                connection.execute("PRAGMA synchronous=FULL")  # on the disk before a byte leaves
                connection.execute("BEGIN IMMEDIATE")
                [version] = connection.execute("PRAGMA user_version").fetchone()
                if version == 0 and not connection.execute("SELECT 1 FROM sqlite_master").fetchone():
                    for statement in SCHEMA.split(";"):
                        connection.execute(statement)
                elif version != VERSION:
                    raise sqlite3.DatabaseError(f"it was written by another version of this pack ({version})")
                yield connection
                connection.execute("COMMIT")
        except (OSError, sqlite3.Error) as error:
            # Of no subclass: no database, a damaged one, or another version's. "no such table": a foreign one.
            if type(error) is sqlite3.DatabaseError or str(error).startswith("no such "):
                self._set_aside(inode, str(error))
            raise HostedError(
                f"The journal of hosted requests ({self.path.name}) could not be written: {error}. It keeps a request "
                "from being paid for twice. Check the free space and the permissions of ComfyUI's user folder."
            ) from error

    def _set_aside(self, inode: int | None, why: str) -> None:
        """Give the file another name, unless somebody else already has; raises HostedError in any case."""
        aside = self.path.with_name(f"{self.path.stem}-set-aside-{uuid.uuid4().hex[:8]}{self.path.suffix}")
        if self.path.exists() and self.path.stat().st_ino == inode:
            self.path.rename(aside)
        raise HostedError(
            f"The journal of hosted requests cannot be read ({why}) and was set aside as {aside.name}. It is no longer "
            "known what was sent before, so an equal request would be paid for again. Nothing was sent now. Look at "
            "fal.ai/dashboard/requests, fetch what is there by its id (PuLID Hosted Result), then queue the prompt "
            "again; a new journal begins."
        )

    def find(self, digest: str) -> Row | None:
        """The row of this request that stands, if there is one. The caller holds the digest's lock."""
        with self._database() as database:
            row = next(iter(_rows(database, f"digest = ? AND {STANDS}", digest)), None)
            if row and row.state == "PREPARED":
                row = replace(row, state="AMBIGUOUS", note="ended while it was being sent")
                self._write(database, row)
            return row

    def by_id(self, known: str) -> Row | None:
        """The last row that the service, or else this pack, calls so."""
        with self._database() as database:
            return next(iter(_rows(database, "request_id = ? OR name = ?", known, known)), None)

    def rows(self) -> list[Row]:
        """All of them, the newest first."""
        with self._database() as database:
            return _rows(database, "state != 'FORGOTTEN'")

    def claim(self, row: Row, guard: Guard, given_up: Row | None = None) -> Row:
        """Write a new row, in the place of one that is given up, which makes the caller the one to send it.

        Raises HostedError where another one stands, and HostedLimit when the guard's numbers are reached; then nothing
        is given up either.
        """
        with self._database() as database:
            self._check(database, row.run, row.pictures, guard)
            if given_up:
                state = "CASE state WHEN 'DOWNLOADED' THEN state ELSE 'FAILED' END"
                database.execute(f"UPDATE requests SET kept = 0, state = {state} WHERE name = ?", [given_up.name])
            row = replace(row, created=self.now(), is_owner=True)
            self._write(database, row)
            return row

    def check(self, run: str, pictures: int, guard: Guard) -> None:
        """Raises HostedLimit when the guard's numbers would be exceeded."""
        with self._database() as database:
            self._check(database, run, pictures, guard)

    def move(self, row: Row) -> None:
        """Note where a request stands now, also where the row or the whole file has vanished meanwhile."""
        with self._database() as database:
            self._write(database, row)

    def forget(self, ids: Iterable[str] = (), older_than: float | None = None) -> int:
        """Delete rows, kept pictures and with them prompts: of these ids, or of all that are so many seconds old.

        What the guard counts stays, as a number, for a day. Returns how many requests were forgotten.
        """
        names, until = set(ids), -1 if older_than is None else self.now() - older_than
        rows = [row for row in self.rows() if names & {row.id, row.name} or row.created <= until]
        for row in rows:
            shutil.rmtree(self.path.parent / PICTURES_FOLDER / row.id, ignore_errors=True)
        with self._database() as database:
            database.executemany(
                "UPDATE requests SET digest = name, state = 'FORGOTTEN', kept = 0, payer = '', webhook = '', "
                "request_id = NULL, note = NULL WHERE name = ?",
                [[row.name] for row in rows],
            )
            database.execute("DELETE FROM requests WHERE state = 'FORGOTTEN' AND created < ?", [self.now() - DAY])
        return len(rows)

    def _write(self, database: sqlite3.Connection, row: Row) -> None:
        """`updated` is there for earlier versions of this pack alone: they read it, and their files ask for it."""
        database.execute(
            f"INSERT INTO requests ({', '.join(COLUMNS)}, updated) VALUES ({', '.join(f':{name}' for name in COLUMNS)},"
            " :created) ON CONFLICT (name) DO UPDATE SET state = excluded.state, note = excluded.note,"
            " request_id = COALESCE(excluded.request_id, request_id)"
            " WHERE state NOT IN ('FAILED', 'FORGOTTEN')",  # what has failed stays so
            {column: getattr(row, column) for column in COLUMNS},
        )

    def _check(self, database: sqlite3.Connection, run: str, pictures: int, guard: Guard) -> None:
        def asked(condition: str, *values: str | float) -> int:
            sent = "(request_id IS NOT NULL OR state IN ('PREPARED', 'AMBIGUOUS', 'FORGOTTEN'))"
            query = f"SELECT COALESCE(SUM(MAX(pictures, 1)), 0) FROM requests WHERE {sent} AND {condition}"
            return database.execute(query, values).fetchone()[0]

        day = asked("created > ? AND created <= ?", self.now() - DAY, self.now() + STEP)
        spans = {"run": ("this run", asked("run = ?", run)), "day": ("the last 24 hours", day)}
        lifting = {"ceiling": "No switch on a node lifts this"}
        if not guard.lifted:
            lifting["pictures"] = "Switch confirm_paid on to send it all the same"
        for (kind, lift), (span, (what, before)) in itertools.product(lifting.items(), spans.items()):
            name = f"{kind}_per_{span}"
            if before + max(pictures, 1) > (limit := getattr(guard, name)):
                raise HostedLimit(
                    f"The guard against unmeant costs stopped this: {before} pictures were asked for in {what}, "
                    f"{pictures} more would exceed {limit:.10g}. Nothing was sent. {lift}, "
                    f"or set PULID_FAL_{name.upper()} in ComfyUI's environment."
                )


def _rows(database: sqlite3.Connection, condition: str, *values: str) -> list[Row]:
    query = f"SELECT {', '.join(COLUMNS)} FROM requests WHERE {condition} ORDER BY created DESC"
    return [Row(**dict(each)) for each in database.execute(query, values)]


# --- What is listed ---

UNITS = {DAY: "d", 3600: "h", 60: "min", 0: "s"}
NEXT = {  # what to do with a request in this state
    "PREPARED": "is being sent, or was when its sender ended; queue its prompt again to learn which",
    "AMBIGUOUS": "may have been accepted and billed: look at fal.ai/dashboard/requests; forget it if it is not there",
    "SUBMITTED": "under way: fetch it, or cancel it",
    "CANCEL_REQUESTED": "asked to stop: fetch it in case that it went on, or forget it",
    "COMPLETED": "finished: fetch it",
    "DOWNLOADED": "finished, and its pictures are kept here: fetch it, or forget it",
    "FAILED": "over; forget it",
}
CHOICES = {"open": OPEN, "unknown": ("AMBIGUOUS",), "all": tuple(NEXT)}


def listing(requests: Iterable[Row], choice: str = "all") -> str:
    """A line for each request: id, age, pictures, and what to do with it."""
    lines = []
    for row in filter(lambda row: row.state in CHOICES[choice], requests):
        seconds = max(0, int(time.time() - row.created))
        size, unit = next((size, unit) for size, unit in UNITS.items() if seconds >= size)
        pictures = f"{row.pictures} picture{'s' * (row.pictures != 1)}"
        lines.append(f"{row.id}  {seconds // max(size, 1)} {unit} ago  {pictures}  {NEXT[row.state]}")
    return "\n".join(lines) or "There are none on this machine."
