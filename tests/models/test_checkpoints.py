"""Weight files: what loads, in which shape it arrives, and what a wrong file is told."""

import errno
import io
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import zipfile
import zlib
from functools import partial, reduce
from pathlib import Path

import pytest
import torch
from pulid_sdxl.models import catalogue, checkpoints, tensors
from pulid_sdxl.models.face_networks import load_torch
from pulid_sdxl.pulid.encoders import IdEncoder, IdFormer
from pulid_sdxl.pulid.errors import DamagedWeights, ForeignWeights, MissingWeights, PulidError, WeightsError
from pulid_sdxl.tools import TOOLS
from pulid_sdxl.tools.fakes import standins
from pulid_sdxl.tools.fakes.damage import damages
from safetensors import safe_open
from safetensors.torch import save_file

FORMS = ("converted safetensors", "converted nested pickle", "published pickle", "pickle of an old PyTorch")
NARROW = 0.1  # width of the sites in most files here, relative to SDXL; the encoders have one size only

# Names alone tell a PuLID file; with these sizes it is refused before anything is built.
TINY_V1 = {
    "id_adapter.mapping_patch_0.0.weight": torch.zeros(2),
    **{f"id_adapter_attn_layers.{i}.id_to_{half}.weight": torch.zeros(2, 2) for i in range(1, 140, 2) for half in "kv"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder for large files, emptied as soon as this module is done."""
    path = tmp_path_factory.mktemp("weights")
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def v1_files(folder):
    """The same v1 weights in every form they are met in."""
    state = standins.pulid_state("v1-published", NARROW)
    torch.save(state, folder / "pickle of an old PyTorch", _use_new_zipfile_serialization=False)
    layouts = ("v1-converted", "a.safetensors"), ("v1-converted", "b.bin"), ("v1-published", "c.bin")
    files = [standins.make_pulid(folder / name, layout, NARROW) for layout, name in layouts]
    return dict(zip(FORMS, (*files, folder / "pickle of an old PyTorch"), strict=True))


@pytest.fixture(scope="module")
def v1_1_file(folder):
    return standins.make_pulid(folder / "f.safetensors", "v1.1", NARROW)


def small_eva(path, spelling, **changes):
    """A small tower at `path`; of each change, the tensor that takes that name's place, or None for none."""
    state = standins.eva_state(spelling, small=True) | changes
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, path)
    return path


def refusal(error: type[PulidError], load, path: Path) -> str:
    """The message with which `load` refuses the file; every one names the file, and none the private path."""
    with pytest.raises(error) as caught:
        load(path)
    message = str(caught.value)
    assert path.name in message
    assert str(path.parent.parent) not in message
    return message


# ---- What loads ----


@pytest.mark.parametrize("form", FORMS)
def test_v1_arrives_unchanged_from_every_form(v1_files, form):
    state = standins.pulid_state("v1-published", NARROW)

    checkpoint = checkpoints.load_pulid(v1_files[form])

    assert checkpoint.version == "v1"
    assert isinstance(checkpoint.encoder, IdEncoder)
    encoder = checkpoint.encoder.state_dict()
    assert len(encoder) == 110
    for name, tensor in encoder.items():
        assert torch.equal(tensor, state[f"id_adapter.{name}"]), name
    projections = checkpoint.projections.state_dict()
    assert len(projections) == 140
    for site in range(70):
        for half in ("to_k", "to_v"):
            published = state[f"id_adapter_attn_layers.{2 * site + 1}.id_{half}.weight"]
            assert torch.equal(projections[f"{half}.{site}.weight"], published), (half, site)


def test_v1_1_is_recognised_and_loaded_for_inference_whatever_its_name(v1_1_file, tmp_path):
    disguised = tmp_path / "pulid_v1.bin"
    disguised.symlink_to(v1_1_file)

    checkpoint = checkpoints.load_pulid(disguised)

    assert checkpoint.version == "v1.1"
    assert isinstance(checkpoint.encoder, IdFormer)
    with safe_open(v1_1_file, "pt") as file:
        assert torch.equal(checkpoint.encoder.latents, file.get_tensor("id_adapter.latents"))
    for network in (checkpoint.encoder, checkpoint.projections):
        assert not network.training
        assert not any(parameter.requires_grad for parameter in network.parameters())
        assert {parameter.dtype for parameter in network.parameters()} == {torch.float16}  # the file's


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ""])
@pytest.mark.parametrize("form", ["published", "timm"])
def test_the_tower_is_told_by_content_whatever_its_name(tmp_path, suffix, form):
    """torch.load itself goes by the ending .safetensors. What is loaded does not depend on its file any more."""
    path = standins.make_eva(tmp_path / "made", form, small=True).rename(tmp_path / f"tower{suffix}")

    tower = checkpoints.load_vision_tower(path)
    before = {key: tensor.clone() for key, tensor in tower.state_dict().items()}
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))

    assert tower.config.width == 64
    assert all(torch.equal(tensor, before[key]) for key, tensor in tower.state_dict().items())


