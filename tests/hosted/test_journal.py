"""The journal: one request is bought once, over threads, processes and crashes."""

import sqlite3
import stat
import threading
from dataclasses import replace

import pytest
from pulid_sdxl.hosted.errors import AmbiguousSubmit, HostedError, HostedLimit
from pulid_sdxl.hosted.journal import DAY, Guard, Journal
from pulid_sdxl.hosted.queue import Ticket

TICKET = Ticket("request-1", "https://q/r")


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


def claim(journal, digest="a", run="run", pictures=1, fixed=True, guard=None, force=False):
    return journal.claim(digest, run, pictures, fixed, guard or Guard(), force)


def submitted(journal, **values):
    row = replace(claim(journal, **values), ticket=TICKET)
    journal.move(row, "SUBMITTED")
    return row


def test_the_first_to_claim_sends_and_everybody_else_finds_their_row(journal):
    first, second = claim(journal), claim(journal)

    assert (first.fresh, first.state, second.fresh, second.id) == (True, "PREPARED", False, first.id)
    assert claim(journal, "b").fresh


def test_a_row_outlives_the_program_that_wrote_it(journal):
    submitted(journal)

    row = Journal(journal.path).find("a")

    assert (row.state, row.ticket, row.fresh) == ("SUBMITTED", TICKET, False)


@pytest.mark.parametrize("state", ["SUBMITTED", "COMPLETED", "CANCEL_REQUESTED", "DOWNLOADED"])
def test_a_request_with_a_ticket_is_joined(journal, state):
    row = submitted(journal)
    journal.move(row, state)

    again = claim(journal)

    assert (again.fresh, again.id, again.state, again.ticket) == (False, row.id, state, TICKET)


def test_a_failed_request_makes_room_for_a_new_one(journal):
    journal.move(claim(journal), "FAILED", "refused")

    assert journal.find("a") is None
    assert claim(journal).fresh


def test_pictures_of_a_random_seed_answer_no_other_request(journal):
    journal.move(submitted(journal, fixed=False), "DOWNLOADED")

    assert claim(journal, fixed=False).fresh


def test_who_falls_silent_while_sending_leaves_a_request_that_nobody_knows(journal, clock):
    claim(journal)
    clock.now += journal.silence - 1
    assert journal.find("a").state == "PREPARED"
    clock.now += 2

    assert journal.find("a").state == "AMBIGUOUS"
    with pytest.raises(AmbiguousSubmit, match=r"dashboard/requests.*force_resubmit"):
        claim(journal)


def test_who_gives_signs_of_life_is_waited_for(journal, clock):
    row = claim(journal)
    for _ in range(5):
        clock.now += journal.silence - 1
        journal.alive(row)

    assert journal.find("a").state == "PREPARED"


def test_an_answer_that_comes_after_all_is_noted(journal, clock):
    row = claim(journal)
    clock.now += 2 * journal.silence
    assert journal.find("a").state == "AMBIGUOUS"

    journal.move(replace(row, ticket=TICKET), "SUBMITTED")

    assert (journal.find("a").state, journal.find("a").ticket) == ("SUBMITTED", TICKET)


def test_force_sends_anew_but_never_beside_one_that_is_just_being_sent(journal):
    being_sent = claim(journal)
    assert claim(journal, force=True).id == being_sent.id

    for state in ("AMBIGUOUS", "SUBMITTED", "DOWNLOADED"):
        journal.move(journal.find("a"), state)
        anew = claim(journal, force=True)
        assert anew.fresh
    journal.move(being_sent, "SUBMITTED")  # what was given up does not come back
    assert journal.find("a").id == anew.id


def test_a_row_is_found_by_its_request_id(journal):
    row = submitted(journal)

    assert journal.by_request("request-1").id == row.id
    assert journal.by_request("request-2") is None


def test_a_ticket_that_could_not_be_written_is_written_with_the_next_step(journal):
    row = replace(claim(journal), ticket=TICKET)

    assert journal.claim_cancel(row)

    assert journal.find("a").ticket == TICKET


