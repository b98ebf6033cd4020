"""The graph of an ONNX file with its weights left in the file, from where ONNX Runtime maps them.

ONNX Runtime parses a file whole and copies every weight; of a graph whose weights lie outside it needs neither, and
opens ArcFace's 260 MB in a tenth of the time. Source: onnx.proto (https://github.com/onnx/onnx), whose field numbers
these are, and protobuf's encoding (https://protobuf.dev/programming-guides/encoding/).
"""

from collections.abc import Callable, Iterator
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import NamedTuple

GRAPH = 7  # of a ModelProto
INITIALIZER = 5  # of a GraphProto
RAW_DATA, EXTERNAL_DATA, DATA_LOCATION = 9, 13, 14  # of a TensorProto
KEY, VALUE = 1, 2  # of an entry of external_data
EXTERNAL = 1  # a data_location

VARINT, EIGHT_BYTES, SIZED, FOUR_BYTES = 0, 1, 2, 5  # protobuf's wire types
LONGEST_VARINT = 10  # bytes

SMALL = 1024  # bytes of a weight that stays in the graph, where shapes may be inferred from it
LARGEST_GRAPH = 4 << 20  # bytes; ArcFace's has 0.1 MB


def graph_alone(path: Path) -> bytes | None:
    """The model without its larger weights: of each it says where it lies in the file, by the file's name.

    None where the weights are stored in a form that cannot be mapped. Raises ValueError for what is no ONNX file, or
    a part of one.
    """
    with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as content:

        def model(first: int, end: int) -> bytes:
            return rewritten(content, first, end, GRAPH, lambda *graph: message(GRAPH, weightless(*graph)))

        def weightless(first: int, end: int) -> bytes:
            return rewritten(content, first, end, INITIALIZER, lambda *tensor: message(INITIALIZER, outside(*tensor)))

        def outside(first: int, end: int) -> bytes:
            return rewritten(content, first, end, RAW_DATA, place)

        def place(first: int, end: int) -> bytes:
            if end - first < SMALL:
                return message(RAW_DATA, content[first:end])
            entries = {"location": path.name, "offset": str(first), "length": str(end - first)}
            told = (message(KEY, key.encode()) + message(VALUE, value.encode()) for key, value in entries.items())
            return b"".join(message(EXTERNAL_DATA, entry) for entry in told) + number(DATA_LOCATION, EXTERNAL)

        try:
            return model(0, len(content))
        except _TooLargeError:
            return None


class _TooLargeError(Exception):
    pass


def rewritten(content: mmap, first: int, end: int, which: int, change: Callable[[int, int], bytes]) -> bytes:
    """The message at content[first:end], with what `change` makes of the place of its value for each field `which`."""
    made = bytearray()
    for field in fields(content, first, end):
        made += change(field.value, field.end) if field.number == which else content[field.first : field.end]
        if len(made) > LARGEST_GRAPH:
            raise _TooLargeError
    return bytes(made)


class Field(NamedTuple):
    """Where a field lies: from its tag, over its value, to its end."""

    number: int
    first: int
    value: int
    end: int


def fields(content: mmap, first: int, end: int) -> Iterator[Field]:
    """The fields of the message at content[first:end]. Raises ValueError where it is none."""
    while first < end:
        tag, value = read_varint(content, first)
        wire = tag & 7
        if wire == VARINT:
            last = read_varint(content, value)[1]
        elif wire == SIZED:
            size, value = read_varint(content, value)
            last = value + size
        elif wire in (EIGHT_BYTES, FOUR_BYTES):
            last = value + (8 if wire == EIGHT_BYTES else 4)
        else:
            raise ValueError(f"wire type {wire} at byte {first}")
        if last > end:
            raise ValueError(f"the field at byte {first} goes beyond its end")
        yield Field(tag >> 3, first, value, last)
        first = last


def read_varint(content: mmap, at: int) -> tuple[int, int]:
    """The number at that place, seven bits a byte, lowest first, and the place after it."""
    value = 0
    for index, byte in enumerate(content[at : at + LONGEST_VARINT]):
        value |= (byte & 127) << 7 * index
        if byte < 128:
            return value, at + index + 1
    raise ValueError(f"no number at byte {at}")


def varint(value: int) -> bytes:
    low, high = value & 127, value >> 7
    return bytes((low | 128,)) + varint(high) if high else bytes((low,))


def number(field: int, value: int) -> bytes:
    return varint(field << 3 | VARINT) + varint(value)


def message(field: int, value: bytes) -> bytes:
    return varint(field << 3 | SIZED) + varint(len(value)) + value
