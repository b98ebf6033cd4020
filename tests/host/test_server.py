"""The pack as ComfyUI's own server loads and runs it, in a process of its own, driven as a browser drives it."""

import compileall
import io
import itertools
import json
import os
import re
import shutil
import sys
import urllib.error
from pathlib import Path

import numpy as np
import pytest

if not os.environ.get("COMFYUI"):
    pytest.skip("COMFYUI names no ComfyUI folder", allow_module_level=True)

from PIL import Image, ImageOps
from pulid_sdxl.tools import demo
from pulid_sdxl.tools.comfy_server import ComfyServer, ServerError, title
from pulid_sdxl.tools.fakes.fake_fal import FakeFal
from pulid_sdxl.tools.model_files import gather
from pulid_sdxl.tools.translations import LOCALES, english, flat, read
from pulid_sdxl.tools.workflow import find, misfits, set_inputs, to_prompt

WORKFLOWS = sorted((Path(__file__).parents[2] / "workflows").glob("*.json"))
BLUEPRINTS = sorted((Path(__file__).parents[2] / "subgraphs").glob("*.json"))
PACK = "pulid-sdxl"
HEAVY = {"insightface", "onnxruntime", "cv2", "facexlib", "skimage", "timm", "diffusers", "torchvision", "triton"}
LIGHT = {"PIL"}  # what a start may bring beside Python's own and what ComfyUI has by then

# A pack that lists, as choices of a node, what this Python has imported, in order, when the browser asks for nodes.
PROBE = """
import sys


class Imported:
    RETURN_TYPES, FUNCTION, CATEGORY = (), "run", "tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"modules": (list(sys.modules),)}}


NODE_CLASS_MAPPINGS = {"Imported": Imported}
"""

PUBLISHED = "ip-adapter_pulid_sdxl_fp16.safetensors"  # known, but not here

HOSTED_REQUEST = ["prompt", "negative_prompt", "num_images", "guidance_scale", "num_inference_steps", "seed"]
HOSTED_REQUEST += ["image_size", "width", "height", "id_scale", "mode", "id_mix"]
HOSTED_REFERENCES = ["reference_images", "reference_urls", "transport", "reference_size"]
HOSTED_ORDER = ["webhook_url", "priority", "runner_hint", "no_retry", "queue_limit"]
HOSTED_LIMITS = ["queue_limit", "run_limit", "total_limit"]
PAID = ["confirm_paid", "force_resubmit", "keep_pictures", "service_copy"]
HOSTED_ANSWER = ["images", "seed", "request_id", "info"]
ENCODE = ["pulid", "image", "face", "face_index", "photos", "id_mix", "no_face"]

RANGE = ["start_at", "end_at"]
BEST = ["pulid", "images", "count", "face", "face_index", "drop_strangers"]
GATE = ["pulid", "images", "keep", "threshold", "count", "when_none"]
GATED = ["passed", "rejected", "scores", "report", "chart"]
PLACE = ["pulid", "people", "order", "reach", "feather", "width", "height", "boxes"]

# Public API: saved workflows depend on these names and their order.
NODES = {
    "PuLID_Loader": (["pulid_file", "eva_clip", "face_analysis", "provider", "missing_files"], [], ["pulid"]),
    "PuLID_Encode": (ENCODE, ["mask", "weights", "resolution"], ["identity", "faces", "detections"]),
    "PuLID_PhotoList": (["photo_1"], [f"photo_{number}" for number in range(2, 7)], ["photos"]),
    "PuLID_CombineIdentities": (["identity_1", "identity_2", "mode", "weight"], [], ["identity"]),
    "PuLID_SaveIdentity": (["identity", "filename_prefix"], ["save_as"], ["identity"]),
    "PuLID_LoadIdentity": (["identity_file"], ["image"], ["identity"]),
    "PuLID_FaceSimilarity": (["pulid", "reference", "image"], [], ["similarity", "per image", "annotated image"]),
    "PuLID_Apply": (["model", "pulid", "identity", "method", "weight", "start_at", "end_at"], ["attn_mask"], ["model"]),
    "PuLID_BestPhotos": (BEST, [], ["photos", "scores", "sheet"]),
    "PuLID_LikenessGate": (GATE, ["identity", "reference", "strangers"], GATED),
    "PuLID_PlacePeople": (PLACE, ["image"], ["masks", "preview", "boxes"]),
    "PuLID_ApplyPeople": (["model", "pulid", "identities", "masks", "method", "weights", *RANGE], [], ["model"]),
    "PuLID_FaceCrop": (["pulid", "image", "face", "face_index", "size", "context"], [], ["crop", "mask", "place"]),
    "PuLID_FacePaste": (["image", "crop", "place", "feather"], [], ["image"]),
    "PuLID_Hosted": (HOSTED_REQUEST, [*HOSTED_REFERENCES, *HOSTED_LIMITS, *PAID], HOSTED_ANSWER),
    "PuLID_HostedSubmit": (
        HOSTED_REQUEST,
        [*HOSTED_REFERENCES, *HOSTED_ORDER, *PAID, "picture_access"],
        ["request_id"],
    ),
    "PuLID_HostedStatus": (["request_id", "logs"], [], ["status", "info"]),
    "PuLID_HostedResult": (["request_id"], HOSTED_LIMITS, HOSTED_ANSWER),
    "PuLID_HostedCancel": (["request_id"], [], []),
    "PuLID_HostedUpload": ([], ["image", "expires_in", "reference_size", "file"], ["urls"]),
    "PuLID_HostedRequests": (["show", "request_id", "action"], [], ["report", "images"]),
}


