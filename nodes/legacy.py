"""The nodes that older shared workflows name, under their old ids, inputs and sockets, giving their old pictures.

They come from another pack (https://github.com/cubiq/PuLID_ComfyUI), whose numbers differ from the authors': only 60
of the 70 sites, one weight per picture in ortho_v2, photographs averaged, and the face looked at and the face
recognised chosen apart. That is kept here, out of this pack's own parts; what is new belongs to the other nodes.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from torch import Tensor

from ..models import catalogue
from ..models.face_networks import InsightFaceAnalyzer, SharedFaceAnalysis
from ..models.locate import ModelFolders
from ..models.onnx_providers import available_providers
from ..pulid.attention import METHODS, Fusion
from ..pulid.encode import EncodeSettings, NoFace, OlderChoice, encode, photographs
from ..pulid.errors import InputError, MismatchError, NoFaceError
from ..pulid.identity import IdEmbedding, Version
from ..pulid.networks import Managed, PhotoNetworks, PulidWeights
from ..pulid.sites import SITES
from ..pulid.tokens import Photos, reads_together
from . import host
from .apply import END, MASK, MODEL, START, Application, apply
from .encode import CACHE, step_of
from .load import advised, face_files, load_face_networks, load_tower, load_weights, named, pulid_choices, state_of
from .shared import SharedEvaClip, managed_tower
from .texts import described

log = logging.getLogger(__name__)

CATEGORY = "PuLID/legacy"

PulidFile = io.Custom("PULID")  # PulidWeights
EvaClip = io.Custom("EVA_CLIP")  # a managed EvaVisionTower
FaceAnalysis = io.Custom("FACEANALYSIS")  # an InsightFaceAnalyzer


class Older:
    """What programs that know the older pack expect of its nodes, beside what ComfyUI does."""

    @classmethod
    def GET_NODE_INFO_V1(cls) -> dict[str, Any]:
        """As the older pack's: the choices of an input stand where others have its type."""
        info = super().GET_NODE_INFO_V1()  # type: ignore[misc]  # of io.ComfyNode
        for inputs in info["input"].values():
            for name, (kind, *more) in inputs.items():
                if kind == "COMBO":
                    inputs[name] = (more[0]["options"], more[0])
        return info


@described
class PulidModelLoader(Older, io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PulidModelLoader",
            display_name="Load PuLID Model",
            category=CATEGORY,
            is_deprecated=True,
            inputs=[io.Combo.Input("pulid_file", options=pulid_choices())],
            outputs=[PulidFile.Output("loaded", display_name="PULID")],
        )

    @classmethod
    def validate_inputs(cls, pulid_file: str = "") -> bool:
        return True  # of a file that is not here, find says where to get it

    @classmethod
    def fingerprint_inputs(cls, pulid_file: str) -> str:
        folders = host.model_folders()
        return str(state_of(lambda: [folders.find(named(pulid_file, catalogue.V1_1), like=catalogue.V1_1)]))

    @classmethod
    def execute(cls, pulid_file: str) -> io.NodeOutput:
        folders = host.model_folders()
        name = named(pulid_file, catalogue.V1_1)
        with advised(folders, name):
            return io.NodeOutput(load_weights(folders.find(name, like=catalogue.V1_1)))

    def load_model(self, pulid_file: str) -> tuple:
        return _results(self.execute(pulid_file))


@described
class PulidInsightFaceLoader(Older, io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PulidInsightFaceLoader",
            display_name="Load InsightFace (PuLID)",
            category=CATEGORY,
            is_deprecated=True,
            inputs=[io.Combo.Input("provider", options=["CPU", "CUDA", "ROCM", "CoreML"])],
            outputs=[FaceAnalysis.Output("loaded", display_name="FACEANALYSIS")],
        )

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> str:
        folders = host.model_folders()
        return str(state_of(lambda: face_files(folders)))

    @classmethod
    def execute(cls, provider: str) -> io.NodeOutput:
        folders = host.model_folders()
        with advised(folders, *(file.name for file in catalogue.choices("face_analysis"))):
            providers, notes = _providers(provider)
            analyzer, more = load_face_networks(providers, folders)
        host.say("\n".join(notes + more))
        return io.NodeOutput(analyzer, ui={"text": notes + more})

    def load_insightface(self, provider: str) -> tuple:
        return _results(self.execute(provider))


