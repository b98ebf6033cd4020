"""Every file this pack can use: its name, its place under ComfyUI's `models/`, where it comes from, and its licence.

This is the only place that names files, addresses, sizes and hashes. `None` means that nobody has published the value.
"""

import re
from dataclasses import dataclass


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


PULID = ("pulid",)
VISION = ("clip_vision", "eva_clip", "text_encoders", "clip")
ANTELOPEV2 = ("insightface/models/antelopev2",)
FACEXLIB = ("facexlib",)

RESEARCH_ONLY = "non-commercial research only"
TIMM_NAME = "eva02_large_patch14_clip_336.merged2b_s6b_b61k"
FACEXLIB_RELEASES = "https://github.com/xinntao/facexlib/releases/download"

# The commits are those that public code pins and has fetched these bytes from.
V1_COMMIT = "810eab2a6746efb73ed7f2502bf46b1c453d5cf1"
PULID_COMMIT = "d58b3ba191be1280c37ace0656a2e65cd9b8c8d8"
EVA_CLIP_COMMIT = "11afd202f2ae80869d6cef18b1ec775e79bd8d12"
TIMM_COMMIT = "4f62907359c8506be7021582f360564693b22c15"
ANTELOPEV2_COMMIT = "ba0c3e10f4548361eb9a63265d87ce1140ab5a05"

V1 = WeightFile(
    name="ip-adapter_pulid_sdxl_fp16.safetensors",
    folders=PULID,
    copies=(Copy("huchenlei/ipadapter_pulid", "ip-adapter_pulid_sdxl_fp16.safetensors", V1_COMMIT),),
    licence="Apache-2.0",
    needed_for="PuLID v1, converted to safetensors: the better choice on SDXL-Lightning with 4 steps",
    size=791372856,
)
V1_1 = WeightFile(
    name="pulid_v1.1.safetensors",
    folders=PULID,
    copies=(Copy("guozinan/PuLID", "pulid_v1.1.safetensors", PULID_COMMIT),),
    licence="Apache-2.0",
    needed_for="PuLID v1.1: the better choice on most SDXL checkpoints",
    size=984405232,
    sha256="4cb8ceec1078e0165399b88332ab3c5971619111b8e1730e6bae64144aabae41",
)
V1_PICKLE = WeightFile(
    name="pulid_v1.bin",
    folders=PULID,
    copies=(Copy("guozinan/PuLID", "pulid_v1.bin", PULID_COMMIT),),
    licence="Apache-2.0",
    needed_for="PuLID v1 as the authors published it",
)
EVA_CLIP = WeightFile(
    name="EVA02_CLIP_L_336_psz14_s6B.pt",
    folders=VISION,
    copies=(Copy("QuanSun/EVA-CLIP", "EVA02_CLIP_L_336_psz14_s6B.pt", EVA_CLIP_COMMIT),),
    licence="MIT",
    needed_for="the vision tower that looks at the face",
    size=856461210,
    sha256="84c3a17a228c567a155259b2245b0b59072bf7da510260a0a02ec54de6d50b05",
)
EVA_CLIP_TIMM = WeightFile(
    name=f"{TIMM_NAME}.safetensors",
    folders=VISION,
    copies=(Copy(f"timm/{TIMM_NAME}", "open_clip_model.safetensors", TIMM_COMMIT),),
    licence="MIT",
    needed_for="the same vision tower without a pickle",
    size=856239456,
    sha256="f753bca0e8327f77e8845b0af2510d599c3e4614237007b48078c791f2cf391c",
)
SCRFD = WeightFile(
    name="scrfd_10g_bnkps.onnx",
    folders=ANTELOPEV2,
    copies=(
        Copy("DIAMONIK7777/antelopev2", "scrfd_10g_bnkps.onnx", ANTELOPEV2_COMMIT),
        Copy("camenduru/PuLID", "antelopev2/scrfd_10g_bnkps.onnx"),
    ),
    licence=RESEARCH_ONLY,
    needed_for="finding faces",
    size=16923827,
    sha256="5838f7fe053675b1c7a08b633df49e7af5495cee0493c7dcf6697200b85b5b91",
)
GLINTR100 = WeightFile(
    name="glintr100.onnx",
    folders=ANTELOPEV2,
    copies=(
        Copy("DIAMONIK7777/antelopev2", "glintr100.onnx", ANTELOPEV2_COMMIT),
        Copy("camenduru/PuLID", "antelopev2/glintr100.onnx"),
    ),
    licence=RESEARCH_ONLY,
    needed_for="recognising a face",
    size=260665334,
    sha256="4ab1d6435d639628a6f3e5008dd4f929edf4c4124b1a7169e1048f9fef534cdf",
)
ANTELOPEV2_ZIP = WeightFile(
    name="antelopev2.zip",
    folders=("insightface/models",),
    copies=(),
    licence=RESEARCH_ONLY,
    needed_for="both antelopev2 files at once, put there by hand; the loader unpacks it",
    size=360662982,
    sha256="8e182f14fc6e80b3bfa375b33eb6cff7ee05d8ef7633e738d1c89021dcf0c5c5",
    by_hand="https://github.com/deepinsight/insightface/releases/download/v0.7/antelopev2.zip",
)
RETINAFACE = WeightFile(
    name="detection_Resnet50_Final.pth",
    folders=FACEXLIB,
    copies=(
        Copy("camenduru/PuLID", "facexlib/detection_Resnet50_Final.pth"),
        Copy("leonelhs/facexlib", "detection_Resnet50_Final.pth"),
    ),
    licence="MIT",
    needed_for="the five landmarks that a face is aligned by",
    size=109497761,
    sha256="6d1de9c2944f2ccddca5f5e010ea5ae64a39845a86311af6fdf30841b0a5a16d",
    by_hand=f"{FACEXLIB_RELEASES}/v0.1.0/detection_Resnet50_Final.pth",
)
BISENET = WeightFile(
    name="parsing_bisenet.pth",
    folders=FACEXLIB,
    copies=(
        Copy("camenduru/PuLID", "facexlib/parsing_bisenet.pth"),
        Copy("leonelhs/facexlib", "parsing_bisenet.pth"),
    ),
    licence="MIT",
    needed_for="telling the face from its background",
    size=53289463,
    sha256="468e13ca13a9b43cc0881a9f99083a430e9c0a38abd935431d1c28ee94b26567",
    by_hand=f"{FACEXLIB_RELEASES}/v0.2.0/parsing_bisenet.pth",
)