@pytest.fixture(scope="module")
def fal():
    with FakeFal() as fal:
        yield fal


@pytest.fixture(scope="module")
def server(comfyui, fal, tmp_path_factory):
    base = tmp_path_factory.mktemp("base")
    demo.prepare_base(base, gather(None, None, comfyui))
    astronaut = base / "input" / demo.prepare_photo(base / "input", None)
    shutil.copyfile(astronaut, base / "input" / "copy.png")
    ImageOps.mirror(Image.open(astronaut)).save(base / "input" / "mirrored.png")
    Image.new("RGB", (320, 240), (128, 128, 128)).save(base / "input" / "grey.png")
    for folder in ("person", "of one size"):
        (base / "input" / folder).mkdir()
    for number, name in enumerate(("astronaut.png", "mirrored.png", "grey.png")):
        with Image.open(base / "input" / name) as photo:
            photo.resize((photo.width - 40 * number, photo.height)).save(base / "input" / "person" / name)
            photo.resize((512, 512)).save(base / "input" / "of one size" / name)
    probe = base / "custom_nodes" / "probe"
    probe.mkdir()
    (probe / "__init__.py").write_text(PROBE)
    for package in ("nodes", "models", "pulid"):  # Python's first start compiles; what counts is every other
        compileall.compile_dir(WORKFLOWS[0].parents[1] / package, quiet=1)
    with ComfyServer(comfyui, base, ("--cpu",), fal.environment) as server:
        yield server


@pytest.fixture(scope="module")
def info(server):
    return server.object_info()


def shipped(path, info):
    """A workflow; with the older folder loader, whose photos have one size, where ComfyUI has no other."""
    workflow = json.loads(path.read_text(encoding="utf-8"))
    for node in workflow["nodes"] if FOLDER not in info else ():
        if node["type"] == FOLDER:
            node |= {"type": OLD_FOLDER, "widgets_values": ["of one size", "None"]}
            node["outputs"][0]["name"] = "IMAGE"
    return workflow


def of_file(path, info):
    return to_prompt(shipped(path, info), info)


SMALL = {
    "CheckpointLoaderSimple": {"ckpt_name": "standin_sdxl_fifth_width.safetensors"},
    "PuLID_Loader": {"pulid_file": "pulid_v1.1.safetensors"},
    "EmptyLatentImage": {"width": 128, "height": 192},
    "RebatchLatents": {"batch_size": 2},
    "KSampler": {"steps": 1},
    "PuLID_PlacePeople": {"width": 128, "height": 192, "boxes": "0.2 0.2 0.3 0.3\n0.6 0.2 0.7 0.3"},
    "PuLID_FaceCrop": {"size": 128},
}
MOST = 4  # pictures that are made at once
LOOK_AT_PICTURES = {"PuLID_FaceCrop": "image", "PuLID_FacePaste": "image", "PuLID_LikenessGate": "images"}
FOLDER, OLD_FOLDER = "LoadImageDataSetFromFolder", "LoadImageSetFromFolderNode"  # ComfyUI's own, the first since 0.4
LOCAL = [path for path in WORKFLOWS if "PuLID_Hosted" not in path.read_text(encoding="utf-8")]


