"""The pack in ComfyUI's editor, in a real browser: the shipped workflows, the help pages, another language.

Needs a Chromium (CHROMIUM names one that is not on the path) and ComfyUI's front end; skips, and says so, without.
COMFYUI_ARGUMENTS are further ones for ComfyUI, such as --front-end-root for another front end.
"""

import importlib.util
import json
import os
import shutil
from pathlib import Path

import pytest

if not os.environ.get("COMFYUI"):
    pytest.skip("COMFYUI names no ComfyUI folder", allow_module_level=True)

CHROMIUM = next(filter(None, map(shutil.which, (os.environ.get("CHROMIUM", ""), "chromium", "google-chrome"))), None)
LACKING = [name for name in ("playwright", "comfyui_frontend_package") if importlib.util.find_spec(name) is None]
if CHROMIUM is None or LACKING:
    why = f"the Python package {LACKING[0]} is missing" if LACKING else "no Chromium found"
    pytest.skip(f"THE EDITOR IS NOT TESTED: {why}", allow_module_level=True)

from PIL import Image
from playwright.sync_api import sync_playwright
from pulid_sdxl.tools import ROOT
from pulid_sdxl.tools.comfy_server import ADDRESS, ComfyServer, link
from pulid_sdxl.tools.translations import read
from pulid_sdxl.tools.workflow import FRONTEND_ONLY, declared_inputs, to_prompt, widget_values

WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
SUBGRAPHS = sorted((ROOT / "subgraphs").glob("*.json"))
PACK = "pulid-sdxl"
SECONDS = 10
SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.Locale": "en", "LiteGraph.Node.TooltipDelay": 0}
READY = "() => !!(window.app?.graph && window.LiteGraph?.registered_node_types.PuLID_Apply)"
LOOK = """() => ({
    dialogs: [...document.querySelectorAll('[role=dialog]')].map(dialog => dialog.innerText),
    nodes: app.graph.nodes.map(node => ({
        id: String(node.id), type: node.type, red: !!node.has_errors,
        known: node.type in LiteGraph.registered_node_types,
        values: Object.fromEntries((node.widgets ?? []).map(widget => [widget.name, widget.value])),
    })),
})"""
INSIDE = """() => {
    const [node] = app.graph.nodes, inside = node.subgraph.nodes;
    const known = one => one.type in LiteGraph.registered_node_types;
    return [
        node.inputs.map(slot => slot.name), node.outputs.map(slot => slot.name),
        (node.widgets ?? []).map(widget => widget.name), inside.length,
        inside.filter(one => !known(one) || one.has_errors).map(one => one.type),
    ];
}"""
LABELS = """() => {
    const [node] = app.graph.nodes, label = slot => slot.label ?? slot.localized_name;
    return [node.title, Object.fromEntries(node.inputs.map(slot => [slot.name, label(slot)])), node.outputs.map(label)];
}"""


class Editor:
    """One page, with what went wrong in it."""

    def __init__(self, page, address: str):
        self.page, self.complaints, self.shown = page, [], 0
        page.set_default_timeout(SECONDS * 1000)
        page.on("pageerror", lambda error: self.complaints.append(error.stack or error.message))
        page.on("console", lambda message: message.type == "error" and self.complaints.append(message.text))
        # Nothing here is to leave the machine; an empty answer is no error in the console.
        page.route(lambda url: not url.startswith((address, "data:", "blob:")), lambda route: route.fulfill(body="{}"))
        page.goto(address)
        page.wait_for_function(READY)
        page.wait_for_load_state("networkidle")

    def open(self, workflow: dict) -> None:
        self.complaints.clear()
        self.page.evaluate("workflow => app.loadGraphData(workflow)", workflow)
        self.page.wait_for_load_state("networkidle")

    def speak(self, language: str) -> None:
        self.page.evaluate("language => app.extensionManager.setting.set('Comfy.Locale', language)", language)
        self.page.reload()
        self.page.wait_for_function(READY)

    def show(self, node_id: str) -> None:
        """A graph of that one node, whose title is then clicked."""
        [x, y] = self.page.evaluate(
            """([type, y]) => {
                const node = LiteGraph.createNode(type), canvas = app.canvas;
                app.graph.clear();
                app.graph.add(node);
                node.pos = [500, y];
                canvas.ds.scale = 1;
                canvas.ds.offset = [0, 0];
                canvas.draw(true, true);
                const { left, top } = canvas.canvas.getBoundingClientRect();
                return [left + node.pos[0] + 60, top + node.pos[1] - LiteGraph.NODE_TITLE_HEIGHT / 2];
            }""",
            [node_id, 200 + 100 * (self.shown % 2)],  # twice in one place would be a double click
        )
        self.shown += 1
        self.page.mouse.click(x, y)

    def tooltip(self, widget: str) -> str:
        """What the editor says of a widget of the node that is shown, once the mouse rests on it."""
        [x, y] = self.page.evaluate(
            """name => {
                const [node] = app.graph.nodes, widget = node.widgets.find(widget => widget.name == name);
                const { left, top } = app.canvas.canvas.getBoundingClientRect();
                return [left + node.pos[0] + node.size[0] / 2, top + node.pos[1] + widget.last_y + 8];
            }""",
            widget,
        )
        self.page.mouse.move(x - 5, y)
        self.page.mouse.move(x, y)
        return self.page.locator(".node-tooltip").inner_text()


