"""How the pack is built: its rooms and what they may import, how long its functions are, and what loads with it.

pulid/ is the method, models/ the weight files, hosted/ the service, nodes/ all that touches ComfyUI. Imports run
nodes -> models, hosted -> pulid and nodes -> pulid, never backwards, and relatively inside the pack.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import PurePosixPath

import pytest
from pulid_sdxl.tools import ROOT, TOOLS

MAY_IMPORT = {
    "pulid": {"pulid"},
    "models": {"models", "pulid"},
    "hosted": {"hosted", "pulid"},
    "nodes": {"nodes", "models", "hosted", "pulid"},
    "tools": {"tools", "nodes", "models", "hosted", "pulid", "run"},
}
# ComfyUI's top-level modules that a pack could reach.
HOST = {"comfy", "comfy_api", "comfy_execution", "comfy_extras", "comfy_config", "folder_paths", "execution", "server"}
HOST |= {"latent_preview", "node_helpers", "nodes", "models", "app", "utils"}
# As ComfyUI's main.py does, for a process of their own; and what other packs put there for themselves.
ENTERS_COMFYUI = {"tools/__main__.py", "tools/comfy_host.py", "tests/neighbours/packs.py"}

Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def parse(*patterns: str) -> dict[str, ast.Module]:
    """Path from the root -> syntax tree of every such file."""
    files = [file for pattern in patterns for file in sorted(ROOT.glob(pattern))]
    return {file.relative_to(ROOT).as_posix(): ast.parse(file.read_text(encoding="utf-8")) for file in files}


ROOMS = ("pulid/**/*.py", "models/**/*.py", "hosted/**/*.py", "nodes/**/*.py")
PACK = (*ROOMS, "*.py")
TOOLS_AND_TESTS = ("tools/**/*.py", "tests/**/*.py")


def imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(level, dotted name) of every import anywhere in a file; `from ..pulid import eva` is (2, "pulid.eva")."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.level, ".".join(filter(None, (node.module, alias.name)))) for alias in node.names)


def reached(path: str, tree: ast.Module) -> Iterator[tuple[str, ...]]:
    """Where a file's relative imports lead, from the root; the last part is a file or what it holds."""
    parts = PurePosixPath(path).parts
    yield from ((*parts[:-level], *name.split(".")) for level, name in imports(tree) if level)


def rooms_reached(path: str, tree: ast.Module) -> set[str]:
    return {parts[0] for parts in reached(path, tree)}


def links(files: dict[str, ast.Module]) -> dict[str, set[str]]:
    """Each file, and those of them that it imports, at whatever depth."""
    led = {path: list(reached(path, tree)) for path, tree in files.items()}
    return {path: {"/".join(to[:end]) + ".py" for to in led[path] for end in (-1, None)} & {*files} for path in files}


def top_level(tree: ast.Module) -> set[str]:
    return {name.split(".")[0] for level, name in imports(tree) if level == 0}


def functions(*patterns: str) -> Iterator[tuple[str, Function]]:
    for path, tree in parse(*patterns).items():
        for node in ast.walk(tree):
            if isinstance(node, Function):
                yield f"{path}:{node.lineno} {node.name}", node


def lines(*patterns: str) -> int:
    return sum(file.read_bytes().count(b"\n") for pattern in patterns for file in ROOT.glob(pattern))


def test_imports_never_run_backwards():
    files = parse(*ROOMS, "tools/**/*.py").items()
    found = {path: rooms_reached(path, tree) - MAY_IMPORT[path.split("/")[0]] for path, tree in files}
    assert {path: rooms for path, rooms in found.items() if rooms} == {}


def test_imports_never_run_in_circles():
    TopologicalSorter(links(parse(*ROOMS, "tools/**/*.py"))).prepare()
    sources = {"tools/a.py": "from .fakes.b import f", "tools/fakes/b.py": "def f():\n    from .. import a"}
    with pytest.raises(CycleError):
        TopologicalSorter(links({path: ast.parse(text) for path, text in sources.items()})).prepare()


def test_the_pack_reaches_itself_by_relative_imports_only():
    # `nodes` and `models` as bare names are ComfyUI's own, `pulid_sdxl` is the name that tests and tools give the pack.
    named = {path: top_level(tree) & {*MAY_IMPORT, "pulid_sdxl"} for path, tree in parse(*ROOMS).items()}
    assert {path: names for path, names in named.items() if names} == {}


def test_only_nodes_know_comfyui():
    known = {path: top_level(tree) & HOST for path, tree in parse(*ROOMS).items() if not path.startswith("nodes/")}
    assert {path: names for path, names in known.items() if names} == {}


