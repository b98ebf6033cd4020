"""What starts ComfyUI's server for the demo and the tests."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pulid_sdxl.tools import TOOLS

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
