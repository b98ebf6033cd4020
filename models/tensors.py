"""Reads the tensors of a weight file, safetensors or a PyTorch pickle, without running what it may ask to run.

Formats: https://github.com/huggingface/safetensors and https://pytorch.org/docs/stable/notes/serialization.html
"""

import errno
import pickle
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..pulid.errors import DamagedWeights, ForeignWeights, MissingWeights, PulidError, WeightsError
from ..pulid.packages import describe
from .catalogue import BY_NAME
from .locate import in_the_way, not_weights

SAFETENSORS = rb"(?s).{5}\0\0\0{"  # length of the header, below 2 ** 40, and a JSON object
ZIP = rb"PK\x03\x04"  # PyTorch's pickles since 1.6
OLD_PICKLE = rb"\x80[\x02-\x05]"  # PyTorch's pickles before; they cannot be mapped

CHUNK = 64 << 20  # bytes that are mapped while they are copied
SHARED = 64 << 20  # bytes that tensors may have beyond their file's: EVA's 24 blocks share one rotary table
DEEPEST = 3  # dictionaries in each other; the converted files have two

# How torch and ONNX Runtime report memory, a disk or a device that failed them, rather than a file.
SYSTEM = re.compile(
    r"(?i)memory|alloc|(os|system) error|unable to (open|mmap)|no space|input/output|"
    r"\b(cuda|cudnn|cublas|hip|rocm|migraphx|dml|driver|device)"
)
REFUSED = re.compile(r"(?:GLOBAL|class|function) (?:<[\w -]*? )?([\w.]+)")  # what weights_only did not call


def map_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor by its dotted name; the values stay in the file until they are used, where the format allows it.

    Raises MissingWeights, ForeignWeights (a pickle of something else, or one that asks to run code), DamagedWeights,
    or WeightsError where the system could not read the file.
    """
    with reading(path):
        if _format(path) == SAFETENSORS:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is not a dict)
        else:
            tensors = _unpickle(path, mapped=True)
        described = sum(tensor.nbytes for tensor in tensors.values())
        if described > path.stat().st_size + SHARED:
            raise damaged(path, f"describes tensors of {described} bytes, more than it can hold")
    return tensors


def read_tensors(path: Path, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """The tensors of these names, or all, in memory of their own. Takes CHUNK more than they have, or the file's size.

    Raises what `map_tensors` raises.
    """
    with reading(path):
        if _format(path) == SAFETENSORS:
            return _copy_safetensors(path, names)
        tensors = _unpickle(path)
        return tensors if names is None else {name: tensors[name] for name in names}


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Whatever a library raises while it reads this file becomes a WeightsError.

    Only what the bytes show is called damage: memory, a disk or a device that fails is told as that.
    """
    try:
        yield
    except PulidError:
        raise
    except Exception as error:  # bytes that are not what they were make an unpickler raise nearly anything
        if isinstance(error, pickle.UnpicklingError) and (refused := REFUSED.search(str(error))):
            raise ForeignWeights(
                f"Expected weights alone, but {label(path)} asks to run {refused[1]} when it is opened. Nothing was "
                "run. Do not use this file; look for the same weights as safetensors."
            ) from error
        if words := system_trouble(error):
            raise unread(path, words) from error
        said = str(error) if isinstance(error, SafetensorError) else type(error).__name__
        raise damaged(path, f"is cut short or altered ({said})") from error


def system_trouble(error: Exception) -> str | None:
    """What the system said, if memory, a disk or a device failed; None for an error that tells of a file's content."""
    if isinstance(error, MemoryError):
        return "there is not enough memory"
    # EINVAL is zipfile's, for a place before the beginning. Pillow's damaged pictures have no number, nor have the
    # errors of Rust, which say "os error".
    if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
        return error.strerror or describe(error)
    if isinstance(error, OSError | RuntimeError | pickle.UnpicklingError) and SYSTEM.search(str(error)):
        return describe(error)
    return None


def label(path: Path) -> str:
    """The file and its folder: enough to find it, without the private part of the path."""
    return f"{path.parent.name}/{path.name}"