def test_the_pack_logs_and_never_prints():
    nodes = ((path, node) for path, tree in parse(*ROOMS).items() for node in ast.walk(tree))
    printing = [path for path, node in nodes if isinstance(node, ast.Call) and ast.unparse(node.func) == "print"]
    assert printing == []


def test_tests_and_tools_reach_the_pack_by_its_name():
    texts = {path: (ROOT / path).read_text(encoding="utf-8") for path in parse(*TOOLS_AND_TESTS)}
    assert {path for path, text in texts.items() if re.search(r"\bsys[.]path\b", text)} - ENTERS_COMFYUI == set()


@pytest.mark.parametrize(("path", "source", "expected"), [
    ("pulid/deep.py", "from ..models.locate import find", {"models"}),
    ("nodes/load.py", "from .. import pulid", {"pulid"}),
    ("nodes/load.py", "from . import host", {"nodes"}),
    ("models/a.py", "def f():\n    from ..nodes import host", {"nodes"}),
    ("tools/fakes/a.py", "from ...hosted import api\nfrom .. import demo", {"hosted", "tools"}),
])  # fmt: skip
def test_the_rules_see_every_kind_of_import(path, source, expected):
    assert rooms_reached(path, ast.parse(source)) == expected


def test_functions_fit_on_a_screen():
    lengths = {name: (node.end_lineno or 0) - node.lineno + 1 for name, node in functions(*PACK, *TOOLS_AND_TESTS)}
    assert {name: length for name, length in lengths.items() if length > 60} == {}


def test_functions_take_few_parameters():
    """But a node's `execute` takes what its schema declares, what takes `**values` hands the host's arguments on, and a
    Triton kernel takes pointers and sizes one by one.
    """
    counts = {}
    for name, node in functions(*PACK):
        names = [each.arg for each in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        is_node = name.startswith("nodes/") and node.name == "execute"
        is_kernel = any(ast.unparse(decorator).startswith("triton.jit") for decorator in node.decorator_list)
        if not is_node and not is_kernel and node.args.kwarg is None:
            counts[name] = len(names) - (names[:1] in (["self"], ["cls"]))
    assert {name: count for name, count in counts.items() if count > 8} == {}


def test_the_house_stays_small():
    assert lines(*PACK) <= 12_500
    assert lines(*TOOLS_AND_TESTS) <= 24_500
    assert lines("hosted/*.py") <= 2_200
    hosted = ("tests/hosted/*.py", "tests/host/test_hosted.py", "tools/fakes/fake_fal.py", "tools/fakes/fake_faults.py")
    assert lines(*hosted) <= 4_500


def in_a_process(code: str, *options: str) -> str:
    command = [sys.executable, *options, str(TOOLS), "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_importing_the_pack_takes_nothing_with_it():
    modules = in_a_process("import sys; print(*sys.modules)").split()
    assert [name for name in modules if name.startswith("pulid_sdxl.")] == []
    bare = in_a_process("import sys; print(*sys.modules)", "-I", "-S").split()  # without what site-packages start
    assert {name.split(".")[0] for name in bare} - set(sys.stdlib_module_names) == {"__main__", "pulid_sdxl"}


def test_the_entrypoint_of_comfyui_is_there():
    assert in_a_process("import pulid_sdxl; print(callable(pulid_sdxl.comfy_entrypoint))") == "True\n"


def test_run_py_needs_the_standard_library_only():
    assert top_level(parse("run.py")["run.py"]) - {"pulid_sdxl"} <= set(sys.stdlib_module_names)


def test_what_run_py_takes_from_the_pack_needs_no_more():
    taken = {
        name.rpartition(".")[0] for _, name in imports(parse("run.py")["run.py"]) if name.startswith("pulid_sdxl.")
    }
    modules = {"pulid_sdxl.models.inventory", "pulid_sdxl.models.doctor", "pulid_sdxl.tools.develop", *taken}
    code = "\n".join(f"import {module}" for module in sorted(modules))
    assert in_a_process(f"{code}\nprint('fine')", "-I", "-S") == "fine\n"


def test_contributing_answers_twenty_questions_truly():
    """Every file and every name in it that the table of CONTRIBUTING.md gives is there."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+\?) \| (.+) \|$", text, re.MULTILINE)
    assert len(rows) >= 20 and len(text.splitlines()) <= 300
    for question, answer in rows:
        paths = re.findall(r"`((?:pulid|models|hosted|nodes|locales)/[\w./]+)`", answer)
        assert paths, question
        found = "".join((ROOT / path).read_text(encoding="utf-8") for path in paths)
        names = re.findall(r"`(\w+)`", answer)
        assert [name for name in names if not re.search(rf"\b{name}\b", found)] == [], question
