"""Where requests go: four addresses or a proxy, from the environment, and what may be sent to which.

The addresses are fal's own (https://fal.ai/docs/model-apis/model-endpoints/queue); FAL_RUN_HOST and
FAL_QUEUE_RUN_HOST are those of fal's clients.
"""

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass

from yarl import URL

from ..pulid.errors import UnsafeAddress

QUEUE, BACKUP_QUEUE = URL("https://queue.fal.run"), URL("https://queue.falrun.com")
RUN, REST, CDN = URL("https://fal.run"), URL("https://rest.fal.ai"), URL("https://v3.fal.media")
PREFIX = "PULID_FAL_"


@dataclass(frozen=True)
class Addresses:
    """Origins of the service, and of a proxy that adds the key on its own."""

    queue: URL = QUEUE
    run: URL = RUN
    rest: URL = REST
    cdn: URL = CDN
    proxy: URL | None = None

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> "Addresses":
        """PULID_FAL_QUEUE_URL, _RUN_URL, _REST_URL, _CDN_URL and _PROXY_URL, each checked; raises UnsafeAddress."""
        run_host = environ.get("FAL_RUN_HOST", "")
        queue_host = environ.get("FAL_QUEUE_RUN_HOST") or (run_host and f"queue.{run_host}")
        defaults = {
            "queue": f"https://{queue_host}" if queue_host else QUEUE,
            "run": f"https://{run_host}" if run_host else RUN,
            "rest": REST,
            "cdn": CDN,
        }
        found = {name: environ.get(f"{PREFIX}{name.upper()}_URL") or value for name, value in defaults.items()}
        proxy = environ.get(f"{PREFIX}PROXY_URL")
        return cls(
            **{name: checked(url, f"{PREFIX}{name.upper()}_URL") for name, url in found.items()},
            proxy=checked(proxy, f"{PREFIX}PROXY_URL") if proxy else None,
        )

    @property
    def backup_queue(self) -> URL | None:
        """The second name of fal's own queue, which no proxy and no other queue has."""
        return BACKUP_QUEUE if self.queue == QUEUE and self.proxy is None else None

    def may_see_key(self, url: URL) -> bool:
        """True for the queue, run and rest origins, and for nothing at all where a proxy adds the key."""
        trusted = (self.queue, self.run, self.rest, self.backup_queue)
        return self.proxy is None and url.origin() in {known.origin() for known in trusted if known}

    def is_own_storage(self, url: URL) -> bool:
        """True below the configured CDN where that is on this machine, as in tests: there plain http will do."""
        own = (self.cdn.scheme, self.cdn.host, self.cdn.port)
        return is_loopback(self.cdn) and (url.scheme, url.host, url.port) == own


def checked(address: str | URL, name: str) -> URL:
    """The address as a URL, or UnsafeAddress: https, or http to this machine, and nothing but host, port and path."""
    try:
        url = URL(str(address).strip().rstrip("/"))
        safe = url.scheme == "https" or (url.scheme == "http" and is_loopback(url))
        plain = url.host and not (url.user or url.password or url.query_string or url.fragment)
    except ValueError:
        safe = plain = False
    if not (safe and plain):
        raise UnsafeAddress(
            f"{name} is not an address that a key may be sent to. Expected https://host, "
            "or http:// for this machine alone (127.0.0.1), without user name or query."
        )
    return url


def is_loopback(url: URL) -> bool:
    """True when the host is this machine by its own name or number; no name is looked up."""
    if url.host == "localhost":
        return True
    try:
        return ipaddress.ip_address(url.host or "").is_loopback
    except ValueError:
        return False
