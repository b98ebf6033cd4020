"""From the editor's file to the server's prompt, on small made-up nodes; and the shipped workflows, without a host."""

import itertools
import json
from pathlib import Path

import pytest
from PIL import Image
from pulid_sdxl.tools.workflow import BYPASSED, MUTED, WorkflowError, misfits, set_inputs, to_prompt

SHIPPED = sorted((Path(__file__).parents[2] / "workflows").glob("*.json"))

# Three nodes as /object_info describes them: the first with combos as a list, the last as newer nodes write them.
FILE = {"file": [["a.png", "b.png"], {"image_upload": True}]}
SAMPLE = {
    "image": ["IMAGE", {}],
    "seed": ["INT", {"min": 0, "max": 100, "control_after_generate": True}],
    "cfg": ["FLOAT", {"min": 0.0, "max": 10.0}],
}
OPTIONAL = {"mask": ["MASK", {}], "note": ["STRING", {}]}
SAVE = {"images": ["IMAGE"], "kind": ["COMBO", {"options": ["png", "webp"]}]}
INFO = {
    "Load": {"input": {"required": FILE}, "output": ["IMAGE", "MASK"], "output_name": ["IMAGE", "MASK"]},
    "Sample": {
        "input": {"required": SAMPLE, "optional": OPTIONAL},
        "output": ["IMAGE"],
        "output_name": ["sampled"],
        "display_name": "Sample it",
    },
    "Save": {"input": {"required": SAVE}, "output": [], "output_name": []},
}


def socket(name, kind, link=None):
    return {"name": name, "type": kind, "link": link}


def node(node_id, kind, inputs=(), outputs=(), values=(), **more):
    slots = {"inputs": list(inputs), "outputs": list(outputs)}
    return {"id": node_id, "type": kind, **slots, "widgets_values": list(values), **more}


def workflow():
    """Load -> Sample -> Save."""
    image = {"name": "IMAGE", "type": "IMAGE", "links": [1]}
    mask = {"name": "MASK", "type": "MASK", "links": []}
    sampled = {"name": "sampled", "type": "IMAGE", "links": [2]}
    sample_inputs = [socket("image", "IMAGE", 1), socket("mask", "MASK")]
    return {
        "nodes": [
            node(1, "Load", outputs=[image, mask], values=["a.png", "image"]),
            node(2, "Sample", sample_inputs, [sampled], [7, "randomize", 2.5, "hi"]),
            node(3, "Save", [socket("images", "IMAGE", 2)], values=["webp"]),
        ],
        "links": [[1, 1, 0, 2, 0, "IMAGE"], [2, 2, 0, 3, 0, "IMAGE"]],
    }


def inputs(prompt, node_id):
    return prompt[str(node_id)]["inputs"]


def test_values_get_their_names_and_the_editors_own_widgets_are_left_out():
    prompt = to_prompt(workflow(), INFO)
    assert inputs(prompt, 1) == {"file": "a.png"}
    assert inputs(prompt, 2) == {"seed": 7, "cfg": 2.5, "note": "hi", "image": ["1", 0]}
    assert inputs(prompt, 3) == {"kind": "webp", "images": ["2", 0]}


@pytest.mark.parametrize(("saved", "read"), [
    ([7, 2.5, "hi"], {"seed": 7, "cfg": 2.5, "note": "hi"}),  # a seed without its second widget
    ({"seed": 8, "cfg": 1.0, "videopreview": {}}, {"seed": 8, "cfg": 1.0}),
])  # fmt: skip
def test_values_may_be_saved_in_other_ways(saved, read):
    flow = workflow()
    flow["nodes"][1]["widgets_values"] = saved
    assert inputs(to_prompt(flow, INFO), 2) == {**read, "image": ["1", 0]}


def test_a_link_into_a_widget_wins_over_its_value():
    flow = workflow()
    flow["nodes"].append(node(4, "PrimitiveNode", outputs=[{"name": "INT", "type": "INT", "links": [3]}], values=[42]))
    flow["links"].append([3, 4, 0, 2, 2, "INT"])
    flow["nodes"][1]["inputs"].append({**socket("seed", "INT", 3), "widget": {"name": "seed"}})
    prompt = to_prompt(flow, INFO)
    assert inputs(prompt, 2)["seed"] == 42
    assert "4" not in prompt


def test_a_title_is_the_users_own_else_the_nodes_and_notes_are_no_part_of_the_prompt():
    flow = workflow()
    flow["nodes"][2]["title"] = "My picture"
    flow["nodes"].append(node(9, "MarkdownNote", values=["words"]))
    titles = {key: node["_meta"]["title"] for key, node in to_prompt(flow, INFO).items()}
    assert titles == {"1": "Load", "2": "Sample it", "3": "My picture"}


@pytest.mark.parametrize(("mode", "images"), [(BYPASSED, {"images": ["1", 0]}), (MUTED, {})])
def test_a_bypassed_node_hands_its_input_on_and_a_muted_one_takes_its_links_with_it(mode, images):
    flow = workflow()
    flow["nodes"][1]["mode"] = mode
    prompt = to_prompt(flow, INFO)
    assert set(prompt) == {"1", "3"}
    assert inputs(prompt, 3) == {"kind": "webp", **images}


def test_reroutes_are_followed():
    flow = workflow()
    flow["nodes"].append(node(5, "Reroute", [socket("", "*", 4)], [{"name": "", "type": "IMAGE", "links": [2]}]))
    flow["links"] = [[1, 1, 0, 2, 0, "IMAGE"], [4, 2, 0, 5, 0, "IMAGE"], [2, 5, 0, 3, 0, "IMAGE"]]
    assert inputs(to_prompt(flow, INFO), 3)["images"] == ["2", 0]


