"""A request from its values to its pictures on the real client: sent once, joined, kept, called off."""

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
import torch
from pulid_sdxl.hosted import job as jobs
from pulid_sdxl.hosted.errors import HostedLimit, Interrupted, JobCancelled, JobFailed
from pulid_sdxl.hosted.journal import Guard
from pulid_sdxl.hosted.queue import SubmitOptions
from pulid_sdxl.hosted.references import encode
from pulid_sdxl.hosted.service import Limits, Settings, Watch, read_numbers
from pulid_sdxl.pulid.errors import InputError
from pulid_sdxl.tools import TOOLS
from pulid_sdxl.tools.fakes import fake_faults as faults
from pulid_sdxl.tools.fakes.fake_fal import EVERY
from pulid_sdxl.tools.processes import ENDS_WITH_US

from .helpers import FACE, a_job, beside, generate, perform, wait_until

# Another ComfyUI, as far as the journal can tell: a process that makes the same request.
OTHER_PROCESS = """
import os, sys
from pathlib import Path
from types import SimpleNamespace
from pulid_sdxl.tests.hosted.helpers import generate
print(generate(SimpleNamespace(environment=dict(os.environ)), Path(sys.argv[1])).request_id)
"""


# ---- Joining ----


def other_process(fal, folder):
    command = [sys.executable, TOOLS, "-c", OTHER_PROCESS, str(folder)]
    environment = {**os.environ, **fal.environment}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, **ENDS_WITH_US)


def test_two_processes_with_equal_requests_pay_once(fal, tmp_path):
    told = []
    fal.plan("submit", EVERY, faults.once(lambda: any("waiting for it" in words for words in told)))
    process = other_process(fal, tmp_path)
    wait_until(lambda: fal.seen("submit"))
    mine = generate(fal, tmp_path, told=told)
    theirs, _ = process.communicate(timeout=30)
    assert theirs.strip() == mine.request_id
    assert fal.bill == 1


def test_who_joins_a_request_takes_no_place_from_others_and_has_no_say(fal, tmp_path):
    fal.script, told = ("IN_PROGRESS",), []
    owners, joiners = threading.Event(), threading.Event()
    results = [beside(generate, fal, tmp_path, watch=Watch(owners.is_set))]
    wait_until(lambda: fal.bill == 1)
    joined = beside(generate, fal, tmp_path, watch=Watch(joiners.is_set), told=told)
    wait_until(lambda: any("running" in words for words in told))
    results.append(beside(generate, fal, tmp_path, a_job(seed=8), watch=Watch(owners.is_set)))
    try:
        wait_until(lambda: fal.bill == 2)
        joiners.set()
        with pytest.raises(Interrupted):
            joined()
        assert fal.seen("cancel") == []
    finally:
        joiners.set()
        owners.set()
        for result in results:
            with pytest.raises(Interrupted):
                result()
    assert len(fal.seen("cancel")) == 2


def test_the_guard_stops_before_a_face_leaves_this_machine(fal, tmp_path):
    with pytest.raises(HostedLimit, match="confirm_paid"):
        generate(fal, tmp_path, a_job(guard=Guard(pictures_per_run=1), num_images=2, transport="upload"))
    assert fal.requests == []
    assert len(generate(fal, tmp_path, a_job(guard=Guard(pictures_per_run=1, lifted=True), num_images=2)).images) == 2


# ---- Calling off ----


def interrupted(fal, folder, when, job=None):
    """Make a request and interrupt it as soon as `when()`; it must not wait for a call or a pause that takes longer."""
    stop = threading.Event()
    result = beside(generate, fal, folder, job, watch=Watch(stop.is_set))
    wait_until(when)
    stop.set()
    with pytest.raises(Interrupted):
        result()


def test_an_interrupt_while_sending_waits_for_the_id_and_cancels(fal, tmp_path):
    fal.script = ("IN_PROGRESS",)
    stop = threading.Event()
    fal.plan("submit", 1, faults.once(stop.is_set))
    result = beside(generate, fal, tmp_path, watch=Watch(stop.is_set))
    wait_until(lambda: fal.seen("submit"))
    stop.set()
    with pytest.raises(Interrupted):
        result()
    assert (fal.bill, len(fal.seen("cancel"))) == (1, 1)


def test_an_interrupt_while_a_busy_service_is_waited_for_sends_nothing(fal, tmp_path):
    fal.plan("submit", EVERY, faults.busy("60"))
    interrupted(fal, tmp_path, lambda: fal.seen("submit"))
    assert (fal.bill, len(fal.seen("submit"))) == (0, 1)


def test_an_interrupt_while_pictures_come_cancels_nothing(fal, tmp_path):
    fal.plan("download", EVERY, faults.stall)
    interrupted(fal, tmp_path, lambda: fal.seen("download"))
    fal._plans.clear()
    assert len(generate(fal, tmp_path).images) == 1
    assert (fal.bill, fal.seen("cancel")) == (1, [])


