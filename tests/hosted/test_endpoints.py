"""Where requests go, which addresses may be read, where the key comes from, and that it shows nowhere."""

import itertools
import logging
import os
from pathlib import Path

import pytest
from pulid_sdxl.hosted import endpoints, job, pictures
from pulid_sdxl.hosted.endpoints import (
    BACKUP_QUEUE,
    HIDDEN,
    QUEUE,
    Endpoints,
    Key,
    check_address,
    check_webhook,
    find_key,
    is_fals,
    is_public,
    quieten,
)
from pulid_sdxl.hosted.errors import HostedError
from pulid_sdxl.pulid.errors import InputError
from yarl import URL

HERE = Endpoints(queue=URL("http://127.0.0.1:5000"), rest=URL("http://127.0.0.1:5001"))
VALUE = "0d6ef3f2-aaaa-4bbb:0123456789abcdef"


def test_without_settings_requests_go_to_fal():
    names = (URL("https://queue.fal.run"), URL("https://rest.fal.ai"), None, URL("https://api.fal.ai"))
    assert Endpoints.from_environment({}) == Endpoints(*names)


@pytest.mark.parametrize("name", ["QUEUE", "REST", "PROXY"])
def test_the_price_list_of_fal_is_asked_for_fals_own_service_alone(name):
    environ = {f"PULID_FAL_{name}_URL": "https://other.example"}
    assert Endpoints.from_environment(environ).api is None
    both = Endpoints.from_environment(environ | {"PULID_FAL_API_URL": "https://prices.example"})
    assert both.api == URL("https://prices.example")


def test_every_address_can_be_set():
    names = ("queue", "rest", "proxy", "api")
    found = Endpoints.from_environment({f"PULID_FAL_{name.upper()}_URL": f"https://{name}.example/" for name in names})
    assert {name: str(getattr(found, name)) for name in names} == {name: f"https://{name}.example" for name in names}


def test_fals_own_variables_are_honoured_below_ours():
    host = Endpoints.from_environment({"FAL_RUN_HOST": "fal.example"})
    both = Endpoints.from_environment({"FAL_RUN_HOST": "fal.example", "FAL_QUEUE_RUN_HOST": "q.example"})
    ours = Endpoints.from_environment(
        {"FAL_QUEUE_RUN_HOST": "q.example", "PULID_FAL_QUEUE_URL": "https://ours.example"}
    )
    assert host.queue == URL("https://queue.fal.example")
    assert both.queue == URL("https://q.example")
    assert ours.queue == URL("https://ours.example")


@pytest.mark.parametrize("url", ["http://127.0.0.1:8000", "http://localhost:1", "http://[::1]:9", "http://127.8.8.8"])
def test_plain_http_will_do_for_this_machine(url):
    assert Endpoints.from_environment({"PULID_FAL_QUEUE_URL": url}).queue == URL(url)


@pytest.mark.parametrize("url", [
    "http://fal.run", "http://192.168.0.2", "http://127.0.0.1.example.com", "ftp://fal.run", "fal.run", "https://",
    "https://me:word@fal.run", "https://fal.run?a=b", "https://fal.run:port",
])  # fmt: skip
def test_an_address_that_is_not_safe_is_refused_and_not_repeated(url):
    with pytest.raises(HostedError, match="PULID_FAL_REST_URL is not an address that a key may be sent to") as caught:
        Endpoints.from_environment({"PULID_FAL_REST_URL": url})
    assert url not in str(caught.value).replace("https://host", "")


def test_the_key_may_go_to_queue_and_rest_alone():
    found = Endpoints()
    for url in ("https://queue.fal.run/a", "https://rest.fal.ai/c", "https://queue.falrun.com/d"):
        assert found.may_see_key(URL(url))
    for url in ("https://fal.run", "https://v3.fal.media", "http://queue.fal.run", "https://queue.fal.run:444"):
        assert not found.may_see_key(URL(url))


