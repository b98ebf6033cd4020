"""Where requests go, with which key, and which addresses that others name may be read from.

The addresses are fal's own (https://fal.ai/docs/model-apis/model-endpoints/queue); FAL_RUN_HOST and FAL_QUEUE_RUN_HOST
are those of fal's clients. The key comes from FAL_KEY, from FAL_KEY_ID with FAL_KEY_SECRET, or from a private file.
"""

import hashlib
import ipaddress
import logging
import os
import re
import stat
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import SecretStr
from yarl import URL

from ..pulid.errors import InputError
from .errors import HostedError, clean

QUEUE, BACKUP_QUEUE, REST = URL("https://queue.fal.run"), URL("https://queue.falrun.com"), URL("https://rest.fal.ai")
API = URL("https://api.fal.ai")
PREFIX = "PULID_FAL_"
WEBHOOK_FILE = "webhook_hosts.txt"


@dataclass(frozen=True)
class Endpoints:
    """Origins of the service, and the address of a proxy that adds the key on its own."""

    queue: URL = QUEUE
    rest: URL = REST
    proxy: URL | None = None
    api: URL | None = None  # of the price list; none is asked where another service than fal's own is set

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> "Endpoints":
        """PULID_FAL_QUEUE_URL, _REST_URL, _API_URL and _PROXY_URL, each checked; raises HostedError."""
        queue_host = environ.get("FAL_QUEUE_RUN_HOST") or f"queue.{environ.get('FAL_RUN_HOST') or 'fal.run'}"

        def read(name: str, default: URL | str | None) -> Any:
            address = environ.get(f"{PREFIX}{name}_URL") or default
            return checked(address, f"{PREFIX}{name}_URL") if address else None

        queue, rest, proxy = read("QUEUE", f"https://{queue_host}"), read("REST", REST), read("PROXY", None)
        return cls(queue, rest, proxy, read("API", API if (queue, rest, proxy) == (QUEUE, REST, None) else None))

    @property
    def queues(self) -> list[URL]:
        """The queue, and fal's second name of it, which no proxy and no other queue has."""
        return [self.queue, BACKUP_QUEUE] if self.queue == QUEUE and self.proxy is None else [self.queue]

    def may_see_key(self, url: URL) -> bool:
        """True for the queue, rest and api origins, and for nothing at all where a proxy adds the key."""
        trusted = (*self.queues, self.rest, self.api)
        return self.proxy is None and url.origin() in {known.origin() for known in trusted if known}

    def is_own_storage(self, url: URL) -> bool:
        """True for plain http on this machine where the service itself is configured to be there, as in tests."""
        return url.scheme == "http" and is_loopback(url) and url.host == self.queue.host == self.rest.host


def checked(address: str | URL, name: str) -> URL:
    """The address as a URL, or HostedError: https, or http to this machine, and nothing but host, port and path."""
    with suppress(ValueError):
        url = URL(str(address).strip().rstrip("/"))
        safe = url.scheme == "https" or (url.scheme == "http" and is_loopback(url))
        if safe and url.host and not (url.user or url.password or url.query_string or url.fragment):
            return url
    raise HostedError(
        f"{name} is not an address that a key may be sent to. Expected https://host, "
        "or http:// for this machine alone (127.0.0.1), without user name or query."
    )


def is_loopback(url: URL) -> bool:
    """True when the host is this machine by its own name or number; no name is looked up."""
    with suppress(ValueError):
        return url.host == "localhost" or ipaddress.ip_address(url.host or "").is_loopback
    return False


# --- Which addresses that others name may be read from ---

TUNNELS = [ipaddress.ip_network(text) for text in ("2002::/16", "2001::/32")]  # 6to4, Teredo: to any IPv4 address
PUBLIC_IPV6 = ipaddress.ip_network("2000::/3")  # NAT64, mapped and local addresses lie outside of it
FALS = (".fal.run", ".fal.ai", ".fal.media")
LOCAL = (".localhost", ".local", ".internal", ".intranet", ".lan", ".home.arpa")
NAME = re.compile(r"([a-z0-9_-]+\.)+[a-z][a-z0-9-]*")  # what ends otherwise is a number to some: 127.1, 0177.1, 0x7f.1


def is_public(address: str) -> bool:
    """True for an address on the internet that cannot stand for another one. Raises ValueError for a name."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if ip.version == 6 and (ip not in PUBLIC_IPV6 or any(ip in tunnel for tunnel in TUNNELS)):
        return False
    return ip.is_global and not ip.is_multicast


def is_fals(host: str) -> bool:
    """True for a name of fal's own, of which TLS proves that it is fal who answers."""
    return f".{_plain(host)}".endswith(FALS)


def _plain(host: str) -> str:
    return host.rstrip(".").lower()


def public_url(address: str | URL) -> URL | None:
    """The address as a URL; None unless it is https to a host which, as it is written, is on the public internet.

    Numbers count in their plain form only, since resolvers and HTTP libraries read other forms each in its own way.
    """
    with suppress(ValueError):
        url = URL(address)
        host = _plain(url.raw_host or "")
        is_name = NAME.fullmatch(host) and not f".{host}".endswith(LOCAL)
        if url.scheme == "https" and (is_name or is_public(host)):
            return url
    return None


