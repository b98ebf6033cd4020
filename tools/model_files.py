"""The files a picture needs: real ones where they are installed, otherwise stand-ins made on the spot and named so."""

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ..models import catalogue, locate
from ..pulid.errors import MissingWeights
from . import ROOT, TOOLS

FAKES = TOOLS / "fakes"
CACHE = ROOT / ".cache" / "standins"
STANDIN_CHECKPOINT = "standin_sdxl_fifth_width.safetensors"
FIFTH = 0.2  # width of the stand-in UNet, relative to SDXL

# What the stand-ins are made by: when one of these changes, they are made anew.
MAKERS = (
    FAKES / "standins.py",
    FAKES / "standin_faces.py",
    FAKES / "standin_checkpoint.py",
    FAKES / "standin_host" / "__init__.py",
    ROOT / "pulid" / "eva.py",
    ROOT / "pulid" / "encoders.py",
)


@dataclass(frozen=True)
class ModelFile:
    """One file.

    what    in the user's words
    place   where it belongs, relative to a ComfyUI `models` folder
    source  where it lies
    real    as its maker published it, or a stand-in
    note    what a stand-in keeps of the real thing
    """

    what: str
    place: str
    source: Path
    real: bool
    note: str = ""

    @property
    def name(self) -> str:
        return Path(self.place).name


def gather(models: Path | None, checkpoint: Path | None, comfyui: Path | None) -> list[ModelFile]:
    """All files of the workflow, those of the networks that make the picture first.

    models      the `models` folder to look for real files in
    checkpoint  an SDXL checkpoint; without one it and the PuLID file, whose widths belong together, are stand-ins
    comfyui     gives the stand-in checkpoint its names and shapes; without it there is no checkpoint among the files
    """
    files = []
    if checkpoint:
        files.append(ModelFile("SDXL checkpoint", f"checkpoints/{checkpoint.name}", checkpoint.resolve(), True))
    elif comfyui:
        place = f"checkpoints/{STANDIN_CHECKPOINT}"
        made = standins("checkpoint", lambda folder: make_checkpoint(comfyui, folder / place))
        note = "random weights, a fifth of the width, all 70 sites"
        files.append(ModelFile("SDXL checkpoint", place, made / place, False, note))

    width = 1.0 if checkpoint else FIFTH
    for what, record, group, note in WANTED:
        place = f"{record.folders[0]}/{record.name}"
        real = None if record is catalogue.V1_1 and not checkpoint else installed(models, record)
        if real:
            files.append(ModelFile(what, place, real, True))
        else:
            group = f"{group}-{width:g}" if group == "pulid" else group
            made = standins(group, partial(make_standins, record=record, width=width))
            files.append(ModelFile(what, place, made / place, False, note))
    return files


WANTED = (  # in the user's words, the file, the stand-ins that it is made with, what a stand-in keeps of the real thing
    ("PuLID v1.1", catalogue.V1_1, "pulid", "random weights, the real encoder, projections as wide as the UNet's"),
    ("vision tower", catalogue.EVA_CLIP, "eva", "random weights, the real architecture"),
    ("face detector", catalogue.SCRFD, "faces", "CenterFace, trained, speaking as SCRFD"),
    ("face recogniser", catalogue.GLINTR100, "faces", "a small random network"),
    ("face landmarks", catalogue.RETINAFACE, "faces", "the real architecture, sees no face"),
    ("face parsing", catalogue.BISENET, "faces", "the real architecture, one rounded shape"),
)


def installed(models: Path | None, record: catalogue.WeightFile) -> Path | None:
    """Where the real file lies, if it does."""
    if models is None:
        return None
    try:
        if record.folders == catalogue.ANTELOPEV2:
            return locate.find_antelopev2([models / "insightface"]) / record.name
        return locate.find(record, [models / folder for folder in record.folders])
    except MissingWeights:
        return None


def standins(group: str, make: Callable[[Path], None]) -> Path:
    """A folder of stand-ins, laid out like `models`; made if it is not there yet, never left half-made."""
    digest = hashlib.sha256(b"".join(maker.read_bytes() for maker in MAKERS)).hexdigest()[:12]
    for old in CACHE.glob("*"):
        if old.name != digest:
            shutil.rmtree(old)
    folder = CACHE / digest / group
    if not folder.is_dir():
        partial = folder.with_name(f"{group}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        for place in ("checkpoints", "pulid", "clip_vision"):
            (partial / place).mkdir(parents=True)
        make(partial)
        for file in partial.glob("*/**/*.*"):
            file.chmod(0o644)  # as a download has it; safetensors leaves it to its user alone
        partial.rename(folder)
    return folder


def make_checkpoint(comfyui: Path, path: Path) -> None:
    # In a process of its own, since it takes a ComfyUI into its process.
    command = [sys.executable, str(TOOLS), "fakes.standin_checkpoint", str(comfyui), str(path)]
    made = subprocess.run(command, capture_output=True, text=True)
    if made.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{made.stderr[-2000:]}")


def make_standins(folder: Path, record: catalogue.WeightFile, width: float) -> None:
    from .fakes import standin_faces, standins  # torch and onnx take seconds: only when something has to be made

    if record is catalogue.V1_1:
        standins.make_pulid(folder / "pulid" / record.name, layout="v1.1", width_scale=width)
    elif record is catalogue.EVA_CLIP:
        standins.make_eva(folder / "clip_vision" / record.name)
    else:
        standin_faces.make_face_models(folder)