def test_one_caller_is_to_cancel(journal):
    row = submitted(journal)

    assert [journal.claim_cancel(row) for _ in range(3)] == [True, False, False]
    assert journal.find("a").state == "CANCEL_REQUESTED"


@pytest.mark.parametrize("state", ["COMPLETED", "DOWNLOADED", "FAILED"])
def test_what_is_over_is_not_cancelled(journal, state):
    row = submitted(journal)
    journal.move(row, state)

    assert not journal.claim_cancel(row)


def test_a_seed_of_any_size_is_kept_as_text(journal):
    journal.move(submitted(journal), "DOWNLOADED", seed="17454220438242315174")

    with sqlite3.connect(journal.path) as database:
        assert database.execute("SELECT seed, typeof(seed) FROM jobs").fetchall() == [("17454220438242315174", "text")]
    database.close()


def test_nobody_else_can_read_the_journal(journal):
    claim(journal)

    assert stat.S_IMODE(journal.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(journal.path.parent.stat().st_mode) == 0o700


def test_a_journal_that_cannot_be_written_stops_in_words(tmp_path):
    (tmp_path / "file").write_text("in the way")

    with pytest.raises(HostedError, match=r"journal of hosted requests .* could not be written"):
        claim(Journal(tmp_path / "file" / "hosted.sqlite"))


def test_a_damaged_journal_stops_in_words(journal):
    journal.path.parent.mkdir()
    journal.path.write_bytes(b"no database at all" * 99)

    with pytest.raises(HostedError, match="could not be written"):
        claim(journal)


# ---- The guard ----


def test_pictures_are_counted_by_run(journal):
    for number in range(4):
        submitted(journal, digest=str(number), pictures=2)

    with pytest.raises(HostedLimit, match=r"8 pictures .* in this run, 1 more would exceed 8.*confirm_paid"):
        claim(journal, "x")
    assert claim(journal, "x", run="another").fresh


def test_pictures_are_counted_by_day(journal, clock):
    guard = Guard(per_run=8, per_day=4)
    submitted(journal, digest="1", run="1", pictures=4)

    with pytest.raises(HostedLimit, match=r"4 pictures .* in the last 24 hours, 1 more would exceed 4"):
        claim(journal, "2", run="2", guard=guard)
    clock.now += DAY + 1
    assert claim(journal, "2", run="2", guard=guard).fresh


def test_what_may_have_been_sent_counts_and_what_was_refused_does_not(journal):
    journal.move(claim(journal, "1", pictures=8), "FAILED")
    claim(journal, "2", pictures=8)

    with pytest.raises(HostedLimit):
        claim(journal, "3")


def test_the_users_word_lifts_the_guard_and_joining_needs_none(journal):
    submitted(journal, digest="1", pictures=8)

    assert claim(journal, "2", pictures=8, guard=Guard(lifted=True)).fresh
    assert not claim(journal, "1", pictures=8).fresh


def test_the_guard_can_be_asked_before_anything_is_prepared(journal):
    journal.check("run", 8, Guard())
    with pytest.raises(HostedLimit):
        journal.check("run", 9, Guard())
    assert journal.find("a") is None


# ---- Many at once ----


def test_of_many_threads_one_sends(journal):
    claims, start = [], threading.Barrier(8)

    def work():
        start.wait()
        claims.append(claim(journal))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(row.fresh for row in claims) == [False] * 7 + [True]
    assert len({row.id for row in claims}) == 1


# ---- Uploads ----


def test_an_upload_is_used_again_until_shortly_before_its_end(journal, clock):
    journal.remember_upload("a", "https://v3.fal.media/a", 3600)

    assert journal.uploaded("a", at_least=600) == "https://v3.fal.media/a"
    clock.now += 3100
    assert journal.uploaded("a", at_least=600) is None
    assert journal.uploaded("b", at_least=0) is None


def test_uploads_that_have_expired_are_forgotten(journal, clock):
    journal.remember_upload("a", "https://v3.fal.media/a", 60)
    clock.now += 61
    journal.remember_upload("b", "https://v3.fal.media/b", 60)

    with sqlite3.connect(journal.path) as database:
        assert database.execute("SELECT digest FROM uploads").fetchall() == [("b",)]
    database.close()
