"""The node that loads PuLID, and fetches what is not there if it is told to."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from comfy.model_management import throw_exception_if_processing_interrupted
from comfy.utils import ProgressBar
from comfy_api.latest import io

from ..models import catalogue
from ..models.checkpoints import check_file, load_pulid, load_vision_tower
from ..models.doctor import advice
from ..models.download import fetch
from ..models.face_networks import AbsentAnalyzer, InsightFaceAnalyzer
from ..models.locate import ANTELOPEV2_FILES, ModelFolders, find, find_antelopev2, state_of
from ..models.onnx_providers import PROVIDERS, available_providers, provider_in_use
from ..pulid.errors import ForeignWeights, MissingPackage, MissingWeights, WeightsError
from ..pulid.eva import EvaConfig
from ..pulid.faces import FaceAnalyzer
from . import host
from .types import Pulid, PulidSocket, VisionTower

MISSING_FILES = ("stop", "download")


def _choices(published: tuple[catalogue.WeightFile, ...], found: list[str]) -> list[str]:
    """What is there, then what could be: a name that is not there leads to a message that says where to get it."""
    return list(dict.fromkeys((*found, *(file.name for file in published))))


def pulid_choices() -> list[str]:
    return _choices(catalogue.choices("pulid_file"), host.file_names("pulid"))


def _towers() -> list[str]:
    """Every file that may be the vision tower, those first whose names say so; of the text encoders, those alone."""
    names = host.file_names(*host.VISION_FOLDERS)
    likely = [name for name in names if "eva" in name.lower()]
    return list(dict.fromkeys((*likely, *host.file_names(*host.VISION_FOLDERS[:2]))))


class PulidLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        pulid_files = pulid_choices()
        return io.Schema(
            node_id="PuLID_Loader",
            display_name="Load PuLID (SDXL)",
            category="PuLID",
            description="Loads a PuLID file for SDXL with the networks that find and look at a face.",
            inputs=[
                io.Combo.Input(
                    "pulid_file",
                    options=pulid_files,
                    default=pulid_files[0],
                    tooltip="The PuLID file, in models/pulid. v1.1 suits most SDXL checkpoints, v1 SDXL-Lightning.",
                ),
                io.Combo.Input(
                    "eva_clip",
                    options=_choices(catalogue.choices("eva_clip"), _towers()),
                    tooltip="The EVA02-CLIP-L/14-336 vision tower that looks at the face, in models/clip_vision.",
                ),
                io.Combo.Input(
                    "face_analysis",
                    options=["antelopev2"],
                    tooltip="The InsightFace models that find and recognise a face (non-commercial research only).",
                ),
                io.Combo.Input(
                    "provider",
                    options=["auto", *PROVIDERS],
                    default="auto",
                    tooltip="What runs the InsightFace models. auto takes the fastest that is installed.",
                ),
                io.Combo.Input(
                    "missing_files",
                    options=list(MISSING_FILES),
                    default=MISSING_FILES[0],
                    tooltip="What to do when a file is not there. stop says which file, and where to get it; download "
                    "fetches it (2 GB for all) into your models folder. InsightFace's antelopev2 is for non-commercial "
                    "research only: choose download if that is what you do.",
                ),
            ],
            outputs=[PulidSocket.Output("loaded", display_name="pulid")],
        )

    @classmethod
    def validate_inputs(cls, pulid_file, eva_clip):
        # Taking these two over from ComfyUI lets a shared workflow name a file that is not here; find says what to do.
        return True

    @classmethod
    def fingerprint_inputs(cls, **_):
        # Once the face networks are there, what was loaded without them is loaded again.
        try:
            return str(_face_files(host.model_folders()))
        except WeightsError as error:
            return str(error)

    @classmethod
    def execute(cls, pulid_file, eva_clip, face_analysis, provider, missing_files):
        folders = host.model_folders()
        with advised(folders):
            notes = _fetch_missing(pulid_file, eva_clip, folders) if missing_files == "download" else []
            pulid, more = _load(pulid_file, eva_clip, provider, folders)
        notes += more
        host.say("\n".join(notes))
        return io.NodeOutput(pulid, ui={"text": notes})


def _fetch_missing(pulid_file: str, eva_clip: str, folders: ModelFolders) -> list[str]:
    """Fetch what the loader needs and does not find; returns a line for each file.

    A workflow chooses among the files of the catalogue, by name; no address comes from it.
    """
    asked = {"pulid_file": pulid_file, "eva_clip": eva_clip}
    notes = []
    for need in catalogue.NEEDS:
        name = asked.get(need.input, need.files[0].name)
        file = next((file for file in need.files if file.name == name), None)
        zipped = file in ANTELOPEV2_FILES and folders.locate(catalogue.ANTELOPEV2_ZIP)
        if file is None or zipped or folders.locate(file):
            continue
        host.say(f"Downloading {file.name} ({file.licence})")
        fetch(file, folders.destination(file), _Progress(), lambda part, file=file: check_file(file, part))
        notes.append(f"Downloaded {file.name}. Licence: {file.licence}.")
    return notes


class _Progress:
    """Moves the node's progress bar, and ends the download when the user interrupts."""

    def __init__(self):
        self.bar = None

    def __call__(self, done: int, total: int | None) -> None:
        throw_exception_if_processing_interrupted()
        if total:
            self.bar = self.bar or ProgressBar(total)
            self.bar.update_absolute(done, total)


