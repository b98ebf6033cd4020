"""`run.py batch` on a Ray cluster of two nodes: what is made, and what is left when something is killed.

The command runs as a process, as people start it; its ComfyUIs are fake_comfy.py, whose nodes cost nothing.
"""

import collections
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from pulid_sdxl.tools import ROOT
from pulid_sdxl.tools.batch.plan import plan
from pulid_sdxl.tools.batch.table import read_table
from pulid_sdxl.tools.comfy_server import ComfyServer
from pulid_sdxl.tools.fakes.fake_comfy import EVENTS, make_comfyui
from pulid_sdxl.tools.processes import ENDS_WITH_US

pytest.importorskip("ray", reason="RAY IS NOT INSTALLED: what run.py batch does on a cluster was NOT tested")

from ray.cluster_utils import Cluster

PATIENCE = 120  # s


@pytest.fixture(scope="module")
def cluster():
    """Two nodes with a processor each."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    small = {"num_cpus": 1, "num_gpus": 0, "object_store_memory": 100 << 20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=small)
    cluster.add_node(**{**small, "include_dashboard": None})
    yield cluster.address
    cluster.shutdown()


def node(class_type, title, **inputs):
    return {"class_type": class_type, "inputs": inputs, "_meta": {"title": title}}


def graph(seconds=0.0):
    return {
        "1": node("LoadImage", "Person", image="nobody.png"),
        "2": node("PuLID_Encode", "Encode", image=["1", 0], face="largest"),
        "3": node("Text", "Text", identity=["2", 0], text="x", seed=0),
        "4": node("Sleep", "Sleep", image=["3", 0], seconds=seconds),
        "5": node("Fail", "Fail", image=["4", 0], when="never", text=""),
        "6": node("SaveImage", "Save", images=["5", 0], filename_prefix="x"),
    }


class Batch:
    """The command, with a folder, a graph and a table of its own."""

    def __init__(self, folder: Path, ray: str):
        self.folder, self.ray, self.out = folder, ray, folder / "out"
        self.comfyui = make_comfyui(folder / "comfy")
        self.log = self.comfyui / EVENTS
        for name in ("anna", "bob", "nobody"):
            (folder / f"{name}.png").write_bytes(name.encode())
        self.write(
            graph(), "Person.image,Text.seed\n" + "".join(f"{('anna', 'bob')[n % 2]}.png,{n}\n" for n in range(12))
        )

    def write(self, graph: dict, table: str) -> None:
        (self.folder / "graph.json").write_text(json.dumps(graph))
        (self.folder / "jobs.csv").write_text(table)

    def start(self, *options: str, workers: int = 2) -> subprocess.Popen:
        command = [sys.executable, str(ROOT / "run.py"), "batch", "--comfyui", str(self.comfyui), "--ray", self.ray]
        command += ["--workflow", str(self.folder / "graph.json"), "--table", str(self.folder / "jobs.csv")]
        command += ["--out", str(self.out), *(() if "--server" in options else ("--workers", str(workers))), *options]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **ENDS_WITH_US
        )
        return self.process

    def run(self, *options: str, **more: int) -> tuple[int, str, str]:
        process = self.start(*options, **more)
        printed, told = process.communicate(timeout=PATIENCE)
        return process.returncode, printed, told

    def events(self, what: str) -> list[list[str]]:
        """Name and process id of each event of a kind."""
        return [line.split()[1:] for line in self.log.read_text().splitlines() if line.startswith(what)]

    def wait_for(self, count: int, what: str = "begin") -> list[list[str]]:
        deadline = time.monotonic() + PATIENCE
        while len(self.events(what)) < count:
            assert time.monotonic() < deadline and self.process.poll() is None, "the run does not get there"
            time.sleep(0.02)
        return self.events(what)

    def manifest(self) -> list[dict]:
        return [json.loads(line) for line in (self.out / "manifest.jsonl").read_text().splitlines()]

    def left_running(self) -> list[str]:
        listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout.splitlines()
        return [line for line in listed if str(self.comfyui) in line and "main.py" in line]


@pytest.fixture
def batch(tmp_path, cluster):
    batch = Batch(tmp_path, cluster)
    yield batch
    deadline = time.monotonic() + 30
    while batch.left_running() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert batch.left_running() == []


def parent(process_id: str) -> int:
    return int(subprocess.run(["ps", "-o", "ppid=", "-p", process_id], capture_output=True, text=True).stdout)


def assert_all_is_done_once(batch, jobs=12):
    entries = batch.manifest()
    assert len(entries) == len({entry["id"] for entry in entries}) == jobs
    assert [entry["error"] for entry in entries] == [None] * jobs
    files = {batch.out / file for entry in entries for file in entry["files"]}
    assert files == {*(batch.out / "pictures").iterdir()} and len(files) == jobs
    for file in files:
        with Image.open(file) as picture:
            picture.verify()


def test_two_nodes_make_what_one_server_makes_in_sequence(batch, tmp_path):
    (tmp_path / "graph.json").write_text(json.dumps(graph(seconds=0.3)))  # time for both to take part
    code, printed, _ = batch.run()
    assert (code, printed) == (0, "12 of 12 jobs are done.\n")
    assert_all_is_done_once(batch)
    assert {entry["worker"].split("@")[0] for entry in batch.manifest()} == {"1", "2"}

    made = plan(graph(seconds=0.3), read_table(tmp_path / "jobs.csv"), {})
    folders = {kind: tmp_path / f"by hand {kind}" for kind in ("input", "output", "temp")}
    options = tuple(f"--{kind}-directory={folder}" for kind, folder in folders.items())
    with ComfyServer(batch.comfyui, tmp_path / "by hand", options) as server:
        for job, entry in zip(made.jobs, sorted(batch.manifest(), key=lambda each: int(each["row"])), strict=True):
            [encoding] = job.people.values()
            name = server.upload(
                f"{encoding}.png", (batch.out / "people" / f"{encoding}.png").read_bytes(), "input", "pulid_batch"
            )
            by_hand = made.graph_of(job)
            by_hand["2"]["inputs"]["image"] = f"pulid_batch/{name}"
            [picture] = server.run(by_hand)["6"]["images"]
            [file] = entry["files"]
            assert (entry["id"], entry["row"]) == (job.id, job.row)
            assert (batch.out / file).read_bytes() == server.picture(picture)


def test_people_are_encoded_once_and_files_go_to_each_worker_once(batch):
    assert batch.run()[0] == 0
    assert len(batch.events("begin")) == 12 + 2
    uploads = [tuple(event) for event in batch.events("upload")]
    assert len(uploads) == len(set(uploads)) and len({name for name, _ in uploads}) == 4  # two photographs, two cards
    assert len([*(batch.out / "people").iterdir()]) == 2

    code, _, told = batch.run()  # once more: everything is there
    assert code == 0 and "12 jobs were finished before" in told
    assert len(batch.events("begin")) == 14


@pytest.mark.parametrize("victim", ["comfyui", "worker", "driver"])
def test_whatever_is_killed_every_job_is_done_once(batch, victim):
    batch.write(graph(seconds=0.4), "Person.image,Text.seed\n" + "".join(f"anna.png,{n}\n" for n in range(12)))
    process = batch.start()
    begun = batch.wait_for(6)
    comfyui = begun[-1][1]  # in the middle of a job
    worker = parent(str(parent(comfyui)))  # between them is the leash
    os.kill({"comfyui": int(comfyui), "worker": worker, "driver": process.pid}[victim], signal.SIGKILL)
    process.communicate(timeout=PATIENCE)

    if victim == "driver":
        assert process.returncode == -signal.SIGKILL
        before = batch.manifest()
        assert len(before) < 12
        assert batch.run()[0] == 0
        assert batch.manifest()[: len(before)] == before
    assert_all_is_done_once(batch)
    times = collections.Counter(name for name, _ in batch.events("end"))
    under_way = 2 if victim == "driver" else 1
    assert sum(times.values()) - 13 <= under_way  # 12 jobs and a person; what had ended but was not yet brought
    assert victim == "driver" or process.returncode == 0


def test_a_job_that_fails_is_told_by_its_row_and_the_others_go_on(batch):
    failing = graph()
    failing["5"]["inputs"]["when"] = "p3"
    batch.write(failing, "Fail.text\n" + "".join(f"p{n}\n" for n in range(5)))

    code, printed, told = batch.run()

    assert code == 1
    assert (
        "row 5 failed: ? failed: no face in p3\n4 of 5 jobs are done.\nThe same command tries the others again"
        in printed
    )
    assert "row 5 failed" in told
    assert [entry["error"] for entry in batch.manifest() if entry["row"] == "5"] == ["? failed: no face in p3"]

    (batch.folder / "jobs.csv").write_text("Fail.text\n" + "".join(f"p{n}\n" for n in (0, 1, 2, 4)))
    assert batch.run()[0] == 0
    assert_all_is_done_once(batch, jobs=4)


def test_a_person_who_cannot_be_encoded_fails_the_rows_that_need_it(batch):
    unreadable = graph() | {"7": node("Fail", "Look", image=["1", 0], when="x", text="y")}
    unreadable["2"]["inputs"]["image"] = ["7", 0]
    batch.write(unreadable, "Look.text,Text.seed\nx,1\nx,2\ny,3\n")
    code, printed, _ = batch.run()
    assert code == 1 and "row 3 failed: A person could not be encoded: ? failed: no face in x" in printed
    assert [bool(entry["error"]) for entry in sorted(batch.manifest(), key=lambda each: each["row"])] == [
        True,
        True,
        False,
    ]


def test_ctrl_c_ends_cleanly_says_how_to_go_on_and_the_same_command_does(batch):
    batch.write(graph(seconds=0.5), "Text.seed\n" + "".join(f"{n}\n" for n in range(12)))
    process = batch.start()
    batch.wait_for(5)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert "The same command goes on where this one was." in told and "Traceback" not in told
    assert 0 < len(batch.manifest()) < 12

    before = batch.manifest()
    assert batch.run()[0] == 0
    assert_all_is_done_once(batch)
    assert batch.manifest()[: len(before)] == before


def test_what_costs_money_is_sent_once_whatever_happens(batch):
    paid = graph(seconds=0.5) | {"7": node("PuLID_HostedSubmit", "Send", prompt="x")}
    del paid["1"], paid["2"], paid["3"]["inputs"]["identity"]
    batch.write(paid, "Send.prompt\n" + "".join(f"p{n}\n" for n in range(6)))
    code, _, told = batch.run()
    assert code == 2 and "cost money" in told

    process = batch.start("--allow-hosted")
    os.kill(parent(str(parent(batch.wait_for(2)[-1][1]))), signal.SIGKILL)
    printed, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1 and "It may have been paid for, and is not sent again." in printed
    assert batch.run("--allow-hosted")[0] == 1

    times = collections.Counter(name for name, _ in batch.events("begin"))
    assert set(times.values()) == {1} and len(times) == 6
    assert sum(entry["error"] is not None for entry in batch.manifest()) == 1


def test_servers_that_run_already_are_used_and_left_running(batch, tmp_path):
    servers = []
    for name in ("a", "b"):
        options = tuple(f"--{kind}-directory={tmp_path / name / kind}" for kind in ("input", "output", "temp"))
        server = ComfyServer(batch.comfyui, tmp_path / name, options)
        servers.append(server.__enter__())
    try:
        given = [word for server in servers for word in ("--server", server.url)]
        assert batch.run(*given)[0] == 0
        assert_all_is_done_once(batch)
        assert [server.get("/system_stats") for server in servers] == [{}, {}]

        batch.write(graph(seconds=60), "Text.seed\n100\n101\n")
        process = batch.start(*given)
        batch.wait_for(len(batch.events("end")) + 2)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=PATIENCE)
        assert [server.get("/queue")["queue_running"] for server in servers] == [[], []]  # taken back
    finally:
        for server in servers:
            server.stop()


def test_a_workflow_as_the_editor_saves_it_serves_too(batch):
    image = {"name": "IMAGE", "type": "IMAGE", "links": [1]}
    saved = [{"name": "images", "type": "IMAGE", "link": 1}]
    nodes = [
        {"id": 1, "type": "Text", "title": "T", "inputs": [], "outputs": [image], "widgets_values": ["a", 3, "fixed"]},
        {"id": 2, "type": "SaveImage", "inputs": saved, "outputs": [], "widgets_values": ["x"]},
    ]
    batch.write({"nodes": nodes, "links": [[1, 1, 0, 2, 0, "IMAGE"]]}, "T.text,1.seed\na,1\nb,2\n")
    assert batch.run()[0] == 0
    assert [entry["seed"] for entry in sorted(batch.manifest(), key=lambda each: each["row"])] == [1, 2]

    batch.write({"nodes": [{**nodes[0], "type": "Unknown"}], "links": []}, "T.text\na\n")
    code, _, told = batch.run()
    assert code == 2 and "no node 'Unknown'" in told and "export it with File, Export (API)" in told


def test_a_comfyui_that_does_not_start_is_told_with_its_own_words(batch):
    (batch.comfyui / "main.py").write_text("raise SystemExit('no CUDA here')")
    code, _, told = batch.run()
    assert code == 2
    assert "No worker is left. ComfyUI ended at start." in told and "no CUDA here" in told
    assert io.StringIO(told).readline().startswith("2 workers. Ray's dashboard: ")
