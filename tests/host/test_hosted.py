"""The hosted nodes in a real ComfyUI, through its server, against the fake service: <https://fal.ai/models/fal-ai/pulid/api>.

One row per input, output, option and method of that page. Then what a process can suffer, and a search for the key.
"""

import asyncio
import base64
import io
import json
import os
import signal
import sqlite3
import struct
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import aiohttp
import numpy as np
import pytest

if not os.environ.get("COMFYUI"):
    pytest.skip("COMFYUI names no ComfyUI folder", allow_module_level=True)

from PIL import Image
from pulid_sdxl.tools import comfy_host
from pulid_sdxl.tools.comfy_server import ComfyServer, link
from pulid_sdxl.tools.fakes import fake_faults as faults
from pulid_sdxl.tools.fakes.fake_fal import EVERY, FakeFal
from pulid_sdxl.tools.fakes.fake_model import NEGATIVE_PROMPT, PRESETS, pictures, png
from pulid_sdxl.tools.workflow import set_inputs, to_prompt

comfy_host.enter(os.environ["COMFYUI"])

import torch
from pulid_sdxl.nodes import host
from pulid_sdxl.nodes import hosted as hosted_nodes

ROOT = Path(__file__).parents[2]
SMALL = {"image_size": "custom", "width": 32, "height": 48}
PROGRESS_TEXT = 3  # the kind of a binary message of ComfyUI's
FACES = {  # width, height, color
    "one.png": (24, 32, (210, 160, 130)),
    "two.png": (24, 32, (90, 60, 50)),
    "large.png": (1600, 800, (80, 90, 99)),
    "three.png": (24, 32, (30, 60, 90)),
    "four.png": (24, 32, (60, 30, 90)),
}
# A directory in which ComfyUI must not find a key of whoever runs the tests.
NO_KEY = {"FAL_KEY": None, "FAL_KEY_ID": None, "FAL_KEY_SECRET": None, "PULID_FAL_PROXY_URL": None}


# --- a prompt, and all that comes of it ---


class Graph:
    """A prompt under construction: `add` gives a node's id, `show` makes its text outputs visible."""

    def __init__(self, **values):
        """With values, the main node with them."""
        self.nodes = {}
        if values:
            self.hosted(**values)

    def add(self, class_type, **inputs):
        node_id = str(len(self.nodes) + 1)
        self.nodes[node_id] = {"class_type": class_type, "inputs": inputs}
        return node_id

    def photos(self, *names):
        first, *others = ([self.add("LoadImage", image=name), 0] for name in names)
        for other in others:
            first = [self.add("ImageBatch", image1=first, image2=other), 0]
        return first

    def hosted(self, photos=(), **values):
        """The main node with its outputs shown and its pictures saved, and a photograph unless there are others."""
        if photos or "reference_urls" not in values:
            values["reference_images"] = self.photos(*(photos or ["one.png"]))
        node = self.add("PuLID_Hosted", **{**DEFAULTS, **SMALL, **values})
        self.show(node)
        return node

    def submit(self, **values):
        return self.add("PuLID_HostedSubmit", **{**DEFAULTS, **values}, reference_images=self.photos("one.png"))

    def show(self, node):
        self.add("SaveImage", images=[node, 0], filename_prefix="hosted")
        self.preview(node, 1, 2, 3)

    def preview(self, node, *outputs):
        for output in outputs:
            self.add("PreviewAny", source=[node, output])


def result_of(request_id):
    graph = Graph()
    graph.show(graph.add("PuLID_HostedResult", request_id=request_id))
    return graph


# Every required input at the node's own default, as the editor would send it.
DEFAULTS = {
    "prompt": "portrait",
    "negative_prompt": NEGATIVE_PROMPT,
    "num_images": 1,
    "guidance_scale": 1.2,
    "num_inference_steps": 4,
    "seed": 0,
    "image_size": "custom",
    "width": 768,
    "height": 1024,
    "id_scale": 0.8,
    "mode": "fidelity",
    "id_mix": False,
}


@dataclass
class Run:
    """What came of a prompt; every message of the socket is in `heard`."""

    server: ComfyServer
    graph: Graph
    outputs: dict = field(default_factory=dict)
    error: str | None = None
    interrupted: bool = False
    progress: list[str] = field(default_factory=list)
    heard: bytes = b""

    def texts(self):
        """What the PreviewAny nodes show, in order."""
        shown = [node_id for node_id, node in self.graph.nodes.items() if node["class_type"] == "PreviewAny"]
        return [self.outputs[node_id]["text"][0] for node_id in shown if node_id in self.outputs]

    @property
    def seed(self):
        return self.texts()[0]

    @property
    def request_id(self):
        return self.texts()[1]

    @property
    def info(self):
        return json.loads(self.texts()[2])

    def images(self):
        listed = [entry for output in self.outputs.values() for entry in output.get("images", [])]
        entries = [entry for entry in listed if entry["type"] == "output"]
        return [np.asarray(Image.open(io.BytesIO(self.server.picture(entry))).convert("RGB")) for entry in entries]


