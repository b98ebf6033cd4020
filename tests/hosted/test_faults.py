"""All that can go wrong between here and the service: what it costs, what is kept, and what the user reads.

One row, one fault. Each is met by a whole request on the real client against the fake service; then the same request
is made again without the fault, as somebody does who queues the prompt once more.
"""

import base64
import io
import re
import socket
import threading
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
import torch
from PIL import Image
from pulid_sdxl.hosted import job as jobs
from pulid_sdxl.hosted.errors import (
    AmbiguousSubmit,
    BadAnswer,
    Gone,
    HostedError,
    HostedLimit,
    Interrupted,
    JobFailed,
    Refused,
    Unreachable,
)
from pulid_sdxl.hosted.references import encode, read_lines
from pulid_sdxl.hosted.service import Limits, Watch
from pulid_sdxl.hosted.transport import Terms
from pulid_sdxl.tools.fakes import fake_faults as faults
from pulid_sdxl.tools.fakes.fake_fal import EVERY

from . import helpers
from .helpers import FACE, a_job, beside, wait_until

ANSWER_SECONDS = 0.3
DASHBOARD = r"may have been accepted and billed.*fal\.ai/dashboard/requests.*put local-\w+ into force_resubmit"


class HastyWatch(Watch):
    """The same pauses, in hundredths."""

    async def pause(self, seconds):
        await super().pause(seconds / 100)


def hasty(service):
    terms = Terms(seconds=0.5, limit=1 << 20, idle=ANSWER_SECONDS, public=True)
    client = replace(service.client, cancel_seconds=ANSWER_SECONDS)
    return replace(service, client=client, picture_terms=terms, poll_seconds=(0.5, 1.0, 2.0, 3.0))


def perform(fal, folder, act=None, **environ):
    """What `act` (a request, unless said otherwise) gives, on a client that was just started and soon gives up."""
    environ = {"PULID_FAL_ANSWER_SECONDS": str(ANSWER_SECONDS), **environ}
    return helpers.perform(fal, folder, act, HastyWatch(), change=hasty, **environ)


def generate(fal, folder, environ=None, **options):
    return perform(fal, folder, lambda service: jobs.generate(a_job(**options), service), **(environ or {}))


# --- the table ---


@dataclass(frozen=True)
class Row:
    """One fault.

    faults  (route, nth, fault), in place while the request is made
    error   what it raises, None where the user gets the pictures all the same
    words   a regular expression that the message matches
    bill    accepted submits after it
    again   what the same request does afterwards, and the bill then
    script  of the fake's jobs
    """

    name: str
    faults: tuple
    error: type | None
    words: str
    bill: int
    again: tuple[str, int]
    script: tuple = ("IN_PROGRESS", "COMPLETED")


PICTURES, REFUSED = "pictures", "refused"
PAID = (PICTURES, 1)  # the picture that was paid for
SENT_NOW = (PICTURES, 1)  # nothing was accepted before
SENT_ANEW = (PICTURES, 2)  # the first one failed for good, and was said to have
NOT_AGAIN = (REFUSED, 1)  # nobody knows, so nothing is sent until the user says so


def on(route, *planned, nth=EVERY):
    return tuple((route, nth, fault) for fault in planned)


def submit(name, fault, error, words, bill, again, nth=EVERY):
    return Row(f"submit: {name}", on("submit", fault, nth=nth), error, words, bill, again)


def unsure(name, fault, bill):
    """A submit of which nobody knows whether it was accepted."""
    return submit(name, fault, AmbiguousSubmit, DASHBOARD, bill, (REFUSED, bill))


def refused(name, status, detail, words, headers=None):
    """A submit that the service turns down."""
    fault = faults.answer(status, {"detail": detail}, headers)
    return submit(name, fault, Refused, rf"HTTP {status}.*{words}", 0, SENT_NOW)


