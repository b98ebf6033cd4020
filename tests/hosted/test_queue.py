"""The queue on the wire, with a list for a transport: what is sent where, how often, what is made of answers."""

import asyncio
import json

import pytest
from pulid_sdxl.hosted.endpoints import Endpoints, Key
from pulid_sdxl.hosted.errors import AmbiguousSubmit, AnswerLost, BadAnswer, JobFailed, Refused, Unreachable
from pulid_sdxl.hosted.queue import CancelOutcome, QueueClient, SubmitOptions, check_id
from pulid_sdxl.hosted.transport import Reply
from pulid_sdxl.pulid.errors import InputError
from yarl import URL

ID = "764cabcf-b745-4b3e-ae38-1200304cf45b"
BASE = f"https://queue.fal.run/fal-ai/pulid/requests/{ID}"
URLS = {"status_url": f"{BASE}/status", "response_url": BASE, "cancel_url": f"{BASE}/cancel"}
KEY = Key("keyid-123456:secret-123456")
ACCEPTED = {"status": "IN_QUEUE", "request_id": ID, "queue_position": 0, **URLS}


def reply(status, body=b"", **headers):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Reply(status, {name.replace("_", "-"): value for name, value in headers.items()}, content)


class Line:
    """A transport that answers with a list, one after the other, and keeps what was sent."""

    def __init__(self, *answers):
        self.answers, self.sent, self.pauses = list(answers), [], []

    async def send(self, method, url, headers=None, body=None, terms=None):
        self.sent.append((method, str(url), dict(headers or {}), body, terms))
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def client(line, endpoints=None, key=KEY):
    async def sleep(seconds):
        line.pauses.append(seconds)

    return QueueClient(line.send, endpoints or Endpoints(), key, sleep=sleep)


def submit(line, endpoints=None, key=KEY, **options):
    return asyncio.run(client(line, endpoints, key).submit({"prompt": "x"}, SubmitOptions(**options)))


# ---- submit ----


def test_a_submit_is_the_input_itself_with_the_key_in_one_header():
    line = Line(reply(200, ACCEPTED))
    request_id = submit(line)
    [(method, url, headers, body, _)] = line.sent
    assert (method, url, json.loads(body)) == ("POST", "https://queue.fal.run/fal-ai/pulid", {"prompt": "x"})
    assert headers["Authorization"] == "Key keyid-123456:secret-123456"
    assert request_id == ID


def test_options_go_as_the_service_names_them():
    line = Line(reply(200, ACCEPTED))
    submit(line, webhook_url="https://me.example/a?b=c&d", lifetime=3600, access="forbid")
    [(_, url, headers, _, _)] = line.sent
    assert URL(url).query == {"fal_webhook": "https://me.example/a?b=c&d"}
    lifecycle = json.loads(headers["X-Fal-Object-Lifecycle-Preference"])
    assert lifecycle == {"expiration_duration_seconds": 3600, "initial_acl": {"default": "forbid"}}


@pytest.mark.parametrize("options", [{"runner_hint": "a\r\nb"}, {"runner_hint": "ü"}])
def test_options_that_cannot_be_sent_are_refused_before_anything_is(options):
    with pytest.raises(InputError):
        SubmitOptions(**options)


def test_only_a_connection_that_never_came_about_is_tried_at_the_backup_address():
    line = Line(Unreachable("no"), reply(200, ACCEPTED))
    submit(line)
    assert [URL(url).host for _, url, *_ in line.sent] == ["queue.fal.run", "queue.falrun.com"]


@pytest.mark.parametrize(
    "answer",
    [
        AnswerLost("x"),
        BadAnswer("x"),
        *(reply(status, b"<html>") for status in (301, 302, 307, 408, 500, 502, 503, 504)),
        *(reply(200, body) for body in (b"", b"<html>", [], {}, {"request_id": None}, {"request_id": "a b"})),
    ],
    ids=str,
)
def test_where_nobody_knows_nothing_is_sent_again(answer):
    line = Line(answer, *[reply(200, ACCEPTED)] * 3)
    with pytest.raises(AmbiguousSubmit):
        submit(line)
    assert len(line.sent) == 1


def test_a_busy_service_is_asked_again_when_it_says():
    line = Line(reply(429, b"", retry_after="7"), reply(429), reply(200, ACCEPTED))
    assert submit(line) == ID
    assert line.pauses[0] == 7 and 0.5 <= line.pauses[1] <= 1


@pytest.mark.parametrize(("answers", "calls"), [([reply(429)] * 9, 4), ([reply(429, b"", retry_after="3600")] * 9, 1)])
def test_a_busy_service_is_not_asked_for_ever(answers, calls):
    line = Line(*answers)
    with pytest.raises(Refused, match="busy"):
        submit(line)
    assert len(line.sent) == calls


# ---- through a proxy ----


