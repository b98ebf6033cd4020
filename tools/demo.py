"""The demo: the shipped workflow on a real photograph, through ComfyUI's own server, with whatever weights are there.

    python3 run.py demo [--photo FILE] [--checkpoint FILE] [--seed N] [--steps N] [--size WIDTHxHEIGHT]

Files that are not installed are replaced by stand-ins of the real architecture, made on the spot and named as such.
"""

import argparse
import hashlib
import io
import json
import shutil
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

from ..pulid.errors import InputError, PulidError
from . import ROOT, TOOLS
from . import arguments as command_line
from .arguments import QUICK_STEPS
from .comfy_server import ComfyServer, ServerError, link
from .model_files import ModelFile, gather
from .workflow import BYPASSED, ObjectInfo, Prompt, Workflow, WorkflowError, find, set_inputs, to_prompt

BASE = ROOT / ".cache" / "demo"
OUTPUT = ROOT / "output"
WORKFLOW = ROOT / "workflows" / "pulid_01_simple.json"
# Without a GPU and with a stand-in checkpoint there is nothing to see in more pixels or steps.
QUICK_SIZE = 448, 576
# What stands in, when there is no ComfyUI, for things that are no files.
WITHOUT_COMFYUI = {
    "SDXL UNet": "diffusers', random weights, a fifth of the width, all 70 sites",
    "autoencoder": "diffusers', random weights, a quarter of the width",
    "prompt": "random numbers",
}

started = time.monotonic()


def say(line: str = "") -> None:
    print(f"[{time.monotonic() - started:6.1f} s] {line}" if line else "", flush=True)


def prepare_photo(folder: Path, photo: Path | None) -> str:
    """Put the photograph, by default NASA's of Eileen Collins (public domain), into ComfyUI's input folder.

    Raises InputError where it is damaged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if photo:
        content = photo.read_bytes()
        try:
            Image.open(io.BytesIO(content)).load()
        except (OSError, SyntaxError, ValueError) as error:  # all that Pillow raises
            raise InputError(f"{photo} cannot be read: {error}. Use a whole PNG, JPEG or WebP file.") from error
        (folder / photo.name).write_bytes(content)
        return photo.name
    import skimage.data

    Image.fromarray(skimage.data.astronaut()).save(folder / "astronaut.png")
    return "astronaut.png"


def prepare_base(base: Path, files: list[ModelFile]) -> None:
    """A base directory for ComfyUI: this pack, and links to the files, under the names the workflow knows."""
    for folder in ("custom_nodes", "models"):
        shutil.rmtree(base / folder, ignore_errors=True)
    link(ROOT, base / "custom_nodes" / "pulid-sdxl")
    if not checkpoint_of(files).real:
        link(TOOLS / "fakes" / "standin_host", base / "custom_nodes" / "standin_host")
    for file in files:
        link(file.source, base / "models" / file.place)


def checkpoint_of(files: list[ModelFile]) -> ModelFile:
    return next(file for file in files if file.place.startswith("checkpoints/"))


def print_table(photo: str, files: list[ModelFile], notes: dict[str, str]) -> None:
    """What is real and what is not. notes: further stand-ins, which are no files, and what they are."""
    rows = [("photograph", True, photo)]
    rows += [(what, False, note) for what, note in notes.items()]
    rows += [(file.what, file.real, f"{file.name}: {file.note}" if file.note else file.name) for file in files]
    print()
    for what, real, detail in rows:
        print(f"  {what:<16} {'real' if real else 'STAND-IN':<9} {detail}")
    print(flush=True)


def prompt_for(
    workflow: Workflow, info: ObjectInfo, arguments: argparse.Namespace, photo: str, files: list[ModelFile]
) -> Prompt:
    """The shipped workflow with the demo's few inputs."""
    prompt = to_prompt(workflow, info)
    checkpoint = checkpoint_of(files)
    set_inputs(prompt, "LoadImage", image=photo)
    set_inputs(prompt, "CheckpointLoaderSimple", ckpt_name=checkpoint.name)
    set_inputs(prompt, "KSampler", seed=arguments.seed)
    quick_steps, quick_size = (None, None) if checkpoint.real else (QUICK_STEPS, QUICK_SIZE)
    if steps := arguments.steps or quick_steps:
        set_inputs(prompt, "KSampler", steps=steps)
    if pixels := arguments.size or quick_size:
        set_inputs(prompt, "EmptyLatentImage", width=pixels[0], height=pixels[1])
    return prompt


def without_identity(workflow: Workflow) -> Workflow:
    """The same workflow with the Apply node bypassed, and nothing previewed."""
    modes = {"PuLID_Apply": BYPASSED, "PreviewImage": BYPASSED}
    return {**workflow, "nodes": [{**node, "mode": modes.get(node["type"], 0)} for node in workflow["nodes"]]}


