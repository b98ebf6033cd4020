"""A Python with nothing but ComfyUI's own requirements: the pack loads there, works after requirements.txt, and pip
changes nothing that was there.

The Python is made of links into the one that runs the tests, package by package, as far as ComfyUI's requirements
reach: a download of torch would take minutes and prove no more.
"""

import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from pulid_sdxl.run import find_hosts
from pulid_sdxl.tools import ROOT, TOOLS, develop, model_files

# What ComfyUI imports without asking for it: 0.3.64 got it from the huggingface-hub of its day.
UNASKED = ["requests"]
[HOST] = find_hosts(None)[-1:] or [None]
pytestmark = pytest.mark.skipif(HOST is None, reason="THE CLEAN ENVIRONMENT IS NOT TESTED: no ComfyUI found")


def closure(requirements: list[str]) -> set[str]:
    """Every installed distribution that these requirements bring."""
    found, waiting = set(), [(requirement, "") for requirement in requirements]
    while waiting:
        text, extra = waiting.pop()
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        try:
            needs = distribution(requirement.name).requires or []
        except PackageNotFoundError:
            continue  # for another system, or of another ComfyUI
        for each in requirement.extras or {""}:
            if (requirement.name, each) not in found:
                found.add((requirement.name, each))
                waiting += [(needed, each) for needed in needs]
    return {name for name, _ in found}


def link(name: str, site: Path) -> None:
    """Put a distribution into `site` as links; folders that several may share become folders of links."""
    installed = distribution(name)
    tops = {file.parts[0] for file in installed.files or [] if file.parts[0] not in ("..", "__pycache__", "bin")}
    for top in tops:
        source = Path(installed.locate_file(top))
        whole = source.is_file() or (source / "__init__.py").is_file() or source.suffix in (".dist-info", ".libs")
        for path in [source] if whole else [child for child in source.iterdir() if child.name != "__pycache__"]:
            target = site / path.relative_to(source.parent)
            target.parent.mkdir(exist_ok=True)
            if not target.exists():
                target.symlink_to(path)


class CleanEnvironment(develop.Environment):
    def run(self, *arguments: str | Path) -> subprocess.CompletedProcess:
        variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "COMFYUI")}
        command = [str(self.python), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=variables, cwd=self.folder)

    def versions(self) -> dict[str, str]:
        listed = json.loads(self.run("-m", "pip", "list", "--format", "json", "--disable-pip-version-check").stdout)
        return {canonicalize_name(entry["name"]): entry["version"] for entry in listed}


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    made = CleanEnvironment(tmp_path_factory.mktemp("clean") / "venv")
    made.create()
    site = Path(made.run("-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip())
    for name in closure([*develop.host_requirements(HOST), "torch", "torchvision", *UNASKED]):
        link(name, site)
    return made


ENTER = """
import asyncio, sys
from pulid_sdxl.tools import comfy_host
comfy_host.enter(sys.argv[1])
import pulid_sdxl
nodes = asyncio.run(asyncio.run(pulid_sdxl.comfy_entrypoint()).get_node_list())
print(*sorted(node.define_schema().node_id for node in nodes))
"""
WORK = (
    ENTER
    + """
import folder_paths, skimage.data, torch
from pathlib import Path
models = Path(sys.argv[2])
for name in ("pulid", "clip_vision", "insightface", "facexlib"):
    folder_paths.add_model_folder_path(name, str(models / name), is_default=True)
by_id = {node.define_schema().node_id: node for node in nodes}
with torch.inference_mode():
    [pulid] = by_id["PuLID_Loader"].execute(
        "pulid_v1.1.safetensors", "EVA02_CLIP_L_336_psz14_s6B.pt", "antelopev2", "auto", "stop").result
    photo = torch.from_numpy(skimage.data.astronaut().copy())[None].float() / 255
    inputs = pulid, photo, "largest", 0, "one person", False, "stop"
    identity = by_id["PuLID_Encode"].execute(*([one] for one in inputs)).result[0]
print("TOKENS", *identity.cond.shape, bool(identity.cond.isfinite().all()))
"""
)


def test_nothing_of_ours_is_there_yet(environment):
    there = environment.versions()
    assert {"torch", "numpy", "aiohttp", "huggingface-hub", "filelock"} <= set(there)  # the last two for downloads
    assert not {"insightface", "facexlib", "onnxruntime", "opencv-python", "timm"} & set(there)


def test_the_pack_loads_with_comfyuis_requirements_alone(environment):
    done = environment.run(TOOLS, "-c", ENTER, HOST)
    assert "PuLID_Loader" in done.stdout, done.stderr[-2000:]
    assert "PuLID_Encode" in done.stdout


def test_the_node_names_the_missing_package_and_its_command(environment):
    code = "from pulid_sdxl.models.onnx_providers import available_providers\navailable_providers()"
    done = environment.run(TOOLS, "-c", code)
    assert "The Python package 'onnxruntime' is not installed" in done.stderr
    assert f'"{environment.python}" -m pip install --upgrade onnxruntime' in done.stderr


def test_requirements_change_nothing_that_was_there_and_the_nodes_then_work(environment, tmp_path):
    before = environment.versions()
    pip = ("-m", "pip", "install", "--disable-pip-version-check", "--quiet", "-r", ROOT / "requirements.txt")
    planned = environment.run(*pip, "--dry-run", "--report", "-")
    if planned.returncode:
        pytest.skip(f"THE CLEAN ENVIRONMENT IS NOT TESTED: pip cannot reach an index: {planned.stderr[-300:]}")
    wanted = {entry["metadata"]["name"].lower() for entry in json.loads(planned.stdout)["install"]}
    assert not wanted & set(before), "pip would replace what is there"  # before anything could follow a link
    assert {"insightface", "facexlib", "onnxruntime"} <= wanted

    pins = tmp_path / "pins.txt"
    pins.write_text("".join(f"{name}=={version}\n" for name, version in before.items() if name != "pip"))
    installed = environment.run(*pip, "--no-compile", "--constraint", pins)
    assert installed.returncode == 0, installed.stderr[-2000:]

    after = environment.versions()
    assert {name: after.get(name) for name in before} == before
    models = tmp_path / "models"
    for file in model_files.gather(None, None, HOST):
        place = models / file.place
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(file.source)
    done = environment.run(TOOLS, "-c", WORK, HOST, models)
    assert "TOKENS 1 32 2048 True" in done.stdout, done.stderr[-3000:]
    print(f"{len(after) - len(before)} packages added to {len(before)}; none changed", file=sys.stderr)
