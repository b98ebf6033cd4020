"""Feeds damaged and hostile files to every reader of files, and counts: `python tools/fuzz.py READER CASES SEED`.

A reader may refuse a file with one of the pack's own errors or read it. It may not raise anything else, take longer
than SECONDS, run code, write anywhere, or take more memory than the file's size and ROOM. To be run in a process of its
own, since a file may end it; the last line of its output is JSON.
"""

import io
import json
import os
import pickle
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import warnings
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save

from ..models import archive, catalogue, checkpoints, extra_model_paths, face_networks, locate
from ..pulid.errors import PulidError

ROOM = 200e6  # bytes beyond the file's size
SECONDS = 20  # for one file
ADDRESSES = 6 << 30  # bytes of address space; what asks for more fails instead of harming this machine
NAME = "pulid/case"


# --- Damage ----------------------------------------------------------------------------------------------------------


def mutate(content: bytes, chance: random.Random) -> bytes:
    """One to five small damages, most of them near the ends, where headers and tables lie."""
    damaged = bytearray(content)
    for _ in range(chance.randint(1, 5)):
        if not damaged:
            break
        near = min(len(damaged), 4096)
        at = chance.choice((chance.randrange(near), len(damaged) - 1 - chance.randrange(near)))
        length = chance.choice((1, 2, 4, 8, 64, 1024))
        kind = chance.randrange(6)
        if kind == 0:
            damaged[at] = chance.randrange(256)
        elif kind == 1:
            damaged[at : at + length] = chance.choice((b"\0", b"\xff", b"\x7f", b"9")) * length
        elif kind == 2:
            del damaged[at : at + length]
        elif kind == 3:
            damaged[at:at] = damaged[at : at + length] * chance.choice((1, 2, 50))
        elif kind == 4:
            other = chance.randrange(len(damaged))
            damaged[at : at + length] = damaged[other : other + length]
        else:
            del damaged[chance.randrange(len(damaged)) :]
    return bytes(damaged)


# --- Checkpoints -----------------------------------------------------------------------------------------------------


class Runs:
    """Makes a folder when it is unpickled by anything that trusts it."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def sound_checkpoints() -> list[bytes]:
    from .fakes import standins

    tower = {name: t for name, t in standins.eva_state("published", small=True).items() if ".rope." not in name}
    tiny = {"id_adapter.mapping_patch_0.0.weight": torch.zeros(2)}
    for index in range(1, 140, 2):
        tiny |= {f"id_adapter_attn_layers.{index}.id_to_{half}.weight": torch.zeros(2, 2) for half in "kv"}
    made = []
    for state in (tower, tiny):
        made += [save({name: t.contiguous() for name, t in state.items()}), saved(state), saved(state, False)]
    return made


def saved(content: object, zipped: bool = True) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def rezipped(pickled: bytes, compression: int = zipfile.ZIP_STORED, **more: bytes) -> bytes:
    """PyTorch's container around a pickle of one's own."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as opened:
        for name, content in {"data.pkl": pickled, "version": b"3\n", "byteorder": b"little", **more}.items():
            opened.writestr(f"archive/{name}", content)
    return file.getvalue()


def old_pickle(pickled: bytes) -> bytes:
    """PyTorch's container before 1.6 around a pickle of one's own."""
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    before = b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, system))
    return before + pickled + pickle.dumps([], 2)