def test_what_is_fetched_after_all_keeps_no_place_from_others(fal, tmp_path):
    fal.script = ("IN_PROGRESS",)
    fal.plan("cancel", 1, faults.answer(400, {"status": "ALREADY_COMPLETED"}))
    stop = threading.Event()
    result = beside(generate, fal, tmp_path, watch=Watch(stop.is_set), PULID_FAL_AT_ONCE="1")
    wait_until(lambda: fal.seen("status"))
    other_is_done = threading.Event()
    fal.plan("download", 1, faults.once(other_is_done.is_set))
    stop.set()
    wait_until(lambda: fal.seen("cancel"))
    fal.script = ("COMPLETED",)
    wait_until(lambda: fal.seen("download"))
    beside(generate, fal, tmp_path, a_job(seed=8), PULID_FAL_AT_ONCE="1")()
    other_is_done.set()
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
    fal.plan("result", EVERY, faults.model_error(422, [{"msg": "Bad prompt"}]))
    with pytest.raises(JobFailed, match="Bad prompt"):
        generate(fal, tmp_path)
    assert fal.bill == 1


def test_a_request_that_somebody_else_cancelled_is_not_sent_anew(fal, tmp_path):
    fal.plan("result", EVERY, faults.model_error(499, "Request was cancelled", error_type="client_cancelled"))
    with pytest.raises(JobCancelled, match="It was cancelled"):
        generate(fal, tmp_path)
    assert fal.bill == 1
    asked = len(fal.seen("result"))
    with pytest.raises(Interrupted):  # for whom it was cancelled because they, too, want to stop
        generate(fal, tmp_path, watch=Watch(lambda: len(fal.seen("result")) > asked))


# ---- By id ----


def ordered(fal, folder, webhook):
    job = replace(a_job(), options=SubmitOptions(webhook_url=webhook))
    return perform(fal, folder, lambda service: jobs.order(job, service))


@pytest.mark.parametrize("first", ["", "https://a.example/1"])
def test_a_webhook_has_an_allowed_host_and_is_called_for_the_request_that_named_it(fal, tmp_path, first):
    with pytest.raises(InputError, match=r"does not know a\.example"):
        ordered(fal, tmp_path, "https://a.example/2")
    assert fal.requests == []
    (tmp_path / "webhook_hosts.txt").write_text("a.example")
    known = ordered(fal, tmp_path, first)
    with pytest.raises(InputError, match="another webhook or none"):
        ordered(fal, tmp_path, "https://a.example/2")
    assert (ordered(fal, tmp_path, ""), fal.bill) == (known, 1)


def test_what_was_fetched_by_id_answers_the_request_itself(fal, tmp_path):
    request_id, _ = perform(fal, tmp_path, lambda service: jobs.order(a_job(), service))
    perform(fal, tmp_path, lambda service: jobs.fetch(request_id, Limits(), service))
    requests = len(fal.requests)
    assert generate(fal, tmp_path).request_id == request_id
    assert len(fal.requests) == requests


def test_who_stops_waiting_for_an_id_does_not_cancel_it(fal, tmp_path):
    fal.script = ("IN_PROGRESS",)
    request_id, _ = perform(fal, tmp_path, lambda service: jobs.order(a_job(), service))

    def fetch(service):
        return jobs.fetch(request_id, Limits(run=0.1), service)

    for stop, words in ((False, r"run_limit.*goes on"), (True, "Stopped by the user")):
        with pytest.raises(Interrupted if stop else HostedLimit, match=words):
            perform(fal, tmp_path, fetch, watch=Watch(lambda stop=stop: stop))
    assert fal.seen("cancel") == []


def test_a_cancel_that_comes_too_late_leaves_a_finished_request_as_it_is(fal, tmp_path):
    outcome = generate(fal, tmp_path)
    fal.plan("cancel", EVERY, faults.answer(200, {"status": "OK"}))
    perform(fal, tmp_path, lambda service: jobs.cancel(outcome.request_id, service))
    requests = len(fal.requests)
    assert generate(fal, tmp_path).request_id == outcome.request_id
    assert len(fal.requests) == requests


def test_an_uploaded_photograph_is_used_again_until_it_expires(fal, tmp_path, monkeypatch):
    for seed, queue in ((1, 7200), (2, 7200), (3, 9200)):  # the last one may need it for longer than it is kept
        generate(fal, tmp_path, a_job(seed=seed, transport="upload", limits=Limits(queue=queue)))
    assert len(fal.seen("put")) == 2
    generate(fal, tmp_path, a_job(seed=4, transport="upload"), PULID_FAL_PROXY_URL=fal.proxy_url)  # by somebody else
    monkeypatch.setattr(time, "time", lambda: 0.0)  # a clock that went backwards knows nothing of it
    generate(fal, tmp_path, a_job(seed=5, transport="upload"))
    assert len(fal.seen("put")) == 4
    life = json.loads(fal.seen("initiate")[0].headers["x-fal-object-lifecycle"])["expiration_duration_seconds"]
    assert 7200 + 600 < life < 9200 + 600
    assert fal.seen("put")[0].authorization is None


# ---- What is told ----


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


@pytest.mark.parametrize("text", ["0", "-1", "many", "nan", "inf"])
def test_a_number_that_is_none_is_named(text):
    with pytest.raises(InputError, match="PULID_FAL_AT_ONCE is a positive number"):
        read_numbers(Settings, {"PULID_FAL_AT_ONCE": text})


def test_numbers_come_from_the_environment():
    environ = {"PULID_FAL_PICTURES_PER_RUN": "3", "PULID_FAL_PICTURES_PER_DAY": "5"}
    assert read_numbers(Guard, environ, lifted=True) == Guard(3, 5, lifted=True)
    assert read_numbers(Guard, {}, lifted=False) == Guard()