def polling(name, fault, words, error=Refused):
    """A status that cannot be had: the request goes on, and its pictures come when it is queued again."""
    return Row(f"status: {name}", on("status", fault), error, words, 1, PAID)


def passing(route, name, fault):
    """A fault that the user never hears of."""
    return Row(f"{route}: {name}", on(route, fault, nth=1), None, "", 1, PAID)


def result(name, fault, words, error=JobFailed, again=SENT_ANEW):
    return Row(f"result: {name}", on("result", fault), error, words, 1, again)


def picture(name, fault, words, error=BadAnswer):
    """A picture that cannot be had; it is paid for, so queueing again fetches it and buys nothing."""
    return Row(f"picture: {name}", on("download", fault), error, words, 1, PAID)


def elsewhere(name, url, words, error=HostedError):
    """A picture at another address than the service's own storage."""
    image = {"url": url, "content_type": "image/png"}
    return Row(f"picture: {name}", on("result", faults.with_values(images=[image])), error, words, 1, PAID)


def endless(name, script, words):
    """A job that goes on for longer than the user's limits, and is called off."""
    return Row(f"status: {name}", (), HostedLimit, words, 1, SENT_ANEW, script)


def problem(kind, *place, message="no"):
    return {"loc": ["body", *(place or ("reference_images", 0, "image_url"))], "msg": message, "type": kind}


NOT_LOST = r"Request [0-9a-f-]{36} is not lost.*not sent a second time.*put [0-9a-f-]{36} into force_resubmit"
FOREIGN = [{"loc": ["path", "request_id"], "msg": "not an id", "type": "uuid_parsing"}]
FIELDS = [problem("less_than", "num_images", message="ensure this value is at most 8"), problem("face_detection_error")]
OLD_STYLE = [problem("value_error.missing", "prompt", message="field required")]
FAILED = faults.with_values(status="COMPLETED", error="CUDA out of memory", error_type="runner_server_error")
TIMEOUT = {"detail": "Request timed out", "error_type": "request_timeout"}

