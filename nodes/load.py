"""The node that loads PuLID, and fetches what is not there if it is told to."""

from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from comfy.model_management import throw_exception_if_processing_interrupted
from comfy.utils import ProgressBar
from comfy_api.latest import io

from ..models import catalogue
from ..models.checkpoints import check_file, load_pulid, load_vision_tower
from ..models.doctor import advice
from ..models.download import fetch
from ..models.face_networks import InsightFaceAnalyzer, MissingFaceNetworks
from ..models.locate import ANTELOPEV2_FILES, ModelFolders, file_state, find_antelopev2, unpack_antelopev2
from ..models.onnx_providers import PROVIDERS, available_providers, provider_in_use
from ..pulid.errors import ForeignWeights, InputError, MissingPackage, MissingWeights, WeightsError
from ..pulid.eva import EvaConfig, EvaVisionTower
from ..pulid.faces import FaceAnalyzer
from ..pulid.networks import Managed, PhotoNetworks, PulidWeights
from . import host
from .texts import described
from .types import LoadedPulid, PulidSocket

MISSING_FILES = ("stop", "download")


def _choices(published: tuple[catalogue.WeightFile, ...], found: list[str]) -> list[str]:
    """What is there, then what could be: a name that is not there leads to a message that says where to get it."""
    return list(dict.fromkeys((*found, *(file.name for file in published))))


def pulid_choices() -> list[str]:
    return _choices(catalogue.choices("pulid_file"), host.file_names("pulid"))


def _tower_choices() -> list[str]:
    """Every file that may be the vision tower, those first whose names say so; of the text encoders, those alone."""
    names = host.file_names(*host.VISION_FOLDERS)
    likely = [name for name in names if "eva" in name.lower()]
    return list(dict.fromkeys((*likely, *host.file_names(*host.VISION_FOLDERS[:2]))))


@described
class PulidLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        pulid_files = pulid_choices()
        return io.Schema(
            node_id="PuLID_Loader",
            display_name="Load PuLID (SDXL)",
            category="PuLID",
            inputs=[
                io.Combo.Input("pulid_file", options=pulid_files, default=pulid_files[0]),
                io.Combo.Input("eva_clip", options=_choices(catalogue.choices("eva_clip"), _tower_choices())),
                io.Combo.Input("face_analysis", options=["antelopev2"]),
                io.Combo.Input("provider", options=["auto", *PROVIDERS], default="auto"),
                io.Combo.Input("missing_files", options=list(MISSING_FILES), default=MISSING_FILES[0]),
            ],
            outputs=[PulidSocket.Output("loaded", display_name="pulid")],
        )

    @classmethod
    def validate_inputs(cls, pulid_file: str, eva_clip: str) -> bool:
        # Taking these two over from ComfyUI lets a shared workflow name a file that is not here; find says what to do.
        return True

    @classmethod
    def fingerprint_inputs(cls, pulid_file: str, eva_clip: str, **_: Any) -> str:
        # A file that is replaced under its name, and one that has come since, is loaded at the next run.
        folders = host.model_folders()
        return str(
            [
                state_of(lambda: [folders.find(pulid_file, like=catalogue.V1_1)]),
                state_of(lambda: [folders.find(eva_clip, like=catalogue.EVA_CLIP)]),
                state_of(lambda: face_files(folders)),
            ]
        )

    @classmethod
    def execute(
        cls, pulid_file: str, eva_clip: str, face_analysis: str, provider: str, missing_files: str
    ) -> io.NodeOutput:
        folders = host.model_folders()
        with advised(folders):
            notes = fetch_missing(pulid_file, eva_clip, folders) if missing_files == "download" else []
            path = folders.find(pulid_file, like=catalogue.V1_1)
            tower_path = folders.find(eva_clip, like=catalogue.EVA_CLIP)  # before a gigabyte is read in vain
            weights, tower = load_weights(path), load_tower(tower_path)
            analyzer, about_faces = _face_analyzer(provider, folders)
        notes += [f"PuLID {weights.version}, {path.name}.", *about_faces]
        host.say("\n".join(notes))
        return io.NodeOutput(LoadedPulid(weights, PhotoNetworks(tower, analyzer)), ui={"text": notes})


