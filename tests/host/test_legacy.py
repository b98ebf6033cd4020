"""The nodes of older shared workflows: their shape, their numbers, real workflows, and other packs with the same ids."""

import asyncio
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

import comfy_host

comfy_host.enter(os.environ["COMFYUI"])

import demo
import numpy as np
import parts
import standins
import torch
import torchvision
from comfy.ldm.modules import attention as host_attention
from comfy_server import ComfyServer, ServerError, link
from conformance import FOLDER
from PIL import Image
from pulid_sdxl.models import catalogue
from pulid_sdxl.models.face_analysis import InsightFaceAnalyzer
from pulid_sdxl.nodes import host, kept, legacy, patch
from pulid_sdxl.nodes.sockets import Pulid, VisionTower
from pulid_sdxl.pulid import faces as pulid_faces
from pulid_sdxl.pulid.attention import Fusion, IdProjections
from pulid_sdxl.pulid.encoders import IdEncoder
from pulid_sdxl.pulid.errors import InputError, MismatchError, MissingWeights, NoFaceError
from pulid_sdxl.pulid.eva import EvaConfig
from pulid_sdxl.pulid.faces import Face
from pulid_sdxl.pulid.identity import IdEmbedding, VisionFeatures
from pulid_sdxl.pulid.sites import SITES
from safetensors.torch import load_file
from workflow import declared_inputs, find, misfits, set_inputs, to_prompt

ROOT = Path(legacy.__file__).parents[1]
V1 = catalogue.V1.name

# ---- Their shape ----

WEIGHT = ("weight", "FLOAT", {"default": 1.0, "min": -1.0, "max": 5.0, "step": 0.05})
START = ("start_at", "FLOAT", {"default": 0.0, "min": 0.0, "max": 1.0, "step": 0.001})
END = ("end_at", "FLOAT", {"default": 1.0, "min": 0.0, "max": 1.0, "step": 0.001})
SOCKETS = [
    ("model", "MODEL", {}),
    ("pulid", "PULID", {}),
    ("eva_clip", "EVA_CLIP", {}),
    ("face_analysis", "FACEANALYSIS", {}),
    ("image", "IMAGE", {}),
]
MASK = [("attn_mask", "MASK", {})]

# The other pack's node definitions: id -> required inputs in order (name, type or choices, limits), optional ones,
# outputs (name and type are one). A file list has no choices of its own.
OLD = {
    "PulidModelLoader": ([("pulid_file", None, {})], [], "PULID"),
    "PulidInsightFaceLoader": ([("provider", ["CPU", "CUDA", "ROCM", "CoreML"], {})], [], "FACEANALYSIS"),
    "PulidEvaClipLoader": ([], [], "EVA_CLIP"),
    "ApplyPulid": (
        [*SOCKETS, ("method", ["fidelity", "style", "neutral"], {}), WEIGHT, START, END],
        MASK,
        "MODEL",
    ),
    "ApplyPulidAdvanced": (
        [
            *SOCKETS,
            WEIGHT,
            ("projection", ["ortho_v2", "ortho", "none"], {}),
            ("fidelity", "INT", {"default": 8, "min": 0, "max": 32, "step": 1}),
            ("noise", "FLOAT", {"default": 0.0, "min": -1.0, "max": 1.0, "step": 0.1}),
            START,
            END,
        ],
        MASK,
        "MODEL",
    ),
}


@pytest.fixture(scope="module")
def server(comfyui, tmp_path_factory):
    """A ComfyUI with this pack and stand-ins of every file that an older workflow needs."""
    base = tmp_path_factory.mktemp("base")
    demo.prepare_base(base, parts.gather(None, None, comfyui))
    demo.prepare_photo(base / "input", None)
    Image.new("RGB", (320, 240), (128, 128, 128)).save(base / "input" / "grey.png")

    def make(folder):
        standins.make_pulid(folder / "pulid" / V1, layout="v1-converted", width_scale=parts.FIFTH)

    link(parts.standins("pulid-v1-0.2", make) / "pulid" / V1, base / "models" / "pulid" / V1)
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


def slot(name, kind, link=None):
    return {"name": name, "type": kind, "link": link}


def out(kind, *links, name=None):
    return {"name": name or kind, "type": kind, "links": list(links), "slot_index": 0}


