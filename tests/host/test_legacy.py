"""The nodes of older shared workflows: their shape, real workflows, their numbers, and other packs with their ids."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

if not os.environ.get("COMFYUI"):
    pytest.skip("COMFYUI names no ComfyUI folder", allow_module_level=True)

from pulid_sdxl.pulid.cache import ResultCache
from pulid_sdxl.pulid.networks import Managed, on_cpu
from pulid_sdxl.tools import TOOLS, comfy_host
from pulid_sdxl.tools.fakes import networks as fakes

comfy_host.enter(os.environ["COMFYUI"])

import numpy as np
import torch
import torchvision
from PIL import Image
from pulid_sdxl.models import catalogue
from pulid_sdxl.models import locate as pulid_files
from pulid_sdxl.models.face_networks import InsightFaceAnalyzer
from pulid_sdxl.nodes import host, legacy, load, patch, shared
from pulid_sdxl.pulid import faces as pulid_faces
from pulid_sdxl.pulid.attention import Fusion, IdProjections
from pulid_sdxl.pulid.encoders import IdEncoder
from pulid_sdxl.pulid.errors import InputError, MismatchError, MissingWeights, NoFaceError
from pulid_sdxl.pulid.eva import EvaConfig, EvaVisionTower, rotary_table
from pulid_sdxl.pulid.faces import Face
from pulid_sdxl.pulid.identity import IdEmbedding, VisionFeatures
from pulid_sdxl.pulid.sites import SITES
from pulid_sdxl.tools import demo, model_files
from pulid_sdxl.tools.comfy_server import ComfyServer, ServerError, link
from pulid_sdxl.tools.conformance import FOLDER
from pulid_sdxl.tools.fakes import standins
from pulid_sdxl.tools.workflow import declared_inputs, find, misfits, set_inputs, to_prompt
from safetensors.torch import load_file

from . import sampling

ROOT = Path(legacy.__file__).parents[1]
V1 = catalogue.V1.name

# ---- Their shape ----

WEIGHT = ("weight", "FLOAT", {"default": 1.0, "min": -1.0, "max": 5.0, "step": 0.05})
NOISE = ("noise", "FLOAT", {"default": 0.0, "min": -1.0, "max": 1.0, "step": 0.1})
RANGE = [
    (name, "FLOAT", {"default": default, "min": 0.0, "max": 1.0, "step": 0.001})
    for name, default in (("start_at", 0.0), ("end_at", 1.0))
]
SOCKETS = {
    "model": "MODEL",
    "pulid": "PULID",
    "eva_clip": "EVA_CLIP",
    "face_analysis": "FACEANALYSIS",
    "image": "IMAGE",
}
INPUTS = [(name, kind, {}) for name, kind in SOCKETS.items()]
METHOD = ("method", ["fidelity", "style", "neutral"], {})
PROJECTION = ("projection", ["ortho_v2", "ortho", "none"], {})
FIDELITY = ("fidelity", "INT", {"default": 8, "min": 0, "max": 32, "step": 1})
MASK = [("attn_mask", "MASK", {})]

# The other pack's node definitions: id -> required inputs in order (name, type or choices, limits), optional ones,
# outputs (name and type are one). A file list has no choices of its own.
OLD = {
    "PulidModelLoader": ([("pulid_file", None, {})], [], "PULID"),
    "PulidInsightFaceLoader": ([("provider", ["CPU", "CUDA", "ROCM", "CoreML"], {})], [], "FACEANALYSIS"),
    "PulidEvaClipLoader": ([], [], "EVA_CLIP"),
    "ApplyPulid": ([*INPUTS, METHOD, WEIGHT, *RANGE], MASK, "MODEL"),
    "ApplyPulidAdvanced": ([*INPUTS, WEIGHT, PROJECTION, FIDELITY, NOISE, *RANGE], MASK, "MODEL"),
}


@pytest.fixture(scope="module")
def server(comfyui, tmp_path_factory):
    """A ComfyUI with this pack and stand-ins of every file that an older workflow needs."""
    base = tmp_path_factory.mktemp("base")
    demo.prepare_base(base, model_files.gather(None, None, comfyui))
    demo.prepare_photo(base / "input", None)

    def make(folder):
        standins.make_pulid(folder / "pulid" / V1, layout="v1-converted", width_scale=model_files.FIFTH)

    link(model_files.standins("pulid-v1-0.2", make) / "pulid" / V1, base / "models" / "pulid" / V1)
    (base / "models" / "pulid" / catalogue.V1_1.name).rename(base / "models" / "pulid" / "newer.safetensors")
    seeing_retinaface(base / "models" / "facexlib" / catalogue.RETINAFACE.name)
    with ComfyServer(comfyui, base, ("--cpu",)) as server:
        yield server


def seeing_retinaface(path):
    """In place of the stand-in that sees nothing, one that sees upright faces of 256 px wherever it looks."""
    state = torch.load(path, weights_only=True)
    path.unlink()
    landmarks = torch.tensor([-0.25, -0.2, 0.25, -0.2, 0, 0, -0.2, 0.25, 0.2, 0.25]) / 0.1  # of the box, over variance
    for kind, bias in (
        ("ClassHead", torch.tensor([-9.0, 9.0, 9.0, -9.0])),
        ("BboxHead", torch.zeros(8)),
        ("LandmarkHead", landmarks.repeat(2)),
    ):
        state[f"module.{kind}.2.conv1x1.weight"].zero_()
        state[f"module.{kind}.2.conv1x1.bias"].copy_(bias)
    torch.save(state, path)


@pytest.fixture(scope="module")
def info(server):
    return server.object_info()


@pytest.mark.parametrize("node_id", OLD)
def test_inputs_and_outputs_are_the_other_packs(info, node_id):
    required, optional, output = OLD[node_id]
    node = info[node_id]
    assert (node["output"], node["output_name"]) == ([output], [output])
    assert node["input_order"].get("required", []) == [name for name, _, _ in required]
    assert node["input_order"].get("optional", []) == [name for name, _, _ in optional]
    declared = declared_inputs(node_id, info)
    for name, kind, limits in (*required, *optional):
        found, options = declared[name]
        if found == "COMBO" or isinstance(found, list):
            found = found if isinstance(found, list) else options["options"]
            assert options.get("default") in (None, found[0])  # what a new node shows
            found = found if kind else kind
        assert found == kind
        assert {key: options.get(key) for key in limits} == limits


def test_they_are_marked_as_deprecated_and_lie_in_a_category_of_their_own(info):
    for node_id in OLD:
        assert info[node_id]["deprecated"]
        assert info[node_id]["category"] == "PuLID/legacy"
        assert "In new ones, use " in info[node_id]["description"]


# ---- Old workflows on a real server ----


def old_workflow(apply="ApplyPulid", values=("fidelity", 0.8, 0, 1), masked=False):
    """An older workflow as the editor saved it: values by place alone, whole numbers for fractions."""
    sockets = "model:1 pulid:6 eva_clip:8 face_analysis:7 image:5" + masked * " attn_mask:14"
    described = [  # id, type, links of inputs and of outputs by name, values
        (4, "CheckpointLoaderSimple", "", "MODEL:1 CLIP:2,3 VAE:4", ["standin_sdxl_fifth_width.safetensors"]),
        (12, "LoadImage", "", "IMAGE:5 MASK:", ["astronaut.png", "image"]),
        (16, "PulidModelLoader", None, "PULID:6", [V1]),
        (17, "PulidInsightFaceLoader", None, "FACEANALYSIS:7", ["CPU"]),
        (19, "PulidEvaClipLoader", None, "EVA_CLIP:8", None),
        (33, apply, sockets, "MODEL:9", list(values)),
        (22, "CLIPTextEncode", "clip:2", "CONDITIONING:10", ["portrait, wolf ears"]),
        (23, "CLIPTextEncode", "clip:3", "CONDITIONING:11", ["blurry"]),
        (5, "EmptyLatentImage", "", "LATENT:12", [128, 192, 1]),
        (3, "KSampler", "model:9 positive:10 negative:11 latent_image:12", "LATENT:13",
         [42, "fixed", 2, 1.2, "dpmpp_2m", "sgm_uniform", 1]),
        (8, "VAEDecode", "samples:13 vae:4", "IMAGE:15", None),
        (10, "PreviewImage", "images:15", "", None),
        *([(86, "SolidMask", "", "MASK:14", [1, 128, 192])] if masked else []),
    ]  # fmt: skip
    nodes, links = [], {}
    for node_id, kind, _, named, values in described:
        outputs = []
        for index, (name, _, leads) in enumerate(output.partition(":") for output in named.split()):
            outputs.append(
                {"name": name, "type": name, "links": [int(number) for number in leads.split(",") if number]}
            )
            links |= {number: [number, node_id, index, None, None, name] for number in outputs[-1]["links"]}
        nodes.append({"id": node_id, "type": kind, "outputs": outputs})
        nodes[-1] |= {} if values is None else {"widgets_values": values}
    for node, (node_id, _, named, *_) in zip(nodes, described, strict=True):
        for index, (name, _, number) in enumerate(entry.partition(":") for entry in (named or "").split()):
            entered = links[int(number)]
            entered[3:5] = node_id, index
            node.setdefault("inputs", []).append({"name": name, "type": entered[5], "link": entered[0]})
    return {"nodes": nodes, "links": list(links.values()), "version": 0.4}


def picture(server, prompt):
    outputs = server.run(prompt)
    [entry] = outputs[find(prompt, "PreviewImage")]["images"]
    return np.asarray(Image.open(io.BytesIO(server.picture(entry))).convert("RGB")).astype(int), outputs


@pytest.fixture(scope="module")
def unpatched(server, info):
    prompt = to_prompt(old_workflow(), info)
    set_inputs(prompt, "ApplyPulid", weight=0.0)
    return picture(server, prompt)[0]


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(("apply", "values"), [
    ("ApplyPulid", ("fidelity", 0.8, 0, 1)), ("ApplyPulid", ("style", 0.7000000000000001, 0, 1)),
    ("ApplyPulid", ("neutral", 1, 0.0, 0.9)), ("ApplyPulidAdvanced", (0.8, "ortho_v2", 8, 0, 0, 1)),
    ("ApplyPulidAdvanced", (0.8, "ortho", 16, 0.3, 0, 1)),
])  # fmt: skip
def test_an_old_workflow_fits_and_runs(server, info, unpatched, apply, values, masked):
    workflow = old_workflow(apply, values, masked)
    # A file may lack the mask.
    assert [line for line in misfits(workflow, info) if "defined ['model'" not in line] == []
    made, _ = picture(server, to_prompt(workflow, info))
    assert (made != unpatched).mean() > 0.1


def test_a_slider_looks_at_no_photograph_again(server, info):
    prompt = to_prompt(old_workflow(), info)
    server.run(prompt)
    set_inputs(prompt, "ApplyPulid", weight=0.55)
    ran = []
    server.run(prompt, ran.append)
    assert not [line for line in ran if line.startswith("Apply PuLID:")]  # the progress of looking at photographs
    assert "Apply PuLID" in ran


def test_a_provider_that_this_machine_lacks_is_said_and_the_cpu_serves(server, info):
    prompt = to_prompt(old_workflow(), info)
    set_inputs(prompt, "PulidInsightFaceLoader", provider="ROCM")
    _, outputs = picture(server, prompt)
    refused, used = outputs["17"]["text"]
    assert refused.startswith("The installed ONNX Runtime does not offer 'ROCM'; it offers: ")
    assert refused.endswith("Going on with the CPU.")
    assert used.endswith("runs on CPU.")


def test_a_file_that_is_not_here_is_named_with_its_address(server, info):
    prompt = to_prompt(old_workflow(), info)
    set_inputs(prompt, "PulidModelLoader", pulid_file=catalogue.V1_PICKLE.name)
    with pytest.raises(ServerError, match=r"pulid_v1\.bin .*was not found.*https://.*--download pulid_v1\.bin"):
        server.run(prompt)
    set_inputs(prompt, "PulidModelLoader", pulid_file="their own\\name.safetensors")
    with pytest.raises(ServerError, match=r"name\.safetensors was not found\. Looked in"):
        server.run(prompt)


def test_a_newer_pulid_file_serves_too(server, info, unpatched):
    prompt = to_prompt(old_workflow(), info)
    set_inputs(prompt, "PulidModelLoader", pulid_file="newer.safetensors")
    assert (picture(server, prompt)[0] != unpatched).mean() > 0.1


# ---- Their numbers ----


def relative(out, expected):
    return ((out - expected).abs().max() / expected.std()).item()


@pytest.fixture
def one_site(model, monkeypatch):
    """The reference's attention site in place of each site of a model: its vectors, and a PuLID made for it."""
    if not FOLDER.is_dir():
        pytest.skip(f"no reference vectors at {FOLDER} (set PULID_REFERENCE)")
    site = load_file(FOLDER / "attention_shared_workflows.safetensors")
    width, token_width = site["to_k"].shape
    heads = int(site["heads"])
    monkeypatch.setattr(host, "check_layout", lambda *_, **__: None)
    monkeypatch.setattr(patch, "cross_attention", lambda model, _: SimpleNamespace(heads=heads))
    projections = IdProjections([width] * len(SITES), token_width)
    weights = {f"to_{half}.{i}.weight": site[f"to_{half}"] for i in range(len(SITES)) for half in "kv"}
    projections.load_state_dict(weights)
    pulid = fakes.weights(projections.eval())
    identity = IdEmbedding(site["cond"], site["uncond"], "v1", "print")
    monkeypatch.setattr(legacy, "_identify", lambda *_: (identity, []))
    return site, pulid