class Driver:
    """Queues prompts as a browser does, and keeps all that ComfyUI says."""

    def __init__(self, server, headers=None):
        self.server, self.headers, self.heard = server, headers, b""

    def run(self, graph, when=None, act: Callable | None = None, times=1) -> Run:
        """Queue the prompt and follow it to its end; `act` runs in a thread as soon as `when()` holds."""
        return asyncio.run(self._run(graph, when, act, times))[-1]

    def runs(self, graph, times):
        return asyncio.run(self._run(graph, None, None, times))

    async def _run(self, graph, when, act, times):
        if act:
            threading.Thread(target=lambda: wait_for(when) and act(), daemon=True).start()
        async with (
            aiohttp.ClientSession(f"http://127.0.0.1:{self.server.port}", headers=self.headers) as session,
            session.ws_connect("/ws?clientId=hosted", max_msg_size=0) as socket,
        ):
            runs = {}
            for _ in range(times):
                async with session.post("/prompt", json={"prompt": graph.nodes, "client_id": "hosted"}) as answer:
                    queued = await answer.json()
                    assert answer.status == 200 and not queued["node_errors"], queued
                    runs[queued["prompt_id"]] = Run(self.server, graph)
            await self._follow(socket, runs)
        return list(runs.values())

    async def _follow(self, socket, runs):
        open_runs = set(runs)
        while open_runs:
            message = await socket.receive(timeout=60)
            if message.type not in (aiohttp.WSMsgType.TEXT, aiohttp.WSMsgType.BINARY):
                return  # the server is gone
            binary = message.type is aiohttp.WSMsgType.BINARY
            raw = message.data if binary else message.data.encode()
            self.heard += raw
            if binary:
                if struct.unpack(">I", raw[:4])[0] == PROGRESS_TEXT:
                    length = struct.unpack(">I", raw[4:8])[0]
                    for prompt_id in open_runs:
                        runs[prompt_id].progress.append(raw[8 + length :].decode())
                continue
            event = json.loads(raw)
            prompt_id = event["data"].get("prompt_id")
            if prompt_id not in open_runs:
                continue
            run = runs[prompt_id]
            if event["type"] == "executed" and event["data"]["output"]:
                run.outputs[event["data"]["node"]] = event["data"]["output"]
            elif event["type"] == "execution_error":
                run.error = event["data"]["exception_message"].strip()
            elif event["type"] == "execution_interrupted":
                run.interrupted = True
            if event["type"] in ("execution_success", "execution_error", "execution_interrupted"):
                open_runs.discard(prompt_id)

    def interrupt(self):
        request = urllib.request.Request(f"http://127.0.0.1:{self.server.port}/interrupt", b"", method="POST")
        urllib.request.urlopen(request, timeout=10).close()


def wait_for(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.01)
    return False


# --- one server for all rows ---


def prepare(base):
    link(ROOT, base / "custom_nodes" / "pulid-sdxl")
    (base / "input").mkdir()
    for name, (width, height, color) in FACES.items():
        Image.new("RGB", (width, height), color).save(base / "input" / name)
    return base


BOTH = """
class Both:
    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_IS_LIST = ("IMAGE",), "run", "tests", (True,)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"one": ("IMAGE",), "other": ("IMAGE",)}}

    def run(self, one, other):
        return ([one, other],)


NODE_CLASS_MAPPINGS = {"Both": Both}
"""


@pytest.fixture(scope="module")
def service():
    with FakeFal() as fal:
        yield fal


@pytest.fixture(scope="module")
def driver(comfyui, service, tmp_path_factory):
    base = prepare(tmp_path_factory.mktemp("base"))
    (base / "custom_nodes" / "both").mkdir()
    (base / "custom_nodes" / "both" / "__init__.py").write_text(BOTH)
    plenty = {"PULID_FAL_PICTURES_PER_DAY": "10000", "PULID_FAL_CEILING_PER_DAY": "10000"}
    (base / "user" / "__pulid").mkdir(parents=True)
    (base / "user" / "__pulid" / "webhook_hosts.txt").write_text("optional.webhook.url\n")
    variables = {**NO_KEY, **service.environment, **plenty}
    with ComfyServer(comfyui, base, ("--cpu",), variables) as server:
        yield Driver(server)


@pytest.fixture
def fal(service):
    service.reset()
    service.script = ("COMPLETED",)
    return service


def face(name="one.png"):
    width, height, color = FACES[name]
    return np.full((height, width, 3), color, np.uint8)


def references(fal):
    """The decoded references of the one job that was accepted."""
    [job] = fal.jobs.values()
    urls = [entry["image_url"] for entry in job.input["reference_images"]]
    contents = [base64.b64decode(url.partition(",")[2]) if url.startswith("data:") else fal._fetch(url) for url in urls]
    return [np.asarray(Image.open(io.BytesIO(content))) for content in contents]


def assert_same(one, other):
    """Equal but for the rounding of ComfyUI's own way from a file to a tensor and back."""
    assert one.shape == other.shape
    assert np.abs(one.astype(int) - other).max() <= 1


def expected(fal, seed):
    """The pictures that the service has to make of the one job that was accepted."""
    [job] = fal.jobs.values()
    return [np.asarray(picture) for picture in pictures(job.input, seed, references(fal))]


# --- the page's input fields: what the node is given, and what arrives ---