def test_dtype_and_layers_are_those_that_are_asked_for(tmp_path):
    class Linear(torch.nn.Linear):
        pass

    class Operations:
        LayerNorm, Conv2d = torch.nn.LayerNorm, torch.nn.Conv2d

    Operations.Linear = Linear
    path = standins.make_eva(tmp_path / "eva.pt", small=True)

    tower = checkpoints.load_vision_tower(path, Operations, torch.bfloat16)

    assert isinstance(tower.head, Linear)
    assert {tensor.dtype for tensor in tower.state_dict().values()} == {torch.bfloat16}


# ---- The fingerprint ----


def test_fingerprint_is_that_of_the_weights_not_of_the_container(v1_files, folder):
    full_precision = standins.make_pulid(folder / "g.safetensors", "v1-converted", NARROW, torch.float32)

    prints = {checkpoints.load_pulid(path).fingerprint for path in (*v1_files.values(), full_precision)}
    as_bfloat16 = checkpoints.load_pulid(v1_files["published pickle"], dtype=torch.bfloat16).fingerprint

    assert len(prints) == 1
    assert as_bfloat16 in prints
    assert all(len(text) == 16 and int(text, 16) for text in prints)


def test_fingerprint_tells_weights_and_names_apart():
    state = {"a": torch.arange(100.0), "b": torch.zeros(3)}
    known = checkpoints.fingerprint(state)

    assert known == checkpoints.fingerprint(dict(reversed(state.items())))
    assert known != checkpoints.fingerprint(state | {"a": torch.arange(100.0) + 1})
    assert known != checkpoints.fingerprint({"a": torch.arange(100.0), "c": torch.zeros(3)})


# ---- Whole files of something else ----


