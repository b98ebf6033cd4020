"""Weight files: what loads, in which shape it arrives, and what a wrong file is told."""

import errno
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pulid_sdxl.models import catalogue, checkpoints, tensors
from pulid_sdxl.pulid.encoders import IdEncoder, IdFormer
from pulid_sdxl.pulid.errors import DamagedWeights, ForeignWeights, MissingWeights, PulidError, WeightsError
from pulid_sdxl.tools import TOOLS
from pulid_sdxl.tools.fakes import standins
from safetensors import safe_open
from safetensors.torch import save_file

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
def v1_state():
    return standins.pulid_state("v1-published", NARROW)


@pytest.fixture(scope="module")
def v1_files(folder):
    """The same v1 weights in every form they are met in."""
    files = {
        "converted safetensors": standins.make_pulid(folder / "a.safetensors", "v1-converted", NARROW),
        "converted nested pickle": standins.make_pulid(folder / "b.bin", "v1-converted", NARROW),
        "published pickle": standins.make_pulid(folder / "c.bin", "v1-published", NARROW),
        "published safetensors": standins.make_pulid(folder / "d.safetensors", "v1-published", NARROW),
        "pickle of an old PyTorch": folder / "e.bin",
    }
    state = standins.pulid_state("v1-published", NARROW)
    torch.save(state, files["pickle of an old PyTorch"], _use_new_zipfile_serialization=False)
    return files


@pytest.fixture(scope="module")
def v1_1_file(folder):
    return standins.make_pulid(folder / "f.safetensors", "v1.1", NARROW)


def refusal(error: type[PulidError], load, path: Path) -> str:
    """The message with which `load` refuses the file; every one names the file, and none the private path."""
    with pytest.raises(error) as caught:
        load(path)
    message = str(caught.value)
    assert path.name in message
    assert str(path.parent.parent) not in message
    return message


# ---- What loads ----


FORMS = (
    "converted safetensors",
    "converted nested pickle",
    "published pickle",
    "published safetensors",
    "pickle of an old PyTorch",
)


@pytest.mark.parametrize("form", FORMS)
def test_v1_arrives_unchanged_from_every_form(v1_files, v1_state, form):
    checkpoint = checkpoints.load_pulid(v1_files[form])

    assert checkpoint.version == "v1"
    assert isinstance(checkpoint.encoder, IdEncoder)
    encoder = checkpoint.encoder.state_dict()
    assert len(encoder) == 110
    for name, tensor in encoder.items():
        assert torch.equal(tensor, v1_state[f"id_adapter.{name}"]), name
    projections = checkpoint.projections.state_dict()
    assert len(projections) == 140
    for site in range(70):
        for half in ("to_k", "to_v"):
            published = v1_state[f"id_adapter_attn_layers.{2 * site + 1}.id_{half}.weight"]
            assert torch.equal(projections[f"{half}.{site}.weight"], published), (half, site)


def test_v1_1_is_recognised_and_loaded(v1_1_file):
    checkpoint = checkpoints.load_pulid(v1_1_file)

    assert checkpoint.version == "v1.1"
    assert isinstance(checkpoint.encoder, IdFormer)
    with safe_open(v1_1_file, "pt") as file:
        assert torch.equal(checkpoint.encoder.latents, file.get_tensor("id_adapter.latents"))


def test_widths_of_the_sites_are_those_of_the_file(v1_files):
    projections = checkpoints.load_pulid(v1_files["converted safetensors"]).projections

    assert [layer.weight.shape[0] for layer in projections.to_k] == [64] * 4 + [128] * 50 + [64] * 6 + [128] * 10