def small(path, info):
    """A shipped workflow with pictures that are there, small and short."""
    prompt = of_file(path, info)
    photos = itertools.cycle(("astronaut.png", "mirrored.png"))
    for node in prompt.values():
        node["inputs"].update(SMALL.get(node["class_type"], {}))
        if node["class_type"] == "LoadImage":
            node["inputs"]["image"] = next(photos)
        elif node["class_type"] == "EmptyLatentImage":
            node["inputs"]["batch_size"] = min(node["inputs"]["batch_size"], MOST)
    show_faces(prompt)
    return prompt


def show_faces(prompt):
    """Stand-ins make no faces: whoever looks for one in a picture that was made sees the photograph in its place."""
    photo = next((node_id for node_id, node in prompt.items() if node["class_type"] == "LoadImage"), None)
    for node in list(prompt.values()):
        if (name := LOOK_AT_PICTURES.get(node["class_type"])) is None:
            continue
        made = node["inputs"][name]
        blend = {"image1": [photo, 0], "image2": made, "blend_factor": 0.0, "blend_mode": "normal"}
        place = f"photo for {made}"
        prompt[place] = {"class_type": "ImageBlend", "inputs": blend, "_meta": {"title": place}}
        node["inputs"][name] = [place, 0]


@pytest.fixture
def prompt(info):
    """The shipped workflow, small and short."""
    prompt = small(demo.WORKFLOW, info)
    set_inputs(prompt, "KSampler", steps=2)
    return prompt


@pytest.fixture
def ours(info):
    return {name: node for name, node in info.items() if node["python_module"] == f"custom_nodes.{PACK}"}


def inputs_of(node):
    return {
        name: declared for group in ("required", "optional") for name, declared in node["input"].get(group, {}).items()
    }


def picture(server, prompt, outputs, class_type):
    [entry] = outputs[find(prompt, class_type)]["images"]
    return np.asarray(Image.open(io.BytesIO(server.picture(entry))).convert("RGB"))


def test_the_pack_loads(server):
    assert PACK in server.import_seconds()
    assert server.failed_packs() == []


def test_nothing_heavy_is_imported_at_start(info):
    modules = info["Imported"]["input"]["required"]["modules"][0]
    ours = next(index for index, name in enumerate(modules) if name.endswith(PACK))  # before: ComfyUI's own
    assert any(f"{PACK}.nodes.load" in name for name in modules[ours:])  # the probe does see what is there
    assert HEAVY & set(modules[ours:]) == set()
    last = max(index for index, name in enumerate(modules) if PACK in name)  # behind: ComfyUI's own again
    brought = {name.split(".")[0] for name in modules[ours:last] if not name.startswith("/")}
    assert brought - set(sys.stdlib_module_names) <= LIGHT


@pytest.mark.parametrize("node_id", NODES)
def test_inputs_and_outputs_are_those_of_saved_workflows(info, node_id):
    order = info[node_id]["input_order"]
    assert (order["required"], order.get("optional", []), info[node_id]["output_name"]) == NODES[node_id]


def test_every_node_and_input_explains_itself_in_a_page_too(ours):
    assert set(NODES) <= set(ours)
    for name, node in ours.items():
        assert node["description"], name
        assert node["category"] == ("PuLID/legacy" if node["deprecated"] else "PuLID")
        inputs = inputs_of(node)
        assert [key for key, (_, options) in inputs.items() if not options.get("tooltip")] == [], name
        page = (WORKFLOWS[0].parents[1] / "web" / "docs" / f"{name}.md").read_text(encoding="utf-8")
        table = page.partition("| input |")[2].partition("\n\n")[0]
        rows = re.findall(r"^\| ([a-z_0-9, ]+) \|", table, re.MULTILINE)
        named = {word for row in rows for word in row.split(", ")}
        assert named <= set(inputs) and bool(named) == bool(inputs), name


FIRST = ("face", "identity", "portrait", "likeness", "faceid", "ipadapter", "ip adapter", "consistent character")
# Nodes that answer to the same words; every other word that several share is one that a newcomer types.
KIN = ("People$", "Gate|Similarity", "FaceCrop|FacePaste", "(Save|Load)Identity", "Hosted")