NEEDS = (
    Need("pulid_file", (V1_1, V1, V1_PICKLE)),
    Need("eva_clip", (EVA_CLIP, EVA_CLIP_TIMM)),
    Need("face_analysis", (SCRFD,)),
    Need("face_analysis", (GLINTR100,)),
    Need("face_analysis", (RETINAFACE,)),
    Need("face_analysis", (BISENET,)),
)
CATALOGUE = (*(file for need in NEEDS for file in need.files), ANTELOPEV2_ZIP)
BY_NAME = {file.name: file for file in CATALOGUE}


def choices(need_input: str) -> tuple[WeightFile, ...]:
    """The files that an input of the loader can name."""
    return tuple(file for need in NEEDS if need.input == need_input for file in need.files)


def workflow_hint(file: WeightFile) -> dict[str, str]:
    """What a workflow says of a file in `properties.models`, so that ComfyUI's editor offers to fetch it."""
    hint = {"name": file.name, "url": file.url, "directory": file.folders[0]}
    return hint | ({"hash": file.sha256, "hash_type": "SHA256"} if file.sha256 else {})


def markdown_table() -> str:
    """The table of the README: every file, what it is for, its size, its licence and what a download is checked by."""
    rows = ["| file under `models/` | for | size | licence | checked by |", "|---|---|---|---|---|"]
    for file in CATALOGUE:
        size = f"{file.size / 1e6:.0f} MB" if file.size else ""
        licence = f"**{file.licence}**" if file.licence == RESEARCH_ONLY else file.licence
        rows.append(f"| [`{file.place}`]({file.url}) | {file.needed_for} | {size} | {licence} | {file.checked_by} |")
    return "\n".join(rows)
