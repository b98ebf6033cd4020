"""Reads the tensors of a weight file, whatever its container, without running what it may ask to run.

Tensors come mapped, not read: whoever wants one copies it. What is no weight file gets a message saying what it is.
No file makes this take more memory than its own size and some 200 MB.
"""

import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..pulid.errors import DamagedWeights, ForeignWeights, MissingWeights
from .archive import check_directory
from .catalogue import BY_NAME
from .locate import not_weights
from .pickles import CodeInPickle, look_through

# What torch and zipfile raise when the bytes of a pickle are not what they were.
UNREADABLE = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    struct.error,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)

SAFETENSORS = rb"(?s).{5}\0\0\0{"  # length of the header, below 2 ** 40, and a JSON object
LARGEST_HEADER = 8 << 20  # bytes of a safetensors header; a file of 2,500 tensors has 0.3 MB
LONGEST_NAME = 1024  # characters
OLD_PICKLES = 5  # before 1.6: magic number, protocol, system, the object, its storages


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


def copier(path: Path) -> Callable[[Tensor], Tensor]:
    """A function that copies tensors of `read_tensors(path)` into memory of their own.

    Where the system tells which memory is mapped from which part of a file (Linux), it reads that part instead: half
    the time, and no mapped page counts as the process's memory. Raises DamagedWeights if the file became shorter.
    """
    ranges = _mapped_ranges(path)

    def copy(tensor: Tensor) -> Tensor:
        start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        within = [start - low + offset for low, high, offset in ranges if low <= start and end <= high]
        if not within or not tensor.is_contiguous():
            return tensor.clone(memory_format=torch.contiguous_format)
        raw = torch.empty(tensor.nbytes, dtype=torch.uint8)
        with path.open("rb", buffering=0) as file:
            file.seek(within[0])
            rest = memoryview(raw.numpy())
            while rest and (read := file.readinto(rest)):
                rest = rest[read:]
        if rest:
            raise damaged(path, "became shorter while it was read")
        return raw.view(tensor.dtype).view(tensor.shape)

    return copy


def _mapped_ranges(path: Path) -> list[tuple[int, int, int]]:
    """First and last address, and place in the file, of all memory that is mapped from it; proc_pid_maps(5)."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    inode = str(path.stat().st_ino)
    found = (line.split(maxsplit=5) for line in lines)
    return [
        (*(int(end, 16) for end in span.split("-")), int(offset, 16))
        for span, _, offset, _, node, *_ in found
        if node == inode
    ]


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
    if length > LARGEST_HEADER:
        raise damaged(path, f"claims a header of {length} bytes, so it is cut short or altered")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is not a dict)
    except (SafetensorError, *UNREADABLE) as error:
        raise damaged(path, f"is cut short or altered ({error})") from error


def _read_zip(path: Path) -> dict[str, Tensor]:
    """PyTorch's format since 1.6: a zip archive around a small pickle, whose checksum torch itself does not look at."""
    check_directory(path)
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {entry.filename.rpartition("/")[2]: entry for entry in archive.infolist()}
            if "data.pkl" not in entries:
                raise ForeignWeights(
                    f"Expected weights, found an ordinary zip archive: {label(path)}. Unpack it first."
                )
            if "constants.pkl" in entries:
                raise ForeignWeights(
                    f"Expected weights, found a TorchScript program: {label(path)}. Choose another file."
                )
            if any(entry.compress_type or entry.file_size != entry.compress_size for entry in archive.infolist()):
                raise damaged(path, "was packed anew: PyTorch compresses nothing")
            with archive.open(entries["data.pkl"]) as pickled:
                _look_through(path, pickled)
                while pickled.read(1 << 16):  # to its end, where its checksum is compared
                    pass
    except UNREADABLE as error:
        raise damaged(path, f"is cut short or altered ({error})") from error
    return _read_pickle(path, mmap=True)


def _read_old_pickle(path: Path) -> dict[str, Tensor]:
    with path.open("rb") as file:
        _look_through(path, file, OLD_PICKLES)
    return _read_pickle(path)


def _look_through(path: Path, file, pickles: int = 1) -> None:
    try:
        look_through(file, pickles)
    except CodeInPickle as error:
        raise ForeignWeights(
            f"Expected weights alone, but {label(path)} asks to run {error} when it is opened. Nothing was run. "
            "Do not use this file; look for the same weights as safetensors."
        ) from error
    except UNREADABLE as error:
        raise damaged(path, f"is cut short or altered ({error})") from error


def _read_pickle(path: Path, mmap: bool = False) -> dict[str, Tensor]:
    try:
        misnamed = path.suffix == ".safetensors"  # torch goes by this name, if it is told it; then it cannot map
        with path.open("rb") as file:
            source = file if misnamed else path
            content = torch.load(source, map_location="cpu", weights_only=True, mmap=mmap and not misnamed)
        tensors = dict(_flatten(content, set())) if isinstance(content, Mapping) else {}
    except UNREADABLE as error:
        raise damaged(path, f"is cut short or altered ({type(error).__name__} while reading the pickle)") from error
    if not tensors:
        raise ForeignWeights(
            f"Expected weights by name, found {type(content).__name__} without any in {label(path)}. "
            "Choose another file."
        )
    return tensors


FORMATS = (
    (SAFETENSORS, _read_safetensors),
    (rb"PK\x03\x04", _read_zip),
    (rb"\x80[\x02-\x05]", _read_old_pickle),  # it cannot be mapped
)


def _flatten(tree: Mapping, seen: set[int], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Tensors of nested dictionaries, under dotted names. Raises ValueError for what no file of weights holds."""
    if id(tree) in seen:
        raise ValueError("a dictionary is in it twice")
    seen.add(id(tree))
    for key, value in tree.items():
        name = f"{prefix}{key}" if len(prefix) < LONGEST_NAME and isinstance(key, str | int) else ""
        if isinstance(value, Tensor | Mapping) and not 0 < len(name) <= LONGEST_NAME:
            raise ValueError("a name is too long or no name")
        if isinstance(value, Tensor):
            value = value.detach()
            if value.layout is not torch.strided or value.device.type != "cpu":
                raise ValueError(f"{name} is no plain tensor")
            yield name, value
        elif isinstance(value, Mapping):
            yield from _flatten(value, seen, f"{name}.")
