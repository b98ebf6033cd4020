"""The pack in ComfyUI's editor, in a real browser: the shipped workflows, the help pages, another language.

Needs a Chromium (CHROMIUM names one that is not on the path) and the front end that `run.py test` fetches: the one that
the ComfyUI pins, or that of the version in COMFYUI_FRONTEND. Skips, and says so, without.
"""

import importlib.util
import itertools
import json
import os
import re
import shutil
from pathlib import Path

import pytest
from pulid_sdxl.tools.comfy_server import ADDRESS, ComfyServer, front_end, link

if not os.environ.get("COMFYUI"):
    pytest.skip("COMFYUI names no ComfyUI folder", allow_module_level=True)

CHROMIUM = next(filter(None, map(shutil.which, (os.environ.get("CHROMIUM", ""), "chromium", "google-chrome"))), None)
LACKING = {
    "no Chromium found": CHROMIUM is None,
    "the Python package playwright is missing": importlib.util.find_spec("playwright") is None,
    "its front end has not been fetched": front_end(Path(os.environ["COMFYUI"])) is None,
}
for why in (why for why, lacking in LACKING.items() if lacking):
    pytest.skip(f"THE EDITOR IS NOT TESTED: {why}", allow_module_level=True)

from PIL import Image
from playwright.sync_api import sync_playwright
from pulid_sdxl.tools import ROOT
from pulid_sdxl.tools.translations import read
from pulid_sdxl.tools.workflow import FRONTEND_ONLY, declared_inputs, to_prompt, widget_values

WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
SUBGRAPHS = sorted((ROOT / "subgraphs").glob("*.json"))
PACK = "pulid-sdxl"
SECONDS = 60  # for anything in the browser: only against what hangs
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
RECTANGLES = """() => {
    // Of each node with its title, and of what no menu covers, in units of the graph. Nodes 2.0 makes elements.
    const { scale, offset } = app.canvas.ds, { left, top } = app.canvas.canvas.getBoundingClientRect();
    const onGraph = box => [(box.left - left) / scale - offset[0], (box.top - top) / scale - offset[1],
                            box.width / scale, box.height / scale];
    const nodes = app.graph.nodes.map(node => {
        const element = document.querySelector(`[data-node-id="${node.id}"]`);
        const box = element ? onGraph(element.getBoundingClientRect()) : [...node.getBounding()];
        return [`${node.type} ${node.id}`, box];
    });
    const { clientWidth: width, clientHeight: height } = app.canvas.canvas;
    const view = [60 / scale - offset[0], 80 / scale - offset[1], (width - 60) / scale, (height - 80) / scale];
    return { nodes, groups: app.graph.groups.map(group => [group.title, [...group.pos, ...group.size]]), view };
}"""
# What a run sends for each node, longer than most: the editor cannot tell it from one.
SENT = """outputs => app.graph.nodes.filter(node => outputs[node.type]).map(node => app.api.dispatchEvent(
    new CustomEvent("executed", { detail: {
        node: String(node.id), display_node: String(node.id), prompt_id: "a run", output: outputs[node.type]
    } })
))"""
PICTURE = {"filename": "photo.jpg", "subfolder": "", "type": "input"}
LINES = [f"Photograph {number} of 5: face 0 of 1, largest; InsightFace at 640 px." for number in range(1, 6)]
OUTPUTS = {
    "PuLID_Loader": {"text": LINES[:3]},
    "PuLID_Encode": {"images": [PICTURE] * 4, "text": LINES},
    "PuLID_SaveIdentity": {"images": [PICTURE], "text": LINES[:1]},
    "PuLID_LoadIdentity": {"images": [PICTURE], "text": LINES[:1]},
    "PuLID_Hosted": {"text": LINES[:3]},
    "PuLID_HostedSubmit": {"text": LINES[:1]},
    "PuLID_HostedResult": {"text": LINES[:3]},
    "PreviewImage": {"images": [PICTURE]},
    "SaveImage": {"images": [PICTURE]},
}
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
        page.on("console", self.hear)
        # Nothing here is to leave the machine; an empty answer is no error in the console.
        page.route(lambda url: not url.startswith((address, "data:", "blob:")), lambda route: route.fulfill(body="{}"))
        page.goto(address)
        page.wait_for_function(READY)
        page.wait_for_load_state("networkidle")

    def hear(self, message) -> None:
        # For the workflow that it starts with, the editor asks Hugging Face for sizes, which ComfyUI's policy forbids.
        if message.type == "error" and "Content Security Policy" not in message.text:
            self.complaints.append(message.text)

    def open(self, workflow: dict) -> None:
        self.page.mouse.move(800, 900)  # off a tab, which shows what it holds as long as the mouse is on it
        while dialogs := self.page.evaluate(LOOK)["dialogs"]:  # of the workflow before, over everything
            self.page.keyboard.press("Escape")
            self.page.get_by_role("dialog").nth(len(dialogs) - 1).wait_for(state="hidden")
        self.complaints.clear()
        self.page.evaluate("workflow => app.loadGraphData(workflow)", workflow)
        self.page.wait_for_load_state("networkidle")

    def draw_by(self, renderer: str) -> None:
        setting = "value => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', value)"
        self.page.evaluate(setting, renderer == "Nodes 2.0")

    def restart(self) -> None:
        self.page.reload()
        self.page.wait_for_function(READY)
        self.page.wait_for_load_state("networkidle")
        self.page.wait_for_function("() => !!app.extensionManager.workflow.activeWorkflow")  # what was open before

    def settled(self, look: str):
        """What `look` finds once two looks in a row find the same: nodes grow in a few frames."""
        before = None
        for _ in range(40):
            self.page.wait_for_timeout(100)
            found = self.page.evaluate(look)
            if found == before:
                return found
            before = found
        raise AssertionError(f"does not come to rest: {before}")

    def speak(self, language: str) -> None:
        self.page.evaluate("language => app.extensionManager.setting.set('Comfy.Locale', language)", language)
        self.restart()

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
    with ComfyServer(comfyui, base, ("--cpu",)) as server:
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


