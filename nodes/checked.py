"""Holds what a node is given against its schema: ComfyUI believes what comes through a link, and much besides."""

import inspect
import math
import reprlib
from collections.abc import Callable, Mapping
from functools import cache, partial, wraps
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
from comfy_api.latest import io
from torch import Tensor

from ..pulid.closeup import Place
from ..pulid.errors import InputError
from ..pulid.identity import IdEmbedding
from ..pulid.photo import BRIGHTEST
from .types import IdentitySocket, LoadedPulid, PlaceSocket, PulidSocket

Node = TypeVar("Node", bound=io.ComfyNode)
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def checked(node: type[Node]) -> type[Node]:
    """A class decorator: `execute` gets what the schema asks for, or raises InputError; None is no optional input."""
    inner = node.execute.__func__
    signature, taken_over = inspect.signature(inner), inspect.signature(node.validate_inputs).parameters

    @cache
    def schema() -> tuple[bool, Mapping[str, io.Input]]:
        made = node.define_schema()
        return made.is_input_list, {one.id: one for one in made.inputs}

    @wraps(inner)
    def execute(cls: type[Node], *args: Any, **kwargs: Any) -> io.NodeOutput:
        listed, inputs = schema()
        given = signature.bind(cls, *args, **kwargs)
        for name, value in list(given.arguments.items())[1:]:
            one = inputs[name]
            values = value if listed else [value]
            if one.optional:
                values = [value for value in values or () if value is not None]
            # Which names serve, where the node has taken that over, it says itself.
            kind = "STRING" if name in taken_over else str(one.io_type)
            check = KINDS.get(kind) or partial(_plain, kind=kind)
            values = [_in_list(check, one, value, number, len(values)) for number, value in enumerate(values, start=1)]
            if values or not one.optional:
                given.arguments[name] = values if listed else values[0]
            else:
                del given.arguments[name]
        return inner(*given.args, **given.kwargs)

    node.execute = classmethod(execute)
    return node


def _in_list(check: Callable[[io.Input, Any], Any], one: io.Input, value: Any, number: int, count: int) -> Any:
    try:
        return check(one, value)
    except InputError as error:
        if count == 1:
            raise
        raise InputError(f"{error} That is number {number} of the {count} in the list.") from error


def read_mask(mask: object, name: str, as_given: bool = False) -> Tensor:
    """A MASK as (M, H, W) float32 on the CPU, 0..1; bool, (H, W) and one channel are taken too. Raises InputError.

    as_given  with values beyond 0..1 too, as the pack of older shared workflows takes them
    """
    expected, remedy = "a mask (masks, height, width) of 0 to 1", "Connect a node that gives a MASK."
    if not isinstance(mask, Tensor):
        _refuse(name, expected, mask, remedy)
    read = mask.detach()
    if read.ndim == 2:
        read = read.unsqueeze(0)
    if read.ndim == 4 and 1 in (read.shape[1], read.shape[-1]):
        read = read.squeeze(1 if read.shape[1] == 1 else -1)
    if read.ndim == 4 and read.shape[-1] in (3, 4):
        remedy = "That is a picture: put Convert Image to Mask between."
    if read.ndim != 3 or read.numel() == 0 or read.dtype not in (*FLOATS, torch.bool):
        _refuse(name, expected, mask, remedy)
    read = read.float().cpu()
    _check_range(name, expected, read, math.inf if as_given else BRIGHTEST)
    return read if as_given else read.clamp(0, 1)


def _image(one: io.Input, value: object) -> Tensor:
    expected = "an image batch (pictures, height, width, channels) of floats 0 to 1, with 1, 3 or 4 channels"
    if not isinstance(value, Tensor):
        _refuse(one.id, expected, value, "Put VAE Decode between." if _named(value) == "a LATENT" else CONNECT)
    if remedy := _no_image(value):
        _refuse(one.id, expected, value, remedy)
    _check_range(one.id, expected, value)
    return value.expand(-1, -1, -1, 3) if value.shape[-1] == 1 else value


CHANNELS = (1, 3, 4)
CONNECT = "Connect a node that gives an IMAGE."


