"""The node that loads PuLID, and fetches what is not there if it is told to."""

from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PureWindowsPath
from typing import Any

from comfy.model_management import throw_exception_if_processing_interrupted
from comfy.utils import ProgressBar
from comfy_api.latest import io

from ..models import catalogue
from ..models.checkpoints import check_file, load_pulid, load_vision_tower
from ..models.doctor import advice, anonymous, command
from ..models.download import fetch
from ..models.face_networks import InsightFaceAnalyzer, MissingFaceNetworks
from ..models.locate import ANTELOPEV2_FILES, ModelFolders, file_state, find_antelopev2, unpack_antelopev2
from ..models.onnx_providers import PROVIDERS, available_providers, provider_in_use
from ..pulid.errors import DownloadError, ForeignWeights, InputError, MissingPackage, MissingWeights, WeightsError
from ..pulid.eva import EvaConfig, EvaVisionTower
from ..pulid.faces import FaceAnalyzer
from ..pulid.networks import Managed, PhotoNetworks, PulidWeights
from . import host
from .checked import checked
from .texts import described
from .types import LoadedPulid, PulidSocket

MISSING_FILES = ("stop", "download")


NONE_YET = "(none here yet)"  # stands for the file of the catalogue that is the one to fetch


def pulid_choices() -> list[str]:
    """What is there, v1.1 first: ComfyUI's editor calls a file missing, and offers to fetch it, that is not listed."""
    return sorted(host.file_names("pulid"), key=lambda name: name != catalogue.V1_1.name) or [NONE_YET]


def _tower_choices() -> list[str]:
    """Every file that may be the vision tower, those first whose names say so; of the text encoders, those alone."""
    names = host.file_names(*host.VISION_FOLDERS)
    likely = [name for name in names if "eva" in name.lower()]
    return list(dict.fromkeys((*(likely or [NONE_YET]), *host.file_names(*host.VISION_FOLDERS[:2]))))


def named(choice: str, like: catalogue.WeightFile) -> str:
    """The file name that a choice stands for. Raises InputError for none, as it is of a link beforehand."""
    if not isinstance(choice, str):
        raise InputError(f"Expected the name of a file, found {choice!r}. Choose one on the node.")
    return like.name if choice == NONE_YET else choice


@described
@checked
class PulidLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PuLID_Loader",
            display_name="Load PuLID (SDXL)",
            category="PuLID",
            inputs=[
                io.Combo.Input("pulid_file", options=pulid_choices()),
                io.Combo.Input("eva_clip", options=_tower_choices()),
                io.Combo.Input("face_analysis", options=["antelopev2"]),
                io.Combo.Input("provider", options=["auto", *PROVIDERS], default="auto"),
                io.Combo.Input("missing_files", options=list(MISSING_FILES), default=MISSING_FILES[0]),
            ],
            outputs=[PulidSocket.Output("loaded", display_name="pulid")],
        )

    @classmethod
    def validate_inputs(cls, pulid_file: str = "", eva_clip: str = "") -> bool:
        # Taking these two over lets a shared workflow name a file that is not here; execute says what to do.
        return True

    @classmethod
    def fingerprint_inputs(cls, pulid_file: str, eva_clip: str, **_: Any) -> str:
        # A file that is replaced under its name, and one that has come since, is loaded at the next run.
        folders = host.model_folders()
        weights = state_of(lambda: _weight_files(pulid_file, eva_clip, folders))
        return str([weights, state_of(lambda: face_files(folders)) or _missing_faces(folders)])

    @classmethod
    def execute(
        cls, pulid_file: str, eva_clip: str, face_analysis: str, provider: str, missing_files: str
    ) -> io.NodeOutput:
        folders = host.model_folders()
        notes = fetch_missing(pulid_file, eva_clip, folders) if missing_files == "download" else []
        try:
            path, tower_path = _weight_files(pulid_file, eva_clip, folders)  # both, before a gigabyte is read in vain
        except MissingWeights as error:
            raise MissingWeights(missing_message(lacking(pulid_file, eva_clip, folders), folders)) from error
        with advised(folders):
            weights, tower = load_weights(path), load_tower(tower_path)
            analyzer, about_faces = _face_analyzer(provider, folders)
        notes += [f"PuLID {weights.version}, {path.name}.", *about_faces]
        host.say("\n".join(notes))
        return io.NodeOutput(LoadedPulid(weights, PhotoNetworks(tower, analyzer)), ui={"text": notes})


def _weight_files(pulid_file: str, eva_clip: str, folders: ModelFolders) -> list[Path]:
    """The PuLID file and the vision tower. Raises MissingWeights."""
    asked = (pulid_file, catalogue.V1_1), (eva_clip, catalogue.EVA_CLIP)
    return [folders.find(named(choice, like), like=like) for choice, like in asked]


Missing = catalogue.WeightFile | tuple[str, str]  # a name that the catalogue does not know, with what is said of it


