"""The fake service against the real, unmodified fal-client, and what no client of its own can show.

fal-client has to pass on the fake, and has to lose money on it where it does on the real service.
"""

import io
import json
import urllib.error
import urllib.request
from contextlib import contextmanager

import fal_client
import numpy as np
import pytest
from PIL import Image
from pulid_sdxl.tools.fakes import fake_faults as faults
from pulid_sdxl.tools.fakes.fake_fal import MODEL, FakeFal, KeyLeak
from pulid_sdxl.tools.fakes.fake_model import png

FACE = png(Image.new("RGB", (8, 8), (200, 150, 120)))
ARGUMENTS = {
    "reference_images": [{"image_url": fal_client.encode(FACE, "image/png")}],
    "prompt": "portrait",
    "image_size": {"width": 64, "height": 96},
    "seed": 7,
}
BODY = json.dumps(ARGUMENTS).encode()


@pytest.fixture
def pointed(fal, monkeypatch):
    """fal-client's address set to the fake's, its retries made quick; nothing else of it is touched."""
    monkeypatch.setattr(fal_client.client, "QUEUE_URL_FORMAT", f"{fal.queue_url}/")
    monkeypatch.setattr(fal_client.client, "BASE_DELAY", 0.001)
    return fal


@contextmanager
def sync_client(fal, **options):
    """A fal-client that is closed afterwards, which it does not do itself."""
    client = fal_client.SyncClient(key=fal.key, **options)
    yield client
    client._client.close()


@pytest.fixture
def client(pointed):
    with sync_client(pointed) as client:
        yield client


def call(url, method="GET", body=None, headers=None):
    """(status, headers, content) of one request, errors included."""
    request = urllib.request.Request(url, data=body, method=method, headers=headers or {})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, dict(answer.headers), answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, dict(error.headers), error.read()


def authorized(fal, **more):
    return {"Authorization": f"Key {fal.key}", "Content-Type": "application/json", **more}


def submit(fal, arguments=ARGUMENTS, query="", **headers):
    status, _, content = call(
        f"{fal.queue_url}/{MODEL}{query}", "POST", json.dumps(arguments).encode(), authorized(fal, **headers)
    )
    assert status == 200, content
    return json.loads(content)


def get(fal, url):
    status, headers, content = call(url, headers=authorized(fal))
    return status, headers, json.loads(content)


def finish(fal, arguments=ARGUMENTS, **headers):
    """(status, headers, body) of a job's result."""
    handle = submit(fal, arguments, **headers)
    fal.script = ("COMPLETED",)
    get(fal, handle["status_url"])
    return get(fal, handle["response_url"])


def pixels(url):
    status, _, content = call(url)
    assert status == 200
    return np.asarray(Image.open(io.BytesIO(content)))