FOREIGN = {
    "PuLID for FLUX": {"pulid_encoder.latents": (2, 2), "pulid_ca.0.norm1.weight": (2,)},
    "InstantID": {"image_proj.proj_in.weight": (1280, 512), "ip_adapter.1.to_k_ip.weight": (2, 2)},
    "IP-Adapter": {"image_proj.proj_in.weight": (1280, 1280), "ip_adapter.1.to_k_ip.weight": (2, 2)},
    "ControlNet": {"controlnet_cond_embedding.conv_in.weight": (2,), "down_blocks.0.x": (2,)},
    "SDXL checkpoint": {"model.diffusion_model.out.2.bias": (2,), "conditioner.embedders.1.model.ln_final.bias": (2,)},
    "diffusion model": {"down_blocks.0.resnets.0.conv1.weight": (2,)},
    "CLIP vision model": {"vision_model.encoder.layers.0.layer_norm1.weight": (2,)},
    "EVA02-CLIP": {"visual.blocks.0.attn.inner_attn_ln.weight": (2,), "text.ln_final.weight": (2,)},
    "3 tensors of an unknown kind": {"gamma": (2,), "beta": (2,), "delta": (2,)},
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_file_is_named_for_what_it_is(tmp_path, kind):
    path = tmp_path / "pulid_v1.1.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in FOREIGN[kind].items()}, path)

    message = refusal(ForeignWeights, checkpoints.load_pulid, path)

    assert message.startswith(f"Expected PuLID for SDXL, found {kind}")


@pytest.mark.parametrize(
    ("load", "content", "words"),
    [
        (
            checkpoints.load_pulid,
            {"image_proj": {"proj.weight": torch.zeros(2)}, "ip_adapter": {"1.to_k_ip.weight": torch.zeros(2)}},
            "Expected PuLID for SDXL, found IP-Adapter",
        ),
        (checkpoints.load_vision_tower, TINY_V1, "Expected EVA02-CLIP, found PuLID v1 for SDXL"),
        (checkpoints.load_pulid, [torch.zeros(2)], "found list"),
        (checkpoints.load_pulid, {"epoch": 3}, "found dict"),
    ],
    ids=["IP-Adapter", "PuLID", "list", "numbers"],
)
def test_a_pickle_of_something_else_is_named(tmp_path, load, content, words):
    path = tmp_path / "EVA02_CLIP_L_336_psz14_s6B.pt"
    torch.save(content, path)

    assert words in refusal(ForeignWeights, load, path)


def test_an_ordinary_zip_is_not_taken_for_a_pickle(tmp_path):
    path = tmp_path / "pulid.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("pulid/pulid_v1.1.safetensors", b"")

    assert "Unpack it" in refusal(ForeignWeights, checkpoints.load_pulid, path)


class Malicious:
    """Runs a command when it is unpickled by anything that trusts it."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("hide", [lambda code: TINY_V1 | {"extra": code}, lambda code: {"a": {"b": [code]}}, list])
def test_a_pickle_never_runs_code(tmp_path, zipped, protocol, hide):
    path, trace = tmp_path / "pulid_v1.bin", tmp_path / "it ran"
    content = [Malicious(trace)] if hide is list else hide(Malicious(trace))
    torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)

    message = refusal(WeightsError, checkpoints.load_pulid, path)

    assert protocol == 4 or re.search(r"asks to run (posix|nt)\.mkdir", message)  # torch reads nothing of protocol 4
    assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists(), "the pickle was harmless, so this test proved nothing"


# ---- Files that are not whole ----


NOT_WEIGHTS = {
    "is empty": b"",
    "is a web page": b"\n<!DOCTYPE html>\n<html lang=en>Not found</html>",
    "is a git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4cb8\nsize 984405232\n",
    "is text (JSON)": b'{"error":"Repository not found"}',
    "neither safetensors nor a PyTorch pickle": b"GGUF\x03\0\0\0 and so on",
}


@pytest.mark.parametrize("verdict", NOT_WEIGHTS)
def test_what_a_failed_download_left_is_told(tmp_path, verdict):
    path = tmp_path / "pulid_v1.1.safetensors"
    path.write_bytes(NOT_WEIGHTS[verdict])

    for load in (checkpoints.load_pulid, checkpoints.load_vision_tower):
        message = refusal(DamagedWeights, load, path)
        assert verdict in message
        assert catalogue.V1_1.url in message and str(catalogue.V1_1.size) in message


TROUBLE = [
    (MemoryError(), "there is not enough memory"),
    (OSError(errno.EIO, os.strerror(errno.EIO)), "Input/output error"),
    (OSError("Input/output error (os error 5)"), "Input/output error"),  # as safetensors raises it
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "can't allocate"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "CUDA out of memory"),
    (RuntimeError("unable to mmap 984405232 bytes from file: Cannot allocate memory (12)"), "Cannot allocate memory"),
]


@pytest.mark.parametrize(("error", "words"), TROUBLE, ids=lambda value: str(value)[:20])
@pytest.mark.parametrize("form", ["safetensors", "pickle"])
def test_what_the_system_fails_at_is_not_told_as_a_damaged_file(tmp_path, monkeypatch, error, words, form):
    path = tmp_path / "pulid"
    save_file(TINY_V1, path) if form == "safetensors" else torch.save(TINY_V1, path)

    def fails(*_, **__):
        raise error

    monkeypatch.setattr(tensors, "safe_open", fails)
    monkeypatch.setattr(torch, "load", fails)
    with pytest.raises(WeightsError, match=re.escape(words)) as caught:
        checkpoints.load_pulid(path)
    assert type(caught.value) is WeightsError
    assert "may be whole" in str(caught.value) and "elete" not in str(caught.value)


def test_a_folder_and_a_file_that_vanished_are_told(tmp_path):
    (tmp_path / "pulid").mkdir()

    assert "found the folder" in refusal(DamagedWeights, checkpoints.load_pulid, tmp_path / "pulid")
    refusal(MissingWeights, checkpoints.load_pulid, tmp_path / "gone.safetensors")


@pytest.mark.parametrize("part", [0.001, 0.5, 0.999])
@pytest.mark.parametrize("container", ["safetensors", "zipped pickle", "old pickle"])
def test_a_download_cut_short_is_damaged(tmp_path, container, part):
    path = small_eva(tmp_path / "eva", "timm")
    if container != "safetensors":
        state = standins.eva_state("timm", small=True)
        torch.save(state, path, _use_new_zipfile_serialization=container == "zipped pickle")
    os.truncate(path, int(path.stat().st_size * part))

    assert "is cut short or altered" in refusal(DamagedWeights, checkpoints.load_vision_tower, path)


ALTERATIONS = {
    "cls_token is missing": {"cls_token": None},
    "blocks.5.attn.gate does not belong to it": {"blocks.5.attn.gate": torch.zeros(2)},
    "norm.weight is (3,) instead of (64,)": {"norm.weight": torch.zeros(3)},
    "norm.bias holds torch.int64": {"norm.bias": torch.zeros(64, dtype=torch.int64)},
    "head.weight": {"head.weight": None},
    "is not EVA02-CLIP as published": {"patch_embed.proj.weight": torch.zeros(3)},
    "; and 21 more faults": {f"blocks.{block}.norm1.weight": None for block in range(24)},
    "has 10000 blocks": {"blocks.9999.norm1.weight": torch.zeros(64)},
}


@pytest.mark.parametrize("fault", ALTERATIONS)
def test_an_altered_tower_is_refused_with_its_fault(tmp_path, fault):
    path = small_eva(tmp_path / "eva.safetensors", "timm", **ALTERATIONS[fault])
    message = refusal(DamagedWeights, checkpoints.load_vision_tower, path)

    assert fault in message and message.count("is missing") <= 3


ATTENTION = "id_adapter_attn_layers"


@pytest.mark.parametrize(
    ("name", "tensor", "fault"),
    [
        (f"{ATTENTION}.25.id_to_k.weight", None, "to_k of site index 25 is missing"),
        (f"{ATTENTION}.2.id_to_v.weight", torch.zeros(2, 2), f"{ATTENTION}.2.id_to_v.weight belongs to no site"),
        (f"{ATTENTION}.141.id_to_v.weight", torch.zeros(2, 2), f"{ATTENTION}.141.id_to_v.weight belongs to no site"),
        ("optimizer.step", torch.zeros(1), "optimizer.step does not belong to it"),
        (f"{ATTENTION}.{'9' * 5000}.id_to_k.weight", torch.zeros(2, 2), ".id_to_k.weight does not belong to it"),
        (f"{ATTENTION}.1.id_to_k.weight", torch.tensor(1.0), "is not PuLID v1 for SDXL as published"),
        (f"{ATTENTION}.1.id_to_k.weight", torch.zeros(1).expand(1 << 16, 2048), "describes tensors of"),  # one number
    ],
)
def test_an_altered_pulid_is_refused_with_its_fault(tmp_path, name, tensor, fault):
    path = tmp_path / "pulid.bin"
    torch.save({key: value for key, value in (TINY_V1 | {name: tensor}).items() if value is not None}, path)

    assert fault in refusal(DamagedWeights, checkpoints.load_pulid, path)


READERS = {  # and what each reads
    checkpoints.load_pulid: TINY_V1,
    checkpoints.load_vision_tower: standins.eva_state("timm", small=True),
    partial(load_torch, make=partial(torch.nn.BatchNorm1d, 2)): torch.nn.BatchNorm1d(2).state_dict(),
}


@pytest.mark.filterwarnings("ignore")  # torch remarks on pickle protocols
@pytest.mark.parametrize("container", ["safetensors", "zip", "pickle"])
@pytest.mark.parametrize("load", READERS)
def test_no_damage_leads_to_anything_but_our_errors(tmp_path, load, container):
    path = tmp_path / "damaged"
    if container == "safetensors":
        save_file(READERS[load], path)
    else:
        torch.save(READERS[load], path, _use_new_zipfile_serialization=container == "zip")

    for content in damages(path.read_bytes(), 60):
        path.write_bytes(content)
        try:
            load(path)
        except PulidError as error:
            assert path.name in str(error)


# ---- Files made to do harm ----


def zipped(pickled: bytes) -> bytes:
    """PyTorch's zip around a pickle of one's own, with four numbers in it."""
    with zipfile.ZipFile(file := io.BytesIO(), "w") as archive:
        for name, content in {"data.pkl": pickled, "version": b"3\n", "data/0": bytes(16)}.items():
            archive.writestr(f"archive/{name}", content)
    return file.getvalue()


def old(pickled: bytes) -> bytes:
    """PyTorch's container before 1.6: its magic number, version and system, the pickle, names of what follows."""
    before = (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}})
    return b"".join(pickle.dumps(part, 2) for part in before) + pickled + pickle.dumps([], 2)