def site_of(site, node, model, pulid, *values):
    """What the node leaves on the first site, run as ComfyUI runs it: the negative row first."""
    photo = torch.zeros(1, 8, 8, 3)
    patched = node.execute(model, pulid, on_cpu(fakes.NotingTower()), SeesSpots(), photo, *values)[0]
    options = {
        "n_heads": int(site["heads"]), "cond_or_uncond": [1, 0], "sigmas": torch.tensor([5.0]),
        "activations_shape": [2, 24, 3, 4], "original_shape": [2, 4, 6, 8],
    }  # fmt: skip
    replacements = patched.model_options["transformer_options"]["patches_replace"]["attn2"]
    return replacements[("input", 4, 0)](site["q"], site["k"], site["v"], options)


@pytest.mark.parametrize(
    ("method", "projection", "zero_tokens"),
    [("fidelity", "ortho_v2", 8), ("style", "ortho", 16), ("neutral", "none", 0)],
)
@pytest.mark.usefixtures("inference")
def test_methods_and_projections_give_the_vectors_of_that_pack(model, one_site, method, projection, zero_tokens):
    site, pulid = one_site
    for name, mask in ((f"out.{method}", None), (f"out.{method}.mask", site["mask"])):
        made = site_of(site, legacy.ApplyPulid, model, pulid, method, 0.8, 0.0, 1.0, mask)
        assert relative(made, site[name]) <= 1e-5
    same, other = (
        site_of(site, legacy.ApplyPulidAdvanced, model, pulid, 0.8, projection, zero_tokens + more, 0.0, 0.0, 1.0)
        for more in (0, 1)
    )
    assert relative(same, site[f"out.{method}"]) <= 1e-5
    assert relative(other, site[f"out.{method}"]) > 1e-3


