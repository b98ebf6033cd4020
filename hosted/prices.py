"""What a request will cost, about, by the service's own price list (https://fal.ai/docs/platform-apis/v1/models/pricing).

Nothing waits for it or fails because of it: where the list cannot be had, there is no estimate.
"""

import math
import time
from contextlib import suppress

from pydantic import BaseModel, Field, FiniteFloat

from .api import ENDPOINT, HostedRequest, read_answer
from .errors import HostedError
from .queue import QueueClient
from .transport import Terms

PATIENCE = Terms(seconds=3, limit=2**20)
KEPT_SECONDS = 24 * 3600  # that a price list, or its absence, is remembered in this process


class Price(BaseModel):
    """Of one unit of an endpoint's output."""

    endpoint_id: str
    unit_price: FiniteFloat = Field(ge=0)
    unit: str
    currency: str


class _Prices(BaseModel):
    prices: list[Price]


_known: dict[str, tuple[float, Price | None]] = {}


async def ask_price(client: QueueClient) -> Price | None:
    """The endpoint's price for this account, asked for once a day; None where it is not to be had."""
    api, name, price = client.endpoints.api, f"{client.endpoints.api} {client.key and client.key.account}", None
    if api and (name not in _known or time.monotonic() - _known[name][0] > KEPT_SECONDS):
        with suppress(HostedError):
            reply = await client.call("GET", api / "v1/models/pricing" % {"endpoint_id": ENDPOINT}, terms=PATIENCE)
            listed = read_answer(_Prices, reply.json).prices
            price = next((price for price in listed if price.endpoint_id == ENDPOINT), None)
        _known[name] = (time.monotonic(), price)
    return _known[name][1] if api else None


def estimate(request: HostedRequest, price: Price | None) -> str:
    """The words "about $0.12" and their like; "" for a unit that nobody knows before, such as seconds of a machine."""
    size = request.size
    quantities = {"image": request.num_images, "megapixel": request.num_images * math.prod(size) / 1e6, "request": 1}
    quantity = quantities.get(price.unit.lower().removesuffix("s")) if price else None
    if price is None or quantity is None:
        return ""
    cost = f"{price.unit_price * quantity:.2g}"
    return f"about ${cost}" if price.currency.upper() == "USD" else f"about {cost} {price.currency[:10]}"