def test_nodes_are_found_by_what_people_look_for(info, ours):
    if "search_aliases" not in info["KSampler"]:
        pytest.skip("this ComfyUI knows no aliases")
    words = {name: node["search_aliases"] for name, node in ours.items() if not node["deprecated"]}
    assert set(words["PuLID_Loader"]) & set(words["PuLID_Encode"]) & set(words["PuLID_Apply"]) >= {*FIRST}
    for name, own in words.items():
        assert own and len({*own}) == len(own) and info[name]["display_name"].lower() not in own, name
        assert [word for word in own if word != word.strip().lower()] == [], name
        kin = {one for one in words for family in KIN if re.search(family, name) and re.search(family, one)}
        shared = {word for other in {*words} - kin - {name} for word in words[other] if word in own}
        assert shared <= {*words["PuLID_Encode"]}, name


@pytest.mark.parametrize("path", [*WORKFLOWS, *BLUEPRINTS], ids=lambda path: path.stem)
def test_what_is_shipped_uses_no_deprecated_node(info, path):
    flow = json.loads(path.read_text(encoding="utf-8"))
    graphs = [flow, *flow.get("definitions", {}).get("subgraphs", [])]
    used = {node["type"] for graph in graphs for node in graph["nodes"]}
    assert [name for name in used if info.get(name, {}).get("deprecated")] == []


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_shipped_workflows_fit_the_nodes(info, path):
    assert misfits(shipped(path, info), info) == []


def test_shipped_workflows_are_offered_as_templates(server):
    assert set(server.get("/workflow_templates")[PACK]) == {path.stem for path in WORKFLOWS}


@pytest.mark.parametrize("path", BLUEPRINTS, ids=lambda path: path.stem)
def test_subgraphs_fit_the_nodes_and_are_offered(server, info, path):
    blueprint = json.loads(path.read_text(encoding="utf-8"))
    [definition] = blueprint["definitions"]["subgraphs"]
    assert definition["category"] == "PuLID" and definition["description"], "found under no words but its name"
    assert misfits(inner_workflow(blueprint), info) == []
    try:
        offered = server.get("/global_subgraphs")
    except urllib.error.HTTPError as error:
        error.close()
        pytest.skip("this ComfyUI reads no subgraphs of packs")
    ours = {entry["name"]: key for key, entry in offered.items() if entry["info"]["node_pack"].endswith(PACK)}
    assert set(ours) == {blueprint.stem for blueprint in BLUEPRINTS}
    served = server.get(f"/global_subgraphs/{ours[path.stem]}")["data"]
    assert json.loads(served) == json.loads(path.read_text(encoding="utf-8"))


def inner_workflow(blueprint):
    """The nodes of a subgraph as a workflow; what comes from outside or goes there is not connected."""
    [subgraph] = blueprint["definitions"]["subgraphs"]
    ends = {subgraph["inputNode"]["id"], subgraph["outputNode"]["id"]}
    fields = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    links = [[link[field] for field in fields] for link in subgraph["links"]]
    outside = {link[0] for link in links if {link[1], link[3]} & ends}
    for node in subgraph["nodes"]:
        for slot in node["inputs"]:
            slot["link"] = None if slot["link"] in outside else slot["link"]
        for slot in node["outputs"]:
            slot["links"] = [link for link in slot["links"] if link not in outside]
    return {"nodes": subgraph["nodes"], "links": [link for link in links if link[0] not in outside]}


def test_translations_follow_the_nodes_and_are_served(server, ours):
    assert english(ours) == read("en"), "locales/en says something else"
    served = server.get("/i18n")
    for folder in LOCALES.iterdir():
        assert read(folder.name).items() <= served[folder.name]["nodeDefs"].items()


def test_translations_name_the_options_of_combos_as_they_are(info):
    tooltips = {path[:-1]: text for path, text in flat(read("en")) if path[1] == "inputs" and path[-1] == "tooltip"}
    translated_ones = {path: text for path, text in tooltips.items() if path[0].startswith("PuLID_")}
    for (node, _, name), tooltip in translated_ones.items():
        for option in inputs_of(info[node])[name][1].get("options", []):
            named = re.compile(rf"(?<!\w){re.escape(option)}(?!\w)", re.ASCII)
            for folder in LOCALES.iterdir() if named.search(tooltip) else []:
                translated = read(folder.name)[node]["inputs"][name]["tooltip"]
                assert named.search(translated), f"{folder.name} {node}.{name} does not name {option!r}"