def test_a_file_name_decides_nothing(v1_1_file, tmp_path):
    disguised = tmp_path / "pulid_v1.bin"
    disguised.symlink_to(v1_1_file)

    assert checkpoints.load_pulid(disguised).version == "v1.1"


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".bin", ".ckpt", ".onnx", ""])
@pytest.mark.parametrize("form", ["published", "timm"])
def test_the_tower_is_told_by_content_whatever_its_name(tmp_path, suffix, form):
    """torch.load itself goes by the ending .safetensors."""
    made = standins.make_eva(tmp_path / "made", form, small=True)

    tower = checkpoints.load_vision_tower(made.rename(tmp_path / f"tower{suffix}"))

    assert tower.config.width == 64


def test_weights_are_for_inference_and_in_the_dtype_of_the_file(v1_1_file):
    checkpoint = checkpoints.load_pulid(v1_1_file)

    for network in (checkpoint.encoder, checkpoint.projections):
        assert not network.training
        assert not any(parameter.requires_grad for parameter in network.parameters())
        assert {parameter.dtype for parameter in network.parameters()} == {torch.float16}


def test_a_dtype_can_be_asked_for(tmp_path):
    path = standins.make_eva(tmp_path / "eva.safetensors", "timm", small=True)

    tower = checkpoints.load_vision_tower(path, dtype=torch.bfloat16)

    assert {tensor.dtype for tensor in tower.state_dict().values()} == {torch.bfloat16}


def test_layers_come_from_the_operations_that_are_passed_in(tmp_path):
    class Linear(torch.nn.Linear):
        pass

    class Operations:
        LayerNorm, Conv2d = torch.nn.LayerNorm, torch.nn.Conv2d

    Operations.Linear = Linear
    path = standins.make_eva(tmp_path / "eva.pt", small=True)

    tower = checkpoints.load_vision_tower(path, operations=Operations)

    assert isinstance(tower.head, Linear)


def test_both_spellings_of_the_tower_compute_the_same(tmp_path):
    published = checkpoints.load_vision_tower(
        standins.make_eva(tmp_path / "eva.pt", "published", small=True, dtype=torch.float32)
    )
    timm = checkpoints.load_vision_tower(
        standins.make_eva(tmp_path / "eva.safetensors", "timm", small=True, dtype=torch.float32)
    )
    pixels = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))

    pooled, hidden = published(pixels)
    assert pooled.isfinite().all() and pooled.std() > 0.1
    assert torch.equal(pooled, timm(pixels)[0])
    assert len(hidden) == 5


@pytest.mark.parametrize("name", ["eva.pt", "eva.safetensors"])
def test_a_loaded_network_does_not_depend_on_its_file(tmp_path, name):
    path = standins.make_eva(tmp_path / name, "timm" if name.endswith("safetensors") else "published", small=True)
    tower = checkpoints.load_vision_tower(path)
    before = {key: tensor.clone() for key, tensor in tower.state_dict().items()}

    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))

    assert all(torch.equal(tensor, before[key]) for key, tensor in tower.state_dict().items())


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

    assert checkpoints.fingerprint(state) == checkpoints.fingerprint(dict(reversed(state.items())))
    assert checkpoints.fingerprint(state) != checkpoints.fingerprint(
        {"a": torch.arange(100.0) + 1, "b": torch.zeros(3)}
    )
    assert checkpoints.fingerprint(state) != checkpoints.fingerprint({"a": torch.arange(100.0), "c": torch.zeros(3)})


# ---- Whole files of something else ----


