"""`pulid/` is what is true of tensors, `models/` what touches disks and networks, `nodes/` what touches ComfyUI.

Imports run nodes -> models -> pulid and nodes -> pulid, never backwards, and relatively inside the pack.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from pulid_sdxl.tools import TOOLS

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {"pulid": {"pulid"}, "models": {"models", "pulid"}, "nodes": {"nodes", "models", "pulid"}}
# ComfyUI's top-level modules that a pack could reach.
HOST = {"comfy", "comfy_api", "comfy_execution", "comfy_extras", "comfy_config", "folder_paths", "execution", "server"}
HOST |= {"latent_preview", "node_helpers", "nodes", "models", "app", "utils"}

FILES = [path for room in MAY_IMPORT for path in sorted((ROOT / room).rglob("*.py"))]
PACK = [*FILES, ROOT / "__init__.py"]


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def imports(path):
    """(level, dotted name) of every import anywhere in a file; `from ..pulid import eva` is (2, "pulid.eva")."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.level, ".".join(filter(None, (node.module, alias.name)))) for alias in node.names)


def rooms_reached(path):
    """The rooms that a file's relative imports lead to."""
    for level, name in imports(path):
        if level:
            folder = path.relative_to(ROOT).parts[:-level]
            yield (*folder, *name.split("."))[0]


def top_level(path):
    return {name.split(".")[0] for level, name in imports(path) if level == 0}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_inside_the_pack_never_run_backwards(path):
    room = path.relative_to(ROOT).parts[0]
    assert set(rooms_reached(path)) <= MAY_IMPORT[room]


@pytest.mark.parametrize("path", PACK, ids=name_of)
def test_the_pack_reaches_itself_by_relative_imports_only(path):
    # `nodes` and `models` as bare names are ComfyUI's own, `pulid_sdxl` is the alias of the tests.
    assert top_level(path) & {"pulid", "models", "nodes", "pulid_sdxl"} == set()


@pytest.mark.parametrize("path", [path for path in FILES if path.is_relative_to(ROOT / "nodes") is False], ids=name_of)
def test_only_nodes_know_comfyui(path):
    assert top_level(path) & HOST == set()


@pytest.mark.parametrize("path", PACK, ids=name_of)
def test_the_pack_logs_and_never_prints(path):
    calls = [node.func for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call)]
    assert [call.lineno for call in calls if isinstance(call, ast.Name) and call.id == "print"] == []


@pytest.mark.parametrize(("path", "source", "expected"), [
    ("pulid/deep.py", "from ..models.files import find", {"models"}),
    ("nodes/load.py", "from .. import pulid", {"pulid"}),
    ("nodes/load.py", "from . import host", {"nodes"}),
    ("models/a.py", "def f():\n    from ..nodes import host", {"nodes"}),
])  # fmt: skip
def test_the_rules_see_every_kind_of_import(tmp_path, monkeypatch, path, source, expected):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    file = tmp_path / path
    file.parent.mkdir()
    file.write_text(source)
    assert set(rooms_reached(file)) == expected


def run(code):
    return subprocess.run([sys.executable, TOOLS, "-c", code], capture_output=True, text=True, check=True)


def test_importing_the_pack_takes_milliseconds_and_nothing_with_it():
    output = run("""
import sys, time
sys.path.insert(0, ".")
before = set(sys.modules)
start = time.perf_counter()
import mount
mount.mount()
print(time.perf_counter() - start, *{name.split(".")[0] for name in set(sys.modules) - before})
""").stdout
    seconds, *modules = output.split()
    assert float(seconds) < 0.05
    assert set(modules) - set(sys.stdlib_module_names) == {"mount", "pulid_sdxl"}


def test_the_entrypoint_of_comfyui_is_there():
    assert run(
        "import mount; mount.mount(); import pulid_sdxl; print(callable(pulid_sdxl.comfy_entrypoint))"
    ).stdout == ("True\n")


def test_run_py_needs_the_standard_library_only():
    assert top_level(ROOT / "run.py") - {"pulid_sdxl"} <= set(sys.stdlib_module_names)


def test_what_run_py_takes_from_the_pack_needs_no_more():
    modules = "catalogue, files, archive, download, inventory, paths, doctor"
    code = f"import mount; mount.mount(); from pulid_sdxl.models import {modules}; print('fine')"
    bare = [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, '.'); {code}"]  # without site-packages
    assert subprocess.run(bare, capture_output=True, text=True, cwd=ROOT / "tools").stdout == "fine\n"