def _providers(choice: str) -> tuple[list[str], list[str]]:
    """What to ask of ONNX Runtime, and what to say of it: a shared workflow names what its author's machine has."""
    try:
        return available_providers(choice), []
    except InputError as error:
        return available_providers("CPU"), [f"{error} Going on with the CPU."]


@described
class PulidEvaClipLoader(Older, io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PulidEvaClipLoader",
            display_name="Load Eva Clip (PuLID)",
            category=CATEGORY,
            is_deprecated=True,
            inputs=[],
            outputs=[EvaClip.Output("loaded", display_name="EVA_CLIP")],
        )

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> str:
        folders = host.model_folders()
        return str(state_of(lambda: [folders.find(_tower_here(folders), like=catalogue.EVA_CLIP)]))

    @classmethod
    def execute(cls) -> io.NodeOutput:
        folders = host.model_folders()
        with advised(folders, catalogue.EVA_CLIP.name):
            tower = load_tower(folders.find(_tower_here(folders), like=catalogue.EVA_CLIP), own_rotary=True)
        return io.NodeOutput(SharedEvaClip(tower.module, tower.load, tower.source))

    def load_eva_clip(self) -> tuple:
        return _results(self.execute())


def _tower_here(folders: ModelFolders) -> str:
    """The name of the first published vision tower that is here; else of the one to get."""
    published = catalogue.choices("eva_clip")
    return next((file.name for file in published if folders.locate(file)), catalogue.EVA_CLIP.name)


PULID = PulidFile.Input("pulid")
EVA_CLIP = EvaClip.Input("eva_clip")
FACE_ANALYSIS = FaceAnalysis.Input("face_analysis")
IMAGE = io.Image.Input("image")
WEIGHT = io.Float.Input("weight", default=1.0, min=-1.0, max=5.0, step=0.05)
PATCHED = io.Model.Output("patched_model", display_name="MODEL")

# Our methods, each with the method and the projection that mean it there, in the order in which that pack asks.
METHODS_THERE = (("fidelity", "fidelity", "ortho_v2"), ("extreme style", "style", "ortho"))


@described
class ApplyPulid(Older, io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ApplyPulid",
            display_name="Apply PuLID",
            category=CATEGORY,
            is_deprecated=True,
            inputs=[
                MODEL,
                PULID,
                EVA_CLIP,
                FACE_ANALYSIS,
                IMAGE,
                io.Combo.Input("method", options=["fidelity", "style", "neutral"]),
                WEIGHT,
                START,
                END,
                MASK,
            ],
            outputs=[PATCHED],
        )

    @classmethod
    def execute(
        cls, model: ModelPatcher, pulid: object, eva_clip: object, face_analysis: object, image: Tensor, method: str,
        weight: float, start_at: float, end_at: float, attn_mask: Tensor | None = None,
    ) -> io.NodeOutput:  # fmt: skip
        photographed = model, pulid, eva_clip, face_analysis, image
        return Asked(*photographed, weight, start_at, end_at, method, attn_mask=attn_mask).answer()

    def apply_pulid(self, *arguments: Any, **named: Any) -> tuple:
        """As Asked has them."""
        return _results(Asked(*arguments, **named).answer())


@described
class ApplyPulidAdvanced(Older, io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ApplyPulidAdvanced",
            display_name="Apply PuLID Advanced",
            category=CATEGORY,
            is_deprecated=True,
            inputs=[
                MODEL,
                PULID,
                EVA_CLIP,
                FACE_ANALYSIS,
                IMAGE,
                WEIGHT,
                io.Combo.Input("projection", options=["ortho_v2", "ortho", "none"]),
                io.Int.Input("fidelity", default=8, min=0, max=32, step=1),
                io.Float.Input("noise", default=0.0, min=-1.0, max=1.0, step=0.1),
                START,
                END,
                MASK,
            ],
            outputs=[PATCHED],
        )

    @classmethod
    def execute(
        cls, model: ModelPatcher, pulid: object, eva_clip: object, face_analysis: object, image: Tensor, weight: float,
        projection: str, fidelity: int, noise: float, start_at: float, end_at: float, attn_mask: Tensor | None = None,
    ) -> io.NodeOutput:  # fmt: skip
        photographed = model, pulid, eva_clip, face_analysis, image
        return Asked(*photographed, weight, start_at, end_at, None, noise, fidelity, projection, attn_mask).answer()

    apply_pulid = ApplyPulid.apply_pulid