ROWS = (
    # Did it arrive?
    unsure("answer lost after accept", faults.accept_then_drop, bill=1),
    unsure("no answer in time, accepted", faults.accept_then_stall, bill=1),
    unsure("no answer in time, not accepted", faults.stall, bill=0),
    unsure("reset while the body is sent", faults.reset, bill=0),
    unsure("answer cut off", faults.truncated, bill=1),
    unsure("answer of the wrong length", faults.wrong_length, bill=1),
    unsure("answer that drips", faults.drip(0.1), bill=1),
    unsure("408", faults.answer(408, {"detail": "timeout"}), bill=0),
    unsure("500", faults.answer(500, {"detail": "Internal server error"}), bill=0),
    unsure("502 of a gateway, accepted", faults.accepted(faults.gateway(502)), bill=1),
    unsure("503 of a gateway", faults.gateway(503), bill=0),
    unsure("504 of a gateway", faults.gateway(504), bill=0),
    unsure("no JSON", faults.served(b"hello", "text/plain"), bill=0),
    unsure("JSON without a request id", faults.without("request_id"), bill=1),
    unsure("redirect", faults.redirect("https://example.org/"), bill=0),
    # It did not, and says so.
    refused("401", 401, "No user found for Key ID and Secret", "key is wrong.*FAL_KEY"),
    refused("403 of a scope", 403, "Forbidden", "scope API"),
    refused("404", 404, 'Application "pulid" not found', "does not know it"),
    refused("413", 413, "Payload too large", "transport to upload"),
    refused("422 with a list", 422, FIELDS, r"num_images: ensure this value is at most 8; reference 1.*face"),
    refused("422 in the old style", 422, OLD_STYLE, "prompt: field required"),
    refused("422 with a text", 422, "Not today", "Not today.*refused these values"),
    refused("403 locked", 403, "User is locked. Reason: Exhausted balance.", "locked.*balance.*support"),
    submit("422 without a body", faults.answer(422, b""), Refused, "HTTP 422.*refused these values", 0, SENT_NOW),
    submit("429 for good", faults.busy(), Refused, "HTTP 429.*busy", 0, SENT_NOW),
    submit("429 for long", faults.busy("3600"), Refused, "HTTP 429.*busy", 0, SENT_NOW),
    submit("429 once", faults.busy(), None, "", 1, PAID, nth=1),
    submit("429 once, with Retry-After", faults.busy("1"), None, "", 1, PAID, nth=1),
    # Waiting.
    passing("status", "lost answer", faults.accept_then_drop),
    passing("status", "502 of a gateway", faults.gateway(502)),
    passing("status", "429", faults.busy("1")),
    passing("status", "500", faults.answer(500, {"detail": "Internal"})),
    passing("status", "408", faults.answer(408, b"")),
    passing("status", "logs of every type", faults.with_values(logs=[7, {"message": {}}, "a\x1b[2J", None])),
    passing("status", "logs of none", faults.with_values(logs=5, metrics=[1], queue_position="x")),
    passing("status", "error of another type", faults.with_values(error=[], error_type=7)),
    passing("status", "no JSON", faults.served(b"<html>", "text/html")),
    passing("status", "unknown", faults.with_values(status="DREAMING")),
    passing("status", "logs null", faults.with_values(logs=None)),
    passing("status", "no logs", faults.without("logs")),
    polling("401", faults.answer(401, {"detail": "No user found"}), "HTTP 401.*key is wrong.*request [0-9a-f-]{36}"),
    polling("404", faults.answer(404, {"detail": "Request not found"}), "HTTP 404.*expired.*request [0-9a-f-]{36}"),
    polling("500", faults.answer(500, {"detail": "Internal"}), f"HTTP 500.*{NOT_LOST}"),
    polling("JSON without an end", faults.served(b'{"logs":' + b"[" * 10**5, "application/json"), NOT_LOST, BadAnswer),
    polling("a status of another type", faults.with_values(status=7), NOT_LOST, error=BadAnswer),
    polling("no answer, ever", faults.stall, r"no whole answer", error=HostedError),
    polling("redirect", faults.redirect("https://example.org/"), "HTTP 302", error=HostedError),
    polling("nothing in it", faults.answer(200, {}), "lacks what must be in it: status", error=BadAnswer),
    Row("status: queued once more", (), None, "", 1, PAID, ("IN_PROGRESS", 1, "COMPLETED")),
    endless("never done", (1, "IN_PROGRESS"), r"Waited 0\.3 s for the run \(run_limit\).*asked to stop"),
    endless("never taken up", (1,), r"Waited 0\.3 s in the queue \(queue_limit\).*out of the queue"),
    Row("status: COMPLETED with error and result", on("status", FAILED), JobFailed, "memory.*not billed", 1, SENT_ANEW),
    # The result.
    passing("result", "still in progress", faults.answer(400, {"detail": "Request is still in progress"})),
    passing("result", "502 of a gateway", faults.gateway(502)),
    passing("result", "bare 500", faults.answer(500, {"detail": "Internal"})),
    passing("result", "bare 408", faults.answer(408, b"")),
    passing("result", "cut off", faults.truncated),
    passing("result", "no seed", faults.without("seed")),
    passing("result", "seed beyond 64 bits", faults.with_values(seed=2**70)),
    result("422 with a list", faults.model_error(422, FIELDS, False), "num_images.*reference 1.*face"),
    result("500 of the runner", faults.model_error(500, "Oops", True, "runner_server_error"), "500.*Oops.*not billed"),
    result("422 with a text", faults.model_error(422, "Bad prompt"), f"422.*Bad prompt.*{NOT_LOST}", Refused, PAID),
    result("bare 500", faults.answer(500, {"detail": "Oops"}), f"HTTP 500.*Oops.*{NOT_LOST}", Refused, PAID),
    result("500 that bills nothing", faults.answer(500, b"", {"x-fal-billable-units": "0"}), NOT_LOST, Refused, PAID),
    result("499", faults.answer(499, b""), NOT_LOST, Refused, PAID),
    result("error that is about our asking", faults.model_error(422, FOREIGN), NOT_LOST, Refused, PAID),
    result("JSON without an end", faults.served(b"[" * 10**5, "application/json"), NOT_LOST, BadAnswer, PAID),
    result("a list", faults.answer(200, []), NOT_LOST, BadAnswer, PAID),
    result(
        "NaN in the place of pictures", faults.served(b'{"images": NaN}', "application/json"), NOT_LOST, BadAnswer, PAID
    ),
    result("503 of the runner", faults.model_error(503, "x", error_type="runner_connection_error"), "503.*not billed"),
    result("content check", faults.model_error(422, [problem("content_policy_violation")]), "content check refused"),
    result("unread reference", faults.model_error(422, [problem("file_download_error")]), "reference 1.*some hosts"),
    result("start limit", faults.answer(504, TIMEOUT, {"X-Fal-Request-Timeout-Type": "user"}), "nothing ran"),
    result("408", faults.answer(408, {"detail": "x"}), f"HTTP 408.*{NOT_LOST}", Refused, PAID),
    result("expired", faults.answer(404, {"detail": "Request not found"}), "expired", Refused, PAID),
    result("no pictures", faults.with_values(images=[]), "lacks what must be in it: images", BadAnswer, PAID),
    result(
        "a picture without url",
        faults.with_values(images=[{}]),
        r"lacks what must be in it: images\.0",
        BadAnswer,
        PAID,
    ),
    # The picture.
    passing("download", "gone in the middle", faults.truncated),
    passing("download", "lost connection", faults.reset),
    passing("download", "502 of a gateway", faults.gateway(502)),
    picture("expired", faults.answer(404, "gone"), "expired.*7 days", Refused),
    picture("expired and said so", faults.answer(410, "gone"), "expired.*7 days", Refused),
    picture("too large, as declared", faults.declared(1 << 30), "larger than 1 MiB"),
    picture("too large, as it turns out", faults.endless(), "larger than 1 MiB"),
    picture("of another type", faults.served(b"<html>", "text/html"), "Expected a picture.*text/html"),
    picture("no picture", faults.served(b"not a picture at all"), "PNG, JPEG or WebP"),
    picture("damaged", faults.served(b"\x89PNG\r\n\x1a\n" + bytes(99)), "damaged"),
    picture("a bomb", faults.served(faults.png_bomb()), "30000 x 30000"),
    picture("a drip", faults.drip(0.2), "did not arrive within", HostedError),
    picture("silence", faults.stall, "did not arrive within", HostedError),
    picture("redirect to the metadata", faults.redirect("http://169.254.169.254/x"), "address", HostedError),
    picture("redirect inside", faults.redirect("https://0177.1/a.png"), "public https address", HostedError),
    elsewhere("plain http", "http://pictures.example/a.png", "https"),
    elsewhere("private number", "https://192.168.0.2/a.png", "public https address.*host '192.168.0.2'"),
    elsewhere("IPv6 that means a private one", "https://[::ffff:10.0.0.1]/a.png", "public https address"),
    elsewhere("with a user name", "https://me:pw@pictures.example/a.png", "user name"),
    elsewhere("another port", "https://pictures.example:8443/a.png", "port 8443"),
    elsewhere("a name that leads to a private address", "https://inside.example/a.png", "private address"),
    elsewhere("a file", "file:///etc/passwd", "https"),
    elsewhere("a number in another form", "https://2130706433/a.png", "public https address"),
    picture("a warning", faults.served(faults.png_bomb(15_000)), "15000 x 15000"),
)