def test_a_photograph_becomes_a_picture_twice_the_same(server, prompt):
    outputs = server.run(prompt)
    first = picture(server, prompt, outputs, "SaveImage")
    assert first.shape == (192, 128, 3)
    assert first.std() > 10  # not one flat colour

    face = picture(server, prompt, outputs, "PreviewImage")
    assert face.shape == (336, 336, 3) and face.std(axis=2).max() < 2  # grey
    assert (face[[0, 0, -1, -1], [0, -1, 0, -1]] > 240).all()  # on white
    assert (face[100:250, 100:250] < 200).mean() > 0.5  # with a face in the middle

    set_inputs(prompt, "LoadImage", image="copy.png")  # the same photograph, so that nothing comes from a cache
    again = picture(server, prompt, server.run(prompt), "SaveImage")
    assert np.array_equal(first, again)

    set_inputs(prompt, "PuLID_Apply", weight=0.0)
    without = picture(server, prompt, server.run(prompt), "SaveImage")
    assert np.abs(first.astype(float) - without).mean() > 1


@pytest.mark.parametrize("path", LOCAL, ids=lambda path: path.stem)
def test_shipped_workflows_run(server, info, path):
    if path.stem == "pulid_07_load_identity":  # which takes what the other one keeps
        server.run(small(path.with_name("pulid_06_save_identity.json"), info))
        info = server.object_info()
    prompt = small(path, info)
    outputs = server.run(prompt)
    kinds = {prompt[node]["class_type"] for node in outputs}
    assert kinds & {"SaveImage", "PuLID_SaveIdentity"}
    if "SaveImage" in kinds:
        latents = prompt[find(prompt, "EmptyLatentImage")]["inputs"]["batch_size"]
        assert len(outputs[find(prompt, "SaveImage")]["images"]) == latents


def test_a_slider_runs_apply_again_and_nothing_before_it(server, prompt):
    server.run(prompt)
    for change in ({"weight": 0.55}, {"method": "neutral"}, {"start_at": 0.2}):
        set_inputs(prompt, "PuLID_Apply", **change)
        ran = []
        server.run(prompt, ran.append)
        nodes = [line for line in ran if ":" not in line]  # the others are progress
        assert nodes[0].startswith("Apply PuLID")
        assert not {"Load PuLID (SDXL)", "PuLID Encode Identity", "Photo of the person"} & set(nodes)


@pytest.mark.parametrize(
    ("node", "inputs", "words"),
    [
        ("LoadImage", {"image": "grey.png"}, r"Photograph 1 of 1: .*face"),
        ("PuLID_Loader", {"pulid_file": PUBLISHED}, rf"(?s)Missing: {PUBLISHED}\..*Set missing_files.*https://"),
        ("PuLID_Loader", {"pulid_file": "someone\\else.safetensors"}, r"Missing: someone.else\.safetensors\."),
        ("PuLID_Apply", {"weight": 99.0}, "weight"),
    ],
    ids=["no face", "a file that is missing", "a file that only another machine has", "a value out of range"],
)
def test_what_cannot_be_done_is_answered_in_words(server, prompt, node, inputs, words):
    set_inputs(prompt, node, **inputs)
    with pytest.raises(ServerError, match=words):
        server.run(prompt)


def test_one_set_of_values_makes_a_picture_here_and_one_at_the_service(server, info, fal):
    prompt = of_file(WORKFLOWS[0].with_name("pulid_14_local_and_hosted.json"), info)
    by_title = {node["_meta"]["title"]: node["inputs"] for node in prompt.values()}
    for name, value in (("Width", 128), ("Height", 192), ("Steps", 2), ("Seed", 5), ("ID scale", 0.6)):
        by_title[name]["value"] = value
    set_inputs(prompt, "LoadImage", image="astronaut.png")
    set_inputs(prompt, "CheckpointLoaderSimple", ckpt_name="standin_sdxl_fifth_width.safetensors")
    set_inputs(prompt, "PuLID_Loader", pulid_file="pulid_v1.1.safetensors")
    outputs = server.run(prompt)
    shapes = {}
    for node_id, output in outputs.items():
        for entry in output.get("images", []):
            shapes[title(prompt, node_id)] = Image.open(io.BytesIO(server.picture(entry))).size
    assert shapes == {"Made here": (128, 192), "Made at fal.ai": (128, 192), "Here | at fal.ai": (256, 192)}
    [job] = fal.jobs.values()
    assert {"seed": 5, "num_inference_steps": 2, "guidance_scale": 1.2, "id_scale": 0.6}.items() <= job.input.items()
