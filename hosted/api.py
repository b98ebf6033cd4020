"""The values of a request to fal-ai/pulid and of the service's answers (https://fal.ai/models/fal-ai/pulid/api).

Names, defaults and literals are the service's own, to the letter; ranges are those of its published OpenAPI data. What
costs money is checked here, since a value that comes through a link passes by the ranges of a node's widgets. Whatever
comes as an answer is read as one of the models here, or is a BadAnswer.
"""

import hashlib
import json
import math
import re
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator
from pydantic.dataclasses import dataclass
from pydantic.functional_validators import BeforeValidator, WrapValidator
from pydantic_core import from_json

from ..pulid.errors import InputError
from .errors import BadAnswer, Failure, clean

ENDPOINT = "fal-ai/pulid"

# The two spaces before `deformed` are the service's; its page shows one.
NEGATIVE_PROMPT = (
    "flaws in the eyes, flaws in the face, flaws, lowres, non-HDRi, low quality, worst quality,artifacts noise, text, "
    "watermark, glitch, deformed, mutated, ugly, disfigured, hands, low resolution, partially rendered objects,  "
    "deformed or partially rendered eyes, deformed, deformed eyeballs, cross-eyed,blurry"
)
MODES = ("fidelity", "extreme style")
PRESETS = {  # name -> width, height; the portraits are 3:4 and 9:16 in fact
    "square_hd": (1024, 1024),
    "square": (512, 512),
    "portrait_4_3": (768, 1024),
    "portrait_16_9": (576, 1024),
    "landscape_4_3": (1024, 768),
    "landscape_16_9": (1024, 576),
}
LARGEST_SIDE = 14142  # pixels
LARGEST_SEED = 2**32 - 1  # numpy's, which the authors' code hands the seed to
LARGEST_ANSWER = 64 * 2**20  # pixels of all pictures of a request together
MOST_PICTURES = 8
IDEAL_REFERENCES = 4

Side = Annotated[int, Field(ge=1, le=LARGEST_SIDE)]