def unread(path: Path, words: str) -> WeightsError:
    """The error for a file that the system could not read; `words` are the system's."""
    if blocked := in_the_way(path):
        return WeightsError(blocked)
    words = words.replace(str(path), path.name)
    return WeightsError(
        f"{label(path)} could not be read: {words}. The file may be whole: keep it, free what is short or mend what "
        "failed, and try again."
    )


def damaged(path: Path, verdict: str) -> DamagedWeights:
    """The error for a file that is not what its maker published, with the way to a whole copy."""
    record = BY_NAME.get(path.name)
    whole = f" (whole, it has {record.size} bytes)" if record and record.size else ""
    return DamagedWeights(
        f"Expected weights, but {label(path)} ({path.stat().st_size} bytes) {verdict}. "
        f"Delete it and download it again{source(path)}{whole}."
    )


def source(path: Path) -> str:
    """Where a file of this name comes from, in words; nothing where nobody knows."""
    record = BY_NAME.get(path.name)
    return f" from {record.url}" if record else ""


def _format(path: Path) -> bytes:
    """SAFETENSORS, ZIP or OLD_PICKLE, told by the first bytes."""
    if not path.exists():
        raise MissingWeights(f"{label(path)} is not there (any more). Refresh the list of files and choose again.")
    if path.is_dir():
        raise DamagedWeights(f"Expected a weight file, found the folder {label(path)}. Choose a file inside it.")
    with path.open("rb") as file:
        head = file.read(64)
    for beginning in (SAFETENSORS, ZIP, OLD_PICKLE):
        if re.match(beginning, head):
            return beginning
    raise damaged(
        path, not_weights(head) or f"begins with {head[:12]!r}, which is neither safetensors nor a PyTorch pickle"
    )


def _copy_safetensors(path: Path, names: Iterable[str] | None) -> dict[str, Tensor]:
    """As mapped pages count as the process's memory, the file is closed and opened anew after every CHUNK."""
    tensors: dict[str, Tensor] = {}
    left = None if names is None else list(names)
    while left is None or left:
        with safe_open(path, framework="pt") as file:
            if left is None:
                left = list(file.keys())
            copied = 0
            while left and copied < CHUNK:
                name = left.pop(0)
                tensors[name] = file.get_tensor(name).clone()
                copied += tensors[name].nbytes
    return tensors


def _unpickle(path: Path, mapped: bool = False) -> dict[str, Tensor]:
    with path.open("rb") as file:
        zipped = _format(path) == ZIP
        if zipped:
            _check_archive(path, file)
        # torch maps only what it opens itself, and takes whatever is named .safetensors for that.
        mapped = mapped and zipped and path.suffix != ".safetensors"
        content = torch.load(path if mapped else file, map_location="cpu", weights_only=True, mmap=mapped)
    tensors = dict(_flatten(content)) if isinstance(content, Mapping) else {}
    if not tensors:
        raise ForeignWeights(
            f"Expected weights by name, found {type(content).__name__} without any in {label(path)}. "
            "Choose another file."
        )
    return tensors


def _check_archive(path: Path, file: BinaryIO) -> None:
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    names = {entry.filename.rpartition("/")[2] for entry in entries}
    if "data.pkl" not in names:
        raise ForeignWeights(f"Expected weights, found an ordinary zip archive: {label(path)}. Unpack it first.")
    if "constants.pkl" in names:
        raise ForeignWeights(f"Expected weights, found a TorchScript program: {label(path)}. Choose another file.")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise damaged(path, "was packed anew: PyTorch compresses nothing")
    file.seek(0)


def _flatten(tree: Mapping, prefix: str = "", depth: int = 1) -> Iterator[tuple[str, Tensor]]:
    """The plain tensors of nested dictionaries, under dotted names."""
    for key, value in tree.items():
        if isinstance(value, Tensor) and value.layout is torch.strided and value.device.type == "cpu":
            yield f"{prefix}{key}", value.detach()
        elif isinstance(value, Mapping) and depth < DEEPEST:
            yield from _flatten(value, f"{prefix}{key}.", depth + 1)