NODES = (PulidModelLoader, PulidInsightFaceLoader, PulidEvaClipLoader, ApplyPulid, ApplyPulidAdvanced)


def not_taken() -> list[type[io.ComfyNode]]:
    """These nodes; none of them where another pack has one, since nodes of two packs would not fit together."""
    registered = host.registered_nodes()
    ours = {node.GET_SCHEMA().node_id: node for node in NODES}
    taken = [node_id for node_id, node in ours.items() if registered.get(node_id, node) is not node]
    if not taken:
        return list(NODES)
    pack = getattr(registered[taken[0]], "RELATIVE_PYTHON_MODULE", "another pack")
    log.info("PuLID for SDXL leaves the nodes of older workflows to %s, which has %s.", pack, ", ".join(taken))
    return []


@dataclass(frozen=True, eq=False)
class Asked:
    """What the older pack's apply_pulid takes, in its order; both of its nodes call it."""

    model: ModelPatcher
    pulid: object
    eva_clip: object
    face_analysis: object
    image: Tensor
    weight: float
    start_at: float
    end_at: float
    method: str | None = None
    noise: float = 0.0
    fidelity: int | None = None
    projection: str | None = None
    attn_mask: Tensor | None = None

    def answer(self) -> io.NodeOutput:
        if self.start_at > self.end_at:
            note = f"PuLID does not act: start_at ({self.start_at}) lies after end_at ({self.end_at}). Swap them."
            return _output(self.model.clone(), [note])
        weights, networks, notes = _checked(self.pulid, self.eva_clip, self.face_analysis)
        fusion, zero_tokens = self._method(weights.version)
        identity, more = _identify(weights, networks, self.image, self.noise, zero_tokens)
        how = Application(
            Fusion.SHARED_V2 if fusion is Fusion.ORTHOGONAL_V2 else fusion,
            0 if self.noise else zero_tokens,  # with noise they are among the identity's tokens
            # That pack registers the middle block under a key that ComfyUI never looks up.
            site_weights=[0.0 if site.part == "middle" else self.weight for site in SITES],
            start_at=self.start_at,
            end_at=self.end_at,
            attn_mask=self.attn_mask,
            older=True,
        )
        return _output(apply(self.model, weights, identity, how), notes + more)

    def _method(self, version: Version) -> tuple[Fusion, int]:
        """The fusion and its zero tokens; what that pack does not know is neutral there, fewer than none are none."""
        named = next((ours for ours, *theirs in METHODS_THERE if {self.method, self.projection} & {*theirs}), "neutral")
        chosen = METHODS[named]["v1" if self.method is None else version]
        return chosen.fusion, chosen.zero_tokens if self.fidelity is None else max(int(self.fidelity), 0)


def _results(output: io.NodeOutput) -> tuple:
    """What the older pack's methods return."""
    return output.result or ()


def _checked(pulid: object, eva_clip: object, face_analysis: object) -> tuple[PulidWeights, PhotoNetworks, list[str]]:
    """What the sockets hold, and what to say of it. Raises MismatchError for what cannot be used."""
    if not isinstance(pulid, PulidWeights):
        raise _foreign("pulid", pulid, "Load PuLID Model (PulidModelLoader)")
    if isinstance(eva_clip, torch.nn.Module) and hasattr(eva_clip, "image_size"):
        eva_clip = _around(eva_clip, managed_tower)
    if not isinstance(eva_clip, Managed):
        raise _foreign("eva_clip", eva_clip, "Load Eva Clip (PuLID) (PulidEvaClipLoader)")
    notes: list[str] = []
    if isinstance(face_analysis, InsightFaceAnalyzer):
        analyzer = face_analysis
    elif hasattr(face_analysis, "det_model"):
        analyzer = shared = _around(face_analysis, _shared_analysis)
        if shared.recogniser_name not in ("", catalogue.GLINTR100.name):
            notes = [f"Faces are recognised by {shared.recogniser_name}, but PuLID knows antelopev2's: less alike."]
    else:
        raise _foreign("face_analysis", face_analysis, "Load InsightFace (PuLID) (PulidInsightFaceLoader)")
    return pulid, PhotoNetworks(eva_clip, analyzer), notes