def header(text: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text


def tensor_call(numel: int, size: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    """A pickle of one tensor that claims these numbers of its storage."""

    def whole(number: int) -> bytes:
        return b"\x8a\x08" + struct.pack("<q", number)

    def several(numbers: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(map(whole, numbers)) + b"t"

    def text(words: str) -> bytes:
        return b"X" + struct.pack("<L", len(words)) + words.encode()

    persistent = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + whole(numel) + b"tQ"
    call = b"ctorch._utils\n_rebuild_tensor_v2\n(" + persistent + whole(0) + several(size) + several(stride)
    return b"\x80\x02}" + text("id_adapter.mapping_patch_0.0.weight") + call + b"\x89ccollections\nOrderedDict\n)RtRs."


def hostile_checkpoints(trace: Path) -> dict[str, bytes]:
    """Files made to do harm, by what they try."""
    ordered = OrderedDict()
    ordered["again"] = ordered
    shared: dict = {}
    for _ in range(60):
        shared = {"a": shared, "b": shared}
    nested = b"\x80\x02" + b"(" * 200_000 + b"t" * 200_000
    hashed = b"\x80\x02})" + b"\x85" * 200_000 + b"K\1s."
    pairs = b"\x80\x02}N\x85q\0" + b"".join(bytes((104, i, 104, i, 0x86, 113, i + 1)) for i in range(60)) + b"K\1s."
    many = b"\x80\x02" + b"]" * 4_000_000 + b"."
    filled = b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\0\0\0\0\1\x85R."
    sized = b"\x80\x02ctorch\nSize\ncbuiltins\nbytearray\n\x8a\x05\0\0\0\0\1\x85R\x85R."
    tensors = {"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    many_names = (
        b"{" + b",".join(b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % n for n in range(150_000)) + b"}"
    )
    cases = {"code": Runs(trace), "code in a list": [Runs(trace)], "code as a key": {"a": {"b": Runs(trace)}}}
    made = {
        f"{name}, {'zip' if zipped else 'old'}": saved(case, zipped)
        for name, case in cases.items()
        for zipped in (1, 0)
    }
    pickles = {
        "nested tuples": nested, "nested tuples as a key": hashed, "doubled tuples as a key": pairs,
        "lists without end": many, "a terabyte of zeros": filled, "counting them": sized,
        "storage of an exabyte": tensor_call(1 << 57, (1,), (1,)),
        "one number, a terabyte of times": tensor_call(1, (1 << 20, 1 << 20), (0, 0)),
        "a size below nothing": tensor_call(4, (-4,), (1,)),
        "a stride out of the storage": tensor_call(4, (2,), (1 << 40,)),
        "itself in itself": pickle.dumps(ordered, 2), "two to the sixty": pickle.dumps(shared, 2),
        "protocol 4": pickle.dumps({"a": Runs(trace)}, 4),
        "a name of a megabyte": pickle.dumps({"a" * 1_000_000: {"b": {}}}, 2),
        "an unknown opcode": b"\x80\x02\xff.", "nothing": b"\x80\x02.", "no end": b"\x80\x02}",
    }  # fmt: skip
    for name, content in pickles.items():
        made[f"{name}, zip"] = rezipped(content)
        made[f"{name}, old"] = old_pickle(content)
    made |= {
        "a bomb in the zip": rezipped(b"\x80\x02}." + bytes(1 << 28), zipfile.ZIP_DEFLATED),
        "a bomb beside the pickle": rezipped(b"\x80\x02}.", zipfile.ZIP_DEFLATED, byteorder=bytes(1 << 28)),
        "a zip of many names": rezipped(b"\x80\x02}.", **{f"data/{n}": b"" for n in range(60_000)}),
        "a header of an exabyte": header(b"{}", 1 << 39),
        "a header as long as it says": header(b"{" + b" " * (9 << 20) + b"}"),
        "many names": header(many_names),
        "nested json": header(b"{" + b'"a":[' * 100_000),
        "offsets that overlap": header(json.dumps({**tensors, "y": tensors["x"]}).encode()) + bytes(4),
        "offsets backwards": header(json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}).encode()),
        "a shape that overflows": header(
            json.dumps({"x": {"dtype": "F32", "shape": [1 << 62, 4], "data_offsets": [0, 0]}}).encode()
        ),
        "a name twice": header(b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},' * 2 + b'"z":{}}') + bytes(4),
    }  # fmt: skip
    return made


def load_checkpoint(path: Path) -> None:
    for load in (checkpoints.load_pulid, checkpoints.load_vision_tower):
        try:
            load(path)
        except PulidError:
            if load is checkpoints.load_vision_tower:
                raise


# --- The zip, the yaml, names ----------------------------------------------------------------------------------------


def sound_zips() -> list[bytes]:
    made = []
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", compression) as opened:
            for record in locate.ANTELOPEV2_FILES:
                opened.writestr(f"antelopev2/{record.name}", b"not what was published" * 300)
            opened.writestr("../../../../tmp/pulid_fuzz_left", b"an entry that would leave")
        made.append(file.getvalue())
    return made


