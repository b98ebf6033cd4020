"""What starts ComfyUI's server for the demo and the tests."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pulid_sdxl.tools import TOOLS, comfy_server, develop

PARENT = """
import subprocess, sys
from pulid_sdxl.tools.comfy_server import as_child
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], preexec_fn=as_child)
print(child.pid, flush=True)
child.wait()
"""


def runs(pid: int) -> bool:
    """Whether that process is there and more than a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux to end it")
def test_no_server_is_left_behind_by_what_is_killed():
    command = [sys.executable, str(TOOLS), "-c", PARENT]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        child = int(parent.stdout.readline())
        assert runs(child)
        os.kill(parent.pid, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while runs(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not runs(child)


def test_the_front_end_is_the_pinned_one_unless_another_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(develop, "FRONTENDS", tmp_path)
    monkeypatch.delenv("COMFYUI_FRONTEND", raising=False)
    (tmp_path / "requirements.txt").write_text("comfyui-frontend-package==1.2.3\ntorch\n")
    assert comfy_server.front_end(tmp_path) is None  # not fetched yet
    for version in ("1.2.3", "1.9.0"):
        develop.frontend_root(version).mkdir(parents=True)
    assert comfy_server.front_end(tmp_path) == develop.frontend_root("1.2.3")
    monkeypatch.setenv("COMFYUI_FRONTEND", "1.9.0")
    assert comfy_server.front_end(tmp_path) == develop.frontend_root("1.9.0")


def test_where_no_front_end_was_fetched_an_empty_folder_outside_of_temp_is_served(tmp_path, monkeypatch):
    monkeypatch.delenv("COMFYUI_FRONTEND", raising=False)
    assert comfy_server.front_end(tmp_path) is None
    root = comfy_server.nothing_to_serve(tmp_path / "base")
    assert root.is_dir() and root.parent == tmp_path / "base" and root.name != "temp"