def make_files(base: Path) -> None:
    """What the workflows name: with a file of that name in its place, the editor has nothing to ask for."""
    for path in WORKFLOWS:
        for node in json.loads(path.read_text(encoding="utf-8"))["nodes"]:
            places = [f"models/{model['directory']}/{model['name']}" for model in node["properties"].get("models", [])]
            if node["type"] == "LoadImage":
                (base / "input").mkdir(exist_ok=True)
                Image.new("RGB", (64, 64)).save(base / "input" / node["widgets_values"][0])
            elif node["type"] == "LoadImageDataSetFromFolder":
                (base / "input" / node["widgets_values"][0]).mkdir(parents=True, exist_ok=True)
            elif node["type"] == "PuLID_LoadIdentity":
                places.append(f"output/pulid_identities/{node['widgets_values'][0]}")
            for place in places:
                (base / place).parent.mkdir(parents=True, exist_ok=True)
                (base / place).touch()


@pytest.fixture(scope="module")
def server(comfyui, tmp_path_factory):
    base = tmp_path_factory.mktemp("base")
    make_files(base)
    settings = base / "user" / "default" / "comfy.settings.json"
    settings.parent.mkdir(parents=True)
    settings.write_text(json.dumps(SETTINGS))
    link(ROOT, base / "custom_nodes" / PACK)
    with ComfyServer(comfyui, base, ("--cpu", *os.environ.get("COMFYUI_ARGUMENTS", "").split())) as server:
        yield server


@pytest.fixture(scope="module")
def info(server):
    return server.object_info()


@pytest.fixture(scope="module")
def editor(server):
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield Editor(browser.new_page(viewport={"width": 1600, "height": 1000}), f"http://{ADDRESS}:{server.port}/")
        browser.close()


@pytest.fixture(scope="module", params=WORKFLOWS, ids=lambda path: path.stem)
def workflow(request, info):
    workflow = json.loads(request.param.read_text(encoding="utf-8"))
    if lacking := {node["type"] for node in workflow["nodes"]} - {*info, *FRONTEND_ONLY}:
        pytest.skip(f"this ComfyUI has no {lacking}")
    return workflow


@pytest.fixture(scope="module")
def opened(editor, workflow):
    editor.open(workflow)
    return editor.page.evaluate(LOOK)


def test_a_workflow_opens_and_nothing_is_missing_or_red(editor, workflow, opened):
    assert opened["dialogs"] == []
    assert len(opened["nodes"]) == len(workflow["nodes"])
    assert [node for node in opened["nodes"] if node["red"] or not node["known"]] == []
    assert editor.complaints == []


def test_every_widget_has_the_value_that_was_saved_for_it(workflow, opened, info):
    values = {node["id"]: node["values"] for node in opened["nodes"]}
    for node in workflow["nodes"]:
        if node["type"] not in FRONTEND_ONLY:
            saved = widget_values(node, info)
            assert {name: values[str(node["id"])].get(name) for name in saved} == saved, node["type"]


def test_the_editor_makes_the_prompt_that_the_tests_run(editor, workflow, opened, info):
    made = editor.page.evaluate("async () => (await app.graphToPrompt()).output")
    for node in made.values():  # without what the editor adds for itself: a text that was output, a pack's version
        declared = declared_inputs(node["class_type"], info)
        node["inputs"] = {name: value for name, value in node["inputs"].items() if name in declared}
        node["_meta"] = {"title": node["_meta"]["title"]}
    assert made == to_prompt(workflow, info)


@pytest.mark.parametrize("path", SUBGRAPHS, ids=lambda path: path.stem)
def test_a_subgraph_opens_with_all_its_nodes_inputs_and_widgets(editor, info, path):
    blueprint = json.loads(path.read_text(encoding="utf-8"))
    [definition] = blueprint["definitions"]["subgraphs"]
    if lacking := {node["type"] for node in definition["nodes"]} - {*info}:
        pytest.skip(f"this ComfyUI has no {lacking}")
    editor.open(blueprint)
    [inputs, outputs, widgets, inside, unknown] = editor.page.evaluate(INSIDE)
    assert inputs == [slot["name"] for slot in definition["inputs"]]
    assert outputs == [slot["name"] for slot in definition["outputs"]]
    [outer] = blueprint["nodes"]
    assert widgets == [slot["name"] for slot in outer["inputs"] if "widget" in slot]
    assert (inside, unknown) == (len(definition["nodes"]), [])
    assert editor.complaints == []


def test_no_run_changes_the_noise_of_a_patched_model_by_itself(editor):
    """The editor lets a seed change at every run unless it is told otherwise."""
    editor.show("PuLID_ApplyAdvanced")
    widgets = editor.page.evaluate("() => app.graph.nodes[0].widgets.map(widget => widget.name)")
    assert "noise_seed" in widgets and "control_after_generate" not in widgets


def test_every_help_page_opens_on_its_node(editor):
    pages = sorted((ROOT / "web" / "docs").glob("*.md"))
    assert pages
    for page in pages:
        heading = page.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        editor.show(page.stem)
        editor.page.get_by_test_id("info-button").click()
        editor.page.locator(".node-help-content").get_by_role("heading", name=heading, exact=True).wait_for()


@pytest.mark.parametrize("language", ["zh", "zh-TW", "fr"])
def test_nodes_speak_the_language_of_the_editor(editor, language):
    editor.speak(language)
    for name, texts in read(language).items():
        editor.show(name)
        [title, inputs, outputs] = editor.page.evaluate(LABELS)
        assert title == texts["display_name"]
        assert inputs == {key: slot["name"] for key, slot in texts["inputs"].items()}
        assert outputs == [slot["name"] for slot in texts["outputs"].values()]
    editor.show("PuLID_Apply")
    assert editor.tooltip("weight") == read(language)["PuLID_Apply"]["inputs"]["weight"]["tooltip"]
