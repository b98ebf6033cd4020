"""The model behind the fake server: the schema of <https://fal.ai/models/fal-ai/pulid/api>, and pictures made of it.

A picture depends on every value of the input and on the decoded pixels of the references, so a test sees what arrived.
"""

import base64
import hashlib
import io
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from PIL import Image

NEGATIVE_PROMPT = (
    "flaws in the eyes, flaws in the face, flaws, lowres, non-HDRi, low quality, worst quality,artifacts noise, text, "
    "watermark, glitch, deformed, mutated, ugly, disfigured, hands, low resolution, partially rendered objects,  "
    "deformed or partially rendered eyes, deformed, deformed eyeballs, cross-eyed,blurry"
)
DEFAULTS = {
    "negative_prompt": NEGATIVE_PROMPT,
    "num_images": 1,
    "guidance_scale": 1.2,
    "num_inference_steps": 4,
    "image_size": {"width": 768, "height": 1024},
    "id_scale": 0.8,
    "mode": "fidelity",
    "id_mix": False,
}
PRESETS = {
    "square_hd": (1024, 1024),
    "square": (512, 512),
    "portrait_4_3": (768, 1024),
    "portrait_16_9": (576, 1024),
    "landscape_4_3": (1024, 768),
    "landscape_16_9": (1024, 576),
}
SIDE_DEFAULT, SIDE_MAX = 512, 14142
# An omitted seed becomes this one, as large as the service's own can be: beyond 64 signed bits.
RANDOM_SEED = 17454220438242315174
MOST_BYTES = 50 << 20  # of one reference

Fetch = Callable[[str], bytes]  # a reference's URL -> its bytes; raises BadReference


class BadReference(Exception):
    """A reference that the service cannot use; the argument is the error type of its answer."""


def number(kind: type, low: float, high: float) -> Callable[[Any], str | None]:
    def check(value: Any) -> str | None:
        if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)):
            return f"value is not a valid {kind.__name__}"
        return None if low <= value <= high else f"ensure this value lies in {low} to {high}"

    return check


def one_of(*choices: Any) -> Callable[[Any], str | None]:
    return lambda value: None if value in choices else f"unexpected value; permitted: {choices}"


def is_a(kind: type) -> Callable[[Any], str | None]:
    return lambda value: None if type(value) is kind else f"{kind.__name__} type expected"


def image_size(value: Any) -> str | None:
    if isinstance(value, str):
        return one_of(*PRESETS)(value)
    if not isinstance(value, dict) or set(value) - {"width", "height"}:
        return "value is not a valid image size"
    sides = (value.get("width", SIDE_DEFAULT), value.get("height", SIDE_DEFAULT))
    return next(filter(None, (number(int, 1, SIDE_MAX)(side) for side in sides)), None)


def references(value: Any) -> str | None:
    if not isinstance(value, list) or not value:
        return "ensure this value has at least 1 items"
    sound = all(
        isinstance(face, dict) and set(face) == {"image_url"} and isinstance(face["image_url"], str) for face in value
    )
    return None if sound else "each reference is an object with image_url, a string"


SCHEMA = {
    "reference_images": references,
    "prompt": is_a(str),
    "negative_prompt": is_a(str),
    "num_images": number(int, 1, 8),
    "guidance_scale": number(float, 1, 1.5),
    "num_inference_steps": number(int, 1, 12),
    "seed": number(int, 0, 2**32 - 1),
    "image_size": image_size,
    "id_scale": number(float, 0, 5),
    "mode": one_of("fidelity", "extreme style"),
    "id_mix": is_a(bool),
}
REQUIRED = ("reference_images", "prompt")


def problem(kind: str, message: str, *place: str | int) -> dict[str, Any]:
    """One entry of a 422's `detail`."""
    return {"loc": ["body", *place], "msg": message, "type": kind}


def problems(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every way in which an input breaks the schema. Names that it lacks are refused, so that none goes lost."""
    missing = [problem("missing", "Field required", name) for name in REQUIRED if name not in body]
    foreign = [problem("extra_forbidden", "Extra inputs are not permitted", name) for name in body.keys() - SCHEMA]
    found = [(name, SCHEMA[name](value)) for name, value in body.items() if name in SCHEMA]
    return missing + foreign + [problem("value_error", message, name) for name, message in found if message]


def data_uri(url: str) -> bytes:
    head, _, payload = url.partition(",")
    if not head.endswith(";base64"):
        raise BadReference("file_download_error")
    return base64.b64decode(payload, validate=True)


def read_references(body: Mapping[str, Any], fetch: Fetch) -> tuple[list[np.ndarray], list[dict[str, Any]]]:
    """The decoded references, each (H,W,3) uint8, and the problems of those that cannot be had."""
    pictures, bad = [], []
    for index, face in enumerate(body["reference_images"]):
        url = face["image_url"]
        try:
            content = data_uri(url) if url.startswith("data:") else fetch(url)
            if len(content) > MOST_BYTES:
                raise BadReference("file_too_large")
            try:
                pictures.append(np.asarray(Image.open(io.BytesIO(content)).convert("RGB")))
            except OSError:
                raise BadReference("image_load_error") from None
        except BadReference as error:
            kind = str(error)
            message = f"Failed: {kind.replace('_', ' ')}"
            bad.append(problem(kind, message, "reference_images", index, "image_url"))
    return pictures, bad


def size_of(value: str | Mapping[str, int]) -> tuple[int, int]:
    """(width, height)"""
    if isinstance(value, str):
        return PRESETS[value]
    return value.get("width", SIDE_DEFAULT), value.get("height", SIDE_DEFAULT)


def pictures(body: Mapping[str, Any], seed: int, faces: list[np.ndarray]) -> list[Image.Image]:
    """One picture for each that was asked for: soft patches of colour drawn from everything that came in."""
    values = {**DEFAULTS, **body, "seed": seed}
    count, size = values.pop("num_images"), size_of(values.pop("image_size"))
    values["reference_images"] = [
        hashlib.sha256(face.tobytes() + str(face.shape).encode()).hexdigest() for face in faces
    ]
    described = json.dumps(values, sort_keys=True).encode()
    made = []
    for index in range(count):
        digest = hashlib.sha256(described + bytes([index])).digest()
        patches = np.random.default_rng(list(digest)).integers(0, 256, (6, 5, 3), np.uint8)
        made.append(Image.fromarray(patches).resize(size, Image.Resampling.BICUBIC))
    return made


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