@pytest.mark.usefixtures("inference")
def test_values_beyond_the_widgets_limits_count_as_they_counted_there(model, one_site):
    """ComfyUI holds widgets to their limits, but no value that comes through a link."""
    site, pulid = one_site

    def made(weight=1.0, fidelity=8, start_at=0.0, end_at=1.0, mask=None):
        values = weight, "ortho_v2", fidelity, 0.0, start_at, end_at, mask
        return site_of(site, legacy.ApplyPulidAdvanced, model, pulid, *values) - unpatched

    unpatched = 0
    unpatched = made(start_at=1.0001, end_at=2.0)  # which is after the last step
    full = made()
    assert full.abs().max() > 0.1
    assert relative(made(weight=7.0), 7 * full) < 1e-4
    assert relative(made(weight=-3.0), -3 * full) < 1e-4
    assert torch.equal(made(start_at=-0.5, end_at=1.5), full)
    assert torch.equal(made(fidelity=-3), made(fidelity=0))
    assert made(fidelity=500).isfinite().all()
    for value in (2.0, -0.5):
        assert relative(made(mask=torch.full((1, 48, 64), value)), value * full) < 1e-4


def test_a_method_counts_as_that_pack_asked_for_it(model):
    for method, projection, fusion in (
        ("style", "ortho_v2", Fusion.ORTHOGONAL_V2),
        ("fidelity", "ortho", Fusion.ORTHOGONAL_V2),
        ("neutral", "ortho", Fusion.ORTHOGONAL),
        (None, None, Fusion.PLAIN),
    ):
        asked = legacy.Asked(model, *[None] * 4, 1.0, 0.0, 1.0, method, projection=projection)
        assert asked._method("v1")[0] is fusion


