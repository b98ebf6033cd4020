"""Reads the tensors of a weight file, whatever its container, without running what it may ask to run.

Tensors come mapped, not read: whoever wants one copies it. What is no weight file gets a message saying what it is.
"""

import pickle
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..pulid.errors import DamagedWeights, ForeignWeights, MissingWeights
from .catalogue import BY_NAME
from .files import not_weights

# What torch and zipfile raise when the bytes of a pickle are not what they were.
UNREADABLE = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    struct.error,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)

# How torch words its refusal of a pickle that names something to call.
REFUSED = re.compile(r"unsupported (?:global: )?(?:global|class) ([\w.]+)", re.IGNORECASE)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file or a PyTorch pickle, by its dotted name; mapped where the format allows it.

    Raises MissingWeights, ForeignWeights (a pickle of something else, or one that wants to run code) or DamagedWeights.
    """
    if not path.exists():
        raise MissingWeights(f"{label(path)} is not there (any more). Refresh the list of files and choose again.")
    if path.is_dir():
        raise DamagedWeights(f"Expected a weight file, found the folder {label(path)}. Choose a file inside it.")
    with path.open("rb") as file:
        head = file.read(64)
    for magic, read in FORMATS:
        if re.match(magic, head):
            return read(path)
    if verdict := not_weights(head):
        raise damaged(path, verdict)
    raise damaged(path, f"begins with {head[:12]!r}, which is neither safetensors nor a PyTorch pickle")


def label(path: Path) -> str:
    """The file and its folder: enough to find it, without the private part of the path."""
    return f"{path.parent.name}/{path.name}"


def damaged(path: Path, verdict: str) -> DamagedWeights:
    """The error for a file that is not what its maker published, with the way to a whole copy."""
    record = BY_NAME.get(path.name)
    source = f" from {record.url}" if record else ""
    whole = f" (whole, it has {record.size} bytes)" if record and record.size else ""
    return DamagedWeights(
        f"Expected weights, but {label(path)} ({path.stat().st_size} bytes) {verdict}. "
        f"Delete it and download it again{source}{whole}."
    )


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is not a dict)
    except SafetensorError as error:
        raise damaged(path, f"is cut short or altered ({error})") from error


def _read_zip(path: Path) -> dict[str, Tensor]:
    """PyTorch's format since 1.6: a zip archive around a small pickle, whose checksum torch itself does not look at."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = [name.rpartition("/")[2] for name in archive.namelist()]
            for name in archive.namelist():
                if name.endswith(".pkl"):
                    archive.read(name)
    except UNREADABLE as error:
        raise damaged(path, f"is cut short or altered ({error})") from error
    if "data.pkl" not in members:
        raise ForeignWeights(f"Expected weights, found an ordinary zip archive: {label(path)}. Unpack it first.")
    if "constants.pkl" in members:
        raise ForeignWeights(f"Expected weights, found a TorchScript program: {label(path)}. Choose another file.")
    return _read_pickle(path, mmap=True)


def _read_pickle(path: Path, mmap: bool = False) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        tensors = dict(_flatten(content)) if isinstance(content, Mapping) else {}
    except UNREADABLE as error:
        if refused := REFUSED.search(str(error)):
            raise ForeignWeights(
                f"Expected weights alone, but {label(path)} asks to run {refused[1]} when it is opened. Nothing was "
                "run. Do not use this file; look for the same weights as safetensors."
            ) from error
        raise damaged(path, f"is cut short or altered ({type(error).__name__} while reading the pickle)") from error
    if not tensors:
        raise ForeignWeights(
            f"Expected weights by name, found {type(content).__name__} without any in {label(path)}. "
            "Choose another file."
        )
    return tensors


FORMATS = (
    (rb"(?s).{5}\0\0\0{", _read_safetensors),  # length of the header, below 2 ** 40, and a JSON object
    (rb"PK\x03\x04", _read_zip),
    (rb"\x80[\x02-\x05]", _read_pickle),  # PyTorch before 1.6; it cannot be mapped
)


def _flatten(tree: Mapping, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Tensors of nested dictionaries, under dotted names."""
    for key, value in tree.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{key}", value.detach()
        elif isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
