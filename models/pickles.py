"""Looks through a pickle of weights without unpickling anything, and refuses what weights have no need of.

torch's own `weights_only` keeps code from running. It does not keep a small file from filling the memory, never ending
or overflowing the stack: it knows `bytearray`, and tuples in tuples of any depth, which are hashed part by part.
Source of the opcodes: Python's pickletools; of what weights need: `torch.save`.
"""

import pickletools
from typing import BinaryIO

LARGEST = 1 << 20  # bytes; an unpickler makes up to 80 bytes of each, and a file of 1,000 tensors has 0.2 MB

# What torch.save writes, whatever is saved (pickle protocol 2).
OPCODES = {
    "PROTO", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT",
    "BINUNICODE", "EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "SETITEM",
    "SETITEMS", "APPEND", "APPENDS", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "GLOBAL", "REDUCE", "BUILD",
    "BINPERSID",
}  # fmt: skip
STORAGES = ("BFloat16", "Bool", "Byte", "Char", "Double", "Float", "Half", "Int", "Long", "Short")
NAMES = {
    "collections OrderedDict",
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_tensor_v2",
    *(f"torch {kind}Storage" for kind in STORAGES),
}
CONTAINERS = {"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_DICT", "EMPTY_LIST"}
DEEPEST = 64  # containers in each other


class CodeInPickle(ValueError):
    """The pickle names something to call that weights have no need of; the message is its name."""


def look_through(stream: BinaryIO, pickles: int = 1) -> None:
    """Read so many pickles, which follow each other. Raises ValueError for what weights have no need of."""
    start = stream.tell()
    for _ in range(pickles):
        depths = _Depths()
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name == "GLOBAL" and argument not in NAMES:
                raise CodeInPickle(argument.replace(" ", "."))
            if opcode.name not in OPCODES:
                raise ValueError(f"its pickle does {opcode.name}")
            if depths.after(opcode, argument) > DEEPEST:
                raise ValueError(f"its pickle is nested more than {DEEPEST} deep")
            if stream.tell() - start > LARGEST:
                raise ValueError(f"its pickle is longer than {LARGEST} bytes")


class _Depths:
    """An unpickler's stack with, in place of each value, how many containers lie in each other there."""

    def __init__(self):
        self.stack: list[int] = []
        self.marks: list[int] = []  # places in the stack
        self.kept: dict[int, tuple[int, str]] = {}  # the memo: depth, and the opcode that made the value
        self.maker = ""

    def after(self, opcode: pickletools.OpcodeInfo, argument: object) -> int:
        """The depth of what the opcode leaves on top of the stack."""
        name = opcode.name
        if name == "MARK":
            self.marks.append(len(self.stack))
            return 0
        if name.endswith("BINPUT"):
            self.kept[argument] = self.stack[-1], self.maker
            return 0
        self.maker = name
        if name.endswith("BINGET"):
            depth, maker = self.kept[argument]
            if maker in CONTAINERS:
                raise ValueError("its pickle holds a container twice")
        else:
            depth = max(self._taken(opcode.stack_before), default=0) + 1
        self.stack += [depth] * len(opcode.stack_after)
        return depth

    def _taken(self, before: list[pickletools.StackObject]) -> list[int]:
        count = len(before)
        if pickletools.markobject in before:
            count = before.index(pickletools.markobject) + len(self.stack) - self.marks.pop()
        if count > len(self.stack):
            raise ValueError("its pickle takes more than there is")
        at = len(self.stack) - count
        taken = self.stack[at:]
        del self.stack[at:]
        return taken
