"""What was sent to the hosted service and what became of it, in an SQLite file that outlives a crash.

A row is written before a request leaves, so that whatever happens afterwards, somebody can tell. At most one row of a
digest stands at a time, over all threads and processes; that is what keeps one picture from being bought twice. A row
with a seed of its own stands also after its pictures have come.

    PREPARED ─┬─> SUBMITTED ─┬─> COMPLETED ──> DOWNLOADED
              │              ├─> CANCEL_REQUESTED (may still come to COMPLETED or FAILED)
              ├─> AMBIGUOUS  └─> FAILED
              └─> FAILED
"""

import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from .errors import OUTCOME_UNKNOWN, AmbiguousSubmit, HostedError, HostedLimit
from .queue import Ticket

Database = sqlite3.Connection
State = Literal["PREPARED", "SUBMITTED", "COMPLETED", "DOWNLOADED", "FAILED", "CANCEL_REQUESTED", "AMBIGUOUS"]
OPEN = ("PREPARED", "SUBMITTED", "COMPLETED", "CANCEL_REQUESTED", "AMBIGUOUS")
STANDS = f"(state IN {OPEN!r} OR (state = 'DOWNLOADED' AND fixed))"

HEARTBEAT_SECONDS = 2.0  # between two signs of life of who is sending
BUSY_SECONDS = 10  # to wait for another process's write
DAY = 24 * 3600

SCHEMA = f"""CREATE TABLE IF NOT EXISTS jobs (
    id INTEGER PRIMARY KEY, digest TEXT NOT NULL, state TEXT NOT NULL, fixed INTEGER NOT NULL,
    run TEXT NOT NULL, pictures INTEGER NOT NULL, created REAL NOT NULL, updated REAL NOT NULL,
    request_id TEXT, status_url TEXT, response_url TEXT, cancel_url TEXT, seed TEXT, note TEXT);
CREATE UNIQUE INDEX IF NOT EXISTS one_stands ON jobs (digest) WHERE {STANDS};
CREATE INDEX IF NOT EXISTS by_request ON jobs (request_id);
CREATE TABLE IF NOT EXISTS uploads (digest TEXT PRIMARY KEY, url TEXT NOT NULL, expires REAL NOT NULL)
"""


@dataclass(frozen=True)
class Row:
    """One request. `fresh` is True for who wrote it, and so is the one to send it."""

    id: int
    digest: str
    state: State
    ticket: Ticket | None
    fresh: bool = False


@dataclass(frozen=True)
class Guard:
    """How many pictures may be asked for in one run of a workflow and in one day; `lifted` by the user's word."""

    per_run: int = 8
    per_day: int = 100
    lifted: bool = False