RENDERERS = ["canvas", "Nodes 2.0"]
VERSION = [int(number) for number in re.findall(r"\d+", front_end(Path(os.environ["COMFYUI"])).parents[1].name)]
NODES_2, LISTS_MISSING = [1, 42], [1, 49]  # versions of the front end: from here on as it is today


@pytest.fixture(params=RENDERERS)
def renderer(editor, request):
    if request.param == "Nodes 2.0" and VERSION < NODES_2:
        pytest.skip("this editor's Nodes 2.0 is a first try")
    editor.draw_by(request.param)
    yield request.param
    editor.draw_by("canvas")


def overlap(one, other):
    return all(one[i] < other[i] + other[i + 2] and other[i] < one[i] + one[i + 2] for i in (0, 1))


def inside(one, other):
    return all(other[i] <= one[i] and one[i] + one[i + 2] <= other[i] + other[i + 2] for i in (0, 1))


def test_nothing_overlaps_or_leaves_its_group_before_and_after_a_run(editor, renderer, workflow):
    editor.open(workflow)
    opened = editor.settled(RECTANGLES)
    homes = {name: [title for title, group in opened["groups"] if overlap(box, group)] for name, box in opened["nodes"]}
    assert [name for name, box in opened["nodes"] if not inside(box, opened["view"])] == [], "the view opens elsewhere"
    editor.page.evaluate(SENT, OUTPUTS)
    for seen in (opened, editor.settled(RECTANGLES)):
        boxes, groups = dict(seen["nodes"]), dict(seen["groups"])
        assert [pair for pair in itertools.combinations(boxes, 2) if overlap(*map(boxes.get, pair))] == []
        assert [(name, home) for name in boxes for home in homes[name] if not inside(boxes[name], groups[home])] == []


def panel(editor):
    return editor.page.locator(".pulid-notes").first


def test_what_a_node_says_stays_on_it_and_in_no_workflow(editor, renderer):
    editor.open(json.loads((ROOT / "workflows" / "pulid_01_simple.json").read_text(encoding="utf-8")))
    graph = "() => Object.fromEntries(app.graph.serialize().nodes.map(node => [node.id, node.widgets_values]))"
    before, prompt = editor.page.evaluate(graph), editor.page.evaluate("async () => (await app.graphToPrompt()).output")
    editor.page.evaluate(SENT, {"PuLID_Encode": OUTPUTS["PuLID_Encode"]})
    editor.page.evaluate("""() => app.api.dispatchEvent(new CustomEvent("execution_success", { detail: {} }))""")
    shown = panel(editor)
    shown.wait_for()
    assert shown.locator(".pulid-notes-text").inner_text() == "\n".join(LINES)
    folded = shown.bounding_box()["height"]
    if renderer == "canvas":  # which gives a widget its place, whatever the element takes
        taken, given = editor.page.evaluate(
            """() => {
                const notes = app.graph.getNodeById(3).widgets.find(widget => widget.name == "pulid_notes");
                return [notes.element.offsetHeight, notes.computedHeight];
            }"""
        )
        assert taken <= given
    shown.get_by_role("button", name="More").click()
    editor.settled(RECTANGLES)
    assert shown.bounding_box()["height"] > folded
    editor.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    shown.get_by_role("button", name="Copy").click()
    shown.get_by_role("button", name="Copied").wait_for()
    assert editor.page.evaluate("() => navigator.clipboard.readText()") == "\n".join(LINES)
    assert editor.page.evaluate(graph) == before
    assert editor.page.evaluate("async () => (await app.graphToPrompt()).output") == prompt