def hostile_zips(trace: Path) -> dict[str, bytes]:
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as opened:
        for record in locate.ANTELOPEV2_FILES:
            opened.writestr(record.name, bytes(1 << 28))
    many = io.BytesIO()
    with zipfile.ZipFile(many, "w") as opened:
        for number in range(60_000):
            opened.writestr(f"{number}/{'a' * 40}", b"")
    return {"a bomb": bomb.getvalue(), "many names": many.getvalue()}


def unpack(path: Path) -> None:
    folder = path.parent / "unpacked"
    try:
        archive.unpack(path, locate.ANTELOPEV2_FILES, folder)
    finally:
        left = [found for found in path.parent.parent.rglob("*") if found.is_file() and found != path]
        if left or Path("/tmp/pulid_fuzz_left").exists():
            raise AssertionError(f"something that was not published was written: {left}")


YAML = b"""comfyui:
    base_path: /somewhere/
    is_default: true
    pulid: models/pulid
    clip: |
        models/clip
        models/text_encoders
other: {insightface: relative, facexlib: "quo\\u0074ed"}
"""


def hostile_yamls(trace: Path) -> dict[str, bytes]:
    laughs = b"a: &a [x, x, x, x, x, x, x, x, x]\n"
    for one, two in zip("abcdefgh", "bcdefghi", strict=True):
        laughs += f"{two}: &{two} [{', '.join([f'*{one}'] * 9)}]\n".encode()
    merges = b"a: &a {k0: v}\n"
    for one, two in zip("abcdefgh", "bcdefghi", strict=True):
        merges += f"{two}: &{two} {{<<: [{', '.join([f'*{one}'] * 9)}], k{two}: v}}\n".encode()
    return {
        "code": f"a: !!python/object/apply:os.mkdir ['{trace}']".encode(),
        "laughs": laughs,
        "merges": merges,
        "depth": b"[" * 20_000,
        "keys in keys": b"? " * 5_000 + b"a",
        "sixties": b"a: " + b":".join([b"1"] * 80_000),
        "digits": b"a: " + b"9" * 200_000,
        "a large file": b"a: b\n" * 200_000,
        "a list for a path": b"a: {pulid: [1, {b: c}], base_path: {d: e}, is_default: []}",
        "itself": b"a: &a {pulid: *a}",
    }


def read_yaml(path: Path) -> None:
    extra_model_paths.model_paths(path.parent, [path])


NAMES = [
    "pulid_v1.1.safetensors", "sub/mine.bin", "..\\..\\x", "C:\\x", "//server/share", "\0", "a" * 5000, "é\u202e.pt",
    "CON", "aux.txt", "~", "~root/x", "$HOME", "%2e%2e/x", "file:///etc/passwd", "https://evil.example/x", ".", "",
    " ", "/etc/passwd", "../fuzz_secret", "a/../../fuzz_secret", "....//", "\n", "http:", "*", "?",
]  # fmt: skip


def find_name(path: Path) -> None:
    """Whatever the name: what is found lies in the folder."""
    name = path.read_bytes().decode("utf-8", "replace")
    folder = path.parent
    (folder.parent / "fuzz_secret").touch()
    found = locate.find(name, [folder], ())
    if not found.resolve().is_relative_to(folder.resolve()):
        raise AssertionError(f"{name!r} led to {found}")
    if name in catalogue.BY_NAME and not catalogue.BY_NAME[name].url.startswith("https://"):
        raise AssertionError(name)


# --- The recogniser --------------------------------------------------------------------------------------------------


def sound_recognisers() -> list[bytes]:
    from .fakes import standin_faces

    return [standin_faces.make_glintr100().SerializeToString()]