def old_workflow(apply="ApplyPulid", values=("fidelity", 0.8, 0, 1), masked=True):
    """An older workflow as the editor saved it: values by place alone, whole numbers for fractions."""
    mask = [slot("attn_mask", "MASK", 14)] if masked else []
    clip = [out("MODEL", 1), {**out("CLIP", 2, 3), "slot_index": 1}, {**out("VAE", 4), "slot_index": 2}]
    nodes = [
        {"id": 4, "type": "CheckpointLoaderSimple", "inputs": [], "outputs": clip,
         "widgets_values": ["standin_sdxl_fifth_width.safetensors"]},
        {"id": 12, "type": "LoadImage", "inputs": [], "outputs": [out("IMAGE", 5), out("MASK")],
         "widgets_values": ["astronaut.png", "image"]},
        {"id": 16, "type": "PulidModelLoader", "outputs": [out("PULID", 6)], "widgets_values": [V1]},
        {"id": 17, "type": "PulidInsightFaceLoader", "outputs": [out("FACEANALYSIS", 7)], "widgets_values": ["CPU"]},
        {"id": 19, "type": "PulidEvaClipLoader", "outputs": [out("EVA_CLIP", 8)]},
        {"id": 33, "type": apply, "inputs": [
            slot("model", "MODEL", 1), slot("pulid", "PULID", 6), slot("eva_clip", "EVA_CLIP", 8),
            slot("face_analysis", "FACEANALYSIS", 7), slot("image", "IMAGE", 5), *mask],
         "outputs": [out("MODEL", 9)], "widgets_values": list(values)},
        {"id": 22, "type": "CLIPTextEncode", "inputs": [slot("clip", "CLIP", 2)], "outputs": [out("CONDITIONING", 10)],
         "widgets_values": ["portrait, wolf ears"]},
        {"id": 23, "type": "CLIPTextEncode", "inputs": [slot("clip", "CLIP", 3)], "outputs": [out("CONDITIONING", 11)],
         "widgets_values": ["blurry"]},
        {"id": 5, "type": "EmptyLatentImage", "inputs": [], "outputs": [out("LATENT", 12)],
         "widgets_values": [128, 192, 1]},
        {"id": 3, "type": "KSampler", "inputs": [
            slot("model", "MODEL", 9), slot("positive", "CONDITIONING", 10), slot("negative", "CONDITIONING", 11),
            slot("latent_image", "LATENT", 12)],
         "outputs": [out("LATENT", 13)], "widgets_values": [42, "fixed", 2, 1.2, "dpmpp_2m", "sgm_uniform", 1]},
        {"id": 8, "type": "VAEDecode", "inputs": [slot("samples", "LATENT", 13), slot("vae", "VAE", 4)],
         "outputs": [out("IMAGE", 15)]},
        {"id": 10, "type": "PreviewImage", "inputs": [slot("images", "IMAGE", 15)], "outputs": []},
    ]  # fmt: skip
    links = [
        [1, 4, 0, 33, 0, "MODEL"], [2, 4, 1, 22, 0, "CLIP"], [3, 4, 1, 23, 0, "CLIP"], [4, 4, 2, 8, 1, "VAE"],
        [5, 12, 0, 33, 4, "IMAGE"], [6, 16, 0, 33, 1, "PULID"], [7, 17, 0, 33, 3, "FACEANALYSIS"],
        [8, 19, 0, 33, 2, "EVA_CLIP"], [9, 33, 0, 3, 0, "MODEL"], [10, 22, 0, 3, 1, "CONDITIONING"],
        [11, 23, 0, 3, 2, "CONDITIONING"], [12, 5, 0, 3, 3, "LATENT"], [13, 3, 0, 8, 0, "LATENT"],
        [15, 8, 0, 10, 0, "IMAGE"],
    ]  # fmt: skip
    if masked:
        nodes.append({"id": 86, "type": "SolidMask", "inputs": [], "outputs": [out("MASK", 14)],
                      "widgets_values": [1, 128, 192]})  # fmt: skip
        links.append([14, 86, 0, 33, 5, "MASK"])
    return {"last_node_id": 86, "last_link_id": 15, "nodes": nodes, "links": links, "version": 0.4}


# The same as older servers were sent it.
API = {
    "model": ["4", 0], "pulid": ["16", 0], "eva_clip": ["19", 0], "face_analysis": ["17", 0], "image": ["12", 0],
    "method": "fidelity", "weight": 0.8, "start_at": 0.0, "end_at": 1.0,
}  # fmt: skip