@pytest.mark.usefixtures("inference")
def test_a_smaller_sdxl_is_patched_where_it_has_sites(monkeypatch):
    """SSD-1B lacks some of SDXL's blocks; that pack acted on the rest."""
    smaller = {"transformer_depth": [0, 0, 2, 2, 4, 4], "transformer_depth_middle": -1,
               "transformer_depth_output": [0, 0, 0, 1, 1, 2, 10, 4, 4]}  # fmt: skip
    monkeypatch.setattr(comfy_host, "SDXL_CONFIG", {**comfy_host.SDXL_CONFIG, **smaller})
    monkeypatch.setattr(legacy, "_identify", lambda *_: (sampling.make_identity(), []))
    model, pulid = comfy_host.sdxl(sampling.MODEL_CHANNELS), fakes.weights(sampling.projections())
    three = pulid, on_cpu(fakes.NotingTower()), SeesSpots()
    patched = legacy.ApplyPulid.execute(model, *three, torch.zeros(1, 8, 8, 3), "style", 1.0, 0.0, 1.0)[0]
    assert len(sampling.sites_of(patched)) == 34
    assert not torch.equal(sampling.sample(patched), sampling.sample(model))


def landmarks_at(x, y):
    return np.array([[-15.0, -10], [15, -10], [0, 8], [-12, 25], [12, 25]]) + np.array((x, y))


class SeesSpots(InsightFaceAnalyzer):
    """Sees a face at each white pixel, RetinaFace at each red one; the recogniser gives the box back."""

    source = ("spots",)

    def __init__(self):
        pass

    def _at(self, photo, colour):
        spots = np.argwhere((photo == colour).all(axis=2))[:, ::-1]
        return [Face((x - 20, y - 20, x + 20.0 + index, y + 20), landmarks_at(x, y), 0.9)
                for index, (x, y) in enumerate(spots)]  # fmt: skip

    def detect(self, photo, side):
        return self._at(photo, (255, 255, 255))

    def detect_for_alignment(self, photo):
        return self._at(photo, (255, 0, 0))

    def recognise(self, photo, face):
        return torch.tensor([*face.box, *[0.0] * 508]) / 100

    def parse(self, crops):
        labels = torch.ones(len(crops), 512, 512, dtype=torch.uint8)
        labels[:, :100] = 17  # hair, which stays; and background
        labels[:, 400:] = 0
        return labels


