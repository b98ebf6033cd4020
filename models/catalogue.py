"""Every file this pack can use: its name, its place under ComfyUI's `models/`, where it comes from, and its licence.

The table is catalogue.json, the only place that names addresses, sizes and hashes; what is not there, nobody has
published. Commits are those that public code pins and has fetched these bytes from.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Copy:
    """Where a file lies on Hugging Face. A revision of 40 hex digits is a commit, whose files never change."""

    repo_id: str
    path: str
    revision: str = "main"

    @property
    def url(self) -> str:
        return f"https://huggingface.co/{self.repo_id}/resolve/{self.revision}/{self.path}"

    @property
    def pinned(self) -> bool:
        return re.fullmatch(r"[0-9a-f]{40}", self.revision) is not None


@dataclass(frozen=True)
class WeightFile:
    """One file as its maker publishes it.

    name        what it is called on disk
    folders     where it may lie under `models/`, each beginning with ComfyUI's name of a folder; put it in the first
    copies      where to fetch it, in order; the hash decides which bytes are right
    licence     what its maker allows
    needed_for  what it does here, in the user's words
    size        bytes
    sha256      of the whole file, lower-case hex
    by_hand     the maker's own address, where that is not the first of the copies
    """

    name: str
    folders: tuple[str, ...]
    copies: tuple[Copy, ...]
    licence: str
    needed_for: str
    size: int | None = None
    sha256: str | None = None
    by_hand: str | None = None

    @property
    def url(self) -> str:
        """The address to fetch it from by hand."""
        return self.by_hand or self.copies[0].url

    @property
    def place(self) -> str:
        """Where to put it, relative to `models/`."""
        return f"{self.folders[0]}/{self.name}"

    @property
    def checked_by(self) -> str:
        """What a download is checked by, in the user's words."""
        if self.sha256:
            return "sha256"
        pin = "at a fixed commit" if all(copy.pinned for copy in self.copies) else "not pinned"
        return f"{'size and ' if self.size else ''}content, {pin}: no hash is published"


@dataclass(frozen=True)
class Need:
    """Something a node cannot do without.

    input  of the node PuLID_Loader
    files  one of these will do; the first is the one to fetch
    """

    input: str
    files: tuple[WeightFile, ...]


RESEARCH_ONLY = "non-commercial research only"


def _read(record: dict[str, Any]) -> WeightFile:
    copies = tuple(Copy(**copy) for copy in record["copies"])
    return WeightFile(**{**record, "folders": tuple(record["folders"]), "copies": copies})


CATALOGUE = tuple(map(_read, json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))))
BY_NAME = {file.name: file for file in CATALOGUE}

V1_1 = BY_NAME["pulid_v1.1.safetensors"]
V1 = BY_NAME["ip-adapter_pulid_sdxl_fp16.safetensors"]
V1_PICKLE = BY_NAME["pulid_v1.bin"]
EVA_CLIP = BY_NAME["EVA02_CLIP_L_336_psz14_s6B.pt"]
EVA_CLIP_TIMM = BY_NAME["eva02_large_patch14_clip_336.merged2b_s6b_b61k.safetensors"]
SCRFD = BY_NAME["scrfd_10g_bnkps.onnx"]
GLINTR100 = BY_NAME["glintr100.onnx"]
RETINAFACE = BY_NAME["detection_Resnet50_Final.pth"]
BISENET = BY_NAME["parsing_bisenet.pth"]
ANTELOPEV2_ZIP = BY_NAME["antelopev2.zip"]
PULID, VISION, ANTELOPEV2, FACEXLIB = (file.folders for file in (V1_1, EVA_CLIP, SCRFD, BISENET))

NEEDS = (
    Need("pulid_file", (V1_1, V1, V1_PICKLE)),
    Need("eva_clip", (EVA_CLIP, EVA_CLIP_TIMM)),
    Need("face_analysis", (SCRFD,)),
    Need("face_analysis", (GLINTR100,)),
    Need("face_analysis", (RETINAFACE,)),
    Need("face_analysis", (BISENET,)),
)


def choices(need_input: str) -> tuple[WeightFile, ...]:
    """The files that an input of the loader can name."""
    return tuple(file for need in NEEDS if need.input == need_input for file in need.files)
