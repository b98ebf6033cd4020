"""One exchange with real sockets: what a failure proves, and what its message must not hold."""

import asyncio
import socket
from contextlib import asynccontextmanager

import pytest
from pulid_sdxl.hosted.errors import AnswerLost, BadAnswer, HostedError, Unreachable
from pulid_sdxl.hosted.transport import PublicResolver, Terms, send
from yarl import URL

FIVE_SECONDS = Terms(seconds=5)
SECRET = {"Authorization": "Key secret:value"}


@asynccontextmanager
async def server(answer):
    """A server on a port of its own that hands each connection's first bytes to `answer`; yields address, requests."""
    requests, served = [], []

    async def serve(reader, writer):
        served.append(asyncio.current_task())
        requests.append(await reader.read(65536))
        await answer(writer)
        writer.close()

    made = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield URL(f"http://127.0.0.1:{made.sockets[0].getsockname()[1]}/path"), requests
    finally:
        made.close()
        await asyncio.gather(*served, return_exceptions=True)


def says(text):
    async def answer(writer):
        writer.write(text.replace("\n", "\r\n").encode())
        await writer.drain()

    return answer


async def silence(writer):
    await asyncio.sleep(0.6)


async def hang_up(writer):
    writer.transport.abort()


def exchange(answer, method="GET", terms=FIVE_SECONDS, times=1):
    async def run():
        async with server(answer) as (url, requests):
            for _ in range(times):
                reply = await send(method, url, SECRET, b"body" if method != "GET" else b"", terms)
            return reply, requests

    return asyncio.run(run())


def test_an_answer_comes_with_names_in_lower_case():
    reply, [request] = exchange(says("HTTP/1.1 202 Accepted\nX-Fal-Request-Id: a\nContent-Length: 2\n\n{}"))
    assert (reply.status, reply.body, reply.headers["x-fal-request-id"]) == (202, b"{}", "a")
    assert b"Authorization: Key secret:value" in request and b"Accept-Encoding: identity" in request


def test_nobody_there_proves_that_nothing_was_sent():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    async def run():
        await send("POST", URL(f"http://127.0.0.1:{port}"), SECRET)

    with pytest.raises(Unreachable, match=r"127\.0\.0\.1 did not get all of it \(refused\), so nothing was accepted"):
        asyncio.run(run())


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (silence, "no whole answer .no answer in time"),
        (says("HTTP/1.1 200 OK\nContent-Length: 9\n\nhalf"), "gave no whole answer"),
        (hang_up, "gave no whole answer"),
        (says("nonsense\n\n"), "gave no whole answer"),
        (says("HTTP/1.1 200 OK\nContent-Length: nine\n\n"), "gave no whole answer"),
    ],
)
def test_what_was_sent_without_a_whole_answer_is_lost(answer, words):
    with pytest.raises(AnswerLost, match=words):
        exchange(answer, "POST", Terms(seconds=0.3))


@pytest.mark.parametrize("head", ["Content-Length: 2000", "Connection: close"])
def test_an_answer_beyond_the_limit_is_not_read(head):
    with pytest.raises(BadAnswer, match="larger than"):
        exchange(says(f"HTTP/1.1 200 OK\n{head}\n\n{'x' * 2000}"), terms=Terms(limit=1000))


def test_a_redirect_is_an_answer_and_a_cookie_is_forgotten():
    answer = says("HTTP/1.1 302 Found\nLocation: https://evil.example/\nSet-Cookie: a=b\nContent-Length: 0\n\n")
    reply, requests = exchange(answer, times=2)
    assert reply.status == 302
    assert len(requests) == 2 and not any(b"Cookie" in request for request in requests)


def test_no_error_carries_the_headers_that_were_sent():
    with pytest.raises(AnswerLost) as caught:
        exchange(hang_up, "POST")
    error = caught.value
    assert (error.__cause__, error.__context__) == (None, None)
    assert "secret" not in f"{error!r} {vars(error)}"


# ---- Proxies ----