class Glance(torch.nn.Module):
    """In the vision tower's place: linear maps of what lies in a few parts of the face."""

    positions = 5  # the class token and 2 x 2 patches

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.pooled = torch.nn.Parameter(torch.randn(48, 768, generator=generator))
        self.hidden = torch.nn.Parameter(torch.randn(5, 48, 5 * 1024, generator=generator) / 7)

    def features(self, pixels):
        corner = pixels[:, :, 150:154, 150:154].flatten(1)  # single pixels, so that how they are made shows
        hidden = tuple(torch.unflatten(corner @ weights, 1, (5, 1024)) for weights in self.hidden)
        return VisionFeatures(torch.nn.functional.normalize(corner @ self.pooled), hidden)


@pytest.fixture(scope="module")
def glance():
    return Glance().requires_grad_(False)


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(1)
    return IdEncoder().eval().requires_grad_(False)


@pytest.fixture
def loaded(glance, encoder, monkeypatch):
    """What the three loaders give, and what reaches the model: a list of (identity, fusion, zero tokens, weights)."""
    applied = []

    def apply(model, weights, identity, how):
        applied.append((identity, how.fusion, how.zero_tokens, how.site_weights))
        return model

    monkeypatch.setattr(legacy, "apply", apply)
    monkeypatch.setattr(legacy, "CACHE", ResultCache(2**24))
    tower = host.managed(glance, "tower")
    return (fakes.weights(encoder=encoder, source="file"), tower, SeesSpots()), applied


def photograph(white=(), red=(), height=200, width=300):
    generator = torch.Generator().manual_seed(height + width)
    image = torch.rand(1, height, width, 3, generator=generator) * 0.8
    for spots, colour in ((white, [1.0, 1, 1]), (red, [1.0, 0, 0])):
        for x, y in spots:
            image[0, y, x] = torch.tensor(colour)
    return image


def apply_advanced(loaded, image, noise=0.0, fidelity=8, model="a model"):
    return legacy.ApplyPulidAdvanced.execute(model, *loaded, image, 1.0, "ortho_v2", fidelity, noise, 0.0, 1.0)


def by_hand(image, landmarks, box, glance, encoder):
    """The tokens of one photograph, in the words of facts: cut off, aligned, grey on white, torchvision's resize."""
    photo = image[0].mul(255).clamp(0, 255).byte().numpy()
    crop = torch.from_numpy(pulid_faces.align(photo, landmarks)).permute(2, 0, 1)[None] / 255
    grey = (0.299 * crop[:, 0:1] + 0.587 * crop[:, 1:2] + 0.114 * crop[:, 2:3]).repeat(1, 3, 1, 1)
    grey[:, :, 400:] = 1
    transforms = torchvision.transforms
    small = transforms.functional.resize(grey, (336, 336), transforms.InterpolationMode.BICUBIC)
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    features = glance.features(transforms.functional.normalize(small, mean, std))
    arcface = torch.tensor([[*box, *[0.0] * 508]]) / 100
    return encoder(torch.cat((arcface, features.pooled), dim=1), features.hidden)


@pytest.mark.usefixtures("inference")
def test_photographs_are_looked_at_whole_and_averaged_each_with_two_faces_of_its_own(loaded, glance, encoder):
    three, applied = loaded
    # Of the faces InsightFace sees, the later is the larger; RetinaFace's nearest to the middle is another one.
    first = photograph(white=[(60, 60), (150, 150)], red=[(40, 100), (160, 110), (250, 180)])
    second = photograph(white=[(80, 70)], red=[(90, 90)])
    large = photograph(white=[(700, 600)], red=[(660, 640)], height=1200, width=1300)

    legacy.ApplyPulid.execute("a model", *three, torch.cat((first, second)), "fidelity", 1.0, 0.0, 1.0)
    legacy.ApplyPulid.execute("a model", *three, large, "fidelity", 1.0, 0.0, 1.0)

    expected = [
        by_hand(first, landmarks_at(160, 110), (130, 130, 171, 170), glance, encoder),
        by_hand(second, landmarks_at(90, 90), (60, 50, 100, 90), glance, encoder),
        by_hand(large, landmarks_at(660, 640), (680, 580, 720, 620), glance, encoder),
    ]
    assert relative(applied[0][0].cond, (expected[0] + expected[1]) / 2) <= 1e-5
    assert relative(applied[1][0].cond, expected[2]) <= 1e-5
    assert relative(expected[0], expected[1]) > 0.1  # they do differ
    zeros = encoder(torch.zeros(1, 1280), [torch.zeros(1, 5, 1024)] * 5)
    assert relative(applied[0][0].uncond, zeros) <= 1e-5