def test_a_proxy_gets_the_target_and_no_key():
    line = Line(reply(200, ACCEPTED))
    submit(line, Endpoints(proxy=URL("https://proxy.example/api/fal/proxy")), key=None)
    [(method, url, headers, _, _)] = line.sent
    assert (method, url) == ("POST", "https://proxy.example/api/fal/proxy")
    assert headers["x-fal-target-url"] == "https://queue.fal.run/fal-ai/pulid"
    assert "Authorization" not in headers


def test_a_refused_proxy_is_told_as_the_proxys():
    with pytest.raises(Refused, match=r"HTTP 401.*for the proxy"):
        submit(Line(reply(401, {"detail": "no"})), Endpoints(proxy=URL("https://proxy.example/x")), key=None)


def test_a_key_is_not_even_by_mistake_sent_elsewhere():
    line = Line(reply(200))
    with pytest.raises(AssertionError, match="no key may go"):
        asyncio.run(client(line).call("GET", URL("https://v3.fal.media/a.png")))
    assert line.sent == []


def test_what_a_service_echoes_of_the_key_is_hidden():
    line = Line(reply(401, {"detail": "bad key keyid-123456:secret-123456"}, x_echo="secret-123456"))
    with pytest.raises(Refused) as caught:
        submit(line)
    assert "keyid-123456" not in str(caught.value) and "secret-123456" not in str(caught.value)


# ---- status, result, cancel ----


def ask(line, call):
    return asyncio.run(call(client(line), check_id(f" {ID}\n")))


@pytest.mark.parametrize("status", [408, 429, 499, 500, 502, 503, 504, 520])
@pytest.mark.parametrize("ask_for", [QueueClient.status, QueueClient.result])
def test_a_bare_status_says_nothing_of_the_job_and_is_asked_again(status, ask_for):
    once = Line(reply(status, {"detail": "x"}), reply(200, {"status": "COMPLETED", "images": [{"url": "u"}]}))
    always = Line(*[reply(status, b"<html>")] * 7)
    ask(once, ask_for)
    with pytest.raises(Refused) as caught:
        ask(always, ask_for)
    assert (len(once.sent), len(always.sent)) == (2, 7)
    assert "billed" not in str(caught.value)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (reply(422, {"detail": "x"}), Refused),
        (reply(422, {"detail": [{"loc": [], "msg": "m", "type": "missing"}]}), JobFailed),
        (reply(422, {"detail": [{"msg": "m"}]}), JobFailed),
        (reply(422, {"detail": [{"loc": ["path", "id"], "msg": "m", "type": "uuid"}]}), Refused),
        (reply(500, {"detail": "x"}, x_fal_error_type="runner_server_error"), JobFailed),
        (reply(504, b"", x_fal_request_timeout_type="user"), JobFailed),
        (reply(503, {"detail": "x", "error_type": "runner_disconnected"}), JobFailed),
        (reply(504, {"detail": "x", "error_type": "startup_timeout"}), JobFailed),
        (reply(400, {"detail": "bad"}), Refused),
        (reply(401, {"detail": "x", "error_type": "odd"}), Refused),
        (reply(403, {"detail": "User is locked."}), Refused),
        (reply(404, {"detail": "x"}), Refused),
        (reply(307, b"", location="https://evil.example"), Refused),
    ],
    ids=str,
)
def test_a_failed_job_differs_from_a_result_that_cannot_be_had_now(answer, error):
    # The journal gives up the first, and sends again when asked to; the second it goes on asking about.
    line = Line(answer)
    with pytest.raises(error, match=ID):
        ask(line, QueueClient.result)
    assert len(line.sent) == 1


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        (reply(202, {"status": "CANCELLATION_REQUESTED"}), CancelOutcome.REQUESTED),
        (reply(200, {"status": "OK"}), CancelOutcome.REMOVED),
        *((reply(200, no_proof), CancelOutcome.REQUESTED) for no_proof in ({"success": False}, ["OK"], b"<html>", b"")),
        (reply(400, {"status": "ALREADY_COMPLETED"}), CancelOutcome.TOO_LATE),
        (reply(404, {"status": "NOT_FOUND"}), CancelOutcome.UNKNOWN),
        (reply(405), CancelOutcome.NOT_PASSED_ON),
        (reply(503), CancelOutcome.NO_ANSWER),
        (AnswerLost("x"), CancelOutcome.NO_ANSWER),
        (Unreachable("x"), CancelOutcome.NO_ANSWER),
    ],
    ids=str,
)
def test_a_cancel_is_sent_once_and_its_answer_told(answer, outcome):
    line = Line(answer, answer)
    assert ask(line, QueueClient.cancel) is outcome
    method, url, _, _, terms = line.sent[0]
    assert (method, url, terms.seconds) == ("PUT", f"{BASE}/cancel", 10)


@pytest.mark.parametrize("text", ["", "a", "../../x", "a/b/c/d", "id?x=1", "x" * 200, "ab cd ef"])
def test_what_is_no_request_id_is_refused(text):
    with pytest.raises(InputError, match="A request id looks like"):
        check_id(text)