class TestFalClient:
    def test_subscribes(self, pointed, client):
        pointed.script = (2, 1, 0, "IN_PROGRESS", "IN_PROGRESS", "COMPLETED")
        seen = []
        result = client.subscribe(MODEL, ARGUMENTS, with_logs=True, on_queue_update=seen.append)
        assert [update.position for update in seen[:3]] == [2, 1, 0]
        assert [len(update.logs) for update in seen[3:5]] == [4, 4]
        assert isinstance(seen[5], fal_client.Completed)
        assert result["seed"] == 7
        assert pixels(result["images"][0]["url"]).shape == (96, 64, 3)
        assert pointed.bill == 1

    def test_submits_asks_and_collects(self, pointed, client):
        pointed.script = (0, "IN_PROGRESS", "COMPLETED")
        handle = client.submit(MODEL, ARGUMENTS, webhook_url=None, priority="low", hint="runner", start_timeout=30)
        assert client.status(MODEL, handle.request_id, with_logs=True) == fal_client.Queued(0)
        assert isinstance(client.status(MODEL, handle.request_id), fal_client.InProgress)
        done = client.status(MODEL, handle.request_id, with_logs=True)
        assert done.metrics == {"inference_time": 1.25}
        assert done.error is None
        assert client.result(MODEL, handle.request_id)["images"][0]["file_size"] > 0
        [request] = pointed.seen("submit")
        sent = {name: request.headers[name] for name in request.headers if name.startswith("x-fal")}
        assert sent["x-fal-queue-priority"] == "low"
        assert sent["x-fal-runner-hint"] == "runner"
        assert float(sent["x-fal-request-timeout"]) == 30

    def test_cancels(self, pointed, client):
        pointed.script = (1,)
        handle = client.submit(MODEL, ARGUMENTS)
        client.cancel(MODEL, handle.request_id)
        with pytest.raises(fal_client.FalClientHTTPError) as caught:
            client.result(MODEL, handle.request_id)
        assert (caught.value.status_code, caught.value.error_type) == (499, "client_cancelled")

    def test_sees_the_models_own_error(self, pointed, client):
        with pytest.raises(fal_client.FalClientHTTPError) as caught:
            client.subscribe(MODEL, {**ARGUMENTS, "mode": "extremely style", "face": 1})
        assert caught.value.status_code == 422
        assert {tuple(entry["loc"]) for entry in caught.value.message} == {("body", "mode"), ("body", "face")}
        assert caught.value.response_headers["x-fal-billable-units"] == "0"

    @pytest.mark.parametrize("fault", [faults.accept_then_drop, faults.accept_then_stall], ids=["drop", "stall"])
    def test_pays_twice_for_an_answer_that_is_lost(self, pointed, fault):
        pointed.plan("submit", 1, fault)
        with sync_client(pointed, default_timeout=0.3) as client:
            handle = client.submit(MODEL, ARGUMENTS)
        assert pointed.bill == 2
        first, second = pointed.jobs
        assert handle.request_id == second != first  # nobody will ever ask for the first


class TestQueue:
    @pytest.mark.parametrize(
        ("authorization", "words"),
        [(None, "required"), ("Key abc", "Expected '<key_id>:<key_secret>'"), ("Key a:b", "No user found")],
    )
    def test_asks_for_the_key(self, fal, authorization, words):
        headers = {"Authorization": authorization} if authorization else {}
        status, _, content = call(f"{fal.queue_url}/{MODEL}", "POST", b"{}", headers)
        assert status == 401
        assert words in json.loads(content)["detail"]
        assert fal.bill == 0

    def test_states_have_their_http_codes_and_cumulative_logs(self, fal):
        fal.script = (1, "IN_PROGRESS", "IN_PROGRESS", "COMPLETED")
        url = submit(fal)["status_url"]
        answers = [get(fal, f"{url}?logs=1"), get(fal, url), get(fal, f"{url}/?logs=true"), get(fal, f"{url}?logs=0")]
        assert [status for status, *_ in answers] == [202, 202, 202, 200]
        bodies = [body for *_, body in answers]
        assert bodies[0]["queue_position"] == 1
        assert "logs" not in bodies[0]
        assert bodies[1]["logs"] is None
        assert [line["message"] for line in bodies[2]["logs"]] == ["Warming up", "Denoising", "Denoising"]
        assert bodies[3]["logs"] is None

    @pytest.mark.parametrize(
        ("script", "obeys", "answer", "result"),
        [
            ((0,), True, (200, "OK"), 499),
            (("IN_PROGRESS",), True, (202, "CANCELLATION_REQUESTED"), 499),
            (("IN_PROGRESS",), False, (202, "CANCELLATION_REQUESTED"), 200),
            (("COMPLETED",), True, (400, "ALREADY_COMPLETED"), 200),
        ],
    )
    def test_cancelling(self, fal, script, obeys, answer, result):
        fal.script, fal.obeys = script, obeys
        handle = submit(fal)
        get(fal, handle["status_url"])
        status, _, content = call(handle["cancel_url"], "PUT", headers=authorized(fal))
        assert (status, json.loads(content)["status"]) == answer
        fal.script = ("COMPLETED",)
        get(fal, handle["status_url"])
        assert get(fal, handle["response_url"])[0] == result

    def test_the_schema_counts_when_the_job_runs(self, fal):
        wrong = {"prompt": 1, "num_images": 9, "seed": -1}
        status, headers, body = finish(fal, wrong)
        assert status == 422
        assert [entry["loc"][1] for entry in body["detail"]] == ["reference_images", "prompt", "num_images", "seed"]
        assert headers["X-Fal-Retryable"] == "false"
        assert fal.bill == 1