def header(tensors: object) -> bytes:
    """A safetensors file of four bytes with this header, as text or to be written as JSON."""
    text = tensors if isinstance(tensors, bytes) else json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text + bytes(4)


torch.save({"id_adapter.mapping_patch_0.0.weight": torch.zeros(4)}, tiny := io.BytesIO())
PICKLE = zipfile.ZipFile(tiny).read("archive/data.pkl")
STORED, SIZE, STRIDE = b"K\x04t", b"K\x04\x85", b"K\x01\x85"  # of its tensor: 4, (4,) and (1,)
HUGE = b"\x8a\x08" + struct.pack("<q", 1 << 40)
TENSOR = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
PICKLES = {
    "a storage of terabytes": PICKLE.replace(STORED, HUGE + b"t"),
    "a size of terabytes": PICKLE.replace(SIZE, HUGE + b"\x85"),
    "one number, terabytes of times": PICKLE.replace(SIZE, HUGE + b"\x85").replace(STRIDE, b"K\x00\x85"),
    "a size below nothing": PICKLE.replace(SIZE, b"J\xfc\xff\xff\xff\x85"),
    "a stride out of the storage": PICKLE.replace(STRIDE, HUGE + b"\x85"),
    "nested tuples": b"\x80\x02" + b"(" * 100_000 + b"t" * 100_000 + b".",
    "itself in itself": b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.",
    "two to the sixty": pickle.dumps(reduce(lambda inner, _: {"a": inner, "b": inner}, range(60), {}), 2),
    "a name of a megabyte": pickle.dumps({"a" * 1_000_000: {"b": {}}}, 2),
    "an unknown opcode": b"\x80\x02\xff.",
    "nothing": b"\x80\x02.",
    "no end": b"\x80\x02}",
}
HARMFUL = {f"{harm}, {wrap.__name__}": wrap(PICKLES[harm]) for harm in PICKLES for wrap in (zipped, old)} | {
    "a header of terabytes": struct.pack("<Q", (1 << 40) - 1) + b"{}",
    "many names": header({str(n): TENSOR | {"shape": [0]} for n in range(20_000)}),
    "nested json": header(b"{" + b'"a":[' * 100_000),
    "offsets that overlap": header({"x": TENSOR, "y": TENSOR}),
    "offsets backwards": header({"x": TENSOR | {"data_offsets": [4, 0]}}),
    "a shape that overflows": header({"x": TENSOR | {"shape": [1 << 62, 4]}}),
}