def test_no_key_goes_anywhere_through_a_proxy():
    found = Endpoints(proxy=URL("https://proxy.example"))
    assert not found.may_see_key(URL("https://queue.fal.run"))
    assert not found.may_see_key(URL("https://proxy.example"))


def test_the_backup_address_belongs_to_fals_own_queue_alone():
    other, proxy = URL("https://other.example"), URL("https://proxy.example")
    assert Endpoints().queues == [QUEUE, BACKUP_QUEUE]
    assert Endpoints(queue=other).queues == [other] and Endpoints(proxy=proxy).queues == [QUEUE]


# ---- Addresses that others name ----


@pytest.mark.parametrize("address", ["8.8.8.8", "151.101.1.1", "2606:4700::1111", "2a00:1450:4001:81b::200e"])
def test_addresses_of_the_internet_are_public(address):
    assert is_public(address)


@pytest.mark.parametrize("address", [
    "127.0.0.1", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.0.1", "169.254.169.254", "100.64.0.1", "192.0.2.1",
    "198.18.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255", "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1",
    "fec0::1", "ff02::1", "::ffff:10.0.0.1", "::10.0.0.1", "64:ff9b::a00:1", "64:ff9b:1::a00:1", "2002:a00:1::",
    "2001:0:a00:1::", "2001:db8::1", "100::1",
])  # fmt: skip
def test_addresses_that_are_or_may_stand_for_private_ones_are_not(address):
    assert not is_public(address)


@pytest.mark.parametrize("url", [
    "http://v3.fal.media/a.png", "https://v3.fal.media:8443/a.png", "https://me@v3.fal.media/a.png", "https://[",
    "http://127.0.0.2:5001/a.png", "http://localhost:5000/a.png", "ftp://v3.fal.media/a.png", "file:///etc/passwd",
    "a.png", "//v3.fal.media/a.png",
    *(f"https://{host}/a.png" for host in (
        "10.0.0.1", "127.1", "0", "2130706433", "0177.0.0.1", "0x7f.0.0.1", "0x7f000001", "[::ffff:127.0.0.1]",
        "[::]", "[::1]", "1", "10.0.0.1.", "127.0.0.1..", "localhost", "localhost.", "a.LOCALHOST",
        "nas", "nas.local", "8.8.8.8.8", "08.8.8.8", "8.8.8.010", "[fe80::1%25a]",
        "%31%32%37.0.0.1", "a b.example", "-", "_._.0x",
        "\uff11\uff10.0.0.1", "127\u30020\u30020\u30021",
    )),
])  # fmt: skip
def test_addresses_that_are_not_safe_are_refused(url):
    with pytest.raises(HostedError):
        check_address(url, HERE)


@pytest.mark.parametrize("url", ["https://v3.fal.media/a.png", "https://8.8.8.8/a.png", "http://127.0.0.1:9/a.png"])
def test_public_addresses_are_read_and_a_storage_beside_a_service_on_this_machine(url):
    assert check_address(url, HERE) == URL(url)


@pytest.mark.parametrize(
    "elsewhere",
    [Endpoints(), Endpoints(queue=HERE.queue), Endpoints(rest=HERE.rest), Endpoints(proxy=URL("http://127.0.0.1:9"))],
)
def test_nothing_on_this_machine_is_read_for_a_service_that_is_elsewhere(elsewhere):
    with pytest.raises(HostedError):
        check_address("http://127.0.0.1:9/a.png", elsewhere)


@pytest.mark.parametrize(("host", "expected"), [
    *((host, True) for host in ("fal.run", "queue.fal.run", "v3.fal.media.", "REST.fal.ai", "v3b.fal.media")),
    *((host, False) for host in ("notfal.run", "fal.run.example.com", "fal.media.evil", "", "fal-run", "fal.com")),
])  # fmt: skip
def test_fals_own_names_are_known(host, expected):
    assert is_fals(host) is expected


# ---- Webhooks ----

HOOK = "https://hooks.example.com/done?token=1"


