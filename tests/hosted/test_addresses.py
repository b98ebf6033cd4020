"""Where requests go, and what may be sent there."""

import pytest
from pulid_sdxl.hosted.addresses import BACKUP_QUEUE, Addresses
from pulid_sdxl.pulid.errors import UnsafeAddress
from yarl import URL


def test_without_settings_requests_go_to_fal():
    assert Addresses.from_environment({}) == Addresses(
        queue=URL("https://queue.fal.run"),
        run=URL("https://fal.run"),
        rest=URL("https://rest.fal.ai"),
        cdn=URL("https://v3.fal.media"),
    )


def test_every_address_can_be_set():
    names = ("queue", "run", "rest", "cdn", "proxy")

    found = Addresses.from_environment({f"PULID_FAL_{name.upper()}_URL": f"https://{name}.example/" for name in names})

    assert {name: str(getattr(found, name)) for name in names} == {name: f"https://{name}.example" for name in names}


def test_fals_own_variables_are_honoured_below_ours():
    host = Addresses.from_environment({"FAL_RUN_HOST": "fal.example"})
    both = Addresses.from_environment({"FAL_RUN_HOST": "fal.example", "FAL_QUEUE_RUN_HOST": "q.example"})
    ours = Addresses.from_environment(
        {"FAL_QUEUE_RUN_HOST": "q.example", "PULID_FAL_QUEUE_URL": "https://ours.example"}
    )

    assert (host.run, host.queue) == (URL("https://fal.example"), URL("https://queue.fal.example"))
    assert both.queue == URL("https://q.example")
    assert ours.queue == URL("https://ours.example")


@pytest.mark.parametrize("url", ["http://127.0.0.1:8000", "http://localhost:1", "http://[::1]:9", "http://127.8.8.8"])
def test_plain_http_will_do_for_this_machine(url):
    assert Addresses.from_environment({"PULID_FAL_QUEUE_URL": url}).queue == URL(url)


@pytest.mark.parametrize(
    "url",
    [
        "http://fal.run",
        "http://192.168.0.2",
        "http://127.0.0.1.example.com",
        "ftp://fal.run",
        "fal.run",
        "https://",
        "https://me:word@fal.run",
        "https://fal.run?a=b",
        "https://fal.run:port",
    ],
)
def test_an_address_that_is_not_safe_is_refused_and_not_repeated(url):
    with pytest.raises(UnsafeAddress, match="PULID_FAL_REST_URL is not an address that a key may be sent to") as caught:
        Addresses.from_environment({"PULID_FAL_REST_URL": url})
    assert url not in str(caught.value).replace("https://host", "")


def test_the_key_may_go_to_queue_run_and_rest_alone():
    addresses = Addresses()

    for url in ("https://queue.fal.run/a", "https://fal.run/b", "https://rest.fal.ai/c", "https://queue.falrun.com/d"):
        assert addresses.may_see_key(URL(url))
    for url in (
        "https://v3.fal.media/a",
        "http://queue.fal.run/a",
        "https://queue.fal.run:444/a",
        "https://queue.fal.run.example.com",
    ):
        assert not addresses.may_see_key(URL(url))


def test_no_key_goes_anywhere_through_a_proxy():
    addresses = Addresses(proxy=URL("https://proxy.example"))

    assert not addresses.may_see_key(URL("https://queue.fal.run"))
    assert not addresses.may_see_key(URL("https://proxy.example"))


def test_the_backup_address_belongs_to_fals_own_queue_alone():
    assert Addresses().backup_queue == BACKUP_QUEUE
    assert Addresses(queue=URL("https://other.example")).backup_queue is None
    assert Addresses(proxy=URL("https://proxy.example")).backup_queue is None


def test_storage_is_ours_only_where_it_was_put_on_this_machine():
    here = Addresses(cdn=URL("http://127.0.0.1:5000"))

    assert here.is_own_storage(URL("http://127.0.0.1:5000/files/a.png"))
    assert not here.is_own_storage(URL("http://127.0.0.1:5001/files/a.png"))
    assert not here.is_own_storage(URL("http://localhost:5000/files/a.png"))
    assert not Addresses().is_own_storage(URL("https://v3.fal.media/a.png"))