def through(monkeypatch, answer, url, **environ):
    """What a proxy got that was asked to lead to `url`, and what came of it."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    heard = []

    async def run():
        async with server(answer) as (proxy, seen):
            for name, value in environ.items():
                monkeypatch.setenv(name, value.format(proxy=f"{proxy.host}:{proxy.port}"))
            try:
                await send("POST", URL(url), SECRET, b"body", Terms(seconds=5, public=True))
            finally:
                heard.extend(seen)

    with pytest.raises(Unreachable) as caught:
        asyncio.run(run())
    return heard, str(caught.value)


@pytest.mark.parametrize("scheme", ["http://", ""])
def test_the_environments_proxy_is_asked_and_sees_no_key(monkeypatch, scheme):
    refuse = says("HTTP/1.1 407 Proxy Authentication Required\nContent-Length: 0\n\n")
    [heard], words = through(monkeypatch, refuse, "https://v3.fal.media/a", HTTPS_PROXY=scheme + "me:pw@{proxy}")
    assert heard.startswith(b"CONNECT v3.fal.media:443 HTTP/1.1")
    assert b"Proxy-Authorization: Basic bWU6cHc=" in heard and b"secret" not in heard
    assert "the proxy refused it, HTTP 407" in words and "nothing was accepted" in words


def test_no_proxy_is_honoured_and_a_netrc_is_not_read(monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text("default login me password pw")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: (_ for _ in ()).throw(socket.gaierror(-2, "no")))
    heard, words = through(monkeypatch, hang_up, "https://v3.fal.media/a", HTTPS_PROXY="{proxy}", NO_PROXY="fal.media")
    assert heard == [] and "its name was not found" in words
    _, [request] = exchange(says("HTTP/1.1 200 OK\nContent-Length: 0\n\n"))  # on this machine, so without a proxy
    assert b"Authorization: Key secret:value" in request and b"Basic" not in request


@pytest.mark.parametrize("proxy", ["socks5://{proxy}", "http://[", "ftp://x"])
def test_a_proxy_that_cannot_be_used_is_named(monkeypatch, proxy):
    heard, words = through(monkeypatch, hang_up, "https://v3.fal.media/a", HTTPS_PROXY=proxy)
    assert heard == [] and "HTTPS_PROXY names no proxy" in words


def test_a_private_name_is_refused_behind_a_proxy_too(monkeypatch):
    def look_up(host, port, *_, **__):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.0.0.1" if host == "inside.example" else host, port))]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    with pytest.raises(HostedError):
        through(monkeypatch, hang_up, "https://inside.example/a", HTTPS_PROXY="http://{proxy}")


# ---- Public addresses ----


@pytest.mark.parametrize("address", ["198.18.0.7", "100.64.0.9", "64:ff9b::808:808"])
@pytest.mark.parametrize(("host", "trusted"), [("v3.fal.media", True), ("fal.media.example", False)])
def test_fals_own_names_are_trusted_by_tls_whatever_their_addresses_look_like(monkeypatch, address, host, trusted):
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    found = [(family, socket.SOCK_STREAM, 6, "", (address, 443, *((0, 0) if ":" in address else ())))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)

    async def run():
        return await PublicResolver().resolve(host, 443)

    if trusted:
        assert asyncio.run(run())[0]["host"] == address
    else:
        with pytest.raises(HostedError):
            asyncio.run(run())


@pytest.mark.parametrize(
    ("found", "safe"),
    [
        (["8.8.8.8", "2606:4700::1"], True),
        (["8.8.8.8", "10.0.0.1"], False),
        (["127.0.0.1"], False),
        (["::ffff:10.0.0.1"], False),
    ],
)
def test_every_address_that_a_name_leads_to_must_be_public(monkeypatch, found, safe):
    tried = []

    def look_up(host, port, *_, **__):
        four = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port)) for ip in found if ":" not in ip]
        six = [(socket.AF_INET6, socket.SOCK_STREAM, 6, "", (ip, port, 0, 0)) for ip in found if ":" in ip]
        return four + six

    def connect(self, address):
        tried.append(address[0])
        raise OSError("not from a test")

    async def run():
        await send("GET", URL("https://pictures.example/a"), terms=Terms(public=True))

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(socket.socket, "connect", connect)
    with pytest.raises(
        Unreachable if safe else HostedError, match="nothing was accepted" if safe else "private address"
    ):
        asyncio.run(run())
    assert set(tried) == (set(found) if safe else set())