@pytest.mark.parametrize("address", [
    "http://hooks.example.com", "https://127.0.0.1/x", "https://127.1/x", "https://localhost/x", "https://nas/x",
    "https://10.0.0.1/x", "https://me:pw@hooks.example.com/", "ftp://a.b", "https://", "hooks.example.com", "https://[",
])  # fmt: skip
def test_a_webhook_is_a_public_https_address(tmp_path, address):
    with pytest.raises(InputError, match=r"public https address.*Nothing was sent"):
        check_webhook(address, tmp_path)


def test_a_webhook_is_shown_until_this_machines_owner_has_allowed_its_host(tmp_path):
    for _ in range(2):  # seeing it once allows nothing
        with pytest.raises(InputError, match=r"pictures to https://hooks\.example\.com/done.*webhook_hosts\.txt"):
            check_webhook(HOOK, tmp_path)
    (tmp_path / "webhook_hosts.txt").write_text("other.example\n Hooks.Example.com. \n")
    check_webhook(HOOK, tmp_path)
    with pytest.raises(InputError, match=r"does not know evil\.example"):
        check_webhook("https://evil.example/hooks.example.com", tmp_path)


# ---- The key ----


def key_file(folder, text, mode=0o600):
    path = folder / "fal.toml"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    path.chmod(mode)
    return path


def found(environ, file):
    return find_key(environ, file).header["Authorization"]


def test_fal_key_comes_first_then_the_pair_then_the_file(tmp_path):
    file = key_file(tmp_path, 'FAL_KEY = "from:file"')
    pair = {"FAL_KEY_ID": "from", "FAL_KEY_SECRET": "pair"}
    assert found({"FAL_KEY": "from:variable", **pair}, file) == "Key from:variable"
    assert found(pair, file) == "Key from:pair"
    assert found({}, file) == "Key from:file"


@pytest.mark.parametrize(("text", "key"), [
    ("FAL_KEY=a:b", "a:b"),
    (" FAL_KEY = 'a:b' \n", "a:b"),
    ('# mine\nFAL_KEY = "a:b"  # really\n', "a:b"),
    ("\ufeffFAL_KEY=a:b", "a:b"),  # as Windows writes it
    ('\n\n  \nFAL_KEY = "a:b#c"\n\n', "a:b#c"),
    ("FAL_KEY='a:#'  # quoted", "a:#"),
    ("FAL_KEY=a:b#c # bare", "a:b#c"),
    ("export FAL_KEY=a:b\r\n", "a:b"),
    ("FAL_KEY_ID=x\nFAL_KEY=a:b", "a:b"),
])  # fmt: skip
def test_the_file_has_a_line_as_in_toml(tmp_path, text, key):
    assert found({}, key_file(tmp_path, text)) == f"Key {key}"


@pytest.mark.parametrize("text", ['FAL_KEY = "a:b', "# FAL_KEY=a:b", "a:b", "FAL_KEY", "FAL_KEY=a:b c", "\udcff"])
def test_a_file_without_such_a_line_is_named(tmp_path, text):
    with pytest.raises(HostedError, match=r"fal\.toml cannot be read"):
        found({}, key_file(tmp_path, text))


def test_an_empty_line_does_not_take_the_next_ones_text(tmp_path):
    with pytest.raises(HostedError, match="none was found"):
        found({}, key_file(tmp_path, "FAL_KEY =\nother:text\n"))


def test_a_file_that_is_closed_to_us_is_told_as_that(tmp_path, monkeypatch):
    def closed(*_, **__):
        raise PermissionError(13, "Permission denied")

    file = key_file(tmp_path, "FAL_KEY=a:b")
    monkeypatch.setattr(Path, "read_text", closed)
    with pytest.raises(HostedError, match=r"fal\.toml cannot be read \(PermissionError\).*chown, chmod 600"):
        find_key({}, file)


