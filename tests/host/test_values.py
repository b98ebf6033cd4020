"""Every input of every node that runs here gets every wrong value that ComfyUI lets through, by its own execution."""

import asyncio
import inspect
import math
import os
from dataclasses import replace
from types import SimpleNamespace
from typing import ClassVar

import pytest

if not os.environ.get("COMFYUI"):
    pytest.skip("COMFYUI names no ComfyUI folder", allow_module_level=True)

from pulid_sdxl.tools import comfy_host

comfy_host.enter(os.environ["COMFYUI"])

import execution
import folder_paths
import numpy as np
import torch
from pulid_sdxl.nodes import host
from pulid_sdxl.nodes.apply import PulidApply, PulidApplyAdvanced
from pulid_sdxl.nodes.closeup import PulidFaceCrop, PulidFacePaste
from pulid_sdxl.nodes.combine import PulidCombineIdentities
from pulid_sdxl.nodes.encode import PulidEncode
from pulid_sdxl.nodes.lists import PulidPhotoList
from pulid_sdxl.nodes.load import PulidLoader
from pulid_sdxl.nodes.people import PulidApplyPeople, PulidBestPhotos, PulidLikenessGate, PulidPlacePeople
from pulid_sdxl.nodes.save_load import PulidLoadIdentity, PulidSaveIdentity
from pulid_sdxl.nodes.similarity import PulidFaceSimilarity
from pulid_sdxl.pulid.closeup import place_of
from pulid_sdxl.pulid.errors import MissingWeights
from pulid_sdxl.tools.fakes import networks as fakes

import nodes as host_nodes

from .sampling import MODEL_CHANNELS, make_identity, projections


class Any(str):
    """A type that fits every other, as packs with switches and primitives have it."""

    def __ne__(self, other):
        return False


class Give:
    """Gives, through a link, what the test put there."""

    RETURN_TYPES, FUNCTION, CATEGORY = (Any("*"),), "give", ""
    values: ClassVar[dict[str, object]] = {}

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"name": ("STRING", {})}}

    def give(self, name):
        return (self.values[name],)


class Take:
    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "take", "", True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": (Any("*"), {})}}

    def take(self, value):
        return ()


class Server(SimpleNamespace):
    client_id, last_node_id, prompt_queue = None, None, None

    def send_sync(self, *_):
        pass


def picture(height=64, width=64, channels=3, count=1):
    image = torch.full((count, height, width, channels), 0.5)
    image[:, 30, 30] = 1
    return image


IDENTITY = replace(make_identity(), arcface=torch.nn.functional.normalize(torch.ones(1, 512)))
ALONE = fakes.loaded(fakes.weights(projections(), source="file"), fakes.photo_networks())
PICTURE, MASK = picture(), torch.ones(1, 64, 64)
GOOD = {
    PulidLoader: {},
    PulidEncode: {"pulid": ALONE, "image": PICTURE, "mask": MASK},
    PulidPhotoList: {f"photo_{number}": PICTURE for number in range(1, 7)},
    PulidCombineIdentities: {"identity_1": IDENTITY, "identity_2": IDENTITY},
    PulidSaveIdentity: {"identity": IDENTITY, "filename_prefix": "anna"},
    PulidLoadIdentity: {"identity_file": "anna_00001_.safetensors"},
    PulidApply: {"pulid": ALONE, "identity": IDENTITY, "attn_mask": MASK},
    PulidApplyAdvanced: {"pulid": ALONE, "identity": IDENTITY, "attn_mask": MASK},
    PulidFaceSimilarity: {"pulid": ALONE, "reference": PICTURE, "image": PICTURE},
    PulidBestPhotos: {"pulid": ALONE, "images": PICTURE},
    PulidLikenessGate: {
        "pulid": ALONE, "images": PICTURE, "identity": IDENTITY, "reference": PICTURE, "strangers": PICTURE,
        "when_none": "best one",
    },
    PulidPlacePeople: {"pulid": ALONE, "people": 1, "image": PICTURE, "boxes": "0.1 0.1 0.5 0.5"},
    PulidApplyPeople: {"pulid": ALONE, "identities": IDENTITY, "masks": MASK},
    PulidFaceCrop: {"pulid": ALONE, "image": PICTURE},
    PulidFacePaste: {"image": PICTURE, "crop": picture(), "place": [place_of((10, 10, 50, 50), (64, 64), 1.0)]},
}  # fmt: skip