CUSTOM = {"image_size": "custom", "width": 768, "height": 1024}
FIELDS = (
    ("prompt", {"prompt": "portrait, impressionist painting"}, {"prompt": "portrait, impressionist painting"}),
    ("prompt beyond ASCII", {"prompt": "Porträt 肖像 🎨"}, {"prompt": "Porträt 肖像 🎨"}),
    ("negative_prompt, default", {}, {"negative_prompt": NEGATIVE_PROMPT}),
    ("negative_prompt", {"negative_prompt": "blurry"}, {"negative_prompt": "blurry"}),
    ("num_images, default", {}, {"num_images": 1}),
    ("num_images", {"num_images": 8}, {"num_images": 8}),
    ("guidance_scale, default", {}, {"guidance_scale": 1.2}),
    ("guidance_scale, lowest", {"guidance_scale": 1.0}, {"guidance_scale": 1.0}),
    ("guidance_scale, highest", {"guidance_scale": 1.5}, {"guidance_scale": 1.5}),
    ("num_inference_steps, default", {}, {"num_inference_steps": 4}),
    ("num_inference_steps", {"num_inference_steps": 12}, {"num_inference_steps": 12}),
    ("seed", {"seed": 42}, {"seed": 42}),
    ("seed, highest", {"seed": 2**32 - 1}, {"seed": 2**32 - 1}),
    ("image_size, default", CUSTOM, {"image_size": {"width": 768, "height": 1024}}),
    ("image_size, custom", {"width": 40, "height": 24}, {"image_size": {"width": 40, "height": 24}}),
    *((f"image_size, {name}", {"image_size": name}, {"image_size": name}) for name in PRESETS),
    ("id_scale, default", {}, {"id_scale": 0.8}),
    ("id_scale, lowest", {"id_scale": 0.0}, {"id_scale": 0.0}),
    ("id_scale, highest", {"id_scale": 5.0}, {"id_scale": 5.0}),
    ("mode, default", {}, {"mode": "fidelity"}),
    ("mode, extreme style", {"mode": "extreme style"}, {"mode": "extreme style"}),
    ("id_mix, default", {}, {"id_mix": None}),
    ("id_mix", {"id_mix": True}, {"id_mix": True}),
)


@pytest.mark.parametrize("row", FIELDS, ids=lambda row: row[0])
def test_input_fields(driver, fal, row):
    _, values, arrives = row
    number = 1000 + FIELDS.index(row)  # a seed of its own, so that no picture comes from an earlier row
    run = driver.run(Graph(**{"seed": number, **values}))
    assert run.error is None
    [job] = fal.jobs.values()
    assert {name: job.input.get(name) for name in arrives} == arrives
    seed = values.get("seed", number)
    assert run.seed == str(seed)
    for shown, made in zip(run.images(), expected(fal, seed), strict=True):
        assert_same(shown, made)
    assert fal.bill == 1


def test_the_pages_example_arrives_to_the_letter(driver, fal):
    urls = [f"https://storage.googleapis.com/falserverless/pulid/img{number}.png" for number in (2, 1)]
    fal.internet = {url: png(Image.fromarray(face(name))) for url, name in zip(urls, FACES, strict=False)}
    words = "portrait, impressionist painting, loose brushwork, vibrant color, light and shadow play"
    assert driver.run(Graph(reference_urls="\n".join(urls), prompt=words, seed=5, **CUSTOM)).error is None
    [job] = fal.jobs.values()
    assert job.input == {
        "reference_images": [{"image_url": url} for url in urls],
        "prompt": words,
        "negative_prompt": NEGATIVE_PROMPT,
        "num_images": 1,
        "guidance_scale": 1.2,
        "num_inference_steps": 4,
        "image_size": {"height": 1024, "width": 768},
        "id_scale": 0.8,
        "mode": "fidelity",
        "seed": 5,
    }


def test_the_shipped_workflow_runs(driver, fal):
    workflow = json.loads((ROOT / "workflows" / "pulid_13_hosted.json").read_text(encoding="utf-8"))
    graph = Graph()
    graph.nodes = to_prompt(workflow, driver.server.object_info())
    set_inputs(graph.nodes, "LoadImage", image="one.png")
    set_inputs(graph.nodes, "PuLID_Hosted", width=32, height=48)
    run = driver.run(graph)
    assert run.error is None
    assert_same(run.images()[0], expected(fal, 0)[0])
    assert fal.bill == 1


class TestReferences:
    """`reference_images`, in every form that the page has for a file."""

    def test_addresses_come_after_what_is_connected(self, driver, fal):
        fal.internet = {"https://example.org/a.png": png(Image.fromarray(face("two.png")))}
        run = driver.run(Graph(photos=["one.png"], reference_urls="\nhttps://example.org/a.png\n", seed=2002))
        assert run.error is None
        assert [picture.tobytes() for picture in references(fal)] == [face().tobytes(), face("two.png").tobytes()]

    def test_pictures_are_uploaded_by_themselves(self, driver, fal):
        assert driver.run(Graph(transport="upload", seed=2003)).error is None
        assert [picture.tobytes() for picture in references(fal)] == [face().tobytes()]
        [put], [asked] = fal.seen("put"), fal.seen("initiate")
        assert put.authorization is None
        assert json.loads(asked.headers["x-fal-object-lifecycle"]) == {"expiration_duration_seconds": 3600}

    def test_the_upload_node_gives_addresses_that_expire(self, driver, fal):
        graph = Graph()
        both = graph.photos("one.png", "two.png")
        urls = [graph.add("PuLID_HostedUpload", image=both, expires_in="1d"), 0]
        graph.hosted(reference_urls=urls, seed=2004)
        assert driver.run(graph).error is None
        assert [picture.tobytes() for picture in references(fal)] == [face().tobytes(), face("two.png").tobytes()]
        [job] = fal.jobs.values()
        url = job.input["reference_images"][1]["image_url"]
        fal.clock += 86400 + 1
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(fal.here(url))

    def test_none_at_all_is_refused_before_anything_is_sent(self, driver, fal):
        assert "at least one photograph" in driver.run(Graph(reference_urls="")).error
        assert fal.requests == []


