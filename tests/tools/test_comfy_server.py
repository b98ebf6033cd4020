"""What starts ComfyUI's server for the demo and the tests."""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from pulid_sdxl.tools import ROOT, comfy_server, develop
from pulid_sdxl.tools.fakes.fake_comfy import make_comfyui
from pulid_sdxl.tools.processes import ENDS_WITH_US

# A run of pytest that waits for ever while its server runs, and says which process that is.
WAITS = """
import os, time
from pathlib import Path
from pulid_sdxl.tools.comfy_server import ComfyServer

def test_waits():
    folder = Path(os.environ["FOLDER"])
    places = [f"--{kind}-directory={folder}" for kind in ("input", "output", "temp")]
    with ComfyServer(folder / "comfy", folder / "base", tuple(places)) as server:
        (folder / "part").write_text(str(server.process.pid))
        (folder / "part").rename(folder / "pid")
        time.sleep(600)
"""
# One that no signal can wake: what Python's own limit cannot end.
DEAF = """
import signal, time

def test_deaf():
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
    time.sleep(600)
"""


@contextmanager
def running_pytest(folder, source, *options, deaf=False):
    """pytest with this pack's settings, on one test of this source; `deaf` as a shell starts it in the background."""
    (folder / "test_it.py").write_text(source)
    (folder / "conftest.py").write_text(f"import runpy\nrunpy.run_path({str(ROOT / 'run.py')!r})['mount_pack']()\n")
    options = ("-c", ROOT / "pyproject.toml", "--rootdir", folder, "-p", "no:cacheprovider", *options)
    command = [sys.executable, "-m", "pytest", *map(str, options), str(folder)]
    ignore = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)} if deaf else ENDS_WITH_US
    variables = {**os.environ, "FOLDER": str(folder)}
    how = {"env": variables, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, **ignore}
    with subprocess.Popen(command, **how) as process:
        try:
            yield process
        finally:
            process.kill()


def runs(pid: int) -> bool:
    """Whether that process is there and more than a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


linux_only = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux to end it")


@linux_only
@pytest.mark.parametrize(("ending", "deaf"), [
    (signal.SIGKILL, False), (signal.SIGTERM, False), (signal.SIGINT, False), (signal.SIGTERM, True)
])  # fmt: skip
def test_no_server_is_left_behind_however_pytest_is_ended(tmp_path, ending, deaf):
    make_comfyui(tmp_path / "comfy")
    with running_pytest(tmp_path, WAITS, deaf=deaf) as process:
        wait_until(lambda: (tmp_path / "pid").is_file() or process.poll() is not None)
        assert process.poll() is None, process.stdout.read()
        server = int((tmp_path / "pid").read_text())
        assert runs(server)
        process.send_signal(ending)
        process.communicate(timeout=60)
    wait_until(lambda: not runs(server))


@linux_only
@pytest.mark.parametrize(("source", "said"), [(WAITS, "Timeout"), (DEAF, "test_deaf")])
def test_a_test_that_hangs_is_ended(tmp_path, source, said):
    make_comfyui(tmp_path / "comfy")
    with running_pytest(tmp_path, source, "-o", "timeout=4", "-o", "faulthandler_timeout=6") as process:
        printed, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and said in printed


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