@dataclass(frozen=True)
class Journal:
    """Opened anew for each step: a step is short, and any thread or process may take it."""

    path: Path
    now: Callable[[], float] = time.time
    silence: float = 15.0  # seconds without a sign of life, after which who was sending has died

    @contextmanager
    def _database(self) -> Iterator[Database]:
        """One step that is written wholly or not at all. Raises HostedError where the disk does not take it."""
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not self.path.exists():
                os.close(os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600))
            connection = sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None)
            try:
                connection.row_factory = sqlite3.Row
                connection.execute("PRAGMA synchronous=FULL")  # on the disk before a byte leaves
                connection.execute("BEGIN IMMEDIATE")
                for statement in SCHEMA.split(";"):
                    connection.execute(statement)
                yield connection
                connection.execute("COMMIT")
            finally:
                connection.close()
        except (OSError, sqlite3.Error) as error:
            raise HostedError(
                f"The journal of hosted requests ({self.path.name}) could not be written: {error}. It keeps a request "
                "from being paid for twice. Check the free space and the permissions of ComfyUI's user folder."
            ) from error

    def find(self, digest: str) -> Row | None:
        """The row of this request that stands, if there is one."""
        with self._database() as database:
            return self._standing(database, digest)

    def by_request(self, request_id: str) -> Row | None:
        """The last row of a request id, if this machine sent it."""
        with self._database() as database:
            query = "SELECT * FROM jobs WHERE request_id = ? ORDER BY id DESC"
            return _row(database.execute(query, [request_id]).fetchone())

    def claim(self, digest: str, run: str, pictures: int, fixed: bool, guard: Guard, force: bool) -> Row:
        """The row of this request that stands, or a new one that makes the caller the one to send it.

        fixed  the request has a seed of its own, so that its pictures answer every equal request
        force  give up on a row that stands, and send anew; one that is just being sent is left alone

        Raises HostedLimit when the guard's numbers are reached, AmbiguousSubmit for a request that may have been sent.
        """
        with self._database() as database:
            row = self._standing(database, digest)
            if row and force and row.state != "PREPARED":
                if row.state == "DOWNLOADED":
                    database.execute("UPDATE jobs SET fixed = 0 WHERE id = ?", [row.id])
                else:
                    self._set(database, row, "FAILED", "given up for a new one")
                row = None
            if row is None:
                self._check(database, run, pictures, guard)
                names = "digest, state, run, pictures, fixed, created, updated"
                values = (digest, "PREPARED", run, pictures, fixed, self.now(), self.now())
                cursor = database.execute(f"INSERT INTO jobs ({names}) VALUES (?, ?, ?, ?, ?, ?, ?)", values)
                return Row(cursor.lastrowid or 0, digest, "PREPARED", None, fresh=True)
        refuse_ambiguous(row)
        return row

    def check(self, run: str, pictures: int, guard: Guard) -> None:
        """Raises HostedLimit when the guard's numbers would be exceeded."""
        with self._database() as database:
            self._check(database, run, pictures, guard)

    def alive(self, row: Row) -> None:
        """Say that a prepared row is still being sent."""
        with self._database() as database:
            statement = "UPDATE jobs SET updated = ? WHERE id = ? AND state = 'PREPARED'"
            database.execute(statement, (self.now(), row.id))

    def move(self, row: Row, state: State, note: str = "", seed: str | None = None) -> None:
        """Note a step of a row, together with its ticket in case that an earlier write of it failed."""
        with self._database() as database:
            self._set(database, row, state, note, seed)

    def claim_cancel(self, row: Row) -> bool:
        """True for the one caller that shall ask the service to cancel."""
        with self._database() as database:
            state = database.execute("SELECT state FROM jobs WHERE id = ?", [row.id]).fetchone()["state"]
            if state in ("PREPARED", "SUBMITTED"):
                self._set(database, row, "CANCEL_REQUESTED")
                return True
            return False

    def uploaded(self, digest: str, at_least: float) -> str | None:
        """The address of a photograph that stays readable for so many seconds, if it was uploaded before."""
        with self._database() as database:
            query = "SELECT url FROM uploads WHERE digest = ? AND expires > ?"
            found = database.execute(query, (digest, self.now() + at_least)).fetchone()
            return found["url"] if found else None

    def remember_upload(self, digest: str, url: str, seconds: float) -> None:
        with self._database() as database:
            database.execute("DELETE FROM uploads WHERE expires < ?", [self.now()])
            database.execute("INSERT OR REPLACE INTO uploads VALUES (?, ?, ?)", (digest, url, self.now() + seconds))

    def _standing(self, database: Database, digest: str) -> Row | None:
        found = database.execute(f"SELECT * FROM jobs WHERE digest = ? AND {STANDS}", [digest]).fetchone()
        row = _row(found)
        if row and row.state == "PREPARED" and self.now() - found["updated"] > self.silence:
            row = replace(row, state="AMBIGUOUS")
            self._set(database, row, row.state, "ended while it was being sent")
        return row

    def _set(self, database: Database, row: Row, state: State, note: str = "", seed: str | None = None) -> None:
        given = {"seed": seed}
        if row.ticket:
            url = row.ticket.url
            given |= {"request_id": row.ticket.request_id, "response_url": url}
            given |= {"status_url": f"{url}/status", "cancel_url": f"{url}/cancel"}
        columns = "".join(f", {name} = COALESCE(?, {name})" for name in given)
        database.execute(
            f"UPDATE jobs SET state = ?, updated = ?, note = ?{columns} WHERE id = ? AND state != ?",
            (state, self.now(), note, *given.values(), row.id, "FAILED"),  # what has failed stays so
        )

    def _check(self, database: Database, run: str, pictures: int, guard: Guard) -> None:
        def asked(condition: str, value: str | float) -> int:
            sent = "(request_id IS NOT NULL OR state IN ('PREPARED', 'AMBIGUOUS'))"
            query = f"SELECT COALESCE(SUM(pictures), 0) FROM jobs WHERE {sent} AND {condition}"
            return database.execute(query, [value]).fetchone()[0]

        counts = (
            ("this run", asked("run = ?", run), guard.per_run, "PULID_FAL_PICTURES_PER_RUN"),
            ("the last 24 hours", asked("created > ?", self.now() - DAY), guard.per_day, "PULID_FAL_PICTURES_PER_DAY"),
        )
        for what, before, limit, name in counts:
            if not guard.lifted and before + pictures > limit:
                raise HostedLimit(
                    f"The guard against unmeant costs stopped this: {before} pictures were asked for in {what}, "
                    f"{pictures} more would exceed {limit}. Nothing was sent. Switch confirm_paid on to send it "
                    f"all the same, or set {name}."
                )


def refuse_ambiguous(row: Row) -> None:
    """Raises AmbiguousSubmit where nobody knows what became of a request."""
    if row.state == "AMBIGUOUS":
        raise AmbiguousSubmit(f"An earlier, equal request has no known outcome. {OUTCOME_UNKNOWN}")


def _row(found: sqlite3.Row | None) -> Row | None:
    if found is None:
        return None
    ticket = Ticket(found["request_id"], found["response_url"]) if found["request_id"] else None
    return Row(found["id"], found["digest"], found["state"], ticket)