class TestOutputs:
    """The page's output fields."""

    def test_pictures_seed_and_request_id(self, driver, fal):
        run = driver.run(Graph(num_images=3, seed=3000))
        [job] = fal.jobs.values()
        assert len(run.images()) == 3
        assert (run.seed, run.request_id) == ("3000", job.id)

    def test_facts_of_every_picture(self, driver, fal):
        info = driver.run(Graph(num_images=2, seed=3001)).info
        [job] = fal.jobs.values()
        made = job.outcome[1]["images"]
        assert info["urls"] == [entry["url"] for entry in made]
        assert info["images"] == made  # url, content_type, file_name, file_size, width, height
        assert info["timings"]["inference_time"] == 1.25
        assert info["logs"] == ["Warming up"]

    def test_a_picture_may_come_inside_the_answer_and_a_seed_beyond_64_bits_is_whole(self, driver, fal):
        made = np.full((8, 8, 3), (9, 99, 199), np.uint8)
        uri = "data:image/png;base64," + base64.b64encode(png(Image.fromarray(made))).decode()
        fal.plan("result", 1, faults.with_values(images=[{"url": uri}], seed=17454220438242315174))
        run = driver.run(Graph(seed=3002))
        assert_same(run.images()[0], made)
        assert run.seed == "17454220438242315174"

    def test_mixed_sizes_are_all_there(self, driver, fal):
        def smaller(data):
            content = png(Image.new("RGB", (10, 12), "green"))
            data["images"][1] = fal._publish(content, (10, 12))

        fal.plan("result", 1, faults.altered(smaller))
        shapes = [picture.shape for picture in driver.run(Graph(num_images=3, seed=3004)).images()]
        assert shapes == [(48, 32, 3), (12, 10, 3), (48, 32, 3)]


class TestMethods:
    """The page's calls: subscribe is the main node; submit, status, result; and what the API has beside them."""

    def test_subscribing_shows_the_queue_the_log_and_the_id(self, driver, fal):
        fal.script = (1, "IN_PROGRESS", "COMPLETED")
        run = driver.run(Graph(seed=4000))
        [job] = fal.jobs.values()
        shown = "\n".join(run.progress)
        assert f"1 before it (request {job.id})" in shown
        assert "Denoising" in shown
        assert all(request.query["logs"] in ("1", "true") for request in fal.seen("status"))
        [sent] = fal.seen("submit")
        assert sent.authorization == f"Key {fal.key}"
        assert "x-fal-request-timeout" in sent.headers

    def test_submit_status_result(self, driver, fal):
        fal.script = (2,)
        graph = Graph()
        hook = "https://optional.webhook.url/for/results?a=1&b=2"
        options = {"webhook_url": hook, "priority": "low", "runner_hint": "studio", "no_retry": True}
        submit = graph.submit(**options)
        graph.preview(submit, 0)
        [request_id] = driver.run(graph).texts()
        [sent] = fal.seen("submit")
        assert list(fal.jobs) == [request_id]
        assert sent.query == {"fal_webhook": hook}
        assert (sent.headers["x-fal-queue-priority"], sent.headers["x-fal-runner-hint"]) == ("low", "studio")
        assert sent.headers["x-fal-no-retry"] == "1"
        asked = Graph()
        status = asked.add("PuLID_HostedStatus", request_id=request_id, logs=True)
        asked.preview(status, 0, 1)
        state, facts = driver.run(asked).texts()
        assert (state, json.loads(facts)["queue_position"]) == ("IN_QUEUE", 2)
        fal.script = ("IN_PROGRESS",)
        state, facts = driver.run(asked).texts()  # the same graph asks anew
        assert (state, json.loads(facts)["logs"][-1]) == ("IN_PROGRESS", "Denoising")
        fal.script = ("COMPLETED",)
        run = driver.run(result_of(request_id))
        assert (run.seed, run.request_id) == ("0", request_id)
        assert_same(run.images()[0], expected(fal, 0)[0])
        assert fal.bill == 1

    def test_status_without_logs(self, driver, fal):
        graph = Graph()
        submit = graph.submit(seed=4001)
        status = graph.add("PuLID_HostedStatus", request_id=[submit, 0], logs=False)
        graph.preview(status, 1)
        assert json.loads(driver.run(graph).texts()[0])["logs"] == []
        assert fal.seen("status")[-1].query["logs"] in ("0", "false")

    @pytest.mark.parametrize(
        ("script", "words"),
        [((1,), "taken out of the queue"), (("IN_PROGRESS",), "no proof"), (("COMPLETED",), "already finished")],
    )
    def test_cancel(self, driver, fal, script, words):
        fal.script = script
        graph = Graph()
        graph.add("PuLID_HostedStatus", request_id=[graph.submit(prompt=words), 0], logs=False)
        assert driver.run(graph).error is None
        cancel = Graph()
        node = cancel.add("PuLID_HostedCancel", request_id=next(iter(fal.jobs)))
        assert words in driver.run(cancel).outputs[node]["text"][0]