def _load(pulid_file: str, eva_clip: str, provider: str, folders: ModelFolders) -> tuple[Pulid, list[str]]:
    """What the node gives, and what it says of it."""
    pulid_path = find(pulid_file, folders.of(catalogue.V1_1), folders.elsewhere)
    tower_path = find(eva_clip, folders.of(catalogue.EVA_CLIP), folders.elsewhere)
    analyzer, about_faces = _face_analyzer(provider, folders)
    pulid = pulid_of(pulid_path).with_sight(tower_of(tower_path), analyzer)
    return pulid, [f"PuLID {pulid.version}, {pulid_path.name}.", *about_faces]


@contextmanager
def advised(folders: ModelFolders, if_missing: str = "") -> Iterator[None]:
    """What is said of a file or package that cannot be used is followed by what else is wrong here.

    if_missing  what else is said of a file that is not there
    """
    try:
        yield
    except (WeightsError, MissingPackage) as error:
        more = if_missing if isinstance(error, MissingWeights) else ""
        raise type(error)(f"{error}{more}\n\n{advice(folders)}") from error


def pulid_of(path: Path) -> Pulid:
    """What a PuLID file holds."""
    checkpoint = load_pulid(path, host.OPERATIONS)
    return Pulid(
        version=checkpoint.version,
        fingerprint=checkpoint.fingerprint,
        widths=checkpoint.projections.widths,
        tower=None,
        encoder=host.managed(checkpoint.encoder),
        projections=host.managed(checkpoint.projections),
        analyzer=None,
        source=state_of(path),
    )


def tower_of(path: Path) -> VisionTower:
    """The vision tower of a file. Raises ForeignWeights for one of another size."""
    tower = load_vision_tower(path, host.OPERATIONS)
    if tower.config != EvaConfig():
        raise ForeignWeights(
            f"{path.name} holds {tower.config}, but PuLID's encoders read EVA02-CLIP-L/14-336: {EvaConfig()}."
        )
    return VisionTower(host.managed(tower), state_of(path))


def _face_analyzer(provider: str, folders: ModelFolders) -> tuple[FaceAnalyzer, list[str]]:
    """The face networks, and what the node says of them. Saved identities need none, so that they may be missing."""
    try:
        return analyzer_of(available_providers(provider), folders)
    except (MissingWeights, MissingPackage) as error:
        why = type(error)(f"{error}\n\n{advice(folders)}")
        return AbsentAnalyzer(why), [f"Only saved identities can be used, no photographs. {error}"]


def analyzer_of(providers: list[str], folders: ModelFolders) -> tuple[InsightFaceAnalyzer, list[str]]:
    """The face networks on these providers, and what the node says of them. Raises MissingWeights, MissingPackage."""
    return InsightFaceAnalyzer(*_face_files(folders), providers, host.manage), _on_provider(providers)


def _face_files(folders: ModelFolders) -> tuple[Path, Path, Path]:
    """antelopev2's folder, RetinaFace and BiSeNet."""
    return (
        find_antelopev2(folders.of(catalogue.SCRFD), folders.elsewhere),
        find(catalogue.RETINAFACE, folders.of(catalogue.RETINAFACE), folders.elsewhere),
        find(catalogue.BISENET, folders.of(catalogue.BISENET), folders.elsewhere),
    )


def _on_provider(providers: list[str]) -> list[str]:
    name, reason = provider_in_use(providers)
    lines = [f"InsightFace's antelopev2 (non-commercial research only) runs on {name}."]
    if reason:
        lines.append(f"{providers[0]} was asked for, but could not be loaded: {reason}. run.py doctor says more.")
    return lines