SHARED: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()  # ours, by what another pack loaded


def _around(theirs: Any, make: Callable[[Any], Any]) -> Any:
    """The same for the same, so that what it saw is found in the cache."""
    if theirs not in SHARED:
        SHARED[theirs] = make(theirs)
    return SHARED[theirs]


def _shared_analysis(analysis: Any) -> SharedFaceAnalysis:
    folders = host.model_folders()
    asked = catalogue.RETINAFACE, catalogue.BISENET
    with advised(folders, *(one.name for one in asked)):
        retinaface, bisenet = (folders.find(one.name, like=one) for one in asked)
    return SharedFaceAnalysis(analysis, retinaface, bisenet, host.manage)


def _foreign(name: str, value: object, loader: str) -> MismatchError:
    return MismatchError(
        f"{name} must come from {loader} of PuLID for SDXL, found {type(value).__module__}."
        f"{type(value).__qualname__} of another pack. Connect that node; where another pack has taken its id, "
        "remove one of the two packs. run.py doctor names packs with the same nodes."
    )


def _output(patched: ModelPatcher, notes: list[str]) -> io.NodeOutput:
    if notes:
        host.say("\n".join(notes))
    return io.NodeOutput(patched, ui={"text": notes} if notes else None)


# How photographs combine: v1's tokens are averaged; v1.1, which that pack could not read, does it as everywhere.
PHOTOS: dict[Version, Photos] = {"v1": "average", "v1.1": "one person"}


def _identify(
    weights: PulidWeights, networks: PhotoNetworks, image: Tensor, noise: float = 0.0, zero_tokens: int = 0
) -> tuple[IdEmbedding, list[str]]:
    """The person, and which photographs were left out. Raises NoFaceError when none remains."""
    settings = EncodeSettings(OlderChoice(), PHOTOS[weights.version], skip=True)
    taken = photographs(image)
    sources = weights.encoder.source, networks.source
    key = (*sources, settings, *(photograph.key for photograph in taken), noise, zero_tokens if noise else 0)
    if (kept := CACHE.get(key)) is not None:
        return kept
    try:
        encoded = encode(taken, weights, networks, settings, CACHE, step_of(len(taken)))
    except NoFaceError as error:
        raise NoFaceError(
            f"{error}\nPuLID Encode Identity also finds faces that are turned, very small or close to the frame; use "
            "it with Apply PuLID (SDXL), or take another photograph."
        ) from error
    notes = [
        f"Photograph {number} of {len(taken)} was left out. {seen.reason}"
        for number, seen in enumerate(encoded.seen, start=1)
        if isinstance(seen, NoFace)
    ]
    identity = encoded.identity
    if noise:
        draws = 1 if reads_together(weights.version, settings.photos) else len(encoded.faces)
        identity = _with_noise(weights, identity, noise, zero_tokens, draws)
    CACHE.put(key, (identity, notes), (identity.cond, identity.uncond))
    return identity, notes


def _with_noise(
    weights: PulidWeights, identity: IdEmbedding, noise: float, zero_tokens: int, draws: int
) -> IdEmbedding:
    """Noise where that pack has it: the negative branch, drawn for each photograph and averaged, and the zero tokens.

    It draws anew each time; here every run draws the same.
    """
    uncond = torch.cat([weights.with_noise(identity, noise, seed).uncond for seed in range(draws)])
    uncond = uncond.mean(dim=0, keepdim=True)  # over the draws
    shape = 1, zero_tokens, uncond.shape[-1]
    tokens = torch.rand(shape, generator=torch.Generator().manual_seed(draws)) * noise
    return replace(identity, cond=torch.cat((identity.cond, tokens), dim=1), uncond=torch.cat((uncond, tokens), dim=1))
