"""The journal: one request is bought once, over threads, processes and crashes."""

import sqlite3
import stat
import subprocess
import sys
import time
from contextlib import closing, suppress
from dataclasses import replace

import pytest
from pulid_sdxl import run
from pulid_sdxl.hosted import journal as journals
from pulid_sdxl.hosted.errors import HostedError, HostedLimit
from pulid_sdxl.hosted.journal import DAY, Guard, Journal, Row
from pulid_sdxl.tools import TOOLS


class Clock:
    def __init__(self):
        self.now = 10**9

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def journal(tmp_path, clock):
    return Journal(tmp_path / "private" / "hosted.sqlite", clock)


def claim(journal, digest="a", run="run", pictures=1, kept=True, guard=None, given_up=None):
    return journal.claim(Row(digest, run, pictures, kept), guard or Guard(), given_up)


def moved(journal, row, state, **values):
    row = replace(row, state=state, **values)
    journal.move(row)
    return row


def submitted(journal, request_id="request-1", **values):
    return moved(journal, claim(journal, **values), "SUBMITTED", request_id=request_id)


def test_a_row_outlives_the_program_that_wrote_it(journal):
    submitted(journal)
    row = Journal(journal.path).find("a")
    assert (row.state, row.request_id, row.is_owner) == ("SUBMITTED", "request-1", False)


@pytest.mark.parametrize("state", ["PREPARED", "SUBMITTED", "COMPLETED", "CANCEL_REQUESTED", "DOWNLOADED"])
def test_where_one_stands_no_equal_one_is_written_even_without_a_lock(journal, state):
    row = moved(journal, submitted(journal), state) if state != "PREPARED" else claim(journal)
    with pytest.raises(HostedError, match="could not be written"):
        claim(journal)
    assert [each.name for each in journal.rows()] == [row.name]
    assert claim(journal, "b").is_owner


def test_a_failed_request_makes_room_for_a_new_one(journal):
    moved(journal, claim(journal), "FAILED", note="refused")
    assert journal.find("a") is None
    assert claim(journal).is_owner


def test_pictures_of_a_random_seed_answer_no_other_request(journal):
    moved(journal, submitted(journal, kept=False), "DOWNLOADED")
    assert claim(journal, kept=False).is_owner


def test_who_died_while_sending_leaves_a_request_that_nobody_knows(journal):
    claim(journal)
    found = journal.find("a")  # whoever asks holds the lock that the sender had
    assert (found.state, found.request_id) == ("AMBIGUOUS", None)


def test_an_answer_that_comes_after_all_is_noted(journal):
    row = claim(journal)
    assert journal.find("a").state == "AMBIGUOUS"
    moved(journal, row, "SUBMITTED", request_id="request-1")
    assert (journal.find("a").state, journal.find("a").request_id) == ("SUBMITTED", "request-1")
    moved(journal, row, "AMBIGUOUS")
    assert journal.find("a").request_id == "request-1"  # an id that is known stays known


@pytest.mark.parametrize("state", ["AMBIGUOUS", "SUBMITTED", "DOWNLOADED"])
def test_a_request_is_given_up_by_its_id_and_once(journal, state):
    old = submitted(journal) if state != "AMBIGUOUS" else claim(journal)
    old = moved(journal, old, state)
    anew = claim(journal, given_up=old)
    assert anew.is_owner
    with suppress(HostedError):
        moved(journal, old, "SUBMITTED")  # what was given up does not come back
    assert journal.find("a").name == anew.name


def test_nothing_is_given_up_where_the_guard_stops_the_new_one(journal):
    old = submitted(journal, pictures=8)
    with pytest.raises(HostedLimit):
        claim(journal, pictures=8, given_up=old)
    assert journal.find("a").name == old.name


def test_a_row_is_found_by_either_name(journal):
    row = submitted(journal)
    assert journal.by_id("request-1").name == journal.by_id(row.name).name == row.name
    assert journal.by_id("request-2") is None