def hostile_recognisers(trace: Path) -> dict[str, bytes]:
    import onnx

    from .fakes import standin_faces

    trace.with_name("secret").write_bytes(bytes(8 << 20))

    def changed(change: Callable[[onnx.ModelProto, onnx.TensorProto], None]) -> bytes:
        model = standin_faces.make_glintr100()
        change(model, max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data)))
        return model.SerializeToString()

    def outside(location: str, offset: int, length: int) -> bytes:
        def change(model: onnx.ModelProto, tensor: onnx.TensorProto) -> None:
            tensor.ClearField("raw_data")
            tensor.data_location = onnx.TensorProto.EXTERNAL
            for key, value in {"location": location, "offset": offset, "length": length}.items():
                tensor.external_data.add(key=key, value=str(value))

        return changed(change)

    return {
        "a longer shape": changed(lambda model, tensor: tensor.dims.__setitem__(0, tensor.dims[0] * 1000)),
        "a shape beyond 64 bits": changed(lambda model, tensor: tensor.dims.extend([1 << 40, 1 << 40])),
        "a negative shape": changed(lambda model, tensor: tensor.dims.__setitem__(0, -1)),
        "another type": changed(lambda model, tensor: setattr(tensor, "data_type", onnx.TensorProto.STRING)),
        "weights elsewhere": outside("../secret", 0, 4 * 64 * 7 * 7 * 512),
        "weights beyond the end": outside("case.onnx", 1 << 40, 4 * 64 * 7 * 7 * 512),
        "weights of a device": outside("/dev/zero", 0, 4 * 64 * 7 * 7 * 512),
        "empty fields": b"\x3a\x00" * 5_000_000,
        "an endless number": b"\x3a" + b"\xff" * 100_000,
        "no weights, but names": b"\x3a" + b"\xff\xff\xff\x07" + b"\x2a\x02\x42\x00" * 4_194_303,
    }


def load_recogniser(path: Path) -> None:
    named = path.with_suffix(".onnx")
    named.unlink(missing_ok=True)
    named.hardlink_to(path)
    face_networks.load_onnx(named, "recognition", ["CPUExecutionProvider"])


Reader = tuple[Callable[[Path], None], Callable[[], list[bytes]], Callable[[Path], dict[str, bytes]]]
READERS: dict[str, Reader] = {
    "checkpoints": (load_checkpoint, sound_checkpoints, hostile_checkpoints),
    "zip": (unpack, sound_zips, hostile_zips),
    "yaml": (read_yaml, lambda: [YAML], hostile_yamls),
    "catalogue": (
        find_name,
        lambda: [name.encode() for name in NAMES],
        lambda trace: {repr(name): name.encode() for name in NAMES},
    ),
    "recogniser": (load_recogniser, sound_recognisers, hostile_recognisers),
}


# --- Running ---------------------------------------------------------------------------------------------------------


def cases(reader: Reader, count: int, seed: int, trace: Path) -> Iterator[tuple[str, bytes]]:
    _, sound, hostile = reader
    yield from hostile(trace).items()
    chance, originals = random.Random(seed), sound()
    for number in range(count):
        yield f"damaged {number}", mutate(originals[number % len(originals)], chance)


def memory(field: str) -> int:
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) * 1024


class Watched:
    """Reads under a limit of time, and keeps how long that took and how many bytes it added at most."""

    def __init__(self, read: Callable[[Path], None]):
        self.read, self.seconds, self.peak = read, 0.0, 0

    def __call__(self, path: Path) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before, start = memory("VmRSS"), time.perf_counter()
        signal.alarm(SECONDS)
        try:
            self.read(path)
        finally:
            signal.alarm(0)
            self.seconds, self.peak = time.perf_counter() - start, memory("VmHWM") - before


def run(name: str, count: int, seed: int) -> dict:
    reader = READERS[name]
    read = Watched(reader[0])
    outcomes, largest, longest = Counter(), (0.0, ""), (0.0, "")
    with tempfile.TemporaryDirectory() as folder:
        trace, path = Path(folder, "it ran"), Path(folder, NAME)
        path.parent.mkdir()
        for case, content in cases(reader, count, seed, trace):
            print(case, flush=True)  # the last one is known even if it ends the process
            path.write_bytes(content)
            try:
                read(path)
                outcomes["read"] += 1
            except PulidError as error:
                outcomes[type(error).__name__] += 1
            longest, largest = max(longest, (read.seconds, case)), max(largest, (read.peak - len(content), case))
            if read.peak > len(content) + ROOM:
                raise AssertionError(f"{case}: {read.peak} bytes for a file of {len(content)}")
            if trace.exists():
                raise AssertionError(f"{case} ran code")
    return {
        "reader": name,
        "cases": outcomes.total(),
        "outcomes": dict(outcomes),
        "most memory beyond the file, MB": round(largest[0] / 1e6, 1),
        "by": largest[1],
        "longest, s": round(longest[0], 2),
        "of": longest[1],
    }


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(json.dumps(run(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