def test_another_file_can_be_named(tmp_path):
    (tmp_path / "own").mkdir()
    own = key_file(tmp_path / "own", "FAL_KEY=own:file")
    assert found({"PULID_FAL_KEY_FILE": str(own)}, key_file(tmp_path, "FAL_KEY=a:b")) == "Key own:file"


@pytest.mark.parametrize("nothing", ["", "  \n", "YOUR_FAL_KEY", " YOUR_API_KEY "])
def test_a_placeholder_hides_no_key_that_comes_after_it(tmp_path, nothing):
    assert found({"FAL_KEY": nothing}, key_file(tmp_path, "FAL_KEY=a:b")) == "Key a:b"
    assert found({"FAL_KEY": "a:b"}, key_file(tmp_path, "FAL_KEY=YOUR_FAL_KEY")) == "Key a:b"


def test_white_space_around_a_key_is_no_part_of_it_and_a_colon_is_not_needed(tmp_path):
    assert found({"FAL_KEY": f' "{VALUE}"\n'}, tmp_path / "none") == f"Key {VALUE}"
    assert found({"FAL_KEY": "withoutcolon"}, tmp_path / "none") == "Key withoutcolon"


def test_no_key_is_said_with_the_variable_and_the_file_but_no_private_path(tmp_path):
    file = tmp_path / "someone" / "user" / "__pulid" / "fal.toml"
    with pytest.raises(HostedError, match=r"variable FAL_KEY.*user/__pulid/fal\.toml") as caught:
        find_key({"FAL_KEY_ID": "half"}, file)
    assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize("value", ["a:b\r\nX-Evil: 1", "a:b c", "a:\x07b", "schlüssel:b"])
def test_a_key_with_control_characters_is_refused_without_being_shown(value, tmp_path):
    with pytest.raises(HostedError, match="characters that no key has") as caught:
        find_key({"FAL_KEY": value}, tmp_path / "none")
    assert value not in str(caught.value)


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
@pytest.mark.parametrize("mode", [0o644, 0o640, 0o606])
def test_a_key_file_that_others_can_read_is_refused(tmp_path, mode):
    with pytest.raises(HostedError, match="chmod 600"):
        find_key({}, key_file(tmp_path, f"FAL_KEY={VALUE}", mode))


def test_a_key_shows_nowhere_but_in_its_header():
    key = Key(VALUE)
    shown = f"{key} {key!r} {[key]} {key.account} {vars(Key).keys()}"
    assert not any(part in shown for part in VALUE.split(":"))
    assert key.header == {"Authorization": f"Key {VALUE}"}


def test_accounts_differ_by_the_id_of_the_key():
    assert Key("me:one").account == Key("me:two").account != Key("you:one").account


def test_text_loses_the_key_and_its_parts():
    key_id, secret = VALUE.split(":")
    assert Key(VALUE).hide(f"[{VALUE}] [{key_id}] [{secret}]") == f"[{HIDDEN}] [{HIDDEN}] [{HIDDEN}]"
    assert Key("a:b").hide("a bad word") == "a bad word"  # short parts are no secret, and hiding them hides words


@pytest.mark.parametrize("name", [job.logger.name, pictures.logger.name, "aiohttp.client", "asyncio"])
def test_no_logger_writes_a_key_of_any_user(caplog, name):
    keys = Key(VALUE), Key("another-user:another-secret")
    for key in (*keys, *keys):
        quieten(key)
    try:
        with caplog.at_level(logging.DEBUG):
            for key in keys:
                value = key.get_secret_value()
                logging.getLogger(name).warning("sent %s", {"Authorization": f"Key {value}"})
                try:
                    raise ValueError(value)
                except ValueError:
                    logging.getLogger(name).exception("failed")
        assert sum(one in keys for one in logging.getLogger(name).filters) == 2
    finally:
        for logger, key in itertools.product(endpoints.LOGGERS, keys):
            logging.getLogger(logger).removeFilter(key)
    assert "failed" in caplog.text and "ValueError" in caplog.text
    assert not any(part in caplog.text for key in keys for part in key.get_secret_value().split(":"))