@pytest.fixture
def names(monkeypatch):
    """Names that lead to private addresses."""
    known = socket.getaddrinfo

    def look_up(host, port, *arguments, **options):
        if host == "inside.example":
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.0.0.1", port))]
        return known(host, port, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)


LIMITS = Limits(queue=0.3, run=0.3, total=5)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_faults(fal, tmp_path, names, row):
    fal.script = row.script
    for planned in row.faults:
        fal.plan(*planned)
    limits = LIMITS if row.error is HostedLimit else Limits()
    if row.error is None:
        assert len(generate(fal, tmp_path, limits=limits).images) == 1
    else:
        with pytest.raises(row.error, match=f"(?s){row.words}") as caught:
            generate(fal, tmp_path, limits=limits)
        assert_fit_to_show(caught.value, fal, tmp_path)
    assert fal.bill == row.bill <= 1
    clear(fal)
    what, bill = row.again
    if what == REFUSED:
        with pytest.raises(AmbiguousSubmit, match=DASHBOARD):
            perform(fal, tmp_path)
    else:
        assert len(perform(fal, tmp_path).images) == 1
    assert fal.bill == bill


def clear(fal):
    fal._plans.clear()
    fal.script = ("COMPLETED",)


def assert_fit_to_show(error, fal, folder):
    """No part of the key, no path, no header in the message, nor in what it was raised from."""
    while error is not None:
        for part in (*fal.key.split(":"), str(folder), "Authorization"):
            assert part not in str(error) + repr(error)
        error = error.__cause__ or error.__context__


