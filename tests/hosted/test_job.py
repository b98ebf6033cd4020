"""A request from its values to its pictures on the real client: sent once, joined, kept, called off."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from pulid_sdxl.hosted import job as jobs
from pulid_sdxl.hosted import journal as journals
from pulid_sdxl.hosted import service as services
from pulid_sdxl.hosted import waiting
from pulid_sdxl.hosted.api import HostedRequest, Size
from pulid_sdxl.hosted.client import SubmitOptions
from pulid_sdxl.hosted.job import Job, Limits
from pulid_sdxl.hosted.journal import Guard
from pulid_sdxl.hosted.service import open_service
from pulid_sdxl.hosted.storage import encode, read_lines
from pulid_sdxl.pulid.errors import (
    AmbiguousSubmit,
    HostedLimit,
    InputError,
    Interrupted,
    JobCancelled,
    JobFailed,
    MissingKey,
)
from pulid_sdxl.tools import TOOLS
from pulid_sdxl.tools.fakes import fake_faults as faults
from pulid_sdxl.tools.fakes.fake_fal import EVERY

FACE = torch.rand(8, 8, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(waiting, "POLL_SECONDS", (0.02,))


def a_job(seed=7, references=None, options=None, guard=None, run="run", **others):
    references = tuple(references or [encode(FACE)])
    values = {"num_images": others.pop("num_images", 1)}
    request = HostedRequest(
        tuple(reference.digest for reference in references), "portrait", seed=seed, image_size=Size(32, 48), **values
    )
    return Job(request, references, options or SubmitOptions(), guard or Guard(), run, **others)


def perform(fal, folder, act, stop=lambda: False, told=None, **environ):
    """What `act(service)` gives, on a client that was just started."""

    async def run():
        report = (told if told is not None else []).append
        async with open_service(fal.environment | environ, folder, stop, report) as service:
            return await act(service)

    return asyncio.run(run())


def generate(fal, folder, job=None, **others):
    job = job or a_job()
    return perform(fal, folder, lambda service: jobs.generate(job, service), **others)


def beside(target, *arguments, **others):
    """Run in a thread; returns a function that gives the result or raises the error."""
    outcome = {}

    def run():
        try:
            outcome["result"] = target(*arguments, **others)
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=run)
    thread.start()

    def result():
        thread.join(30)
        assert not thread.is_alive()
        if "error" in outcome:
            raise outcome["error"]
        return outcome["result"]

    return result


def wait_until(condition, seconds=10):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


# ---- Finished ones ----


def test_a_finished_request_comes_from_the_disk_without_the_network(fal, tmp_path):
    first = generate(fal, tmp_path)
    requests = len(fal.requests)

    again = generate(fal, tmp_path)

    assert [image.tobytes() for image in again.images] == [image.tobytes() for image in first.images]
    assert (again.seed, again.request_id, again.info) == (first.seed, first.request_id, first.info)
    assert (fal.bill, len(fal.requests)) == (1, requests)


@pytest.mark.parametrize("changed", [{"seed": 8}, {"references": [encode(1 - FACE)]}])
def test_another_request_is_another_picture(fal, tmp_path, changed):
    generate(fal, tmp_path)
    generate(fal, tmp_path, a_job(**changed))

    assert fal.bill == 2


def test_a_request_without_a_seed_is_new_each_time_and_keeps_every_digit_of_its_seed(fal, tmp_path):
    first = generate(fal, tmp_path, a_job(seed=None))
    generate(fal, tmp_path, a_job(seed=None))

    assert fal.bill == 2
    assert first.seed == "17454220438242315174"


def test_pictures_that_the_disk_has_lost_are_fetched_again_and_not_paid_again(fal, tmp_path):
    first = generate(fal, tmp_path)
    for file in (tmp_path / services.RESULTS_FOLDER).rglob("*.png"):
        file.unlink()

    assert generate(fal, tmp_path).request_id == first.request_id
    assert fal.bill == 1


def test_the_same_address_and_the_same_bytes_are_the_same_request(fal, tmp_path):
    uri = encode(FACE).data_uri

    generate(fal, tmp_path, a_job(references=[encode(FACE)]))
    generate(fal, tmp_path, a_job(references=read_lines(uri)))

    assert fal.bill == 1


# ---- Joining ----


def test_two_equal_requests_at_once_are_paid_once(fal, tmp_path):
    fal.plan("submit", EVERY, faults.late(0.4))

    first, second = beside(generate, fal, tmp_path), beside(generate, fal, tmp_path)

    assert first().request_id == second().request_id
    assert fal.bill == 1


def test_a_request_under_way_is_joined_after_a_restart(fal, tmp_path):
    fal.script = ("IN_PROGRESS",)
    ticket = perform(fal, tmp_path, lambda service: jobs.order(a_job(), service))
    fal.script = ("COMPLETED",)

    assert generate(fal, tmp_path).request_id == ticket.request_id
    assert fal.bill == 1


def sending_process(fal, folder, *arguments):
    """Another ComfyUI, as far as the journal can tell: a process that makes the same request."""
    code = "import runpy; runpy.run_module('pulid_sdxl.tests.hosted.sending_process', run_name='__main__')"
    command = [sys.executable, TOOLS, "-c", code, str(folder), *arguments]
    return subprocess.Popen(command, env={**os.environ, **fal.environment}, stdout=subprocess.PIPE, text=True)


def test_a_process_killed_between_submit_and_answer_leaves_words_and_no_second_bill(fal, tmp_path, monkeypatch):
    fal.plan("submit", 1, faults.accept_then_stall)
    process = sending_process(fal, tmp_path)
    wait_until(lambda: fal.bill == 1, 30)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    monkeypatch.setattr(journals, "SILENCE_SECONDS", 0.5)

    with pytest.raises(AmbiguousSubmit, match=r"may have been accepted and billed.*dashboard.*force_resubmit"):
        generate(fal, tmp_path)
    assert fal.bill == 1


def test_a_process_killed_while_waiting_loses_nothing(fal, tmp_path):
    fal.script = ("IN_PROGRESS",)
    process = sending_process(fal, tmp_path)
    wait_until(lambda: fal.seen("status"), 30)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    fal.script = ("COMPLETED",)

    assert len(generate(fal, tmp_path).images) == 1
    assert fal.bill == 1


def test_two_processes_with_equal_requests_pay_once(fal, tmp_path):
    fal.plan("submit", EVERY, faults.late(0.5))
    process = sending_process(fal, tmp_path)
    wait_until(lambda: fal.seen("submit"), 30)

    mine = generate(fal, tmp_path)
    theirs, _ = process.communicate(timeout=30)

    assert theirs.strip() == mine.request_id
    assert fal.bill == 1


# ---- Many at once ----


def test_so_many_requests_are_under_way_at_once_and_no_more(fal, tmp_path):
    fal.script = (1, "IN_PROGRESS", "IN_PROGRESS", "COMPLETED")

    results = [beside(generate, fal, tmp_path, a_job(seed=seed)) for seed in range(5)]

    assert len({result().request_id for result in results}) == 5
    assert fal.most_open == 2
    assert fal.bill == 5


def test_who_joins_a_request_takes_no_place_from_others(fal, tmp_path):
    fal.script = ("IN_PROGRESS",)
    fal.plan("put", EVERY, faults.late(0.5))  # so that both look before either sends
    stop = threading.Event()
    equal = a_job(transport="upload")
    results = [beside(generate, fal, tmp_path, equal, stop=stop.is_set) for _ in range(2)]
    wait_until(lambda: fal.bill == 1)

    results.append(beside(generate, fal, tmp_path, a_job(seed=8), stop=stop.is_set))
    try:
        wait_until(lambda: fal.bill == 2, 3)
    finally:
        stop.set()
        for result in results:
            with pytest.raises(Interrupted):
                result()


def test_when_one_of_many_fails_the_others_are_kept(fal, tmp_path):
    fal.plan("result", 2, faults.model_error(500, "Oops"))
    results = []
    for result in [beside(generate, fal, tmp_path, a_job(seed=seed)) for seed in range(3)]:
        try:
            results.append(result().request_id)
        except JobFailed as error:
            assert "request " in str(error)  # says which
    assert (len(results), fal.bill) == (2, 3)

    for seed in range(3):
        generate(fal, tmp_path, a_job(seed=seed))
    assert fal.bill == 4  # the failed one alone is sent anew


def test_the_guard_stops_before_a_face_leaves_this_machine(fal, tmp_path):
    with pytest.raises(HostedLimit, match="confirm_paid"):
        generate(fal, tmp_path, a_job(guard=Guard(per_run=1), num_images=2, transport="upload"))
    assert fal.requests == []

    assert len(generate(fal, tmp_path, a_job(guard=Guard(per_run=1, lifted=True), num_images=2)).images) == 2


# ---- Calling off ----


def interrupted(fal, folder, when, job=None):
    """Make a request and interrupt it as soon as `when()`; returns the error and the seconds it took to come."""
    stop = threading.Event()
    result = beside(generate, fal, folder, job, stop=stop.is_set)
    wait_until(when)
    stop.set()
    start = time.monotonic()
    with pytest.raises(Interrupted):
        result()
    return time.monotonic() - start


def test_an_interrupt_while_uploading_sends_nothing(fal, tmp_path):
    fal.plan("put", EVERY, faults.stall)

    seconds = interrupted(fal, tmp_path, lambda: fal.seen("put"), a_job(transport="upload"))

    assert seconds < 0.5
    assert (fal.bill, fal.seen("submit"), fal.seen("cancel")) == (0, [], [])


def test_an_interrupt_while_sending_waits_for_the_id_and_cancels(fal, tmp_path):
    fal.script = ("IN_PROGRESS",)
    fal.plan("submit", 1, faults.late(0.7))

    interrupted(fal, tmp_path, lambda: fal.seen("submit"))

    assert (fal.bill, len(fal.seen("cancel"))) == (1, 1)


def test_an_interrupt_while_a_busy_service_is_waited_for_sends_nothing(fal, tmp_path):
    fal.plan("submit", EVERY, faults.busy("30"))

    seconds = interrupted(fal, tmp_path, lambda: fal.seen("submit"))

    assert seconds < 0.5
    assert (fal.bill, len(fal.seen("submit"))) == (0, 1)


@pytest.mark.parametrize("script", [(3,), ("IN_PROGRESS",)])
def test_an_interrupt_while_waiting_cancels_within_half_a_second(fal, tmp_path, script):
    fal.script = script

    seconds = interrupted(fal, tmp_path, lambda: fal.seen("status"))

    assert seconds < 0.5
    assert (fal.bill, len(fal.seen("cancel"))) == (1, 1)


def test_an_interrupt_during_a_silent_status_call_does_not_wait_for_it(fal, tmp_path):
    fal.plan("status", EVERY, faults.stall)

    assert interrupted(fal, tmp_path, lambda: fal.seen("status")) < 0.5
    assert len(fal.seen("cancel")) == 1


def test_an_interrupt_while_fetching_keeps_what_was_paid_for(fal, tmp_path):
    fal.plan("download", 1, faults.stall)

    assert interrupted(fal, tmp_path, lambda: fal.seen("download")) < 0.5

    assert fal.seen("cancel") == []
    assert len(generate(fal, tmp_path).images) == 1
    assert fal.bill == 1


def test_an_interrupt_while_waiting_for_a_free_place_sends_nothing(fal, tmp_path):
    fal.script = ("IN_PROGRESS",)
    stop = threading.Event()
    others = [beside(generate, fal, tmp_path, a_job(seed=seed), stop=stop.is_set) for seed in (1, 2)]
    wait_until(lambda: fal.bill == 2)

    interrupted(fal, tmp_path, lambda: True)

    stop.set()
    for other in others:
        with pytest.raises(Interrupted):
            other()
    assert fal.bill == 2


def test_one_interrupt_cancels_all_and_each_once(fal, tmp_path):
    fal.script = ("IN_PROGRESS",)
    stop = threading.Event()
    results = [beside(generate, fal, tmp_path, a_job(seed=seed), stop=stop.is_set) for seed in (1, 2, 1)]
    wait_until(lambda: fal.bill == 2)
    time.sleep(0.3)

    stop.set()
    for result in results:
        with pytest.raises(Interrupted):
            result()

    cancelled = [seen.path for seen in fal.seen("cancel")]
    assert len(cancelled) == len(set(cancelled)) == 2


def test_what_is_fetched_after_all_keeps_no_place_from_others(fal, tmp_path):
    fal.script = ("IN_PROGRESS",)
    fal.plan("cancel", 1, faults.answer(400, {"status": "ALREADY_COMPLETED"}))
    stop = threading.Event()
    result = beside(generate, fal, tmp_path, stop=stop.is_set, PULID_FAL_AT_ONCE="1")
    wait_until(lambda: fal.seen("status"))
    fal.plan("download", 1, faults.late(3))
    stop.set()
    wait_until(lambda: fal.seen("cancel"))
    fal.script = ("COMPLETED",)
    wait_until(lambda: fal.seen("download"))

    start = time.monotonic()
    generate(fal, tmp_path, a_job(seed=8), PULID_FAL_AT_ONCE="1")

    assert time.monotonic() - start < 2
    with pytest.raises(Interrupted):
        result()


def test_a_host_that_tears_everything_down_gets_a_cancel_too(fal, tmp_path):
    fal.script = ("IN_PROGRESS",)

    async def act(service):
        task = asyncio.ensure_future(jobs.generate(a_job(), service))
        while not fal.seen("status"):
            await asyncio.sleep(0.01)
        task.cancel()
        await task

    with pytest.raises(asyncio.CancelledError):
        perform(fal, tmp_path, act)
    assert len(fal.seen("cancel")) == 1


def test_a_request_that_was_called_off_in_the_queue_is_sent_anew(fal, tmp_path):
    fal.script = (3,)
    interrupted(fal, tmp_path, lambda: fal.seen("status"))
    fal.script = ("COMPLETED",)

    assert len(generate(fal, tmp_path).images) == 1
    assert fal.bill == 2


def test_a_request_that_went_on_although_it_was_called_off_is_joined(fal, tmp_path):
    fal.script, fal.obeys = ("IN_PROGRESS",), False
    interrupted(fal, tmp_path, lambda: fal.seen("status"))
    fal.script = ("COMPLETED",)

    assert len(generate(fal, tmp_path).images) == 1
    assert fal.bill == 1


def test_a_request_that_failed_by_itself_after_it_was_called_off_is_not_sent_anew(fal, tmp_path):
    fal.script, fal.obeys = ("IN_PROGRESS",), False
    interrupted(fal, tmp_path, lambda: fal.seen("status"))
    fal.script = ("COMPLETED",)
    fal.plan("result", EVERY, faults.model_error(422, "Bad prompt"))

    with pytest.raises(JobFailed, match="Bad prompt"):
        generate(fal, tmp_path)
    assert fal.bill == 1


def test_a_request_that_somebody_else_cancelled_is_not_sent_anew(fal, tmp_path):
    fal.plan("result", EVERY, faults.model_error(499, "Request was cancelled", error_type="client_cancelled"))

    with pytest.raises(JobCancelled, match="It was cancelled"):
        generate(fal, tmp_path)
    assert fal.bill == 1


# ---- By id ----


def test_a_request_is_ordered_looked_at_and_fetched_by_its_id(fal, tmp_path):
    fal.script = (2, "IN_PROGRESS", "COMPLETED")
    other = tmp_path / "another machine"

    ticket = perform(fal, tmp_path, lambda service: jobs.order(a_job(), service))
    status = perform(fal, other, lambda service: jobs.status(ticket.request_id, True, service))
    outcome = perform(fal, other, lambda service: jobs.fetch(ticket.request_id, Limits(), service))

    assert (status.state, status.position) == ("IN_QUEUE", 2)
    assert (outcome.request_id, len(outcome.images), fal.bill) == (ticket.request_id, 1, 1)


def test_what_was_fetched_by_id_answers_the_request_itself(fal, tmp_path):
    ticket = perform(fal, tmp_path, lambda service: jobs.order(a_job(), service))
    perform(fal, tmp_path, lambda service: jobs.fetch(ticket.request_id, Limits(), service))
    requests = len(fal.requests)

    assert generate(fal, tmp_path).request_id == ticket.request_id
    assert len(fal.requests) == requests


def test_who_stops_waiting_for_an_id_does_not_cancel_it(fal, tmp_path):
    fal.script = ("IN_PROGRESS",)
    ticket = perform(fal, tmp_path, lambda service: jobs.order(a_job(), service))

    with pytest.raises(HostedLimit, match=r"run_limit.*goes on"):
        perform(fal, tmp_path, lambda service: jobs.fetch(ticket.request_id, Limits(run=0.1), service))
    with pytest.raises(Interrupted):
        perform(fal, tmp_path, lambda service: jobs.fetch(ticket.request_id, Limits(), service), stop=lambda: True)
    assert fal.seen("cancel") == []


def test_a_request_is_cancelled_by_its_id(fal, tmp_path):
    fal.script = (2,)
    ticket = perform(fal, tmp_path, lambda service: jobs.order(a_job(), service))

    assert perform(fal, tmp_path, lambda service: jobs.cancel(ticket.request_id, service)).outcome == "removed"
    unknown = "764cabcf-b745-4b3e-ae38-1200304cf45b"
    assert perform(fal, tmp_path, lambda service: jobs.cancel(unknown, service)).outcome == "unknown"


def test_a_cancel_that_comes_too_late_leaves_a_finished_request_as_it_is(fal, tmp_path):
    outcome = generate(fal, tmp_path)
    fal.plan("cancel", EVERY, faults.gateway(502))

    perform(fal, tmp_path, lambda service: jobs.cancel(outcome.request_id, service))

    requests = len(fal.requests)
    assert generate(fal, tmp_path).request_id == outcome.request_id
    assert len(fal.requests) == requests


# ---- Uploads ----


def test_an_uploaded_photograph_is_used_again_until_it_expires(fal, tmp_path):
    for seed in (1, 2):
        generate(fal, tmp_path, a_job(seed=seed, transport="upload"))
    assert len(fal.seen("put")) == 1

    [initiate] = fal.seen("initiate")
    assert '"expiration_duration_seconds": 3600' in initiate.headers["x-fal-object-lifecycle"]
    assert fal.seen("put")[0].authorization is None


def test_photographs_can_be_uploaded_by_themselves(fal, tmp_path):
    references = [encode(FACE), encode(1 - FACE)]

    urls = perform(fal, tmp_path, lambda service: jobs.upload(references, 86400, service))

    assert len(set(urls)) == 2 and all(url.startswith("http") for url in urls)
    assert fal.bill == 0


# ---- What is told ----


def test_progress_names_the_place_in_the_queue_the_last_line_and_the_id(fal, tmp_path):
    fal.script = (2, 0, "IN_PROGRESS", "COMPLETED")
    told = []

    outcome = generate(fal, tmp_path, told=told)

    words = [progress.words for progress in told]
    assert any("queued 0 s, 2 before it" in line for line in words)
    assert any("running 0 s: Denoising" in line for line in words)
    assert all(outcome.request_id in line for line in words[1:])
    assert [progress.step for progress in told] == sorted(progress.step for progress in told)
    assert told[-1].step == services.STEPS


def test_lines_of_the_log_are_written_once_each_also_where_two_are_alike(fal, tmp_path, caplog):
    caplog.set_level("INFO")
    fal.script = ("IN_PROGRESS",) * 4 + ("COMPLETED",)

    outcome = generate(fal, tmp_path)

    written = [record.getMessage().partition(": ")[2] for record in caplog.records if "request" in record.getMessage()]
    assert written == outcome.info["logs"] and len(written) > 2


def test_info_says_what_was_asked_without_the_photograph(fal, tmp_path):
    info = generate(fal, tmp_path, a_job(references=[encode(FACE)] * 5)).info

    assert info["request"]["prompt"] == "portrait"
    assert "base64" not in str(info)
    assert info["notes"] == ["5 references were sent; 4 are ideal."]


def test_info_says_what_the_user_should_know_about_the_references(fal, tmp_path):
    clear = torch.zeros(8, 8, 4)

    info = generate(fal, tmp_path, a_job(references=[encode(FACE), encode(clear)])).info

    assert info["notes"] == ["Reference 2 has transparent parts, which were sent as white."]


# ---- Settings ----


def test_without_a_key_nothing_leaves(fal, tmp_path):
    environment = {name: "" for name in ("FAL_KEY", "FAL_KEY_ID", "FAL_KEY_SECRET")}

    with pytest.raises(MissingKey, match="FAL_KEY"):
        generate(fal, tmp_path, **environment)
    assert fal.requests == []


@pytest.mark.parametrize("proxy", ["proxy_url", "formula_proxy_url"])
def test_a_proxy_does_all_without_a_key_here(fal, tmp_path, proxy):
    environment = {"FAL_KEY": "", "PULID_FAL_PROXY_URL": getattr(fal, proxy)}
    if proxy == "proxy_url":
        assert len(generate(fal, tmp_path, a_job(transport="upload"), **environment).images) == 1
    else:
        assert len(generate(fal, tmp_path, **environment).images) == 1
    assert fal.bill == 1
    assert all(seen.authorization is None for seen in fal.requests if seen.origin == "proxy")


@pytest.mark.parametrize("text", ["0", "-1", "many", "nan", "inf"])
def test_a_number_that_is_none_is_named(text):
    with pytest.raises(InputError, match="PULID_FAL_AT_ONCE is a positive number"):
        services.number({"PULID_FAL_AT_ONCE": text}, "AT_ONCE", 2)


def test_numbers_come_from_the_environment():
    environ = {"PULID_FAL_PICTURES_PER_RUN": "3", "PULID_FAL_PICTURES_PER_DAY": "5"}

    assert services.guard(environ, lifted=True) == Guard(3, 5, True)
    assert services.guard({}, lifted=False) == Guard()