class TestMoney:
    def test_an_equal_request_is_paid_for_once(self, driver, fal):
        for save in ("first", "second"):  # so that ComfyUI's own cache does not answer
            [shown] = driver.run(Graph(seed=5000, confirm_paid=save == "second")).images()
        assert_same(shown, expected(fal, 5000)[0])
        assert fal.bill == 1
        assert len(fal.seen("result")) == 1  # the second came from this disk

    def test_two_equal_graphs_queued_at_once_are_paid_for_once(self, driver, fal):
        fal.script = (0, "COMPLETED")
        graph = Graph(seed=5001)
        assert [run.error for run in driver.runs(graph, times=2)] == [None, None]
        assert fal.bill == 1

    def test_several_prompts_run_two_at_a_time(self, driver, fal):
        fal.script = ("IN_PROGRESS", "COMPLETED")
        graph = Graph()
        for number in range(4):
            graph.hosted(seed=5010 + number)
        assert len(driver.run(graph).images()) == 4
        assert fal.bill == 4
        assert fal.most_open == 2

    def test_what_succeeded_is_kept_when_another_fails(self, driver, fal):
        async def after_the_other(call):
            job = fal._job(call.request)
            while "https" in job.input["reference_images"][0]["image_url"] and not fal.seen("download"):
                await call.wait(0.01)
            return await call.handle()

        fal.plan("result", EVERY, after_the_other)
        graph = Graph()
        graph.hosted(seed=5020)
        graph.hosted(seed=5021, reference_urls="https://example.org/none.png")
        assert "reference 1" in driver.run(graph).error
        again = Graph(seed=5020)
        assert driver.run(again).error is None
        assert fal.bill == 2

    def test_the_guard_counts_the_pictures_of_a_run(self, driver, fal):
        graph = Graph()
        graph.hosted(seed=5030, num_images=8)
        graph.hosted(seed=5031, num_images=8)
        assert "guard against unmeant costs" in driver.run(graph).error
        confirmed = Graph()
        confirmed.hosted(seed=5032, num_images=8, confirm_paid=True)
        confirmed.hosted(seed=5033, num_images=8, confirm_paid=True)
        assert driver.run(confirmed).error is None
        *unconfirmed, one, other = sorted(job.input["seed"] for job in fal.jobs.values())
        assert len(unconfirmed) <= 1 and (one, other) == (5032, 5033)

    def test_a_number_through_a_link_is_checked_where_it_is_spent(self, driver, fal):
        for number in (-50, 104):
            graph = Graph()
            values = {"seed": 5120, "num_images": [graph.add("PrimitiveInt", value=number), 0], "confirm_paid": True}
            graph.hosted(**values)
            graph.submit(**values)
            assert "num_images: Input should be" in driver.run(graph).error
        assert fal.requests == []

    def test_no_switch_lifts_the_ceiling(self, driver, fal):
        graph = Graph()
        for number in range(5):
            graph.hosted(seed=5130 + number, num_images=8, confirm_paid=True)
        assert "No switch on a node lifts this" in driver.run(graph).error
        assert fal.bill == 4  # 32 pictures

    @pytest.mark.parametrize("node", ["hosted", "submit"])
    @pytest.mark.parametrize("saved", [False, True])
    def test_a_graph_of_the_days_when_force_resubmit_was_a_switch(self, driver, fal, node, saved):
        graph = Graph()
        getattr(graph, node)(seed=5140 + saved, force_resubmit=saved)
        error = driver.run(graph).error
        assert (error or "").startswith("force_resubmit was a switch") is saved
        assert fal.bill <= (not saved)

    def test_a_saved_force_resubmit_pays_once(self, driver, fal):
        first = driver.run(Graph(seed=5150)).request_id
        graphs = [Graph(seed=5150, force_resubmit=first, run_limit=limit) for limit in (600, 601)]
        second, third = (driver.run(graph).request_id for graph in graphs)
        assert first != second == third
        assert fal.bill == 2

    def test_a_place_is_taken_before_anything_is_uploaded(self, driver, fal):
        fal.script = ("IN_PROGRESS",)
        graph = Graph()
        for number, name in enumerate(("one.png", "two.png", "three.png", "four.png")):
            graph.hosted(photos=[name], seed=5170 + number, transport="upload", keep_pictures="1h")
        run = driver.run(graph, when=lambda: fal.bill == 2, act=driver.interrupt)
        assert run.interrupted and fal.bill == 2
        assert len(fal.seen("submit")) == 2 >= len(fal.seen("put")) and wait_for(lambda: len(fal.seen("cancel")) == 2)
        preference = fal.seen("submit")[0].headers["x-fal-object-lifecycle-preference"]
        assert json.loads(preference) == {"expiration_duration_seconds": 3600}

    def test_who_joins_has_no_say_and_the_cancel_needs_no_journal(self, driver, fal):
        fal.script = ("IN_PROGRESS",)
        graph = Graph()
        for limit in (600, 601):
            graph.hosted(seed=5178, run_limit=limit)

        def act():
            (driver.server.base / "user" / "__pulid" / "hosted.sqlite").unlink()
            driver.interrupt()

        run = driver.run(graph, when=lambda: len(fal.seen("status")) > 4, act=act)
        assert run.interrupted and fal.bill == 1
        assert wait_for(lambda: fal.seen("cancel")) and not wait_for(lambda: len(fal.seen("cancel")) > 1, seconds=0.5)

    def test_photographs_of_different_sizes_in_a_list_are_one_request(self, driver, fal):
        graph = Graph()
        photos = [graph.photos("one.png"), graph.photos("large.png")]
        graph.nodes["list"] = {"class_type": "Both", "inputs": {"one": photos[0], "other": photos[1]}}
        graph.show(graph.add("PuLID_Hosted", **{**DEFAULTS, **SMALL, "seed": 5200, "reference_images": ["list", 0]}))
        assert driver.run(graph).error is None
        assert [picture.shape for picture in references(fal)] == [(32, 24, 3), (512, 1024, 3)]
        assert fal.bill == 1

    def test_a_seed_of_the_services_choice_is_new_each_time(self, driver, fal):
        seeds = [driver.run(Graph(seed=-1)).seed for _ in range(2)]
        assert seeds == ["17454220438242315174"] * 2
        assert ["seed" in job.input for job in fal.jobs.values()] == [False, False]

    def test_the_service_can_be_asked_to_keep_no_copy(self, driver, fal):
        assert driver.run(Graph(seed=5210, service_copy=False)).error is None
        assert fal.seen("submit")[0].headers["x-fal-store-io"] == "0"

    def test_requests_are_listed_fetched_cancelled_and_forgotten(self, driver, fal):
        fal.script = (3,)
        graph = Graph()
        graph.preview(graph.submit(**SMALL, seed=5220), 0)
        [request_id] = driver.run(graph).texts()

        def report(action, show="open"):
            graph = Graph()
            node = graph.add("PuLID_HostedRequests", show=show, request_id=request_id, action=action)
            graph.preview(node, 0)
            graph.add("SaveImage", images=[node, 1], filename_prefix="listed")
            run = driver.run(graph)
            assert run.error is None
            return run.texts()[0], len(run.images())

        assert f"{request_id}  0 s ago  1 picture  under way" in report("list")[0].replace("1 s ago", "0 s ago")
        fal.script = ("COMPLETED",)
        assert report("fetch")[1] == 1
        assert "already finished" in report("cancel")[0]
        text, pictures = report("forget", "all")
        assert text.startswith("1 forgotten.") and request_id not in text and pictures == 0

    def test_any_file_of_the_input_folder_can_be_uploaded(self, driver, fal):
        (driver.server.base / "input" / "notes.txt").write_text("hello")
        graph = Graph()
        graph.preview(graph.add("PuLID_HostedUpload", expires_in="1h", reference_size="1024", file="notes.txt"), 0)
        assert driver.run(graph).error is None
        assert fal.seen("put")[-1].body == b"hello"

    def test_other_nodes_run_meanwhile(self, driver, fal):
        fal.script = ("IN_PROGRESS",)
        graph = Graph()
        graph.hosted(seed=5040)
        other = graph.add("ImageScaleBy", image=graph.photos("two.png"), upscale_method="bilinear", scale_by=2.0)
        preview = graph.add("PreviewImage", images=[other, 0])

        def shown():
            running = driver.server.get("/queue")["queue_running"]
            return bool(running) and len(list(temporary.glob("*.png"))) > before

        temporary = driver.server.base / "temp"
        before = len(list(temporary.glob("*.png")))
        run = driver.run(graph, when=shown, act=lambda: setattr(fal, "script", ("COMPLETED",)))
        assert run.error is None
        assert preview in run.outputs


