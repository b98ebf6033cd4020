"""The values of a request to fal-ai/pulid and of its answer (https://fal.ai/models/fal-ai/pulid/api).

Names, defaults and literals are the service's own, to the letter; ranges are those of its published OpenAPI data.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from ..pulid.errors import BadAnswer, InputError

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
class Size:
    """A size of one's own. Both are always sent: the service fills a missing one with 512."""

    width: int = 768
    height: int = 1024


@dataclass(frozen=True)
class HostedRequest:
    """The eleven fields. What is at the service's default in `seed` and `id_mix` is left to it, as its page does.

    reference_images  https addresses or data URIs, the main face first; placeholders until they are uploaded
    image_size        a name of PRESETS, or a Size
    """

    reference_images: tuple[str, ...]
    prompt: str
    negative_prompt: str = NEGATIVE_PROMPT
    num_images: int = 1
    guidance_scale: float = 1.2
    num_inference_steps: int = 4
    seed: int | None = None
    image_size: str | Size = Size()
    id_scale: float = 0.8
    mode: str = "fidelity"
    id_mix: bool = False

    def __post_init__(self):
        if not self.reference_images:
            raise InputError(
                "The hosted service needs at least one photograph of the person, found none. "
                "Connect reference_images, or put addresses into reference_urls."
            )
        if not self.prompt.strip():
            raise InputError("The prompt is empty. Say what the picture shall show.")

    def body(self) -> dict[str, Any]:
        """The JSON of the request."""
        size = self.image_size
        body = {
            "reference_images": [{"image_url": url} for url in self.reference_images],
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            "num_images": self.num_images,
            "guidance_scale": self.guidance_scale,
            "num_inference_steps": self.num_inference_steps,
            "seed": self.seed,
            "image_size": size if isinstance(size, str) else {"height": size.height, "width": size.width},
            "id_scale": self.id_scale,
            "mode": self.mode,
            "id_mix": self.id_mix or None,
        }
        return {name: value for name, value in body.items() if value is not None}

    def digest(self, account: str) -> str:
        """Names this request among all of an account; reference_images then hold hashes of what they show."""
        text = json.dumps([ENDPOINT, account, self.body()], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class HostedImage:
    """One picture of an answer; `url` alone is certain."""

    url: str
    content_type: str | None = None
    file_name: str | None = None
    file_size: int | None = None
    file_data: str | None = None
    width: int | None = None
    height: int | None = None


@dataclass(frozen=True)
class HostedAnswer:
    """Pictures and the seed they were made with, as text: it can exceed 2^63."""

    images: tuple[HostedImage, ...]
    seed: str


def read_answer(data: Any) -> HostedAnswer:
    """The JSON of a result; keys that nobody asked for are passed over. Raises BadAnswer."""
    images = data.get("images") if isinstance(data, dict) else None
    if not isinstance(images, list) or not images:
        raise BadAnswer("The service answered without pictures where a list `images` was expected.")
    return HostedAnswer(tuple(map(_read_image, images)), _seed_text(data.get("seed")))


def _read_image(entry: Any) -> HostedImage:
    entry = entry if isinstance(entry, dict) else {}
    if not isinstance(entry.get("url"), str) or not entry["url"]:
        raise BadAnswer("The service named a picture without its address `url`.")

    def known(name: str, kind: type):
        value = entry.get(name)
        return value if type(value) is kind else None

    texts = {name: known(name, str) for name in ("content_type", "file_name", "file_data")}
    numbers = {name: known(name, int) for name in ("file_size", "width", "height")}
    return HostedImage(entry["url"], **texts, **numbers)


def _seed_text(seed: Any) -> str:
    """The seed, or "unknown": a missing seed is no reason to lose pictures that were paid for."""
    return str(seed) if type(seed) is int else "unknown"