@dataclass(frozen=True, config=ConfigDict(strict=True, allow_inf_nan=False))
class HostedRequest:
    """The eleven fields. What is at the service's default in `seed` and `id_mix` is left to it, as its page does."""

    reference_images: tuple[str, ...]  # addresses or data URIs, the main face first; digests until they are placed
    prompt: str
    negative_prompt: str = NEGATIVE_PROMPT
    num_images: int = Field(default=1, ge=1, le=MOST_PICTURES)
    guidance_scale: float = 1.2
    num_inference_steps: int = 4
    seed: int | None = Field(default=None, ge=0)  # None: the service chooses, and no other request equals this one
    image_size: tuple[Side, Side] | str = (768, 1024)  # width and height in pixels, or a name of PRESETS
    id_scale: float = 0.8
    mode: str = "fidelity"
    id_mix: bool = False

    def __post_init__(self) -> None:
        if not self.reference_images:
            needed = "The hosted service needs at least one photograph of the person, found none"
            raise ValueError(f"{needed}. Connect reference_images, or put addresses into reference_urls")
        if not self.prompt.strip():
            raise ValueError("The prompt is empty. Say what the picture shall show")
        if self.num_images * math.prod(self.size) > LARGEST_ANSWER:
            asked = f"{self.num_images} pictures of {self.size[0]} x {self.size[1]} pixels"
            raise ValueError(f"{asked} are more than the {LARGEST_ANSWER // 2**20} million of one answer. Ask for less")
        self.digest()  # half of a character is no Unicode, and is refused here

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels; (1, 1) for a preset that only the service knows."""
        return PRESETS.get(self.image_size, (1, 1)) if isinstance(self.image_size, str) else self.image_size

    def body(self) -> dict[str, Any]:
        """The JSON of the request."""
        size = self.image_size
        changed = {
            "reference_images": [{"image_url": url} for url in self.reference_images],
            # Both numbers are always sent: the service fills a missing one with 512.
            "image_size": size if isinstance(size, str) else {"height": size[1], "width": size[0]},
            "id_mix": self.id_mix or None,
        }
        return {name: value for name, value in (asdict(self) | changed).items() if value is not None}

    def digest(self) -> str:
        """A name of this request, whoever pays; reference_images then hold digests of what they show."""
        alone = uuid.uuid4().hex if self.seed is None else ""
        text = json.dumps([ENDPOINT, self.body(), alone], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()


def read_request(**values: Any) -> HostedRequest:
    """Raises InputError for what would cost more than was meant, or cannot be sent as JSON."""
    try:
        return HostedRequest(**values)
    except ValidationError as error:
        wrong = error.errors(include_url=False)[0]
        message = wrong["msg"].removeprefix("Value error, ")
        if wrong["loc"]:
            message = f"{wrong['loc'][0]}: {message}, found {clean(repr(wrong['input']), 40)}"
        raise InputError(f"{message}. Nothing was sent.") from None


def _or_none(value: Any, read: Callable[[Any], Any]) -> Any:
    try:
        return read(value)
    except ValidationError:
        return None


UNREADABLE_IS_NONE = WrapValidator(_or_none)  # for what is no reason to lose pictures that were paid for
Text = Annotated[str | None, UNREADABLE_IS_NONE]
Number = Annotated[int | None, UNREADABLE_IS_NONE]
HALF = re.compile(r"\\u[dD][89a-fA-F][0-9a-fA-F]{2}")
REQUEST_ID = r"^[0-9A-Za-z][0-9A-Za-z_-]{3,127}$"


class HostedImage(BaseModel, frozen=True, strict=True):
    """One picture of an answer, behind an address or in `file_data` (base64 or a data URI)."""

    url: Annotated[str, BeforeValidator(lambda url: url if isinstance(url, str) else "")] = ""
    content_type: Text = None
    file_name: Text = None
    file_size: Number = None
    file_data: Text = None
    width: Number = None
    height: Number = None

    @model_validator(mode="after")
    def _is_somewhere(self) -> "HostedImage":
        if not (self.url or self.file_data):
            raise ValueError("neither url nor file_data")
        return self

    def shown(self) -> dict[str, Any]:
        """As JSON's values; of a picture in a text, the start."""
        values = self.model_dump(exclude_none=True).items()
        long = {name for name, value in values if len(str(value)) > 64 and not str(value).startswith("http")}
        return {name: f"{str(value)[:64]}..." if name in long else value for name, value in values}


class HostedAnswer(BaseModel):
    """Pictures and the seed they were made with, as text: it can exceed 2^63."""

    images: tuple[HostedImage, ...] = Field(min_length=1)
    seed: Annotated[str, BeforeValidator(lambda seed: str(seed) if type(seed) is int else "unknown")] = "unknown"


class Accepted(BaseModel):  # the answer to a submit
    request_id: str = Field(pattern=REQUEST_ID)


class UploadPlace(BaseModel, frozen=True, strict=True):
    """Where a file goes, and where it can then be read."""

    upload_url: str = Field(min_length=1)
    file_url: str = Field(min_length=1)


def _lines(logs: Any) -> tuple[str, ...]:
    """The texts of log entries, which may be null, objects with a `message`, or bare texts, without control signs."""
    lines = logs if isinstance(logs, list) else []
    texts = (line.get("message") if isinstance(line, dict) else line for line in lines)
    return tuple(clean(text, 1000) for text in texts if isinstance(text, str))


QUEUED, RUNNING, DONE = "IN_QUEUE", "IN_PROGRESS", "COMPLETED"
Cleaned = Annotated[str, BeforeValidator(lambda text: clean(text, 40) if isinstance(text, str) else text)]
AsText = BeforeValidator(lambda data: data if isinstance(data, str) else json.dumps(data) if data else None)


class Status(BaseModel, frozen=True, strict=True):
    """Where a request stands. A state that is not in the service's documents counts as waiting."""

    state: Cleaned = Field(alias="status")
    position: Number = Field(None, alias="queue_position")  # how many are before it
    logs: Annotated[tuple[str, ...], BeforeValidator(_lines)] = ()  # all lines so far
    metrics: Annotated[dict[str, Annotated[FiniteFloat | None, UNREADABLE_IS_NONE]] | None, UNREADABLE_IS_NONE] = None
    error: Annotated[str | None, AsText] = None  # with error_type, what a failed job has although it is COMPLETED
    error_type: Text = None

    @property
    def failure(self) -> Failure | None:
        """What `error` and `error_type` say of a job that has ended; None where they say nothing."""
        if self.state != DONE or not (self.error or self.error_type):
            return None
        return Failure(200, *_problems(parse(self.error or "") or self.error, self.error_type or ""))