class TestStorage:
    def initiate(self, fal):
        body = json.dumps({"file_name": "a.png", "content_type": "image/png"}).encode()
        url = f"{fal.rest_url}/storage/upload/initiate?storage_type=fal-cdn-v3"
        lifetime = {"X-Fal-Object-Lifecycle": json.dumps({"expiration_duration_seconds": 3600})}
        return json.loads(call(url, "POST", body, authorized(fal, **lifetime))[2])

    def test_uploads_expire(self, fal):
        urls = self.initiate(fal)
        call(urls["upload_url"], "PUT", FACE, {"Content-Type": "image/png"})
        fal.clock.advance(3599)
        assert call(fal.here(urls["file_url"]))[0] == 200
        fal.clock.advance(1)
        assert call(fal.here(urls["file_url"]))[0] == 404


class TestTheKey:
    @pytest.mark.parametrize("origin", ["cdn", "foreign", "proxy"])
    def test_must_not_reach(self, origin):
        with pytest.raises(KeyLeak, match=f"{origin}: GET /x"), FakeFal() as fal:
            call(f"{getattr(fal, f'{origin}_url')}/x".replace("/server-proxy", ""), headers=authorized(fal))

    @pytest.mark.parametrize("place", ["query", "header", "body"])
    def test_must_not_stand_beside_the_authorization(self, place):
        with pytest.raises(KeyLeak, match="queue"), FakeFal() as fal:
            secret = fal.key.partition(":")[2]
            url = f"{fal.queue_url}/{MODEL}" + (f"?key={secret}" if place == "query" else "")
            headers = authorized(fal, **({"X-Key": secret} if place == "header" else {}))
            call(url, "POST", secret.encode() if place == "body" else b"{}", headers)


class TestProxies:
    def through(self, proxy, target, method="POST", body=BODY, **headers):
        headers = {"Content-Type": "application/json", "x-fal-target-url": target, **headers}
        status, _, content = call(proxy, method, body, {name: value for name, value in headers.items() if value})
        return status, content

    @pytest.mark.parametrize("flavour", ["proxy_url", "formula_proxy_url"])
    @pytest.mark.parametrize("named", ["https://queue.fal.run", None])
    def test_add_the_key(self, fal, flavour, named):
        status, content = self.through(getattr(fal, flavour), f"{named or fal.queue_url}/{MODEL}")
        assert status == 200
        assert json.loads(content)["request_id"] in fal.jobs
        status_url = json.loads(content)["status_url"]
        assert self.through(getattr(fal, flavour), f"{status_url}?logs=1", "GET", None)[0] == 202

    def test_the_published_package_has_a_list_of_targets(self, fal):
        cancel = f"https://queue.fal.run/{MODEL}/requests/{submit(fal)['request_id']}/cancel"
        assert self.through(fal.proxy_url, cancel, "PUT", b"")[0] == 202
        upload = "https://rest.fal.ai/storage/upload/initiate?storage_type="
        body = json.dumps({"file_name": "a.png", "content_type": "image/png"}).encode()
        lifetime = {"x-fal-object-lifecycle": json.dumps({"expiration_duration_seconds": 3600})}
        assert self.through(fal.proxy_url, f"{upload}fal-cdn-v3", body=body, **lifetime)[0] == 200
        assert self.through(fal.proxy_url, f"{upload}gcs", body=body)[0] == 400
        assert self.through(fal.proxy_url, "https://rest.fal.ai/storage/auth/token", body=b"{}")[0] == 400
        assert self.through(fal.proxy_url, "https://queue.falrun.com/x")[0] == 400


def test_nothing_here_can_leave_this_machine(outside):
    with pytest.raises(OSError, match="loopback"):
        urllib.request.urlopen("https://queue.fal.run/", timeout=1)
    with pytest.raises(OSError, match="loopback"):
        urllib.request.urlopen("http://93.184.215.14/", timeout=1)
    assert outside == ["queue.fal.run", "93.184.215.14"]
    outside.clear()
