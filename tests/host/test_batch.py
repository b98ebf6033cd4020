"""`run.py batch` on real ComfyUIs with stand-in models: what two nodes make is what one server makes in sequence."""

import io
import json
import os
import subprocess
import sys

import pytest

if not os.environ.get("COMFYUI"):
    pytest.skip("COMFYUI names no ComfyUI folder", allow_module_level=True)
pytest.importorskip("ray", reason="RAY IS NOT INSTALLED: run.py batch was NOT tested on a real ComfyUI")

import numpy as np
from PIL import Image, ImageOps
from pulid_sdxl.tools import ROOT, demo
from pulid_sdxl.tools.batch.plan import filled, plan
from pulid_sdxl.tools.batch.table import read_table
from pulid_sdxl.tools.comfy_server import ComfyServer
from pulid_sdxl.tools.model_files import gather
from pulid_sdxl.tools.workflow import find, set_inputs, to_prompt
from ray.cluster_utils import Cluster


@pytest.fixture
def base(comfyui, tmp_path):
    """A base directory with stand-in models, two people and a table of 12 jobs."""
    demo.prepare_base(tmp_path, gather(None, None, comfyui))
    photo = Image.open(tmp_path / "input" / demo.prepare_photo(tmp_path / "input", None))
    photo.save(tmp_path / "anna.png")
    ImageOps.mirror(photo).save(tmp_path / "bea.png")
    rows = "".join(f"{person}.png,{seed}\n" for seed in range(6) for person in ("anna", "bea"))
    (tmp_path / "jobs.csv").write_text(f"Photo of the person.image,KSampler.seed\n{rows}")
    return tmp_path


@pytest.fixture
def cluster(monkeypatch):
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    small = {"num_cpus": 1, "num_gpus": 0, "object_store_memory": 100 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={**small, "include_dashboard": False})
    cluster.add_node(**small)
    yield cluster.address
    cluster.shutdown()


def small_graph(server):
    graph = to_prompt(json.loads(demo.WORKFLOW.read_text(encoding="utf-8")), server.object_info())
    set_inputs(graph, "CheckpointLoaderSimple", ckpt_name="standin_sdxl_fifth_width.safetensors")
    set_inputs(graph, "EmptyLatentImage", width=64, height=64)
    set_inputs(graph, "KSampler", steps=1)
    return graph


def saved(server, graph):
    [entry] = server.run(graph)[find(graph, "SaveImage")]["images"]
    return server.picture(entry)


def pixels(content):
    return np.asarray(Image.open(io.BytesIO(content)))


@pytest.mark.timeout(600)
def test_two_nodes_make_what_one_server_makes_in_sequence(base, cluster, comfyui, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as Ray sets it for its workers: sums on a CPU depend on it
    with ComfyServer(comfyui, base, ("--cpu",)) as server:
        graph = small_graph(server)
        (base / "graph.json").write_text(json.dumps(graph))
        command = [sys.executable, str(ROOT / "run.py"), "batch", "--comfyui", str(comfyui), "--base", str(base)]
        command += ["--workflow", str(base / "graph.json"), "--table", str(base / "jobs.csv")]
        command += ["--out", str(base / "out"), "--ray", cluster, "--workers", "2"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (0, "12 of 12 jobs are done.\n"), done.stderr

        entries = [json.loads(line) for line in (base / "out" / "manifest.jsonl").read_text().splitlines()]
        assert len({entry["id"] for entry in entries}) == len(entries) == 12
        assert {entry["worker"][0] for entry in entries} == {"1", "2"}
        made = plan(graph, read_table(base / "jobs.csv"), {})
        files = {entry["id"]: (base / "out" / entry["files"][0]).read_bytes() for entry in entries}
        encode = find(graph, "PuLID_Encode")
        for job in made.jobs:
            card = f"{job.people[encode]}.png"
            name = server.upload(card, (base / "out" / "people" / card).read_bytes(), "input", "pulid_batch")
            by_hand = made.graph_of(job)
            by_hand[encode]["inputs"]["image"] = f"pulid_batch/{name}"
            assert saved(server, by_hand) == files[job.id]
        for job, photo in zip(made.jobs[:2], ("anna.png", "bea.png"), strict=True):  # and without cards
            server.upload(photo, (base / photo).read_bytes(), "input", "")
            original = filled(graph, {**job.values, (find(graph, "LoadImage"), "image"): photo})
            assert np.array_equal(pixels(saved(server, original)), pixels(files[job.id]))
        assert not np.array_equal(pixels(files[made.jobs[0].id]), pixels(files[made.jobs[1].id]))
