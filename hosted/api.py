"""The values of a request to fal-ai/pulid and of its answer (https://fal.ai/models/fal-ai/pulid/api).

Names, defaults and literals are the service's own, to the letter; ranges are those of its published OpenAPI data.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WrapValidator

from ..pulid.errors import InputError
from .errors import BadAnswer

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
IDEAL_REFERENCES = 4


@dataclass(frozen=True)
class HostedRequest:
    """The eleven fields. What is at the service's default in `seed` and `id_mix` is left to it, as its page does.

    reference_images  https addresses or data URIs, the main face first; placeholders until they are uploaded
    image_size        a name of PRESETS, or width and height in pixels
    """

    reference_images: tuple[str, ...]
    prompt: str
    negative_prompt: str = NEGATIVE_PROMPT
    num_images: int = 1
    guidance_scale: float = 1.2
    num_inference_steps: int = 4
    seed: int | None = None
    image_size: str | tuple[int, int] = (768, 1024)
    id_scale: float = 0.8
    mode: str = "fidelity"
    id_mix: bool = False

    def __post_init__(self) -> None:
        if not self.reference_images:
            needed = "The hosted service needs at least one photograph of the person, found none."
            raise InputError(f"{needed} Connect reference_images, or put addresses into reference_urls.")
        if not self.prompt.strip():
            raise InputError("The prompt is empty. Say what the picture shall show.")

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

    def digest(self, account: str) -> str:
        """A name of this request within an account; reference_images then hold hashes of what they show."""
        text = json.dumps([ENDPOINT, account, self.body()], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()


def _or_none(value: Any, read: Callable[[Any], Any]) -> Any:
    try:
        return read(value)
    except ValidationError:
        return None


UNREADABLE_IS_NONE = WrapValidator(_or_none)  # for what is no reason to lose pictures that were paid for
Text = Annotated[str | None, UNREADABLE_IS_NONE]
Number = Annotated[int | None, UNREADABLE_IS_NONE]


class HostedImage(BaseModel):
    """One picture of an answer; `url` alone is certain."""

    model_config = ConfigDict(frozen=True, strict=True)

    url: str = Field(min_length=1)
    content_type: Text = None
    file_name: Text = None
    file_size: Number = None
    file_data: Text = None
    width: Number = None
    height: Number = None


class HostedAnswer(BaseModel):
    """Pictures and the seed they were made with, as text: it can exceed 2^63."""

    images: tuple[HostedImage, ...] = Field(min_length=1)
    seed: Annotated[str, BeforeValidator(lambda seed: str(seed) if type(seed) is int else "unknown")] = "unknown"


Answer = TypeVar("Answer", bound=BaseModel)


def read_answer(kind: type[Answer], data: Any) -> Answer:
    """The JSON of an answer; keys that nobody asked for are passed over. Raises BadAnswer."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        place = ".".join(map(str, error.errors()[0]["loc"]))
        raise BadAnswer(f"The service's answer lacks what must be in it: {place or 'a JSON object'}.") from None