@pytest.mark.usefixtures("inference")
def test_opacity_is_not_looked_at(loaded):
    three, applied = loaded
    photo = photograph([(80, 70)], [(90, 90)])
    for image in (photo, torch.cat((photo, torch.zeros(1, 200, 300, 1)), dim=-1)):
        legacy.ApplyPulid.execute("a model", *three, image, "fidelity", 1.0, 0.0, 1.0)
    assert torch.equal(applied[0][0].cond, applied[1][0].cond)


@pytest.mark.usefixtures("inference")
def test_the_middle_block_gets_nothing(loaded):
    three, applied = loaded
    legacy.ApplyPulid.execute("m", *three, photograph([(80, 70)], [(90, 90)]), "style", 0.7, 0.0, 1.0)
    [(_, fusion, zero_tokens, weights)] = applied
    assert (fusion, zero_tokens) == (Fusion.ORTHOGONAL, 16)
    assert {site.part: weight for site, weight in zip(SITES, weights, strict=True)} == {
        "input": 0.7, "output": 0.7, "middle": 0.0,
    }  # fmt: skip


@pytest.mark.usefixtures("inference")
def test_noise_stands_for_zeros_in_the_negative_branch_and_in_the_zero_tokens(loaded):
    three, applied = loaded
    image = torch.cat((photograph([(80, 70)], [(90, 90)]), photograph([(150, 70)], [(90, 90)])))
    for noise, fidelity in ((0.0, 8), (0.5, 8), (-0.5, 8), (0.5, 0), (0.5, 8)):
        apply_advanced(three, image, noise, fidelity)

    (without, *_), (noisy, _, zero_tokens, _), (negative, *_), (bare, *_), (again, *_) = applied
    assert (without.tokens, noisy.tokens, bare.tokens) == (10, 18, 10)
    assert zero_tokens == 0  # the noise tokens stand for them
    assert torch.equal(noisy.cond[:, :10], without.cond)
    assert torch.equal(noisy.cond[:, 10:], noisy.uncond[:, 10:])
    assert noisy.cond[:, 10:].min() >= 0 and 0.4 < noisy.cond[:, 10:].max() < 0.5
    assert -0.5 < negative.cond[:, 10:].min() < -0.4 and negative.cond[:, 10:].max() <= 0
    assert relative(noisy.uncond[:, :10], without.uncond) > 0.01
    assert torch.equal(bare.uncond, noisy.uncond[:, :10])
    assert again is noisy  # kept, and so are its keys and values


# ---- What they say ----


@pytest.mark.usefixtures("inference")
def test_a_photograph_without_a_face_is_left_out_and_the_node_says_so(loaded):
    three, applied = loaded
    whole, unseen, unaligned = photograph([(80, 70)], [(90, 90)]), photograph(), photograph([(80, 70)])

    output = apply_advanced(three, torch.cat((unseen, whole, unaligned)))

    assert output.ui["text"] == [
        "Photograph 1 of 3 was left out. InsightFace saw no face at 640 to 320 px.",
        "Photograph 3 of 3 was left out. RetinaFace saw no face to align.",
    ]
    assert apply_advanced(three, whole).ui is None
    assert torch.allclose(applied[0][0].cond, applied[1][0].cond, atol=1e-6)
    with pytest.raises(
        NoFaceError, match=r"(?s)No photograph was left.*Photograph 1 of 1: .*PuLID Encode Identity also finds"
    ):
        apply_advanced(three, unseen)


def test_an_empty_batch_is_refused(loaded):
    with pytest.raises(InputError, match="connect at least one photograph"):
        apply_advanced(loaded[0], torch.zeros(0, 64, 64, 3))


PULID = r"pulid must come from Load PuLID Model \(PulidModelLoader\) of .* found types\.SimpleNamespace of another"
TOWER = r"eva_clip must come from Load Eva Clip \(PuLID\) \(PulidEvaClipLoader\)"
FACES = r"face_analysis must come from Load InsightFace \(PuLID\) \(PulidInsightFaceLoader\).*run.py doctor"


@pytest.mark.parametrize(("place", "words"), [(0, PULID), (1, TOWER), (2, FACES)])
def test_what_another_pack_loaded_is_refused_in_words(loaded, place, words):
    three = list(loaded[0])
    three[place] = SimpleNamespace()
    with pytest.raises(MismatchError, match=words):
        apply_advanced(three, photograph())


def test_a_start_after_the_end_never_acts_and_says_so(model):
    done = legacy.ApplyPulid.execute(model, None, None, None, torch.zeros(1, 8, 8, 3), "style", 1.0, 0.9, 0.1)
    assert "patches_replace" not in done[0].model_options["transformer_options"]
    assert "does not act: start_at (0.9) lies after end_at (0.1)" in done.ui["text"][0]


def test_the_vision_tower_is_named_with_its_address_where_it_is_not_here(monkeypatch):
    monkeypatch.setattr(host, "model_folders", lambda: pulid_files.ModelFolders({}))
    with pytest.raises(
        MissingWeights, match=r"EVA02_CLIP_L_336_psz14_s6B\.pt.*was not found.*https://.*--download EVA"
    ):
        legacy.PulidEvaClipLoader.execute()