# --- beside the host's own work ---


class Photographs:
    """A batch that knows in which threads its photographs were taken out."""

    def __init__(self):
        self.threads = set()

    def __len__(self):
        return 1

    def __iter__(self):
        self.threads.add(threading.get_ident())
        yield torch.zeros(8, 8, 3)


@pytest.mark.parametrize("name", ["Hosted", "HostedSubmit", "HostedUpload"])
def test_photographs_are_encoded_beside_comfyuis_event_loop(fal, tmp_path, monkeypatch, name):
    class Node(getattr(hosted_nodes, f"Pulid{name}")):
        hidden = SimpleNamespace(unique_id="1")

    monkeypatch.setattr(host, "private_folder", lambda: tmp_path)
    for variable, value in fal.environment.items():
        monkeypatch.setenv(variable, value)
    Node.GET_SCHEMA()
    photographs = Photographs()
    inputs = {name: [value] for name, value in DEFAULTS.items()} | {"reference_images": [photographs]}
    asyncio.run(Node.execute(**({"image": [photographs]} if name == "HostedUpload" else inputs)))
    assert photographs.threads and threading.get_ident() not in photographs.threads


# --- interrupt ---

PHASES = {
    "uploading": {"photo": "large.png", "plan": ("put", faults.stall), "route": "put", "bill": 0},
    "submitting": {"plan": ("submit", faults.accept_then_stall), "route": "submit", "bill": 1},
    "queued": {"script": (3,), "route": "status", "bill": 1, "cancelled": True},
    "running": {"script": ("IN_PROGRESS",), "route": "status", "bill": 1, "cancelled": True},
    "asking": {"plan": ("status", faults.stall), "route": "status", "bill": 1, "cancelled": True},
    "fetching": {"plan": ("download", faults.stall), "route": "download", "bill": 1},
}


