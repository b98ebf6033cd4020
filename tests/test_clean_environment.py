"""A Python with nothing but ComfyUI's own requirements: the pack loads there, works after requirements.txt, and pip
changes nothing that was there.

The Python is made of links into the one that runs the tests, package by package, as far as ComfyUI's requirements
reach: a download of torch would take minutes and prove no more.
"""

import json
import os
import subprocess
import sys
import venv
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from pulid_sdxl.tools import parts

ROOT = Path(__file__).parents[1]
TOOLS = ROOT / "tools"
NOT_NEEDED = {"torchaudio", "comfyui-workflow-templates", "comfyui-embedded-docs"}  # left out of .venv, see run.py

# What ComfyUI imports without asking for it: 0.3.64 got it from the huggingface-hub of its day.
UNASKED = ["requests"]


def comfyui() -> Path | None:
    given = os.environ.get("COMFYUI_PATH", "").split(os.pathsep)[-1]
    found = (Path(place) for place in (given, Path.home() / "comfy" / "ComfyUI", ROOT / ".cache" / "ComfyUI") if place)
    return next((place for place in found if (place / "requirements.txt").is_file()), None)


HOST = comfyui()
pytestmark = pytest.mark.skipif(HOST is None, reason="THE CLEAN ENVIRONMENT IS NOT TESTED: no ComfyUI found")


def closure(requirements: list[str]) -> dict[str, str]:
    """Every distribution that these requirements bring, with its installed version."""
    found, waiting = {}, [(requirement, "") for requirement in requirements]
    while waiting:
        text, extra = waiting.pop()
        requirement = Requirement(text)
        name = requirement.name.lower().replace("_", "-").replace(".", "-")
        if name in NOT_NEEDED or (requirement.marker and not requirement.marker.evaluate({"extra": extra})):
            continue
        try:
            installed = distribution(requirement.name)
        except PackageNotFoundError:
            continue  # for another system, or of another ComfyUI
        extras = requirement.extras or {""}
        if (name, *sorted(extras)) not in found:
            found[(name, *sorted(extras))] = installed.version
            waiting += [(needed, each) for needed in installed.requires or [] for each in extras]
    return {key[0]: version for key, version in found.items()}


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


class Environment:
    def __init__(self, folder: Path):
        venv.create(folder, with_pip=True)
        self.python = next(path for path in (folder / "bin/python", folder / "Scripts/python.exe") if path.exists())
        self.site = Path(self.run("-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip())

    def run(self, *arguments: str) -> subprocess.CompletedProcess:
        variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "COMFYUI")}
        command = [str(self.python), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=variables, cwd=TOOLS)

    def versions(self) -> dict[str, str]:
        listed = json.loads(self.run("-m", "pip", "list", "--format", "json", "--disable-pip-version-check").stdout)
        return {entry["name"].lower().replace("_", "-").replace(".", "-"): entry["version"] for entry in listed}


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    made = Environment(tmp_path_factory.mktemp("clean") / "venv")
    lines = (line.split("#")[0].strip() for line in (HOST / "requirements.txt").read_text("utf-8").splitlines())
    for name in closure([*(line for line in lines if line), *UNASKED]):
        link(name, made.site)
    return made


ENTER = """
import asyncio, sys
sys.path.insert(0, sys.argv[1])
from pulid_sdxl.tools import comfy_host
comfy_host.enter(sys.argv[2])
import pulid_sdxl
nodes = asyncio.run(asyncio.run(pulid_sdxl.comfy_entrypoint()).get_node_list())
print(*sorted(node.define_schema().node_id for node in nodes))
"""
WORK = (
    ENTER
    + """
import folder_paths, skimage.data, torch
from pathlib import Path
models = Path(sys.argv[3])
for name in ("pulid", "clip_vision", "insightface", "facexlib"):
    folder_paths.add_model_folder_path(name, str(models / name), is_default=True)
by_id = {node.define_schema().node_id: node for node in nodes}
with torch.inference_mode():
    [pulid] = by_id["PuLID_Loader"].execute(
        "pulid_v1.1.safetensors", "EVA02_CLIP_L_336_psz14_s6B.pt", "antelopev2", "auto", "stop").result
    photo = torch.from_numpy(skimage.data.astronaut().copy())[None].float() / 255
    identity = by_id["PuLID_Encode"].execute(pulid, photo, "largest", 0, "one person", False, "stop").result[0]
print("TOKENS", *identity.cond.shape, bool(identity.cond.isfinite().all()))
"""
)


def test_nothing_of_ours_is_there_yet(environment):
    there = environment.versions()
    assert {"torch", "numpy", "aiohttp"} <= set(there)
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
    installed = environment.run(*pip, "--constraint", pins)
    assert installed.returncode == 0, installed.stderr[-2000:]

    after = environment.versions()
    assert {name: after.get(name) for name in before} == before
    models = tmp_path / "models"
    for part in parts.gather(None, None, HOST):
        place = models / part.place
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(part.source)
    done = environment.run("-c", WORK, TOOLS, HOST, models)
    assert "TOKENS 1 32 2048 True" in done.stdout, done.stderr[-3000:]
    print(f"{len(after) - len(before)} packages added to {len(before)}; none changed", file=sys.stderr)