@pytest.mark.skipif(VERSION < LISTS_MISSING, reason="this editor's tabs are clicked in another way")
def test_notes_are_back_with_the_tab_they_belong_to(editor, renderer):
    first, other = (ROOT / "workflows" / f"{name}.json" for name in ("pulid_01_simple", "pulid_13_hosted"))
    editor.open(json.loads(first.read_text(encoding="utf-8")))
    editor.page.evaluate(SENT, {"PuLID_Encode": OUTPUTS["PuLID_Encode"]})
    panel(editor).wait_for()
    tab = Path(editor.page.evaluate("() => app.extensionManager.workflow.activeWorkflow.path")).stem
    editor.open(json.loads(other.read_text(encoding="utf-8")))
    panel(editor).wait_for(state="hidden")
    editor.page.get_by_text(tab, exact=True).first.click()
    panel(editor).wait_for()
    assert panel(editor).locator(".pulid-notes-text").inner_text() == "\n".join(LINES)


def test_files_that_are_not_there_are_listed_before_a_run_and_named_on_the_node_after_it(server, editor, renderer):
    names = "pulid_v1.1.safetensors", "EVA02_CLIP_L_336_psz14_s6B.pt"
    places = [
        server.base / "models" / folder / name for folder, name in zip(("pulid", "clip_vision"), names, strict=True)
    ]
    for place in places:
        place.rename(server.base / place.name)
    try:
        editor.restart()
        editor.open(json.loads((ROOT / "workflows" / "pulid_06_save_identity.json").read_text(encoding="utf-8")))
        for opener in editor.page.get_by_text("View details").all():
            opener.click()
        editor.page.wait_for_timeout(1000)
        listed = editor.page.locator("body").inner_text()
        if VERSION >= LISTS_MISSING:
            assert all(name in listed for name in names) and listed.count("Download") >= 2
        editor.page.keyboard.press("Escape")
        editor.page.evaluate("() => app.queuePrompt(0)")
        panel(editor).wait_for()
        text = panel(editor).locator(".pulid-notes-text").inner_text()
        assert text.startswith(f"Missing: {names[0]}, {names[1]}, ")
        assert text.splitlines()[1].startswith("Set missing_files of Load PuLID (SDXL) to download and run again")
        assert str(Path.home()) not in text
        editor.page.evaluate("""() => app.api.dispatchEvent(new CustomEvent("execution_start", { detail: {} }))""")
        panel(editor).wait_for(state="detached")  # until this run says otherwise
    finally:
        for place in places:
            (server.base / place.name).rename(place)
        editor.restart()


@pytest.mark.skipif(VERSION < LISTS_MISSING, reason="this editor has no apps yet")
def test_the_simple_workflow_is_an_app_too(editor):
    editor.open(json.loads((ROOT / "workflows" / "pulid_01_simple.json").read_text(encoding="utf-8")))
    editor.page.evaluate("() => app.extensionManager.command.execute('Comfy.ToggleLinear')")
    try:
        for label in ("image", "text", "method", "weight", "seed"):
            editor.page.get_by_text(label, exact=True).locator("visible=true").first.wait_for()
    finally:
        editor.page.evaluate("() => app.extensionManager.command.execute('Comfy.ToggleLinear')")
        editor.restart()
        editor.draw_by("canvas")  # apps switch Nodes 2.0 on


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


@pytest.mark.parametrize("language", ["en", "ja", "zh"])
def test_every_help_page_opens_on_its_node_in_the_language_of_the_editor(editor, language):
    if language != "en":
        editor.speak(language)
    pages = sorted((ROOT / "web" / "docs").glob("*.md"))
    assert pages
    for page in pages:
        text = page if language == "en" else page.with_suffix("") / f"{language}.md"
        heading = text.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        editor.show(page.stem)
        editor.page.get_by_test_id("info-button").click()
        shown = editor.page.locator(".node-help-content")
        shown.get_by_role("heading", name=heading, exact=True).wait_for()
        if row := re.search(r"^\| [^|]+ \([a-z_0-9]+\)", text.read_text(encoding="utf-8"), re.MULTILINE):
            shown.get_by_role("cell", name=row[0].removeprefix("| ")).first.wait_for()


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