def test_an_unknown_node_is_named():
    with pytest.raises(WorkflowError, match="no node 'Load'"):
        to_prompt(workflow(), {"Sample": INFO["Sample"]})


def test_more_values_than_widgets_are_an_error():
    flow = workflow()
    flow["nodes"][2]["widgets_values"] = ["png", "left over"]
    with pytest.raises(WorkflowError, match=r"Save \(node 3\) has 1 widgets, its file has 2 values"):
        to_prompt(flow, INFO)


def test_only_inputs_that_are_there_can_be_set():
    prompt = to_prompt(workflow(), INFO)
    set_inputs(prompt, "Sample", seed=1)
    assert inputs(prompt, 2)["seed"] == 1
    with pytest.raises(WorkflowError, match=r"no input.*'sead'"):
        set_inputs(prompt, "Sample", sead=1)


def test_a_workflow_that_fits_has_no_misfits():
    assert misfits(workflow(), INFO) == []


@pytest.mark.parametrize(("change", "expected"), [
    (lambda flow: flow["nodes"][2]["widgets_values"].clear(), "no value for kind"),
    (lambda flow: flow["nodes"][1]["inputs"].reverse(), "inputs ['mask', 'image'], defined ['image', 'mask']"),
    (lambda flow: flow["nodes"][1]["outputs"][0].update(name="out"), "outputs [('out', 'IMAGE')]"),
    (lambda flow: flow["nodes"][2].update(type="Gone"), "no node 'Gone'"),
    (lambda flow: flow["links"].pop(), "link 2: is not at input 0 of node 3 and"),
    (lambda flow: flow["links"][0].__setitem__(1, 77), "link 1: is not at output 0 of node 77 and"),
])  # fmt: skip
def test_misfits_are_named(change, expected):
    flow = workflow()
    change(flow)
    assert any(expected in line for line in misfits(flow, INFO)), misfits(flow, INFO)


def test_one_set_of_values_drives_the_local_and_the_hosted_side():
    flow = json.loads((SHIPPED[0].parent / "pulid_14_local_and_hosted.json").read_text(encoding="utf-8"))
    nodes, sources = {node["type"]: node for node in flow["nodes"]}, {link[0]: link[1] for link in flow["links"]}

    def source(node_type, name):
        [slot] = [slot for slot in nodes[node_type]["inputs"] if slot["name"] == name]
        return sources[slot["link"]]

    shared = (
        ("seed", "KSampler", "seed"),
        ("num_inference_steps", "KSampler", "steps"),
        ("guidance_scale", "KSampler", "cfg"),
        ("width", "EmptyLatentImage", "width"),
        ("height", "EmptyLatentImage", "height"),
        ("id_scale", "PuLID_Apply", "weight"),
        ("reference_images", "PuLID_Encode", "image"),
    )
    for hosted, node_type, local in shared:
        assert source("PuLID_Hosted", hosted) == source(node_type, local)
    texts = [node for node in flow["nodes"] if node["type"] == "CLIPTextEncode"]
    written = {sources[slot["link"]] for node in texts for slot in node["inputs"] if slot["name"] == "text"}
    assert {source("PuLID_Hosted", "prompt"), source("PuLID_Hosted", "negative_prompt")} == written


def test_shipped_workflows_come_in_an_order_where_names_are_sorted_the_simple_one_first():
    assert SHIPPED[0].stem == "pulid_01_simple"
    assert [path.stem.split("_")[1] for path in SHIPPED] == [f"{number:02}" for number in range(1, len(SHIPPED) + 1)]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
class TestShipped:
    @pytest.fixture
    def flow(self, path):
        return json.loads(path.read_text(encoding="utf-8"))

    def test_is_of_the_version_comfyui_opens(self, flow):
        assert flow["version"] == 0.4
        assert flow["last_node_id"] == max(node["id"] for node in flow["nodes"])
        assert flow["last_link_id"] == max(link[0] for link in flow["links"])

    def test_no_node_covers_another(self, flow):
        title_height = 30  # px, drawn above a node's position
        corners = [(*node["pos"], *node["size"]) for node in flow["nodes"]]
        boxes = [(x, y - title_height, x + width, y + height) for x, y, width, height in corners]
        for a, b in itertools.combinations(boxes, 2):
            assert not (a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]), (a, b)

    def test_what_it_shows_as_an_app_is_on_its_nodes(self, flow):
        app, nodes = flow["extra"].get("linearData", {"inputs": [], "outputs": []}), {n["id"]: n for n in flow["nodes"]}
        for node, widget in app["inputs"]:
            assert widget in [slot["name"] for slot in nodes[node]["inputs"] if "widget" in slot]
        assert {nodes[node]["type"] for node in app["outputs"]} <= {"SaveImage"}

    def test_has_a_card_for_the_list_of_templates(self, path):
        with Image.open(path.with_suffix(".jpg")) as card:
            assert (card.format, card.size) == ("JPEG", (640, 400))

    def test_explains_itself(self, flow):
        assert [node for node in flow["nodes"] if node["type"] in ("Note", "MarkdownNote")]

    def test_each_loader_names_the_files_it_asks_for_where_comfyui_can_fetch_them(self, flow):
        models = [(model, node) for node in flow["nodes"] for model in node["properties"].get("models", [])]
        files = {"PuLID_Loader": 2, "CheckpointLoaderSimple": 1}
        assert len(models) == sum(files[node["type"]] for node in flow["nodes"] if "Loader" in node["type"])
        for model, node in models:
            assert model["name"] in node["widgets_values"]
            assert model["url"].startswith("https://huggingface.co/")
            [suffix] = {Path(model[key]).suffix for key in ("name", "url")}
            assert suffix in (".safetensors", ".pt")  # what the editor fetches; it refuses .bin and .onnx
