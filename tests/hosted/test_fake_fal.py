"""The fake service against the real, unmodified fal-client, and what no client of its own can show.

fal-client has to pass on the fake, and has to lose money on it where it does on the real service.
"""

import io
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

    @pytest.mark.parametrize("fault", [faults.accept_then_drop, faults.accept_then_stall], ids=["drop", "stall"])
    def test_pays_twice_for_an_answer_that_is_lost(self, pointed, fault):
        pointed.plan("submit", 1, fault)
        with sync_client(pointed, default_timeout=0.3) as client:
            handle = client.submit(MODEL, ARGUMENTS)
        assert pointed.bill == 2
        first, second = pointed.jobs
        assert handle.request_id == second != first  # nobody will ever ask for the first


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


def test_nothing_here_can_leave_this_machine(outside):
    with pytest.raises(OSError, match="loopback"):
        urllib.request.urlopen("https://queue.fal.run/", timeout=1)
    with pytest.raises(OSError, match="loopback"):
        urllib.request.urlopen("http://93.184.215.14/", timeout=1)
    assert outside == ["queue.fal.run", "93.184.215.14"]
    outside.clear()