NAN, INFINITE = PICTURE.clone().fill_(math.nan), PICTURE.clone().fill_(math.inf)
ANYTHING = {
    "nothing": None, "a list": ["a", "b", "c"], "an empty list": [], "a latent": {"samples": torch.zeros(1, 4, 8, 8)},
    "a thing": object(), "a set": {1, 2},
}  # fmt: skip
ARRAYS = {
    "an array": np.full((1, 64, 64, 3), 0.5), "a small array": np.array(["largest", "0.5"]), "a tensor of nothing":
    torch.zeros(()), "a mask of one dimension": torch.ones(64), "five dimensions": torch.ones(1, 1, 64, 64, 3),
    "no pixels": torch.zeros(1, 0, 0, 3), "complex": torch.ones(1, 64, 64, 3, dtype=torch.complex64),
}  # fmt: skip
WRONG = {
    "IMAGE": {
        **ARRAYS, "text": "a.png", "a number": 5, "channels first": picture().movedim(-1, 1), "one picture": PICTURE[0],
        "0 to 255": PICTURE * 255, "bytes": (PICTURE * 255).byte(), "no pictures": PICTURE[:0], "a mask": MASK,
        "two channels": picture(channels=2), "NaN": NAN, "infinite": INFINITE,
    },
    "MASK": {
        **ARRAYS, "text": "a.png", "a number": 5, "a picture": PICTURE, "bytes": (MASK * 255).byte(),
        "NaN": MASK / 0 * 0, "0 to 255": MASK * 255, "no masks": MASK[:0], "no mask pixels": torch.zeros(1, 0, 0),
    },
    "INT": {
        **ARRAYS, "text": "many", "yes": True, "a half": 2.5, "NaN": math.nan, "infinite": math.inf,
        "too large": 10**400, "too small": -(10**400),
    },
    "FLOAT": {
        **ARRAYS, "text": "much", "yes": True, "NaN": math.nan, "infinite": -math.inf,
        "too large": 10**400, "too small": -9.0, "complex number": 1j,
    },
    "BOOLEAN": {**ARRAYS, "text": "false", "a number": 2, "NaN": math.nan},
    "STRING": {**ARRAYS, "a number": 5, "no": False},
    "COMBO": {**ARRAYS, "another choice": "nonsense", "a number": 5, "NaN": math.nan, "yes": True},
    "MODEL": {**ARRAYS, "text": "sdxl", "a number": 5, "a pulid": ALONE},
    "PULID_SDXL": {**ARRAYS, "text": "v1", "a number": 5, "its weights": ALONE.weights},
    "PULID_IDENTITY": {**ARRAYS, "text": "anna", "a number": 5, "a pulid": ALONE},
    "PULID_PLACE": {**ARRAYS, "text": "here", "a number": 5, "places of others": [(0, 0, 5, 5)]},
}  # fmt: skip
FITTING = {
    "IMAGE": {"with transparency": picture(channels=4), "grey": picture(channels=1), "half": PICTURE.half()},
    "MASK": {"(H, W)": MASK[0], "(M, 1, H, W)": MASK[:, None], "(M, H, W, 1)": MASK[..., None], "yes or no": MASK > 0},
    "INT": {"of NumPy": np.int64, "a whole float": float},
    "FLOAT": {"a whole number": lambda usual: 1 if usual >= 0.5 else 0, "of NumPy": np.float32},
    "BOOLEAN": {"of NumPy": np.True_, "one": 1},
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return comfy_host.sdxl(MODEL_CHANNELS, seed=None)


@pytest.fixture(autouse=True)
def here(own_folders, monkeypatch, model):
    """Our nodes and the two of this test in a ComfyUI whose folders are the test's own; one identity is saved."""
    for name in host.VISION_FOLDERS:
        folder_paths.add_model_folder_path(name, str(own_folders / "models" / name))
    monkeypatch.setattr(host, "other_programs", lambda environment, home: ())
    host.register_folders()
    for node in (Give, Take, *GOOD):
        monkeypatch.setitem(host_nodes.NODE_CLASS_MAPPINGS, node.__name__, node)
    PulidSaveIdentity.execute(IDENTITY, "anna")
    Give.values = {"model": model}


def good_inputs(node):
    """The inputs of a node as a prompt has them: choices and numbers as they are, the rest through links."""
    given = dict(GOOD[node])
    for one in node.define_schema().inputs:
        if one.id == "model":
            given["model"] = Give.values["model"]
        elif one.id not in given and not one.optional:
            default = getattr(one, "default", None)
            given[one.id] = one.options[0] if default is None and hasattr(one, "options") else default
    return given


def run(node, given, constant=()):
    """The exception, or the host's refusal as a text, of a prompt that gives these; None where it went well."""
    server = Server()
    executor = execution.PromptExecutor(server)
    executor.cache_args = {"ram": 0.0, "ram_inactive": 0.0}  # newer hosts ask for them
    Give.values = {**Give.values, **given}
    prompt = {"node": {"class_type": node.__name__, "inputs": {}}}
    for name, value in given.items():
        prompt[name] = {"class_type": "Give", "inputs": {"name": name}}
        prompt["node"]["inputs"][name] = value if name in constant else [name, 0]
    if not node.define_schema().is_output_node:
        prompt["taken"] = {"class_type": "Take", "inputs": {"value": ["node", 0]}}
    valid, error, outputs, errors = asyncio.run(execution.validate_prompt("prompt", prompt, None))
    if not valid:
        return f"refused by the host: {error} {errors}"
    executor.execute(prompt, "prompt", {}, outputs)
    failed = [data for event, data in executor.status_messages if event == "execution_error"]
    return f"{failed[0]['exception_type']}: {failed[0]['exception_message']}" if failed else None


@pytest.mark.parametrize("node", GOOD, ids=lambda node: node.__name__)
def test_what_is_right_passes_through_links_and_as_constants(node):
    given = good_inputs(node)
    plain = [name for name, value in given.items() if isinstance(value, (str, int, float, bool))]
    for constant in ((), plain):
        result = run(node, given, constant)
        assert result is None if node is not PulidLoader else f"pulid.{MissingWeights.__name__}: Missing:" in result


@pytest.mark.parametrize("node", GOOD, ids=lambda node: node.__name__)
def test_a_wrong_value_is_refused_in_words_that_name_its_input(node):
    good, unsaid = good_inputs(node), {}
    looked_for = inspect.signature(node.validate_inputs).parameters  # names of files, whatever they are
    for one, kind in ((one, str(one.io_type)) for one in node.define_schema().inputs):
        for what, value in {**ANYTHING, **WRONG[kind]}.items():
            if (value is None and one.optional) or (what == "another choice" and one.id in looked_for):
                continue
            linked = run(node, {**good, one.id: value})
            if not (linked and linked.startswith(f"pulid.InputError: {one.id} ") and "found" in linked):
                unsaid[one.id, what] = linked
            if what in WRITABLE and kind not in CONVERTED and (what, kind) != ("yes", "FLOAT"):
                written = run(node, {**good, one.id: value}, [one.id])
                if not (written and written.startswith(("refused by the host", f"pulid.InputError: {one.id} "))):
                    unsaid[one.id, what, "written"] = written
    assert unsaid == {}


WRITABLE = {"nothing", "a latent", "text", "a number", "NaN", "yes", "another choice"}  # as JSON in a prompt
CONVERTED = {"INT", "STRING", "BOOLEAN"}  # where ComfyUI makes a value of the right kind out of it


@pytest.mark.parametrize("node", [node for node in GOOD if node is not PulidLoader], ids=lambda node: node.__name__)
def test_other_forms_of_a_right_value_and_nothing_for_an_optional_one_pass(node):
    given, failed = good_inputs(node), {}
    for one in node.define_schema().inputs:
        fitting = {**FITTING.get(str(one.io_type), {}), **({"nothing": None} if one.optional else {})}
        for what, value in fitting.items():
            value = value(given[one.id]) if callable(value) else value
            if said := run(node, {**given, one.id: value}):
                failed[one.id, what] = said
    assert failed == {}


def test_a_file_name_that_comes_through_a_link_is_not_known_beforehand_and_that_is_no_fault():
    assert PulidLoader.fingerprint_inputs(None, None) == PulidLoader.fingerprint_inputs(None, None)
    assert PulidLoadIdentity.fingerprint_inputs(None, None) is None