# --- what the table does not say ---


def test_the_backup_address_is_tried_when_fals_own_cannot_be_reached(fal, tmp_path, outside):
    with pytest.raises(HostedError, match=r"queue\.falrun\.com did not get all of it"):
        perform(fal, tmp_path, PULID_FAL_QUEUE_URL="")  # fal's own, which is not there in a test
    assert outside == ["queue.fal.run", "queue.falrun.com"]
    outside.clear()


# --- the journal's disk ---


@contextmanager
def full_disk():
    """No file of this process may grow; connections may."""
    resource = pytest.importorskip("resource", reason="this system has no limit on files")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_nothing_is_sent_when_the_journal_cannot_be_written(fal, tmp_path):
    with full_disk() as fill:
        fill()
        with pytest.raises(HostedError, match=r"journal.*could not be written.*free space") as caught:
            perform(fal, tmp_path)
    assert_fit_to_show(caught.value, fal, tmp_path)
    assert fal.requests == []


def test_pictures_come_although_the_disk_fills_up_after_the_request_was_accepted(fal, tmp_path, caplog):
    generate(fal, tmp_path, seed=1)  # the journal is there
    with full_disk() as fill:

        async def accepted_then_full(call):
            response = await call.handle()
            fill()
            return response

        fal.plan("submit", 1, accepted_then_full)
        outcome = perform(fal, tmp_path)
    assert len(outcome.images) == 1
    assert outcome.request_id in caplog.text  # so that it can be found again
    assert fal.bill == 2  # one for each seed


@pytest.mark.parametrize("fault", [faults.answer(404, "gone"), faults.served(b"no picture")])
def test_a_picture_that_cannot_be_had_takes_none_of_the_others_with_it(fal, tmp_path, fault):
    fal.plan("download", 2, fault)
    outcome = generate(fal, tmp_path, num_images=3)
    assert len(outcome.images) == 2 and outcome.info["notes"][0].startswith("Picture 2 is missing: ")
    assert len(generate(fal, tmp_path, num_images=3).images) == 3  # it was not kept as if it were all
    assert fal.bill == 1


# --- calling off ---


def test_a_cancel_that_comes_too_late_keeps_what_was_paid_for(fal, tmp_path):
    fal.script, fal.obeys = ("IN_PROGRESS",), False

    async def done_then_late(call):
        fal.script = ("COMPLETED",)
        [job] = fal.jobs.values()
        fal._settle(job)
        return await call.handle()

    fal.plan("cancel", 1, done_then_late)
    outcome = generate(fal, tmp_path, limits=LIMITS)
    assert len(outcome.images) == 1
    assert fal.bill == 1


