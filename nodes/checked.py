"""Holds what a node is given against what its schema asks for, before anything is done with it.

ComfyUI checks most of what is written on a node; what comes through a link it believes, whatever another pack gives,
and it leaves to a node what that has taken over in `validate_inputs`.
"""

import inspect
import math
import reprlib
from collections.abc import Callable, Mapping
from functools import cache, wraps
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
NUMBERS = (int, float, np.integer, np.floating)
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def checked(node: type[Node]) -> type[Node]:
    """A class decorator: `execute` gets values of the kinds that the schema names.

    Nothing (None) for an optional input is as if it were not connected. Raises InputError that names the input, what it
    takes, what was found and what to do.
    """
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
            check = _text if name in taken_over else KINDS[str(one.io_type)]
            values = [check(one, value) for value in values]
            if values or not one.optional:
                given.arguments[name] = values if listed else values[0]
            else:
                del given.arguments[name]
        return inner(*given.args, **given.kwargs)

    node.execute = classmethod(execute)
    return node


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


def _mask(one: io.Input, value: object) -> Tensor:
    return read_mask(value, one.id)


def _image(one: io.Input, value: object) -> Tensor:
    remedy = "Connect a node that gives an IMAGE."
    expected = "an image batch (pictures, height, width, channels) of floats 0 to 1, with 1, 3 or 4 channels"
    if not isinstance(value, Tensor):
        latent = isinstance(value, dict) and "samples" in value
        _refuse(one.id, expected, value, "Put VAE Decode between." if latent else remedy)
    if value.ndim == 3:
        remedy = "Is it a mask? Put Convert Mask to Image between. A single picture needs a first dimension of 1."
    elif value.ndim == 4 and value.shape[-1] not in (1, 3, 4) and value.shape[1] in (1, 3, 4):
        remedy = "Its channels come first: move them last."
    elif value.ndim == 4 and value.numel() == 0:
        remedy = "The image batch is empty: connect at least one picture."
    elif value.dtype not in FLOATS:
        remedy = "Convert it to floats, 0 for black and 1 for white."
    if value.ndim != 4 or value.shape[-1] not in (1, 3, 4) or value.numel() == 0 or value.dtype not in FLOATS:
        _refuse(one.id, expected, value, remedy)
    _check_range(one.id, expected, value)
    return value


def _check_range(name: str, expected: str, batch: Tensor, most: float = BRIGHTEST) -> None:
    for number, pixels in enumerate(batch, start=1):
        lowest, highest = (float(value) for value in pixels.aminmax())  # NaN if there is one
        finite = math.isfinite(lowest) and math.isfinite(highest)
        if finite and lowest >= -most and highest <= most:
            continue
        what = f"pixels of {lowest:g} to {highest:g}" if finite else "NaN or infinite pixels"
        remedy = "Divide by 255." if BRIGHTEST < highest <= 255 else "Check the node that made them."
        raise InputError(f"{name} must be {expected}, found {what} in number {number} of {len(batch)}. {remedy}")


def _number(one: io.Input, value: Any) -> float:
    least, most = (-np.inf if one.min is None else one.min), (np.inf if one.max is None else one.max)
    whole = str(one.io_type) == "INT"
    expected = f"{'a whole' if whole else 'a'} number from {least} to {most}"
    fits = isinstance(value, NUMBERS) and not isinstance(value, bool) and least <= value <= most
    if not fits or (whole and value != int(value)):
        _refuse(one.id, expected, value, "Set it on the node, or connect a number within that.")
    return int(value) if whole else float(value)


def _yes_or_no(one: io.Input, value: object) -> bool:
    if not isinstance(value, (bool, np.bool_)) and not (isinstance(value, NUMBERS) and value in (0, 1)):
        _refuse(one.id, "yes or no (a BOOLEAN)", value, "Set it on the node, or connect a BOOLEAN.")
    return bool(value)


def _text(one: io.Input, value: object) -> str:
    if not isinstance(value, str):
        _refuse(one.id, "a text", value, "Set it on the node, or connect a STRING.")
    return value


def _choice(one: io.Input, value: object) -> str:
    if not isinstance(value, str) or value not in one.options:
        _refuse(one.id, f"one of: {', '.join(map(repr, one.options))}", value, "Choose one on the node.")
    return value


def _made_by(maker: str, fits: Callable[[object], bool]) -> Callable[[io.Input, object], Any]:
    def check(one: io.Input, value: object) -> object:
        if not fits(value):
            _refuse(one.id, f"what {maker} gives", value, "Connect that.")
        return value

    return check


# What each of ComfyUI's types is held against. A MODEL is known by what is asked of it, since packs wrap it.
KINDS: dict[str, Callable[[io.Input, Any], Any]] = {
    "IMAGE": _image,
    "MASK": _mask,
    "INT": _number,
    "FLOAT": _number,
    "BOOLEAN": _yes_or_no,
    "STRING": _text,
    "COMBO": _choice,
    "MODEL": _made_by("a node that loads a model (MODEL)", lambda value: hasattr(value, "get_model_object")),
    PulidSocket.io_type: _made_by("Load PuLID (SDXL)", lambda value: isinstance(value, LoadedPulid)),
    IdentitySocket.io_type: _made_by(
        "PuLID Encode Identity or PuLID Load Identity", lambda value: isinstance(value, IdEmbedding)
    ),
    PlaceSocket.io_type: _made_by(
        "PuLID Face Crop as place",
        lambda value: isinstance(value, list) and bool(value) and all(isinstance(one, Place) for one in value),
    ),
}


def _refuse(name: str, expected: str, value: object, remedy: str) -> NoReturn:
    raise InputError(f"{name} must be {expected}, found {_named(value)}. {remedy}")


def _named(value: Any) -> str:
    """What a value is, for people: kind and shape, never all of its content."""
    if value is None:
        return "nothing (None)"
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}, {value.dtype}"
    if isinstance(value, np.ndarray):
        return f"a NumPy array of shape {value.shape}, {value.dtype}"
    if isinstance(value, dict):
        return "a LATENT" if "samples" in value else f"a dictionary of {len(value)}"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    kind = type(value).__qualname__
    return f"{reprlib.repr(value)} ({kind})" if isinstance(value, (str, *NUMBERS)) else f"a {kind}"