def picture(server, prompt):
    outputs = server.run(prompt)
    [entry] = outputs[find(prompt, "PreviewImage")]["images"]
    return np.asarray(Image.open(io.BytesIO(server.picture(entry))).convert("RGB")).astype(int), outputs


@pytest.fixture(scope="module")
def unpatched(server, info):
    prompt = to_prompt(old_workflow(masked=False), info)
    set_inputs(prompt, "ApplyPulid", weight=0.0)
    return picture(server, prompt)[0]


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(
    ("apply", "values"),
    [
        ("ApplyPulid", ("fidelity", 0.8, 0, 1)),
        ("ApplyPulid", ("style", 0.7000000000000001, 0, 1)),
        ("ApplyPulid", ("neutral", 1, 0.0, 0.9)),
        ("ApplyPulidAdvanced", (0.8, "ortho_v2", 8, 0, 0, 1)),
        ("ApplyPulidAdvanced", (0.8, "ortho", 16, 0.3, 0, 1)),
    ],
)
def test_an_old_workflow_fits_and_runs(server, info, unpatched, apply, values, masked):
    workflow = old_workflow(apply, values, masked)
    assert [line for line in misfits(workflow, info) if "defined ['model'" not in line] == []  # a file may lack the mask
    made, _ = picture(server, to_prompt(workflow, info))
    assert (made != unpatched).mean() > 0.1


def test_the_prompt_that_older_servers_were_sent_runs_and_gives_the_same(server, info):
    prompt = to_prompt(old_workflow(masked=False), info)
    sent = {key: {"class_type": node["class_type"], "inputs": dict(node["inputs"])} for key, node in prompt.items()}
    sent["33"]["inputs"] = API
    sent["19"]["inputs"] = {}
    assert np.array_equal(picture(server, prompt)[0], picture(server, sent | {
        key: {**node, "_meta": {"title": node["class_type"]}} for key, node in sent.items()
    })[0])  # fmt: skip


def test_method_and_projection_name_the_same_numbers(server, info):
    by_method, _ = picture(server, to_prompt(old_workflow(masked=False), info))
    advanced = old_workflow("ApplyPulidAdvanced", (0.8, "ortho_v2", 8, 0, 0, 1), masked=False)
    assert np.array_equal(picture(server, to_prompt(advanced, info))[0], by_method)


def test_a_slider_looks_at_no_photograph_again(server, info):
    prompt = to_prompt(old_workflow(masked=False), info)
    server.run(prompt)
    set_inputs(prompt, "ApplyPulid", weight=0.55)
    ran = []
    server.run(prompt, ran.append)
    assert not [line for line in ran if line.startswith("Apply PuLID:")]  # the progress of looking at photographs
    assert "Apply PuLID" in ran


def test_a_provider_that_this_machine_lacks_is_said_and_the_cpu_serves(server, info):
    prompt = to_prompt(old_workflow(masked=False), info)
    set_inputs(prompt, "PulidInsightFaceLoader", provider="ROCM")
    _, outputs = picture(server, prompt)
    refused, used = outputs["17"]["text"]
    assert refused.startswith("The installed ONNX Runtime does not offer 'ROCM'; it offers: ")
    assert refused.endswith("Going on with the CPU.")
    assert used.endswith("runs on CPU.")


def test_a_file_that_is_not_here_is_named_with_its_address(server, info):
    prompt = to_prompt(old_workflow(masked=False), info)
    set_inputs(prompt, "PulidModelLoader", pulid_file=catalogue.V1_PICKLE.name)
    with pytest.raises(ServerError, match=r"pulid_v1\.bin .*was not found.*https://.*This node has no missing_files"):
        server.run(prompt)
    set_inputs(prompt, "PulidModelLoader", pulid_file="their own\\name.safetensors")
    with pytest.raises(ServerError, match=r"name\.safetensors was not found\. Looked in"):
        server.run(prompt)


def test_a_newer_pulid_file_serves_too(server, info, unpatched):
    prompt = to_prompt(old_workflow(masked=False), info)
    set_inputs(prompt, "PulidModelLoader", pulid_file="newer.safetensors")
    assert (picture(server, prompt)[0] != unpatched).mean() > 0.1


def test_a_photograph_without_a_face_stops_in_words(server, info):
    prompt = to_prompt(old_workflow(masked=False), info)
    set_inputs(prompt, "LoadImage", image="grey.png")
    with pytest.raises(ServerError, match=r"Photograph 1 of 1 was left out\. InsightFace saw no face.*PuLID Encode"):
        server.run(prompt)