Answer = TypeVar("Answer", bound=BaseModel)


def parse(text: str | bytes) -> Any:
    """The JSON in a text; None where it is none, or is nested without end. Halves of characters become "?"."""
    with suppress(ValueError):
        return from_json(text)
    with suppress(ValueError):  # some services cut their logs inside of a character
        return from_json(HALF.sub("?", text if isinstance(text, str) else text.decode()))
    return None


def read_answer(kind: type[Answer], data: Any) -> Answer:
    """The JSON of an answer; keys that nobody asked for are passed over. Raises BadAnswer."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        place = clean(".".join(map(str, error.errors(include_input=False)[0]["loc"])), 60)
        raise BadAnswer(f"The service's answer lacks what must be in it: {place or 'a JSON object'}.") from None


class Price(BaseModel):
    """Of one unit of an endpoint's output (https://fal.ai/docs/platform-apis/v1/models/pricing)."""

    endpoint_id: str
    unit_price: FiniteFloat = Field(ge=0)
    unit: str
    currency: str

    def of(self, request: HostedRequest) -> str:
        """The words "about $0.12" and their like; "" for a unit that is not known before."""
        pictures = request.num_images
        quantities = {"image": pictures, "megapixel": pictures * math.prod(request.size) / 1e6, "request": 1}
        if (quantity := quantities.get(self.unit.lower().removesuffix("s"))) is None:
            return ""
        cost = f"{self.unit_price * quantity:.2g}"
        return f"about ${cost}" if self.currency.upper() == "USD" else f"about {cost} {self.currency[:10]}"


class PriceList(BaseModel):
    prices: list[Price]


class _Problem(BaseModel, frozen=True, strict=True):
    """One entry of the list in `detail`."""

    loc: Annotated[list[str | int] | None, UNREADABLE_IS_NONE] = None
    msg: Text = None
    type: Text = None

    @property
    def place(self) -> str:
        """["body", "reference_images", 0, "image_url"] -> "reference 1"."""
        parts = [part for part in self.loc or [] if part != "body"]
        if parts[:1] == ["reference_images"] and len(parts) > 1 and isinstance(parts[1], int):
            return f"reference {parts[1] + 1}"
        return ".".join(map(str, parts))


def read_failure(status: int, headers: Mapping[str, str], body: bytes) -> Failure:
    """Both styles of error body, a bare text, and anything else a gateway may send; header names in lower case."""
    data = parse(body)
    data = data if isinstance(data, dict) else {}
    kind = data.get("error_type")
    kind = kind if isinstance(kind, str) else headers.get("x-fal-error-type", "")
    detail = next((data[name] for name in ("detail", "error", "message") if data.get(name) is not None), None)
    said, kinds = _problems(detail, kind)
    if status in (408, 504) and headers.get("x-fal-request-timeout-type", "").lower() == "user":
        kinds |= {"startup_timeout"}  # at the limit that the request itself named
    flag = headers.get("x-fal-retryable", headers.get("x-fal-needs-retry", "")).lower()
    retryable = {"true": True, "false": False}.get(flag)
    return Failure(status, said, kinds, retryable, units=headers.get("x-fal-billable-units", ""))


def _problems(detail: Any, kind: str) -> tuple[str, frozenset[str]]:
    """What is said, each problem with its place, and the kinds of all."""
    said, kinds = [], {kind}
    for problem in detail if isinstance(detail, list) else [detail]:
        if isinstance(problem, str):
            said.append(problem)
        elif entry := _or_none(problem, _Problem.model_validate):
            said.append(": ".join(filter(None, (entry.place, entry.msg))))
            if (entry.loc or [""])[0] not in ("path", "query", "header"):  # which is about our asking, not the job
                kinds.add(entry.type or kind or ("unnamed" if entry.msg else ""))
    return "; ".join(filter(None, said)), frozenset(kinds - {""})