@pytest.mark.parametrize("fault", [faults.stall, faults.gateway(502), faults.answer(405, {})])
def test_a_cancel_that_nobody_takes_is_said_and_not_repeated(fal, tmp_path, fault):
    fal.script = ("IN_PROGRESS",)
    fal.plan("cancel", EVERY, fault)
    with pytest.raises(HostedLimit, match=r"goes on|may go on"):
        generate(fal, tmp_path, limits=LIMITS)
    assert len(fal.seen("cancel")) == 1
    clear(fal)
    assert len(perform(fal, tmp_path).images) == 1  # and it is there when it is queued again
    assert fal.bill == 1


# --- proxies that add the key ---


def through(proxy):
    return {"FAL_KEY": "", "PULID_FAL_PROXY_URL": proxy}


@pytest.mark.parametrize("proxy", ["proxy_url", "formula_proxy_url"])
@pytest.mark.parametrize("how", ["data URI", "upload"])
def test_all_goes_through_a_proxy_without_a_key(fal, tmp_path, proxy, how):
    outcome = generate(fal, tmp_path, through(getattr(fal, proxy)), transport=how)
    assert len(outcome.images) == 1
    assert {request.authorization for request in fal.requests if request.origin in ("proxy", "cdn")} == {None}
    assert fal.bill == 1


def test_a_proxy_passes_a_cancel_on_or_the_request_is_kept(fal, tmp_path):
    fal.script = ("IN_PROGRESS",)
    for proxy, words in ((fal.proxy_url, "asked to stop"), (fal.formula_proxy_url, "does not pass a cancel on")):
        with pytest.raises(HostedLimit, match=words):
            generate(fal, tmp_path / words, through(proxy), limits=LIMITS)
    fal.script = ("COMPLETED",)
    outcome = generate(fal, tmp_path / words, through(fal.formula_proxy_url))
    assert len(outcome.images) == 1
    assert fal.bill == 2  # one through each


# --- where the key goes ---


@pytest.mark.parametrize("route", ["submit", "status", "result"])
@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_calls_with_the_key_follow_no_redirect(fal, tmp_path, route, status):
    fal.plan(route, EVERY, faults.redirect(f"{fal.foreign_url}/x", status))
    with pytest.raises(HostedError):
        perform(fal, tmp_path)
    assert fal.seen("foreign") == []
    assert fal.bill <= 1


@pytest.mark.parametrize(
    ("route", "fault", "words"),
    [
        ("initiate", faults.answer(401, {"detail": "no"}), "Uploading a reference picture failed.*key is wrong"),
        ("initiate", faults.answer(500, {"detail": "no"}), "Uploading a reference picture failed"),
        ("initiate", faults.answer(200, {}), "lacks what must be in it: upload_url"),
        ("initiate", faults.with_values(upload_url="http://169.254.169.254/x"), "address"),
        ("initiate", faults.with_values(upload_url="https://inside.example/x"), "private address"),
        ("put", faults.answer(403, {"detail": "no"}), "Uploading a reference picture failed.*403"),
        ("put", faults.redirect("https://example.org/"), "Uploading a reference picture failed"),
    ],
)
def test_a_reference_that_cannot_be_uploaded_stops_before_it_is_paid(fal, tmp_path, names, route, fault, words):
    fal.plan(route, EVERY, fault)
    with pytest.raises(HostedError, match=words):
        generate(fal, tmp_path, transport="upload")
    assert fal.bill == 0
    assert fal.seen("submit") == []


# --- money, by kind ---


def unknown(fal, folder):
    """The name of a request of which nobody knows whether it was accepted (it was)."""
    fal.plan("submit", 1, faults.accept_then_drop)
    with pytest.raises(AmbiguousSubmit, match=DASHBOARD) as caught:
        generate(fal, folder)
    return re.search(r"put (local-\w+) into", str(caught.value))[1]