@pytest.mark.parametrize("content", [zipped(PICKLE), header({"x": TENSOR})])
def test_what_makes_harmful_files_makes_whole_ones_too(tmp_path, content):
    (tmp_path / "whole").write_bytes(content)
    [tensor] = tensors.map_tensors(tmp_path / "whole").values()
    assert not tensor.any() and all(PICKLE.count(part) == 1 for part in (STORED, SIZE, STRIDE))


@pytest.mark.parametrize("harm", HARMFUL)
def test_a_file_made_to_do_harm_is_refused_by_every_reader(tmp_path, harm):
    (path := tmp_path / "pulid_v1.bin").write_bytes(HARMFUL[harm])
    for load in READERS:
        assert "may be whole" not in refusal(WeightsError, load, path)  # it is the file's fault


# ---- Real sizes ----


MEASURE = """
import json, sys, zlib
from pulid_sdxl.models import checkpoints

def resident(kind):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(kind))

before = resident("VmRSS")
loaded = getattr(checkpoints, sys.argv[1])(sys.argv[2])
peak, settled = resident("VmHWM") - before, resident("VmRSS") - before
networks = [loaded] if hasattr(loaded, "config") else [loaded.encoder, loaded.projections]
tensors = {name: tensor for network in networks for name, tensor in network.state_dict().items()}
sums = {name: zlib.crc32(tensor.numpy()) for name, tensor in tensors.items() if "rope" not in name}
print(json.dumps([peak, settled, sum(tensor.nbytes for tensor in tensors.values()), sums]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from Linux's /proc")
@pytest.mark.parametrize(("record", "load", "make", "layout"), [
    (catalogue.V1, "load_pulid", standins.make_pulid, "v1-converted"),
    (catalogue.V1_1, "load_pulid", standins.make_pulid, "v1.1"),
    (catalogue.EVA_CLIP, "load_vision_tower", standins.make_eva, "published"),
    (catalogue.EVA_CLIP_TIMM, "load_vision_tower", standins.make_eva, "open_clip"),
])  # fmt: skip
def test_every_tensor_of_a_real_file_arrives_within_what_is_kept_and_300_mb(folder, record, load, make, layout):
    path = make(folder / record.name, layout)
    assert path.stat().st_size == pytest.approx(record.size, rel=1e-4)  # a name more or less beside the tensors

    run = subprocess.run([sys.executable, TOOLS, "-c", MEASURE, load, path], capture_output=True, text=True, check=True)
    path.unlink()

    peak, settled, kept, sums = json.loads(run.stdout)
    assert peak <= kept + 300e6 and settled <= kept + 100e6
    made = standins.pulid_state(layout) if load == "load_pulid" else standins.eva_state("timm")  # by our own names
    for name, tensor in made.items():
        site = re.fullmatch(r"\w+\.(\d+)\.(?:id_)?(to_[kv])(?:_ip)?\.weight", name)
        own = f"{site[2]}.{int(site[1]) // 2}.weight" if site else re.sub(r"^(id_adapter|image_proj)\.", "", name)
        assert sums.pop(own) == zlib.crc32(tensor.numpy()), name
    assert not sums