def _no_image(value: Tensor) -> str:
    """What helps against a tensor that is no image batch; nothing where it is one."""
    if value.ndim == 3:
        return "Is it a mask? Put Convert Mask to Image between. A single picture needs a first dimension of 1."
    if value.ndim == 4 and value.shape[-1] not in CHANNELS and value.shape[1] in CHANNELS:
        return "Its channels come first: move them last."
    if value.ndim == 4 and not value.numel():
        return "The image batch is empty: connect at least one picture."
    if value.dtype not in FLOATS:
        return "Convert it to floats, 0 for black and 1 for white."
    return "" if value.ndim == 4 and value.shape[-1] in CHANNELS else CONNECT


def _check_range(name: str, expected: str, batch: Tensor, most: float = BRIGHTEST) -> None:
    for number, pixels in enumerate(batch, start=1):
        lowest, highest = (float(value) for value in pixels.aminmax())  # NaN if there is one
        finite = math.isfinite(lowest) and math.isfinite(highest)
        if finite and lowest >= -most and highest <= most:
            continue
        what = f"pixels of {lowest:g} to {highest:g}" if finite else "NaN or infinite pixels"
        remedy = "Divide by 255." if BRIGHTEST < highest <= 255 else "Check the node that made them."
        where = f" in number {number} of {len(batch)}" if len(batch) > 1 else ""
        raise InputError(f"{name} must be {expected}, found {what}{where}. {remedy}")


def _number(one: io.Input, value: Any) -> float:
    least, most = (-np.inf if one.min is None else one.min), (np.inf if one.max is None else one.max)
    whole = str(one.io_type) == "INT"
    expected = f"{'a whole' if whole else 'a'} number from {least} to {most}"
    fits = (
        _a(int, float, np.integer, np.floating)(one, value) and not isinstance(value, bool) and least <= value <= most
    )
    if not fits or (whole and value != int(value)):
        _refuse(one.id, expected, value, "Set it on the node, or connect a number within that.")
    return int(value) if whole else float(value)


def _a(*kinds: type) -> Callable[[io.Input, Any], bool]:
    return lambda one, value: isinstance(value, kinds)


# What a value must be, how that is told, and what to do. A MODEL is known by what is asked of it, since packs wrap it.
PLAIN: dict[str, tuple[str, Callable[[io.Input, Any], bool], str]] = {
    "BOOLEAN": ("yes or no", lambda one, value: _a(bool, np.bool_, int)(one, value) and value in (0, 1), "Connect"),
    "STRING": ("a text", _a(str), "Set or connect"),
    "COMBO": ("one of: {}", lambda one, value: isinstance(value, str) and value in one.options, "Choose"),
    "MODEL": ("what a node gives that loads a model", lambda one, value: hasattr(value, "get_model_object"), "Connect"),
    PulidSocket.io_type: ("what Load PuLID (SDXL) gives", _a(LoadedPulid), "Connect"),
    IdentitySocket.io_type: ("what PuLID Encode Identity or Load Identity gives", _a(IdEmbedding), "Connect"),
    PlaceSocket.io_type: (
        "what PuLID Face Crop gives as place",
        lambda one, value: isinstance(value, list) and {type(place) for place in value} == {Place},
        "Connect",
    ),
}


def _plain(one: io.Input, value: Any, kind: str) -> Any:
    expected, fits, remedy = PLAIN[kind]
    if not fits(one, value):
        options = ", ".join(map(repr, getattr(one, "options", None) or ()))
        _refuse(one.id, expected.format(options), value, f"{remedy} that.")
    return value


# The checks of ComfyUI's types that need more than that.
KINDS: dict[str, Callable[[io.Input, Any], Any]] = {
    "IMAGE": _image,
    "MASK": lambda one, value: read_mask(value, one.id),
    **dict.fromkeys(("INT", "FLOAT"), _number),
}


def _refuse(name: str, expected: str, value: object, remedy: str) -> NoReturn:
    raise InputError(f"{name} must be {expected}, found {_named(value)}. {remedy}")


def _named(value: Any) -> str:
    """What a value is, for people: kind and shape, never all of its content."""
    if isinstance(value, (Tensor, np.ndarray)):
        return f"a {type(value).__name__} of shape {tuple(value.shape)}, {value.dtype}"
    if isinstance(value, dict) and "samples" in value:
        return "a LATENT"
    return f"{reprlib.repr(value)} ({type(value).__qualname__})"
