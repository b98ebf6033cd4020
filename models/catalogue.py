"""Every file this pack can use: its name, its place under ComfyUI's `models/`, where it comes from, and its licence.

This is the only place that names files, addresses, sizes and hashes. `None` means that nobody has published the value.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class WeightFile:
    """One file as its maker publishes it.

    name        what it is called on disk
    folders     where it may lie under `models/`, each beginning with ComfyUI's name of a folder; put it in the first
    address     where to fetch it, with a place for `revision`
    revision    branch, commit or release tag of the address
    licence     what its maker allows
    needed_for  what it does here, in the user's words
    size        bytes
    sha256      of the whole file, lower-case hex
    """

    name: str
    folders: tuple[str, ...]
    address: str
    revision: str
    licence: str
    needed_for: str
    size: int | None = None
    sha256: str | None = None

    @property
    def url(self) -> str:
        return self.address.format(revision=self.revision)

    @property
    def place(self) -> str:
        """Where to put it, relative to `models/`."""
        return f"{self.folders[0]}/{self.name}"


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

V1 = WeightFile(
    name="ip-adapter_pulid_sdxl_fp16.safetensors",
    folders=PULID,
    address="https://huggingface.co/huchenlei/ipadapter_pulid/resolve/{revision}/ip-adapter_pulid_sdxl_fp16.safetensors",
    revision="main",
    licence="Apache-2.0",
    needed_for="PuLID v1, converted to safetensors: the better choice on SDXL-Lightning with 4 steps",
    size=791372856,
)
V1_1 = WeightFile(
    name="pulid_v1.1.safetensors",
    folders=PULID,
    address="https://huggingface.co/guozinan/PuLID/resolve/{revision}/pulid_v1.1.safetensors",
    revision="main",
    licence="Apache-2.0",
    needed_for="PuLID v1.1: the better choice on every other SDXL checkpoint",
    size=984405232,
    sha256="4cb8ceec1078e0165399b88332ab3c5971619111b8e1730e6bae64144aabae41",
)
V1_PICKLE = WeightFile(
    name="pulid_v1.bin",
    folders=PULID,
    address="https://huggingface.co/guozinan/PuLID/resolve/{revision}/pulid_v1.bin",
    revision="main",
    licence="Apache-2.0",
    needed_for="PuLID v1 as the authors published it",
)
EVA_CLIP = WeightFile(
    name="EVA02_CLIP_L_336_psz14_s6B.pt",
    folders=VISION,
    address="https://huggingface.co/QuanSun/EVA-CLIP/resolve/{revision}/EVA02_CLIP_L_336_psz14_s6B.pt",
    revision="11afd202f2ae80869d6cef18b1ec775e79bd8d12",
    licence="MIT",
    needed_for="the vision tower that looks at the face",
    size=856461210,
    sha256="84c3a17a228c567a155259b2245b0b59072bf7da510260a0a02ec54de6d50b05",
)
EVA_CLIP_TIMM = WeightFile(
    name="eva02_large_patch14_clip_336.merged2b_s6b_b61k.safetensors",
    folders=VISION,
    address="https://huggingface.co/timm/eva02_large_patch14_clip_336.merged2b_s6b_b61k/resolve/{revision}/open_clip_model.safetensors",
    revision="main",
    licence="MIT",
    needed_for="the same vision tower without a pickle",
)
SCRFD = WeightFile(
    name="scrfd_10g_bnkps.onnx",
    folders=ANTELOPEV2,
    address="https://huggingface.co/DIAMONIK7777/antelopev2/resolve/{revision}/scrfd_10g_bnkps.onnx",
    revision="main",
    licence=RESEARCH_ONLY,
    needed_for="finding faces",
    size=16923827,
    sha256="5838f7fe053675b1c7a08b633df49e7af5495cee0493c7dcf6697200b85b5b91",
)
GLINTR100 = WeightFile(
    name="glintr100.onnx",
    folders=ANTELOPEV2,
    address="https://huggingface.co/DIAMONIK7777/antelopev2/resolve/{revision}/glintr100.onnx",
    revision="main",
    licence=RESEARCH_ONLY,
    needed_for="recognising a face",
    sha256="4ab1d6435d639628a6f3e5008dd4f929edf4c4124b1a7169e1048f9fef534cdf",
)
ANTELOPEV2_ZIP = WeightFile(
    name="antelopev2.zip",
    folders=("insightface/models",),
    address="https://github.com/deepinsight/insightface/releases/download/{revision}/antelopev2.zip",
    revision="v0.7",
    licence=RESEARCH_ONLY,
    needed_for="both antelopev2 files at once; it is unpacked where it lies",
    size=360662982,
    sha256="8e182f14fc6e80b3bfa375b33eb6cff7ee05d8ef7633e738d1c89021dcf0c5c5",
)
RETINAFACE = WeightFile(
    name="detection_Resnet50_Final.pth",
    folders=FACEXLIB,
    address="https://github.com/xinntao/facexlib/releases/download/{revision}/detection_Resnet50_Final.pth",
    revision="v0.1.0",
    licence="MIT",
    needed_for="the five landmarks that a face is aligned by",
    size=109497761,
    sha256="6d1de9c2944f2ccddca5f5e010ea5ae64a39845a86311af6fdf30841b0a5a16d",
)
BISENET = WeightFile(
    name="parsing_bisenet.pth",
    folders=FACEXLIB,
    address="https://github.com/xinntao/facexlib/releases/download/{revision}/parsing_bisenet.pth",
    revision="v0.2.0",
    licence="MIT",
    needed_for="telling the face from its background",
    size=53289463,
    sha256="468e13ca13a9b43cc0881a9f99083a430e9c0a38abd935431d1c28ee94b26567",
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
    """The table of the README: every file, what it is for, its size and licence."""
    rows = ["| file under `models/` | for | size | licence |", "|---|---|---|---|"]
    for file in CATALOGUE:
        size = f"{file.size / 1e6:.0f} MB" if file.size else ""
        licence = f"**{file.licence}**" if file.licence == RESEARCH_ONLY else file.licence
        rows.append(f"| [`{file.place}`]({file.url}) | {file.needed_for} | {size} | {licence} |")
    return "\n".join(rows)