def check_address(address: str, endpoints: Endpoints, base: URL | None = None) -> URL:
    """The address, which may be relative to `base`, or HostedError. A name is checked again when it is looked up."""
    try:
        url = base.join(URL(address)) if base else URL(address)
        plain = url.port == 443 and not (url.user or url.password)
        if endpoints.is_own_storage(url) or (plain and public_url(url)):
            return url
        user = ", and a user name" if url.user else ""
        found = f"scheme {clean(url.scheme, 40)!r}, host {clean(url.host, 80)!r}, port {url.port}{user}"
    except ValueError:
        found = "none at all"
    raise HostedError(f"Expected a public https address from the service, found {found}. It was not read.")


def check_webhook(address: str, folder: Path) -> None:
    """Raises InputError unless the address is public https and its host is one that this machine's owner has allowed.

    A graph of somebody else's can hold an address to which every picture would go; no value in a graph allows one.
    """
    url = public_url(address)
    if url is None or url.user:
        example = "A webhook is a public https address such as https://example.com/done"
        raise InputError(f"{example}, found {clean(address, 80)!r}. Nothing was sent.")
    host, file, allowed = _plain(url.raw_host or ""), folder / WEBHOOK_FILE, ""
    with suppress(OSError, UnicodeDecodeError):
        allowed = file.read_text(encoding="utf-8-sig")
    if host not in {_plain(line.strip()) for line in allowed.splitlines()}:
        raise InputError(
            f"This graph has the service send its pictures to {clean(address, 200)}, and this machine does not know "
            f"{host}. Nothing was sent. If you want that, write the line {host} into {_end_of(file)}, then queue again."
        )


# --- The key ---

NO_KEYS = ("", "YOUR_FAL_KEY", "YOUR_API_KEY")  # as fal's page prints them
LINE = re.compile(r"""(?m)^\s*(?:export\s+)?FAL_KEY\s*=[ \t]*(["']?)[ \t]*([^\s"']*)[ \t]*\1(?:[ \t]+#.*|[ \t]*)$""")
HIDDEN = "[hidden]"
LOGGERS = (__package__, "aiohttp.client", "aiohttp.internal", "asyncio")
SHORTEST_PART = 6  # characters; hiding shorter parts would hide words


class Key(SecretStr):
    """A key that shows itself in one place alone, the header of a request."""

    @property
    def header(self) -> dict[str, str]:
        return {"Authorization": f"Key {self.get_secret_value()}"}

    @property
    def account(self) -> str:
        """Differs between accounts, and gives nothing of the key away."""
        return hashlib.sha256(f"pulid account {self.get_secret_value().partition(':')[0]}".encode()).hexdigest()

    def hide(self, text: str) -> str:
        """The text without the key and its parts."""
        value = self.get_secret_value()
        for part in (value, *value.split(":")):
            if len(part) >= SHORTEST_PART:
                text = text.replace(part, HIDDEN)
        return text

    def filter(self, record: logging.LogRecord) -> bool:
        """Takes the key out of a record of a logger."""
        record.msg, record.args = self.hide(record.getMessage()), None
        if record.exc_info:
            record.exc_text = self.hide(record.exc_text or logging.Formatter().formatException(record.exc_info))
        return True


def quieten(key: Key) -> None:
    """Keep this key out of what this package and the HTTP library under it log."""
    for name in LOGGERS:
        logging.getLogger(name).addFilter(key)  # once: equal keys are one filter


def find_key(environ: Mapping[str, str], file: Path) -> Key:
    """The first usable key; a placeholder counts as none. Raises HostedError, which says where a key was looked for.

    PULID_FAL_KEY_FILE in `environ` names a file in place of `file`; nobody but its owner may be able to read it.
    """
    file = Path(environ.get("PULID_FAL_KEY_FILE") or file)
    pair = environ.get("FAL_KEY_ID", "").strip(), environ.get("FAL_KEY_SECRET", "").strip()
    for value in (environ.get("FAL_KEY", ""), ":".join(pair) if all(pair) else "", _read_key(file)):
        if (value := value.strip().strip("\"'")) in NO_KEYS:  # as `set FAL_KEY="id:secret"` leaves it on Windows
            continue
        if not re.fullmatch(r"[!-~]+", value):
            raise HostedError("The hosted service's key holds characters that no key has. Copy it again, as id:secret.")
        return Key(value)
    raise HostedError(
        "The hosted service needs a key, and none was found. Set the environment variable FAL_KEY before ComfyUI "
        f'starts, or put the line FAL_KEY = "id:secret" into {_end_of(file)}, readable by you alone. '
        "Keys are made at fal.ai/dashboard/keys; one of scope API is enough."
    )


def _read_key(file: Path) -> str:
    found, why = None, "no such line"
    try:
        mode = stat.S_IMODE(file.stat().st_mode)
        if os.name == "posix" and mode & (stat.S_IRWXG | stat.S_IRWXO):
            others = f"Others on this machine can read {_end_of(file)} (its mode is {mode:o})."
            raise HostedError(f"{others} Make it yours alone: chmod 600, then run again.")
        found = LINE.search(file.read_text(encoding="utf-8-sig"))
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except (OSError, UnicodeDecodeError) as error:
        why = type(error).__name__
    if found is None:
        needed = 'a text (UTF-8) with the line FAL_KEY = "id:secret", which belongs to you (chown, chmod 600)'
        raise HostedError(f"{_end_of(file)} cannot be read ({why}). It is {needed}.")
    return found[2]


def _end_of(file: Path) -> str:
    """The end of a path: enough to find it, without the name of who is logged in."""
    return "/".join(("…", *file.parts[-3:]))