# ---- Other programs call the nodes in Python ----


@pytest.fixture
def files_here(monkeypatch):
    """Every file is here, and loading gives its path."""
    monkeypatch.setattr(host, "model_folders", lambda: SimpleNamespace(find=lambda name, like: Path(name)))
    monkeypatch.setattr(legacy, "_tower_here", lambda folders: "tower.pt")
    monkeypatch.setattr(legacy, "load_weights", lambda path: path)
    monkeypatch.setattr(legacy, "load_tower", lambda path, **_: on_cpu(torch.nn.Identity()))
    monkeypatch.setattr(legacy, "load_face_networks", lambda providers, folders: (providers, []))


def test_the_loaders_have_the_older_packs_methods(files_here):
    assert legacy.PulidModelLoader().load_model("v1.safetensors") == (Path("v1.safetensors"),)
    assert legacy.PulidModelLoader().load_model(pulid_file="v1.safetensors") == (Path("v1.safetensors"),)
    assert legacy.PulidInsightFaceLoader().load_insightface("CPU") == (["CPUExecutionProvider"],)
    assert isinstance(legacy.PulidEvaClipLoader().load_eva_clip()[0], Managed)


def test_both_apply_nodes_have_the_older_packs_method_with_its_names(model, one_site, monkeypatch):
    monkeypatch.setattr(legacy, "_checked", lambda *sockets: (one_site[1], None, []))
    given = {"pulid": None, "eva_clip": None, "face_analysis": None, "image": None, "weight": 0.8, "start_at": 0.0,
             "end_at": 1.0, "attn_mask": None}  # fmt: skip
    for node, options, fusion in (
        (legacy.ApplyPulid, {"method": "fidelity"}, Fusion.SHARED_V2),
        (legacy.ApplyPulid, {"method": "style"}, Fusion.ORTHOGONAL),
        (legacy.ApplyPulid, {"method": "unheard of"}, Fusion.PLAIN),
        (legacy.ApplyPulidAdvanced, {"projection": "ortho_v2", "fidelity": 12, "noise": 0.0}, Fusion.SHARED_V2),
        (legacy.ApplyPulidAdvanced, {"projection": "none", "fidelity": 99}, Fusion.PLAIN),
    ):
        (patched,) = node().apply_pulid(model, **given, **options)
        placed = patched.model_options["transformer_options"]["patches_replace"]["attn2"]
        assert len(placed) == 60
        assert {one.fusion for one in placed.values()} == {fusion}
    with pytest.raises(TypeError, match="colour"):
        legacy.ApplyPulid().apply_pulid(model, **given, colour=1)


def test_the_tower_has_rotary_tables_of_its_own(monkeypatch):
    """EVA-CLIP's loader, which that pack calls, leaves out the file's, which are rounded to float16."""
    made = EvaVisionTower(EvaConfig(), device="meta", dtype=torch.float16)
    monkeypatch.setattr(load, "load_vision_tower", lambda *_: made)
    monkeypatch.setattr(load, "file_state", lambda path: path)
    monkeypatch.setattr(host, "managed", lambda network, source: Managed(network, on_cpu(network).load, source))
    monkeypatch.setattr(host, "model_folders", lambda: SimpleNamespace(find=lambda name, like: Path(name)))
    monkeypatch.setattr(legacy, "_tower_here", lambda folders: "tower.pt")
    (loaded,) = legacy.PulidEvaClipLoader().load_eva_clip()
    assert torch.equal(loaded.module.rope_cos, rotary_table(24, 64, 16)[0])
    assert loaded.module.rope_sin.dtype == torch.float32
    assert loaded.source != load.load_tower(Path("tower.pt")).source


def test_object_info_has_the_choices_where_clients_read_them(info, monkeypatch):
    assert info["ApplyPulid"]["input"]["required"]["method"][0] == ["fidelity", "style", "neutral"]
    assert V1 in info["PulidModelLoader"]["input"]["required"]["pulid_file"][0]
    monkeypatch.setattr(legacy, "pulid_choices", lambda: ["v1.safetensors"])
    for node, name in ((legacy.PulidInsightFaceLoader, "provider"), (legacy.ApplyPulid, "method"),
                       (legacy.PulidModelLoader, "pulid_file"), (legacy.ApplyPulidAdvanced, "projection")):  # fmt: skip
        choices, options = node.GET_NODE_INFO_V1()["input"]["required"][name]
        assert isinstance(choices, list)
        assert options["tooltip"]


class Visual(torch.nn.Module):
    """EVA-CLIP's `visual` as other packs have it."""

    image_size = 336

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1, dtype=torch.float16))

    def forward(self, pixels, return_all_features, return_hidden, shuffle):
        assert (pixels.dtype, return_hidden, shuffle) == (torch.float16, True, False)
        return pixels.flatten(1)[:, :768], [pixels.flatten(1)[:, :8] + number for number in range(5)]