@pytest.mark.parametrize("phase", PHASES)
def test_an_interrupt_waits_for_no_call_and_tells_the_service(driver, fal, phase):
    number = 6000 + list(PHASES).index(phase)
    plan = PHASES[phase]
    fal.script = plan.get("script", ("COMPLETED",))
    if "plan" in plan:
        route, fault = plan["plan"]
        fal.plan(route, EVERY, fault)
    graph = Graph()
    how = "upload" if phase == "uploading" else "auto"
    graph.hosted(seed=number, transport=how, photos=[plan.get("photo", "one.png")])
    run = driver.run(graph, when=lambda: fal.seen(plan["route"]), act=driver.interrupt)
    assert run.interrupted and run.error is None  # while the call, if there is one, is still held
    assert fal.bill == plan["bill"]
    assert wait_for(lambda: len(fal.seen("cancel")) == plan.get("cancelled", False))


def test_one_interrupt_ends_all_that_run_and_all_that_wait_their_turn(driver, fal):
    fal.script = ("IN_PROGRESS",)
    graph = Graph()
    for seed in range(6200, 6204):
        graph.hosted(seed=seed)
    run = driver.run(graph, when=lambda: fal.bill == 2 and len(fal.seen("status")) >= 2, act=driver.interrupt)
    assert run.interrupted
    assert wait_for(lambda: len(fal.seen("cancel")) == 2)
    assert fal.bill == 2


# --- nothing of the key anywhere ---