FOREIGN = {
    "PuLID for FLUX": {"pulid_encoder.latents": (2, 2), "pulid_ca.0.norm1.weight": (2,)},
    "InstantID": {"image_proj.proj_in.weight": (1280, 512), "ip_adapter.1.to_k_ip.weight": (2, 2)},
    "IP-Adapter": {"image_proj.proj_in.weight": (1280, 1280), "ip_adapter.1.to_k_ip.weight": (2, 2)},
    "ControlNet": {"controlnet_cond_embedding.conv_in.weight": (2,), "down_blocks.0.x": (2,)},
    "LoRA": {"lora_unet_down_blocks_0.lora_up.weight": (2, 2)},
    "SDXL checkpoint": {"model.diffusion_model.out.2.bias": (2,), "conditioner.embedders.1.model.ln_final.bias": (2,)},
    "checkpoint of an image model": {"model.diffusion_model.out.2.bias": (2,), "cond_stage_model.x": (2,)},
    "diffusion model": {"down_blocks.0.resnets.0.conv1.weight": (2,)},
    "CLIP vision model": {"vision_model.encoder.layers.0.layer_norm1.weight": (2,)},
    "text encoder": {"text_model.embeddings.position_embedding.weight": (2, 2)},
    "EVA02-CLIP": {"visual.blocks.0.attn.inner_attn_ln.weight": (2,), "text.ln_final.weight": (2,)},
    "3 tensors of an unknown kind": {"gamma": (2,), "beta": (2,), "delta": (2,)},
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_file_is_named_for_what_it_is(tmp_path, kind):
    path = tmp_path / "pulid_v1.1.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in FOREIGN[kind].items()}, path)

    message = refusal(ForeignWeights, checkpoints.load_pulid, path)

    assert message.startswith(f"Expected PuLID for SDXL, found {kind}")


def test_ip_adapter_pickles_are_recognised_through_their_nesting(tmp_path):
    path = tmp_path / "ip-adapter.bin"
    torch.save(
        {"image_proj": {"proj.weight": torch.zeros(2)}, "ip_adapter": {"1.to_k_ip.weight": torch.zeros(2)}}, path
    )

    assert "found IP-Adapter" in refusal(ForeignWeights, checkpoints.load_pulid, path)


def test_pulid_given_as_the_vision_tower_is_named(tmp_path):
    path = tmp_path / "EVA02_CLIP_L_336_psz14_s6B.pt"
    torch.save(TINY_V1, path)

    message = refusal(ForeignWeights, checkpoints.load_vision_tower, path)

    assert message.startswith("Expected EVA02-CLIP, found PuLID v1 for SDXL")


@pytest.mark.parametrize("content", [[torch.zeros(2)], {"epoch": 3}])
def test_a_pickle_of_something_else_is_foreign(tmp_path, content):
    path = tmp_path / "pulid.bin"
    torch.save(content, path)

    assert type(content).__name__ in refusal(ForeignWeights, checkpoints.load_pulid, path)


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
@pytest.mark.parametrize("load", [checkpoints.load_pulid, checkpoints.load_vision_tower])
def test_what_a_failed_download_left_is_told(tmp_path, verdict, load):
    path = tmp_path / "pulid_v1.1.safetensors"
    path.write_bytes(NOT_WEIGHTS[verdict])

    message = refusal(DamagedWeights, load, path)

    assert verdict in message
    assert catalogue.V1_1.url in message and str(catalogue.V1_1.size) in message


TROUBLE = [
    (MemoryError(), "there is not enough memory"),
    (OSError(errno.EIO, os.strerror(errno.EIO)), "Input/output error"),
    (OSError("Input/output error (os error 5)"), "Input/output error"),  # as safetensors raises it
    (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "No space left on device"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "can't allocate"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "CUDA out of memory"),
    (RuntimeError("CUDA error: device-side assert triggered"), "device-side assert"),
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


def test_a_folder_is_not_a_weight_file(tmp_path):
    (tmp_path / "pulid").mkdir()

    assert "found the folder" in refusal(DamagedWeights, checkpoints.load_pulid, tmp_path / "pulid")


def test_a_file_that_vanished_is_missing(tmp_path):
    refusal(MissingWeights, checkpoints.load_pulid, tmp_path / "gone.safetensors")


@pytest.mark.parametrize("part", [0.001, 0.5, 0.999])
@pytest.mark.parametrize("container", ["safetensors", "zipped pickle", "old pickle"])
def test_a_download_cut_short_is_damaged(tmp_path, container, part):
    path = tmp_path / "eva"
    state = standins.eva_state("timm", small=True)
    if container == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=container == "zipped pickle")
    os.truncate(path, int(path.stat().st_size * part))

    assert "is cut short or altered" in refusal(DamagedWeights, checkpoints.load_vision_tower, path)


def test_an_altered_name_inside_a_pickle_is_named(tmp_path):
    path = standins.make_eva(tmp_path / "eva.pt", small=True)
    path.write_bytes(path.read_bytes().replace(b"visual.cls_token", b"visual.cls_tokem"))

    assert "cls_tokem does not belong to it" in refusal(DamagedWeights, checkpoints.load_vision_tower, path)


ALTERATIONS = {
    "cls_token is missing": lambda state: state.pop("cls_token"),
    "blocks.5.attn.gate does not belong to it": lambda state: state.update({"blocks.5.attn.gate": torch.zeros(2)}),
    "norm.weight is (3,) instead of (64,)": lambda state: state.update({"norm.weight": torch.zeros(3)}),
    "norm.bias holds torch.int64": lambda state: state.update({"norm.bias": torch.zeros(64, dtype=torch.int64)}),
    "head.weight": lambda state: state.pop("head.weight"),
    "is not EVA02-CLIP as published": lambda state: state.update({"patch_embed.proj.weight": torch.zeros(3)}),
}


@pytest.mark.parametrize("fault", ALTERATIONS)
def test_an_altered_tower_is_refused_with_its_fault(tmp_path, fault):
    state = standins.eva_state("timm", small=True)
    ALTERATIONS[fault](state)
    path = tmp_path / "eva.safetensors"
    save_file(state, path)

    assert fault in refusal(DamagedWeights, checkpoints.load_vision_tower, path)


def test_a_message_names_the_first_faults_and_counts_the_others(tmp_path):
    state = {name: tensor for name, tensor in standins.eva_state("timm", small=True).items() if "norm1" not in name}
    path = tmp_path / "eva.safetensors"
    save_file(state, path)

    message = refusal(DamagedWeights, checkpoints.load_vision_tower, path)

    assert message.count("is missing") == 3
    assert "and 45 more faults" in message  # 24 blocks, weight and bias


def test_all_seventy_sites_have_to_be_there(tmp_path):
    path = tmp_path / "pulid.bin"
    torch.save({k: v for k, v in TINY_V1.items() if k != "id_adapter_attn_layers.25.id_to_k.weight"}, path)

    assert "to_k of site index 25 is missing" in refusal(DamagedWeights, checkpoints.load_pulid, path)


@pytest.mark.parametrize("index", [2, 141])
def test_an_index_without_a_site_is_refused(tmp_path, index):
    path = tmp_path / "pulid.bin"
    name = f"id_adapter_attn_layers.{index}.id_to_v.weight"
    torch.save(TINY_V1 | {name: torch.zeros(2, 2)}, path)

    assert f"{name} belongs to no site" in refusal(DamagedWeights, checkpoints.load_pulid, path)


def test_tensors_beside_the_encoder_and_the_sites_are_refused(tmp_path):
    path = tmp_path / "pulid.bin"
    torch.save(TINY_V1 | {"optimizer.step": torch.zeros(1)}, path)

    assert "optimizer.step does not belong to it" in refusal(DamagedWeights, checkpoints.load_pulid, path)


def test_a_projection_without_a_width_is_refused(tmp_path):
    path = tmp_path / "pulid.bin"
    torch.save(TINY_V1 | {"id_adapter_attn_layers.1.id_to_k.weight": torch.tensor(1.0)}, path)

    refusal(DamagedWeights, checkpoints.load_pulid, path)


@pytest.fixture(scope="module")
def containers(tmp_path_factory):
    """Bytes of small files: a tower that loads, and names of PuLID with sizes that do not."""
    folder = tmp_path_factory.mktemp("containers")
    tower = standins.eva_state("published", small=True)
    tower = {name: tensor for name, tensor in tower.items() if name.startswith("visual.") and ".rope." not in name}
    for stem, state in (("eva", tower), ("pulid", TINY_V1)):
        save_file(state, folder / f"{stem} safetensors")
        torch.save(state, folder / f"{stem} zip")
        torch.save(state, folder / f"{stem} pickle", _use_new_zipfile_serialization=False)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.filterwarnings("ignore")  # torch remarks on pickle protocols
@pytest.mark.parametrize("container", ["safetensors", "zip", "pickle"])
@pytest.mark.parametrize(("stem", "load"), [("eva", checkpoints.load_vision_tower), ("pulid", checkpoints.load_pulid)])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_damage_leads_to_anything_but_our_errors(containers, tmp_path, stem, load, container, data):
    content = bytearray(containers[f"{stem} {container}"])
    near_an_end = st.integers(0, 3000) | st.integers(len(content) - 3000, len(content) - 1)
    flips = st.tuples(near_an_end | st.integers(0, len(content) - 1), st.integers(0, 255))
    for place, value in data.draw(st.lists(flips, min_size=1, max_size=4)):
        content[place] = value
    length = data.draw(st.just(len(content)) | near_an_end)
    path = tmp_path / "damaged"
    path.write_bytes(content[:length])

    try:
        load(path)
    except PulidError as error:
        assert "damaged" in str(error)


# ---- Real sizes ----


@pytest.mark.parametrize(
    ("record", "layout", "tensors"),
    [(catalogue.V1, "v1-converted", 250), (catalogue.V1_1, "v1.1", 312)],
    ids=["v1", "v1.1"],
)
def test_stand_ins_have_the_published_sizes_and_load(folder, record, layout, tensors):
    path = standins.make_pulid(folder / record.name, layout)

    assert path.stat().st_size == record.size
    with safe_open(path, "pt") as file:
        assert len(file.keys()) == tensors
    projections = checkpoints.load_pulid(path).projections
    path.unlink()
    assert [layer.weight.shape[0] for layer in projections.to_v] == [640] * 4 + [1280] * 50 + [640] * 6 + [1280] * 10


def test_the_tower_of_timm_loads_at_its_real_size(folder):
    """Its file holds no rotary tables: they are made, and come on top of what the file has."""
    path = standins.make_eva(folder / "timm.safetensors", "timm")

    tower = checkpoints.load_vision_tower(path)

    assert sum(tensor.nbytes for tensor in tower.state_dict().values()) > path.stat().st_size
    path.unlink()


def test_tensors_that_are_one_number_over_and_over_are_refused(tmp_path):
    state = {**TINY_V1, "id_adapter_attn_layers.1.id_to_k.weight": torch.zeros(1).expand(1 << 16, 2048)}
    path = tmp_path / "pulid.bin"
    torch.save(state, path)

    assert "describes tensors of" in refusal(DamagedWeights, checkpoints.load_pulid, path)


MEASURE = """
import sys
from pulid_sdxl.models.checkpoints import load_vision_tower

def resident(kind):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(kind))

before = resident("VmRSS")
tower = load_vision_tower(sys.argv[1])
peak, settled = resident("VmHWM") - before, resident("VmRSS") - before
print(peak, settled, sum(tensor.nbytes for tensor in tower.state_dict().values()))
print(*tower.state_dict())
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from Linux's /proc")
def test_loading_the_tower_takes_no_more_memory_than_file_and_weights(folder):
    path = standins.make_eva(folder / catalogue.EVA_CLIP.name)
    assert abs(path.stat().st_size / catalogue.EVA_CLIP.size - 1) < 1e-3  # one name more or less in the zip

    run = subprocess.run([sys.executable, TOOLS, "-c", MEASURE, path], capture_output=True, text=True, check=True)
    numbers, names = run.stdout.splitlines()
    peak, settled, weights = map(int, numbers.split())

    assert 600e6 < weights < 620e6
    assert peak <= weights + path.stat().st_size
    assert settled <= weights + 100e6
    assert "text" not in names
    path.unlink()