def test_giving_up_a_request_of_unknown_outcome_sends_again_once(fal, tmp_path):
    name = unknown(fal, tmp_path)
    first = generate(fal, tmp_path, give_up=name)
    again = generate(fal, tmp_path, give_up=name)  # as a saved graph says it for ever
    assert (fal.bill, again.request_id) == (2, first.request_id)
    assert f"force_resubmit names {name}, but {first.request_id} answers" in again.info["notes"][-1]


OTHER_KEY = {"PULID_FAL_PROXY_URL": "", "FAL_KEY": "other-key:of-the-same-account"}


def test_another_key_does_not_pay_again_for_what_nobody_knows(fal, tmp_path):
    unknown(fal, tmp_path)
    with pytest.raises(AmbiguousSubmit, match=DASHBOARD):
        perform(fal, tmp_path, **OTHER_KEY)
    assert fal.bill == 1


def test_a_photograph_that_is_compressed_in_another_way_is_the_same(fal, tmp_path):
    file = io.BytesIO()
    Image.open(io.BytesIO(encode(FACE).data)).save(file, "PNG", compress_level=0)
    line = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    assert generate(fal, tmp_path).request_id == generate(fal, tmp_path, references=read_lines(line)).request_id
    assert fal.bill == 1


@pytest.mark.parametrize("route", ["status", "result", "download"])
def test_a_kept_result_that_is_damaged_and_over_is_asked_for_in_words(fal, tmp_path, route):
    kept = tmp_path / "results" / (first := generate(fal, tmp_path)).request_id / "outcome.json"
    kept.unlink()
    assert generate(fal, tmp_path).request_id == first.request_id  # fetched again
    kept.unlink()
    fal.plan(route, EVERY, faults.answer(404, {"detail": "gone"}))
    with pytest.raises(Gone, match=rf"expired.*paid for, anew, put {first.request_id} into force_resubmit"):
        generate(fal, tmp_path)
    assert fal.bill == 1
    clear(fal)
    assert generate(fal, tmp_path, give_up=first.request_id).request_id != first.request_id
    assert fal.bill == 2


LARGE = encode(torch.rand(1600, 1600, 3, generator=torch.Generator().manual_seed(1)), as_is=True)  # 2 MB
AT_LENGTH = {"references": [LARGE], "transport": "data URI"}


@pytest.mark.parametrize("then", [faults.stall, faults.reset])
def test_a_body_of_which_no_byte_moves_any_more_was_not_accepted(fal, tmp_path, then):
    fal.plan("submit", EVERY, faults.unread(then))
    with pytest.raises(Unreachable, match=r"did not get all of it.*nothing was accepted"):
        generate(fal, tmp_path, **AT_LENGTH)
    clear(fal)
    generate(fal, tmp_path, **AT_LENGTH)
    assert fal.bill == 1


def test_a_slow_line_takes_as_long_as_it_needs(fal, tmp_path):
    fal.plan("submit", 1, faults.read_slowly(0.05))
    outcome = generate(fal, tmp_path, {"PULID_FAL_ANSWER_SECONDS": "2"}, **AT_LENGTH)
    [job] = fal.jobs.values()
    [reference] = job.input["reference_images"]
    assert len(reference["image_url"]) // faults.PIECE * 0.05 > 2  # longer than an answer may take
    assert (len(outcome.images), fal.bill) == (1, 1)


@pytest.mark.parametrize("why", ["interrupt", "limit"])
def test_what_is_not_wholly_sent_can_be_broken_off_and_costs_nothing(fal, tmp_path, why):
    fal.plan("submit", EVERY, faults.read_slowly(0.1))
    stop = threading.Event()
    limits = Limits(total=0.5) if why == "limit" else Limits()
    result = beside(helpers.generate, fal, tmp_path, a_job(limits=limits, **AT_LENGTH), watch=Watch(stop.is_set))
    wait_until(lambda: fal.seen("submit"))
    if why == "interrupt":
        stop.set()
    with pytest.raises(HostedLimit if why == "limit" else Interrupted):
        result()
    assert (fal.bill, fal.seen("cancel")) == (0, [])
    clear(fal)
    generate(fal, tmp_path, **AT_LENGTH)
    assert fal.bill == 1