def fetch_missing(
    pulid_file: str, eva_clip: str, folders: ModelFolders, needs: Iterable[catalogue.Need] = catalogue.NEEDS
) -> list[str]:
    """Fetch what the loader needs and does not find; returns a line for each file.

    A workflow chooses among the files of the catalogue, by name; no address comes from it.
    """
    asked = {"pulid_file": pulid_file, "eva_clip": eva_clip}
    notes = []
    for need in needs:
        name = asked.get(need.input, need.files[0].name)
        file = next((file for file in need.files if file.name == name), None)
        if file is None or folders.locate(file):
            continue
        if file.folders == catalogue.ANTELOPEV2 and folders.locate(catalogue.ANTELOPEV2_ZIP):
            continue
        host.say(f"Downloading {file.name} ({file.licence})")
        fetch(file, folders.destination(file), _DownloadBar(), partial(check_file, file))
        notes.append(f"Downloaded {file.name}. Licence: {file.licence}.")
    return notes


class _DownloadBar:
    """Moves the node's progress bar, and ends the download when the user interrupts."""

    def __init__(self) -> None:
        self.bar: ProgressBar | None = None

    def __call__(self, done: int, total: int | None) -> None:
        throw_exception_if_processing_interrupted()
        if total:
            self.bar = self.bar or ProgressBar(total)
            self.bar.update_absolute(done, total)


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


def state_of(paths: Callable[[], Iterable[Path]]) -> Hashable:
    """Changes when one of the files does; None while one is not there."""
    try:
        return tuple(map(file_state, paths()))
    except (WeightsError, InputError, OSError):
        return None


def face_files(folders: ModelFolders) -> list[Path]:
    """All files of the face networks."""
    antelope, retinaface, bisenet = _face_folders(folders)
    return [*(antelope / file.name for file in ANTELOPEV2_FILES), retinaface, bisenet]


def load_weights(path: Path) -> PulidWeights:
    """What a PuLID file holds."""
    checkpoint, source = load_pulid(path, host.OPERATIONS), file_state(path)
    return PulidWeights(
        checkpoint.version,
        checkpoint.fingerprint,
        encoder=host.managed(checkpoint.encoder, source),
        projections=host.managed(checkpoint.projections, source),
    )


def load_tower(path: Path) -> Managed[EvaVisionTower]:
    """The vision tower of a file. Raises ForeignWeights for one of another size."""
    tower = load_vision_tower(path, host.OPERATIONS)
    if tower.config != EvaConfig():
        raise ForeignWeights(
            f"{path.name} holds {tower.config}, but PuLID's encoders read EVA02-CLIP-L/14-336: {EvaConfig()}."
        )
    return host.managed(tower, file_state(path))


def _face_analyzer(provider: str, folders: ModelFolders) -> tuple[FaceAnalyzer, list[str]]:
    """The face networks, and what the node says of them. Saved identities need none, so that they may be missing."""
    try:
        return load_face_networks(available_providers(provider), folders)
    except (MissingWeights, MissingPackage) as error:
        why = type(error)(f"{error}\n\n{advice(folders)}")
        return MissingFaceNetworks(why), [f"Only saved identities can be used, no photographs. {error}"]


def load_face_networks(providers: list[str], folders: ModelFolders) -> tuple[InsightFaceAnalyzer, list[str]]:
    """The face networks on these providers, and what the node says of them. Raises MissingWeights, MissingPackage."""
    unpack_antelopev2(folders)
    return InsightFaceAnalyzer(*_face_folders(folders), providers, host.manage), _on_provider(providers)


def _face_folders(folders: ModelFolders) -> tuple[Path, Path, Path]:
    """antelopev2's folder, RetinaFace and BiSeNet."""
    return (
        find_antelopev2(folders.of(catalogue.SCRFD), folders.elsewhere),
        folders.find(catalogue.RETINAFACE.name, like=catalogue.RETINAFACE),
        folders.find(catalogue.BISENET.name, like=catalogue.BISENET),
    )


def _on_provider(providers: list[str]) -> list[str]:
    name, reason = provider_in_use(providers)
    lines = [f"InsightFace's antelopev2 (non-commercial research only) runs on {name}."]
    if reason:
        lines.append(f"{providers[0]} was asked for, but could not be loaded: {reason}. run.py doctor says more.")
    return lines