@pytest.mark.parametrize("gone", ["row", "file"])
def test_what_vanishes_from_the_journal_is_written_again_with_the_next_step(journal, gone):
    row = submitted(journal)
    if gone == "file":
        journal.path.unlink()
    else:
        with closing(sqlite3.connect(journal.path)) as database, database:
            database.execute("DELETE FROM requests")
    moved(journal, row, "COMPLETED")
    assert (journal.find("a").state, journal.find("a").request_id) == ("COMPLETED", "request-1")


def test_nobody_else_can_read_the_journal(journal):
    claim(journal)
    assert stat.S_IMODE(journal.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(journal.path.parent.stat().st_mode) == 0o700


def damage(path, how):
    path.parent.mkdir(exist_ok=True)
    if how == "no database":
        path.write_bytes(b"no database at all" * 99)
    elif how == "damaged":
        content = bytearray(path.read_bytes())
        content[100:] = b"\xa5" * (len(content) - 100)
        path.write_bytes(content)
    else:
        statement = {
            "foreign": "CREATE TABLE x (y)",
            "earlier": "CREATE TABLE jobs (id)",
            "later": "PRAGMA user_version = 99",
        }
        path.unlink(missing_ok=True)
        with closing(sqlite3.connect(path)) as database, database:
            database.execute(statement[how])


@pytest.mark.parametrize("how", ["no database", "damaged", "foreign", "earlier", "later"])
def test_a_journal_that_cannot_be_read_is_set_aside_in_words_and_once(journal, how):
    submitted(journal)
    damage(journal.path, how)
    with pytest.raises(
        HostedError, match=r"set aside as hosted-set-aside-\w+\.sqlite.*Nothing was sent.*fetch.*by its id"
    ):
        journal.find("a")
    assert len(list(journal.path.parent.glob("hosted-set-aside-*"))) == 1
    assert claim(journal).is_owner  # a new one has begun


def test_what_an_older_file_holds_beside_is_passed_over(journal):
    row = submitted(journal)
    with closing(sqlite3.connect(journal.path)) as database, database:
        database.executescript("ALTER TABLE requests ADD seed TEXT; CREATE TABLE uploads (digest TEXT, url TEXT)")
    assert journal.find("a").request_id == row.request_id
    assert claim(journal, "b").is_owner and journal.forget([row.name]) == 1


# ---- The guard ----


def test_pictures_are_counted_by_run(journal):
    for number in range(4):
        submitted(journal, digest=str(number), pictures=2)
    with pytest.raises(HostedLimit, match=r"8 pictures .* in this run, 1 more would exceed 8.*confirm_paid"):
        claim(journal, "x")
    assert claim(journal, "x", run="another").is_owner


def test_pictures_are_counted_by_day(journal, clock):
    guard = Guard(pictures_per_run=8, pictures_per_day=4)
    submitted(journal, digest="1", run="1", pictures=4)
    with pytest.raises(HostedLimit, match=r"4 pictures .* in the last 24 hours, 1 more would exceed 4"):
        claim(journal, "2", run="2", guard=guard)
    clock.now += DAY + 1
    assert claim(journal, "2", run="2", guard=guard).is_owner


def test_what_may_have_been_sent_counts_and_what_was_refused_does_not(journal):
    moved(journal, claim(journal, "1", pictures=8), "FAILED")
    claim(journal, "2", pictures=8)
    with pytest.raises(HostedLimit):
        claim(journal, "3")


def test_the_users_word_lifts_the_guard(journal):
    submitted(journal, digest="1", pictures=8)
    assert claim(journal, "2", pictures=8, guard=Guard(lifted=True)).is_owner


@pytest.mark.parametrize(("run", "span"), [("run", "RUN"), ("other", "DAY")])
def test_nothing_but_the_environment_lifts_the_ceiling(journal, run, span):
    guard = Guard(lifted=True, ceiling_per_run=8, ceiling_per_day=16)
    for number in range(8 if span == "RUN" else 16):
        submitted(journal, digest=str(number), run=run if span == "RUN" else str(number), request_id=str(number))
    with pytest.raises(HostedLimit, match=rf"No switch.*PULID_FAL_CEILING_PER_{span}") as caught:
        claim(journal, "x", run=run, guard=guard)
    assert "confirm_paid" not in str(caught.value)


def test_forgetting_lifts_nothing(journal):
    row = submitted(journal, pictures=8)
    journal.forget([row.name])
    moved(journal, row, "COMPLETED")  # by somebody who still waits for it
    assert journal.find("a") is None and journal.rows() == [] and journal.by_id("request-1") is None
    with pytest.raises(HostedLimit):
        claim(journal)


def test_no_row_makes_the_sum_smaller(journal):
    submitted(journal, digest="1", pictures=7)
    submitted(journal, digest="2")
    with closing(sqlite3.connect(journal.path)) as database, database:
        database.execute("UPDATE requests SET pictures = -50")
        database.execute("UPDATE requests SET pictures = 7 WHERE digest = '1'")
    with pytest.raises(HostedLimit, match="8 pictures"):
        claim(journal, "3")


def test_a_clock_that_went_backwards_counts_no_rows_of_the_future(journal, clock):
    guard = Guard(pictures_per_run=99, pictures_per_day=4)
    submitted(journal, digest="1", pictures=4)
    clock.now -= 10 * DAY
    assert claim(journal, "2", pictures=4, guard=guard).is_owner
    with pytest.raises(HostedLimit):
        claim(journal, "3", guard=guard)


# ---- What is kept on this machine ----


def test_requests_are_listed_with_age_pictures_and_what_to_do(journal, clock):
    clock.now = time.time() - 2 * 3600
    submitted(journal, digest="1", request_id="under-way", pictures=2)
    unknown = claim(journal, "2")
    journal.find("2")
    moved(journal, submitted(journal, digest="3", request_id="done"), "DOWNLOADED")
    assert "under-way  2 h ago  2 pictures  under way: fetch it, or cancel it" in journals.listing(
        journal.rows(), "open"
    )
    assert journals.listing(journal.rows(), "unknown").startswith(f"{unknown.name}  2 h ago  1 picture  may have been")
    assert len(journals.listing(journal.rows()).splitlines()) == 3
    assert journals.listing([], "open") == "There are none on this machine."


def test_requests_are_forgotten_with_their_pictures(journal, clock):
    folder = journal.path.parent
    clock.now = time.time() - 3 * DAY
    submitted(journal, digest="1", request_id="old-1")
    clock.now = time.time()
    unknown = claim(journal, "2")
    submitted(journal, digest="3", request_id="new-1")
    for name in ("old-1", "new-1"):
        (folder / "results" / name).mkdir(parents=True)
    assert journal.forget(["nobody"]) == 0
    assert journal.forget(older_than=DAY) == 1
    assert [place.name for place in (folder / "results").iterdir()] == ["new-1"]
    assert journal.forget([unknown.name]) == 1
    assert [row.id for row in journal.rows()] == ["new-1"]
    assert journal.forget(older_than=0) == 1
    assert list((folder / "results").iterdir()) == []


def test_run_py_lists_and_forgets_for_every_user(tmp_path, capsys):
    for user in ("", "users/ann_1"):
        journal = Journal(tmp_path / "__pulid" / user / "hosted.sqlite")
        for name in ("one", "two"):
            submitted(journal, digest=name, request_id=f"{user[-1:]}-{name}")
    where = ["--user-directory", str(tmp_path)]
    assert run.hosted([], ["list", *where]) == 0
    shown = sorted(line.split()[0] for line in capsys.readouterr().out.splitlines())
    assert shown == ["-one", "-two", "1-one", "1-two"]
    run.hosted([], ["forget", "1-one", *where])
    run.hosted([], ["forget", "--older-than", "1h", *where])
    run.hosted([], ["forget", "--all", *where])
    assert capsys.readouterr().out == "1 forgotten.\n0 forgotten.\n3 forgotten.\n"
    for wrong in (["forget"], ["forget", "--older-than", "soon"], ["forget", "--older-than", "3y"]):
        with pytest.raises((run.Failure, SystemExit)):
            run.hosted([], [*wrong, *where])


def test_the_command_needs_the_standard_library_only():
    code = "import pulid_sdxl.hosted.journal; print('fine')"
    assert subprocess.run([sys.executable, "-I", "-S", TOOLS, "-c", code], capture_output=True).stdout == b"fine\n"