def through_comfyui(arguments: argparse.Namespace, photo: str, files: list[ModelFile]) -> tuple[Path, Path]:
    """Run the shipped workflow on ComfyUI's server; returns the files of the picture and of the face."""
    import torch

    workflow = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    prepare_base(BASE, files)
    cpu = () if torch.accelerator.is_available() else ("--cpu",)
    say(f"Starting ComfyUI ({arguments.comfyui}){' on the CPU' if cpu else ''}")
    server = ComfyServer(arguments.comfyui, BASE, ("--output-directory", str(OUTPUT), *cpu))
    try:
        with server:
            info = server.object_info()
            prompt = prompt_for(workflow, info, arguments, photo, files)
            outputs = server.run(prompt, report=say)
            picture = saved_file(outputs, prompt)
            [preview] = outputs[find(prompt, "PreviewImage")]["images"]
            face = picture.with_name(f"{picture.stem}face.png")  # ComfyUI's names end in _
            face.write_bytes(server.picture(preview))
            if not checkpoint_of(files).real:
                say("Once more without PuLID, to see what it changes")
                plain = prompt_for(without_identity(workflow), info, arguments, photo, files)
                set_inputs(plain, "SaveImage", filename_prefix="without_PuLID")
                say_difference(Image.open(picture), Image.open(saved_file(server.run(plain, report=say), plain)))
    except ServerError as error:
        raise ServerError(f"{error}\n  ComfyUI's log: {server.log_file}") from error
    return picture, face


def saved_file(outputs: dict, prompt: dict) -> Path:
    [saved] = outputs[find(prompt, "SaveImage")]["images"]
    return OUTPUT / saved["subfolder"] / saved["filename"]


def through_diffusers(arguments: argparse.Namespace, photo: str, files: list[ModelFile]) -> tuple[Path, Path]:
    """Make a picture with the pack's own code on diffusers' UNet; returns the files of the picture and of the face."""
    from . import demo_diffusers

    steps, pixels = arguments.steps or QUICK_STEPS, arguments.size or QUICK_SIZE
    made = demo_diffusers.make(BASE / "input" / photo, files, arguments.seed, steps, pixels, say)
    OUTPUT.mkdir(exist_ok=True)
    picture, face = OUTPUT / "without_ComfyUI.png", OUTPUT / "without_ComfyUI_face.png"
    made.picture.save(picture)
    made.face.save(face)
    say_difference(made.picture, made.without)
    return picture, face


def say_difference(one: Image.Image, other: Image.Image) -> None:
    change = np.abs(np.asarray(one, dtype=np.float32) - np.asarray(other, dtype=np.float32)).mean()
    say(f"PuLID changes each channel of each pixel by {change:.1f} of 255 on average")


def next_steps(comfyui: Path | None) -> str:
    """How to get a picture that shows the person, where the demo had stand-ins."""
    folder = comfyui or "FOLDER"
    lines = ["", "For a real picture:"]
    if comfyui is None:
        lines.append("  install ComfyUI in a FOLDER: https://docs.comfy.org/installation")
    lines.append(f"  python3 run.py models --comfyui {folder} --download")
    lines.append(f"  python3 run.py demo --comfyui {folder} --checkpoint SDXL.safetensors --photo FACE.jpg")
    if comfyui:
        lines += [
            "To look at the stand-ins in ComfyUI's editor, with the Python that starts your ComfyUI:",
            f"  python {comfyui / 'main.py'} --base-directory {BASE}",
        ]
    return "\n".join(lines)


def main() -> int:
    arguments = command_line.demo()
    try:
        photo = prepare_photo(BASE / "input", arguments.photo)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    if arguments.comfyui is None:
        print("!" * 100 + "\nNO COMFYUI: a picture through diffusers' SDXL UNet instead.\n" + "!" * 100, flush=True)
        if arguments.checkpoint:
            say("--checkpoint needs ComfyUI; going on with random weights")
            arguments.checkpoint = None
    say("Gathering the files (stand-ins are made once)")
    models = arguments.comfyui / "models" if arguments.comfyui else None
    files = gather(models, arguments.checkpoint, arguments.comfyui)
    notes = {} if arguments.comfyui else WITHOUT_COMFYUI
    print_table(photo, files, notes)
    try:
        picture, face = (through_comfyui if arguments.comfyui else through_diffusers)(arguments, photo, files)
    except (ServerError, WorkflowError, PulidError) as error:
        say(f"FAILED: {error}")
        return 1

    pixels = Image.open(picture).convert("RGB")
    real = ["the photograph", *([f"ComfyUI and its sampling, {WORKFLOW.name}"] if arguments.comfyui else [])]
    real += [file.what for file in files if file.real]
    standins = [*notes, *(file.what for file in files if not file.real)]
    print(f"\n  picture   {picture}  ({pixels.width} x {pixels.height})")
    print(f"  face      {face}  (what the vision tower sees)")
    print(f"  pixels    sha256 {hashlib.sha256(pixels.tobytes()).hexdigest()}")
    print(f"  real      {', '.join(real)}")
    if standins:
        noise = "" if arguments.checkpoint else " (so the picture is noise)"
        print(f"  stand-in  {', '.join(standins)}{noise}")
    say("Done")
    if standins:
        print(next_steps(arguments.comfyui), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
