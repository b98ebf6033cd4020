"""Tests in this folder talk to a fake of the hosted service; no byte may leave for anywhere but loopback."""

import ipaddress
import socket

import pytest
from pulid_sdxl.tools.fakes.fake_fal import FakeFal


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@pytest.fixture(autouse=True)
def outside(monkeypatch):
    """Hosts beyond loopback that a test tried to reach; each try fails as on a machine without a network.

    A test that means to try clears the list; otherwise it must be empty in the end.
    """
    tried = []
    connect, getaddrinfo = socket.socket.connect, socket.getaddrinfo

    def guarded_connect(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and not is_loopback(address[0]):
            tried.append(address[0])
            raise OSError("the network is unreachable: tests stay on loopback")
        return connect(self, address)

    def guarded_getaddrinfo(host, *arguments, **options):
        name = host.decode() if isinstance(host, bytes) else host
        if name is not None and not is_loopback(name):
            tried.append(name)
            raise socket.gaierror(socket.EAI_NONAME, "tests stay on loopback")
        return getaddrinfo(host, *arguments, **options)

    monkeypatch.setattr(socket.socket, "connect", guarded_connect)
    monkeypatch.setattr(socket, "getaddrinfo", guarded_getaddrinfo)
    yield tried
    assert tried == []


@pytest.fixture
def fal():
    """The fake service; the test fails in the end if any part of the key went astray."""
    with FakeFal() as fal:
        yield fal