def needles(key):
    """The key, its halves, halves of these, and base64 of them at every offset."""
    parts = [key, *key.split(":")]
    parts += [half for part in key.split(":") for half in (part[: len(part) // 2], part[len(part) // 2 :])]
    found = {part.encode() for part in parts}
    for part in parts:
        for offset in range(3):
            encoded = base64.b64encode(bytes(offset) + part.encode())
            found.add(encoded[4:-4])  # what does not depend on the neighbours
    return {needle for needle in found if len(needle) >= 12}


PATHS = ("/history", "/queue", "/object_info", "/system_stats")


def everything(driver, paths):
    """(place, bytes) of all that ComfyUI wrote and said, and of what it says at these paths."""
    yield "websocket", driver.heard
    for path in paths:
        yield path, driver.server.read(path)
    for file in driver.server.base.rglob("*"):
        if file.is_file() and not file.is_symlink() and "custom_nodes" not in file.parts:
            yield str(file.relative_to(driver.server.base)), file.read_bytes()
            if file.suffix == ".png":
                with Image.open(file) as picture:
                    yield f"text of {file.name}", json.dumps(picture.info, default=str).encode()


def assert_no_key(driver, key, paths=PATHS):
    places = dict(everything(driver, paths))
    assert [place for place, content in places.items() for needle in needles(key) if needle in content] == []
    return places


def test_no_part_of_the_key_is_in_anything_that_comfyui_writes_or_says(driver, fal):
    secret = fal.key.partition(":")[2]
    quoted = faults.answer(403, {"detail": f"Key {fal.key} of {secret} is locked"}, {"X-Key": fal.key})
    for seed, route in enumerate(("initiate", "submit", "status", "result"), 7000):  # a service that quotes the key
        fal.plan(route, EVERY, quoted)
        graph = Graph(seed=seed, transport="upload", photos=["large.png"])
        assert "hidden" in driver.run(graph).error or "locked" in driver.run(graph).error
        fal._plans.clear()
    graph = Graph(seed=7010)
    assert driver.run(graph).error is None
    places = assert_no_key(driver, fal.key)
    names = " ".join(places)
    for written in ("hosted.sqlite", "results/", "output/hosted_", "server.log", "websocket", "/history", "text of"):
        assert written in names
    assert b"portrait" in places["/history"]  # the search does see what is there


def test_the_search_sees_a_key(driver):
    driver.heard += b"..." + base64.b64encode(b"x:" + driver.server.environment["FAL_KEY"].encode())
    with pytest.raises(AssertionError, match="websocket"):
        assert_no_key(driver, driver.server.environment["FAL_KEY"])


def test_no_message_shows_where_things_lie_on_this_machine(driver):
    errors = [status for entry in driver.server.get("/history").values() for status in entry["status"]["messages"]]
    texts = [data["exception_message"] for kind, data in errors if kind == "execution_error"]
    assert texts
    assert [text for text in texts if str(driver.server.base) in text or str(ROOT) in text] == []


def test_without_the_service_only_what_is_here_is_given(driver, service):
    """Last of those that share a server: nobody answers any more."""
    service.go_away()
    assert "127.0.0.1 did not get all of it (refused)" in driver.run(Graph(seed=8000)).error
    run = driver.run(Graph(seed=7010))
    assert (run.error, len(run.images())) == (None, 1)


NOT_SERVED = ("/userdata/..%2F__pulid%2Ffal.toml", "/userdata?dir=..%2F__pulid", "/view?filename=fal.toml&subfolder=..")


def journal(base, statement):
    with closing(sqlite3.connect(base / "user" / "__pulid" / "hosted.sqlite")) as database, database:
        return database.execute(statement).fetchall()


def start(comfyui, base, variables):
    return ComfyServer(comfyui, base, ("--cpu",), {**NO_KEY, **variables})


def test_the_life_of_a_process(comfyui, tmp_path):
    """One story in two starts, since each takes seconds: no key, a key file, killed, picked up, told to end."""
    base = prepare(tmp_path / "base")
    key_file = base / "user" / "__pulid" / "fal.toml"
    with FakeFal() as fal:
        addresses = {name: value for name, value in fal.environment.items() if name != "FAL_KEY"}
        with start(comfyui, base, addresses) as server:
            driver = Driver(server)
            # Without a key the pack loads, and the node says what is missing before anything leaves.
            assert server.failed_packs() == []
            error = driver.run(Graph(seed=1)).error
            assert "FAL_KEY" in error and "fal.toml" in error
            assert fal.requests == []
            # A key file is read as soon as it is there, is not served, and must be its owner's alone.
            key_file.parent.mkdir(exist_ok=True)
            key_file.write_text(f'FAL_KEY = "{fal.key}"\n')
            key_file.chmod(0o644)
            assert "chmod 600" in driver.run(Graph(seed=1)).error
            key_file.chmod(0o600)
            for path in NOT_SERVED:
                with pytest.raises(urllib.error.HTTPError):
                    server.read(path)
            assert driver.run(Graph(seed=1)).error is None
            assert fal.bill == 1
            # Another key does not pay again for what is done.
            key_file.write_text("FAL_KEY = another-id:another-secret")
            again = driver.run(Graph(seed=1, run_limit=601))
            assert again.info["notes"] == ["It was paid for with another key than today's."]
            assert fal.bill == 1
            key_file.write_text(f'FAL_KEY = "{fal.key}"\n')
            # Killed between one submit and its answer, and while another request runs.
            fal.script = ("IN_PROGRESS",)
            fal.plan("submit", 2, faults.accept_then_stall)
            both = Graph(seed=2)
            both.hosted(seed=3)

            def asked_about():
                return [job.input["seed"] for job in list(fal.jobs.values())[1:] if job.polls]

            driver.run(both, when=lambda: fal.bill == 3 and asked_about(), act=server.process.kill)
            heard = driver.heard + server.log_file.read_bytes()
        [known] = asked_about()
        [lost] = {2, 3} - {known}
        with start(comfyui, base, addresses) as server:
            driver = Driver(server)
            assert "may have been accepted and billed" in driver.run(Graph(seed=lost)).error
            fal.script = ("COMPLETED",)
            run = driver.run(Graph(seed=known))  # picked up where it was left
            assert (run.error, len(run.images())) == (None, 1)
            assert fal.bill == 3
            # Told to end while it waits: the request is in the journal, for the next start.
            fal.script, polls = ("IN_PROGRESS",), len(fal.seen("status"))
            end = partial(server.process.send_signal, signal.SIGINT)
            driver.run(Graph(seed=4), when=lambda: len(fal.seen("status")) > polls, act=end)
            server.process.wait(15)
            assert journal(base, "SELECT request_id FROM requests ORDER BY created")[-1] == (list(fal.jobs)[-1],)
            assert fal.bill == 4
            key_file.unlink()
            driver.heard += heard
            assert_no_key(driver, fal.key, paths=())


def test_with_several_users_each_has_a_key_and_requests_of_their_own(comfyui, tmp_path):
    base = prepare(tmp_path / "base")
    with FakeFal() as fal:
        fal.script = ("COMPLETED",)
        addresses = {name: value for name, value in fal.environment.items() if name != "FAL_KEY"}
        with ComfyServer(comfyui, base, ("--cpu", "--multi-user"), {**NO_KEY, **addresses}) as server:
            users = []
            for name in ("ann", "bob"):
                body = json.dumps({"username": name}).encode()
                url, headers = f"http://127.0.0.1:{server.port}/users", {"Content-Type": "application/json"}
                with urllib.request.urlopen(urllib.request.Request(url, body, headers, method="POST")) as answer:
                    users.append(json.loads(answer.read()))
            file = base / "user" / "__pulid" / "users" / users[0] / "fal.toml"
            file.parent.mkdir(parents=True)
            file.write_text(f'FAL_KEY = "{fal.key}"')
            file.chmod(0o600)
            ann, bob, nobody = (Driver(server, headers) for headers in ({"comfy-user": each} for each in (*users, "x")))
            assert ann.run(Graph(seed=1)).error is None
            assert "FAL_KEY" in bob.run(Graph(seed=2)).error
            assert "without a user" in nobody.run(Graph(seed=3)).error
        assert fal.bill == 1
        assert sorted(path.name for path in file.parent.iterdir()) == ["fal.toml", "hosted.sqlite", "locks", "results"]