def test_the_eva_clip_socket_is_shared(pulid_weights_alone, monkeypatch):
    visual, pixels = Visual(), torch.rand(1, 3, 336, 336)
    _, networks, _ = legacy._checked(pulid_weights_alone, visual, SeesSpots())
    features = networks.tower.module.features(pixels)
    assert torch.allclose(features.pooled.norm(dim=-1), torch.ones(1))
    assert features.pooled.dtype == torch.float32
    assert len(features.hidden) == 5
    assert legacy._checked(pulid_weights_alone, visual, SeesSpots())[1].tower is networks.tower

    ours = shared.SharedEvaClip(fakes.small_tower(), lambda: torch.device("cpu"))
    assert ours.to("cpu", dtype=torch.float16) is ours
    half = torch.rand(2, 3, 336, 336, dtype=torch.float16)
    pooled, hidden = ours(half, return_all_features=False, return_hidden=True, shuffle=False)
    assert (pooled.dtype, type(hidden), len(ours.image_mean), ours.image_size) == (torch.float16, list, 3, 336)


@pytest.fixture
def pulid_weights_alone():
    return fakes.weights(IdProjections([8]))


def test_insightface_of_another_packs_node_is_taken_and_named(pulid_weights_alone, monkeypatch, tmp_path):
    for name in ("detection_Resnet50_Final.pth", "parsing_bisenet.pth"):
        (tmp_path / name).touch()
    monkeypatch.setattr(host, "model_folders", lambda: SimpleNamespace(find=lambda name, like: tmp_path / name))

    class Analysis:
        def __init__(self):
            self.det_model = object()
            self.models = {"recognition": SimpleNamespace(model_file="/models/buffalo_l/w600k_r50.onnx")}

    analysis = Analysis()
    tower = on_cpu(torch.nn.Identity())
    _, networks, notes = legacy._checked(pulid_weights_alone, tower, analysis)
    assert "w600k_r50.onnx, but PuLID knows antelopev2's" in notes[0]
    assert legacy._checked(pulid_weights_alone, tower, analysis)[1].analyzer is networks.analyzer


# ---- Beside another pack with the same ids ----

OTHER = """
class Other:
    RETURN_TYPES, FUNCTION, CATEGORY = (), "run", "tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}


NODE_CLASS_MAPPINGS = {node_id: type(node_id, (Other,), {}) for node_id in IDS}
"""

# Loads packs in the order given, as ComfyUI does at its start, and says whose each node is.
LOAD = """
import asyncio, json, logging, sys
from pulid_sdxl.tools import comfy_host
comfy_host.enter(sys.argv[1])
import nodes
logging.basicConfig(level=logging.INFO, force=True)
for folder in sys.argv[2:]:
    assert asyncio.run(nodes.load_custom_node(folder, set(), module_parent="custom_nodes"))
print(json.dumps({name: node.RELATIVE_PYTHON_MODULE for name, node in nodes.NODE_CLASS_MAPPINGS.items()
                  if hasattr(node, "RELATIVE_PYTHON_MODULE")}))
"""


ALL_OURS = {**dict.fromkeys(OLD, "pulid-sdxl"), "PuLID_Apply": "pulid-sdxl"}
ALL_THEIRS = {**ALL_OURS, **dict.fromkeys(OLD, "other")}
ONE_THEIRS = {**ALL_OURS, **dict.fromkeys(OLD), "ApplyPulid": "other"}
LEFT = "leaves the nodes of older workflows to custom_nodes.other, which has ApplyPulid."


@pytest.mark.parametrize(
    ("order", "ids", "expected", "said"),
    [
        (["pulid-sdxl"], OLD, ALL_OURS, []),
        (["other", "pulid-sdxl"], ["ApplyPulid"], ONE_THEIRS, [LEFT]),
        (["pulid-sdxl", "other"], OLD, ALL_THEIRS, []),
    ],
    ids=["alone", "after a pack with one of the ids all are left to it", "before another, which takes its own alone"],
)
def test_whose_the_nodes_are(comfyui, tmp_path, order, ids, expected, said):
    other = tmp_path / "other"
    other.mkdir()
    (other / "__init__.py").write_text(f"IDS = {list(ids)!r}\n{OTHER}")
    link(ROOT, tmp_path / "pulid-sdxl")
    command = [sys.executable, TOOLS, "-c", LOAD, comfyui, *(tmp_path / name for name in order)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    owned = json.loads(done.stdout.splitlines()[-1])
    assert {name: owned[name].removeprefix("custom_nodes.") if name in owned else None for name in expected} == expected
    lines = [line for line in done.stderr.splitlines() if "leaves the nodes of older workflows" in line]
    assert [line[line.index("leaves") :] for line in lines] == said