def lacking(
    pulid_file: str, eva_clip: str, folders: ModelFolders, needs: Iterable[catalogue.Need] = catalogue.NEEDS
) -> list[Missing]:
    """What the loader needs and does not find."""
    asked = {"pulid_file": pulid_file, "eva_clip": eva_clip}
    found = [_missing(asked.get(need.input, NONE_YET), need, folders) for need in needs]
    return [one for one in found if one is not None]


def _missing(choice: str, need: catalogue.Need, folders: ModelFolders) -> Missing | None:
    name = named(choice, need.files[0])
    # A workflow may name a folder of the machine that it comes from; the catalogue says where the file goes.
    file = next((file for file in need.files if file.name == PureWindowsPath(name).name), None)
    if file and file.name == name:
        zipped = file.folders == catalogue.ANTELOPEV2 and folders.locate(catalogue.ANTELOPEV2_ZIP)
        return None if folders.locate(file) or zipped else file
    try:
        folders.find(name, like=need.files[0])
    except (MissingWeights, InputError) as error:
        return file if file and isinstance(error, MissingWeights) else (name, str(error))
    return None


def missing_message(missing: list[Missing], folders: ModelFolders) -> str:
    """All that is missing in one message: which files, the shortest way to them, and where each comes from and goes."""
    files = [file for file in missing if isinstance(file, catalogue.WeightFile)]
    unknown = dict(file for file in missing if isinstance(file, tuple))
    lines = [f"Missing: {', '.join((*unknown, *(file.name for file in files)))}.", *unknown.values()]
    lines += filter(None, map(folders.in_the_way, files))
    if files:
        size = f"{sum(file.size or 0 for file in files) / 1e6:.0f} MB"
        lines.append(f"Set missing_files of Load PuLID (SDXL) to download and run again ({size}). Or fetch by hand:")
        lines += [f"- {file.url} to {host.below_models(folders.destination(file))}" for file in files]
    if any(file.licence == catalogue.RESEARCH_ONLY for file in files):
        lines.append(f"The two of antelopev2 are for {catalogue.RESEARCH_ONLY}.")
    return "\n".join(lines)


def fetch_missing(
    pulid_file: str, eva_clip: str, folders: ModelFolders, needs: Iterable[catalogue.Need] = catalogue.NEEDS
) -> list[str]:
    """Fetch what the loader needs and does not find; returns a line for each file.

    A workflow chooses among the files of the catalogue, by name; no address comes from it.
    """
    files = [file for file in lacking(pulid_file, eva_clip, folders, needs) if isinstance(file, catalogue.WeightFile)]
    notes: list[str] = []
    for file in files:
        host.say(f"Downloading {file.name} ({file.licence})")
        try:
            fetch(file, folders.destination(file), _DownloadBar(), partial(check_file, file))
        except DownloadError as error:
            rest = [other.name for other in files[len(notes) + 1 :]]
            still = f"\nStill missing after it: {', '.join(rest)}." if rest else ""
            raise DownloadError(f"{error}{still}\n\n{advice(folders, of_files=False)}") from error
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
def advised(folders: ModelFolders, *names: str) -> Iterator[None]:
    """What is said of a file or package that cannot be used is followed by what else is wrong here.

    names  of the files that a node asks for that fetches none itself
    """
    try:
        yield
    except (WeightsError, MissingPackage) as error:
        known = [name for name in names if name in catalogue.BY_NAME] if isinstance(error, MissingWeights) else []
        more = anonymous(f" Or run {command('models --download', *known)}") if known else ""
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


def load_tower(path: Path, own_rotary: bool = False) -> Managed[EvaVisionTower]:
    """The vision tower of a file. Raises ForeignWeights for one of another size.

    own_rotary  compute the rotary tables, as EVA-CLIP's own loader does, where the file has them rounded to float16
    """
    tower = load_vision_tower(path, host.OPERATIONS)
    if tower.config != EvaConfig():
        raise ForeignWeights(
            f"{path.name} holds {tower.config}, but PuLID's encoders read EVA02-CLIP-L/14-336: {EvaConfig()}."
        )
    if own_rotary:
        tower.compute_rotary()
    return host.managed(tower, (file_state(path), own_rotary))


def _face_analyzer(provider: str, folders: ModelFolders) -> tuple[FaceAnalyzer, list[str]]:
    """The face networks, and what the node says of them. Saved identities need none, so that they may be missing."""
    try:
        return load_face_networks(available_providers(provider), folders)
    except MissingWeights as error:
        why: WeightsError | MissingPackage = MissingWeights(_missing_faces(folders) or str(error))
    except MissingPackage as error:
        why = MissingPackage(f"{error}\n\n{advice(folders)}")
    return MissingFaceNetworks(why), [f"Only saved identities can be used, no photographs. {why}"]


def _missing_faces(folders: ModelFolders) -> str:
    """What is said of the face networks' files that are missing; nothing where all are there."""
    missing = lacking(NONE_YET, NONE_YET, folders, [need for need in catalogue.NEEDS if need.input == "face_analysis"])
    return missing_message(missing, folders) if missing else ""


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