def test_an_interrupt_during_a_submit_that_is_lost_is_told_as_what_it_is(fal, tmp_path, caplog):
    stop = threading.Event()
    fal.plan("submit", 1, faults.once(stop.is_set, faults.accept_then_drop))
    result = beside(helpers.generate, fal, tmp_path, watch=Watch(stop.is_set))
    wait_until(lambda: fal.seen("submit"))
    stop.set()
    with pytest.raises(AmbiguousSubmit, match=f"interrupted while it was being sent.*{DASHBOARD}"):
        result()
    assert "interrupted while it was being sent" in caplog.text
    with pytest.raises(AmbiguousSubmit, match="interrupted while it was being sent"):
        generate(fal, tmp_path)
    assert fal.bill == 1


# --- a way on ---


@pytest.mark.parametrize("route", ["status", "result", "download", "put"])
def test_the_total_limit_holds_while_a_call_stalls(fal, tmp_path, route):
    fal.plan(route, EVERY, faults.stall)
    job = a_job(limits=Limits(total=0.5), transport="upload")
    with pytest.raises(HostedLimit, match="total_limit"):
        beside(helpers.generate, fal, tmp_path, job)()  # waited for less long than a call may be silent
    assert fal.bill == (route != "put")


def test_a_journal_that_is_set_aside_stops_once_and_requests_can_be_fetched_by_id(fal, tmp_path):
    name = unknown(fal, tmp_path)
    [request_id] = fal.jobs
    (tmp_path / "hosted.sqlite").write_bytes(b"damaged" * 999)
    outcome = perform(fal, tmp_path, lambda service: jobs.fetch(request_id, Limits(), service))
    assert (outcome.request_id, fal.bill) == (request_id, 1)
    assert list(tmp_path.glob("hosted-set-aside-*.sqlite")) and name


# --- what it costs ---

PRICE = {"endpoint_id": "fal-ai/pulid", "unit_price": 0.0333, "unit": "images", "currency": "USD"}


@pytest.mark.parametrize(
    ("price", "words"),
    [
        (PRICE, "about $0.067"),
        ({**PRICE, "unit": "megapixels", "currency": "EUR", "unit_price": 10}, "about 0.031 EUR"),
        ({**PRICE, "unit": "compute seconds"}, None),
        ({**PRICE, "unit_price": "much"}, None),
        ({**PRICE, "endpoint_id": "fal-ai/other"}, None),
    ],
)
def test_what_it_will_cost_is_shown_before_sending(fal, tmp_path, price, words):
    fal.prices, told = [price], []
    environ = {"PULID_FAL_API_URL": fal.rest_url}
    outcome = helpers.generate(fal, tmp_path, a_job(num_images=2), told=told, **environ)
    helpers.generate(fal, tmp_path, a_job(seed=8), **environ)
    assert any(words and f"{words}; sending" in shown for shown in told) is bool(words)
    assert [note for note in outcome.info["notes"] if "about" in note] == (
        [f"By the service's price list it costs {words}."] if words else []
    )
    assert len(fal.seen("pricing")) == 1  # asked for once a day


@pytest.mark.parametrize(
    "fault", [faults.reset, faults.answer(500, b""), faults.answer(403, {}), faults.served(b"<html>")]
)
def test_without_a_price_list_there_is_no_estimate_and_nothing_else_is_missing(fal, tmp_path, fault):
    fal.plan("pricing", EVERY, fault)
    outcome = helpers.generate(fal, tmp_path, PULID_FAL_API_URL=fal.rest_url)
    assert (len(outcome.images), outcome.info["notes"], fal.bill) == (1, [], 1)
