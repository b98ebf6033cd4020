"""Other people's packs, loaded as ComfyUI loads them, from the folders that PULID_NEIGHBOURS names.

Each lies there under the name of its repository, with or without its owner before a `+`. Nothing of them is kept here.
"""

import asyncio
import importlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest


def folder(name: str) -> Path:
    """Where the pack lies; skips, loudly, where it does not."""
    roots = [Path(root).expanduser() for root in os.environ.get("PULID_NEIGHBOURS", "").split(os.pathsep) if root]
    for root in roots:
        for path in (root, *sorted(root.glob("*"))):
            if path.is_dir() and path.name.rpartition("+")[2].lower() == name.lower():
                return path
    pytest.skip(f"{name} lies in no folder of PULID_NEIGHBOURS: not tried beside it")


@cache
def _custom_nodes() -> Path:
    """The folder under which ComfyUI has packs, for those that import themselves from it."""
    made = Path(tempfile.mkdtemp(prefix="custom_nodes"))
    package = ModuleType("custom_nodes")
    package.__path__ = [str(made)]
    sys.modules["custom_nodes"] = package
    return made


@cache
def _loaded(path: Path) -> ModuleType:
    link = _custom_nodes() / path.name.rpartition("+")[2]
    if not link.exists():
        link.symlink_to(path)
    module_name = f"neighbour_{path.name.replace('+', '_').replace('-', '_').replace('.', '_')}"
    spec = importlib.util.spec_from_file_location(
        module_name, path / "__init__.py", submodule_search_locations=[str(path)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    spec.loader.exec_module(module)
    return module


def _commit(path: Path) -> str:
    known = subprocess.run(["git", "-C", str(path), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return known.stdout.strip() or "an unknown commit"


def load(name: str) -> ModuleType:
    """The pack's module; skips where it does not load."""
    path = folder(name)
    print(f"{name} at {_commit(path)}")
    try:
        return _loaded(path)
    except Exception as error:  # a pack for other versions of ComfyUI, or for a package that is not installed
        pytest.skip(f"{name} does not load here, so it was not tried ({type(error).__name__}: {error})")


def unloaded(name: str, part: str, packages: str | None = None) -> ModuleType:
    """A module within a pack that is not loaded as a whole.

    packages  the folder in the pack whose folders it imports by their bare names
    """
    path = folder(name)
    print(f"{name} at {_commit(path)}")
    link = _custom_nodes() / path.name.rpartition("+")[2]
    if not link.exists():
        link.symlink_to(path)
    for one in (path / packages).iterdir() if packages else ():
        if one.is_dir() and one.name not in sys.modules:
            sys.modules[one.name] = package = ModuleType(one.name)
            package.__path__ = [str(one)]
    try:
        return importlib.import_module(part if packages else f"custom_nodes.{link.name}.{part}")
    except Exception as error:
        pytest.skip(f"{name} does not load here, so it was not tried ({type(error).__name__}: {error})")


def node(pack: str, node_id: str) -> type:
    """The class of one of the pack's nodes, registered in the one way or the other."""
    module = load(pack)
    if mappings := getattr(module, "NODE_CLASS_MAPPINGS", None):
        return mappings[node_id]

    async def nodes() -> list[type]:
        extension = module.comfy_entrypoint()
        return await (await extension if asyncio.iscoroutine(extension) else extension).get_node_list()

    return next(one for one in asyncio.run(nodes()) if one.GET_SCHEMA().node_id == node_id)


def module_of(pack: str, name: str) -> ModuleType:
    """A module of the pack, by the end of its name."""
    load(pack)
    return next(module for key, module in list(sys.modules.items()) if key.endswith(name) and "neighbour_" in key)
