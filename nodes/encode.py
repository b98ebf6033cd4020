"""The node that makes an identity from photographs."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from comfy.model_management import throw_exception_if_processing_interrupted
from comfy.utils import ProgressBar
from comfy_api.latest import io, ui
from torch import Tensor

from ..pulid.cache import ResultCache
from ..pulid.encode import Encoded, EncodeSettings, FaceChoice, NoFace, Photograph, Step, encode, photographs
from ..pulid.faces import ORDERS, Selection
from ..pulid.identity import IdEmbedding
from ..pulid.photo import cut_off, read_photo, read_size, shrunk
from ..pulid.preview import draw_selection, on_one_size
from ..pulid.tokens import Photos, read_weights
from .checked import checked
from .lists import only, rows
from .texts import described
from .types import IdentitySocket, LoadedPulid, PulidSocket

AS_THE_AUTHORS = "as the authors"
RESOLUTIONS = {AS_THE_AUTHORS: False, "full photograph": True}  # whether the face is cut out of the full one
SMALL_FACE = 128  # px: below it, the face that the vision tower sees was enlarged to more than twice its size

CACHE = ResultCache(128 * 2**20)  # a face is 1.5 MB, 13 MB where PuLID v1.1 reads photographs together


@described
@checked
class PulidEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PuLID_Encode",
            display_name="PuLID Encode Identity",
            category="PuLID",
            inputs=[
                PulidSocket.Input("pulid"),
                io.Image.Input("image"),
                io.Combo.Input("face", options=list(ORDERS), default="largest"),
                io.Int.Input("face_index", default=0, min=0, max=255),
                io.Combo.Input(
                    "photos", options=["one person", "average", "one identity per photo"], default="one person"
                ),
                io.Boolean.Input("id_mix", default=False),
                io.Combo.Input("no_face", options=["stop", "skip photo"], default="stop"),
                io.Mask.Input("mask", optional=True),
                io.String.Input("weights", default="", optional=True),
                io.Combo.Input("resolution", options=list(RESOLUTIONS), default=AS_THE_AUTHORS, optional=True),
            ],
            outputs=[
                IdentitySocket.Output("encoded", display_name="identity"),
                io.Image.Output("seen", display_name="faces"),
                io.Image.Output("found", display_name="detections"),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_input_list=True,
        )

    @classmethod
    def execute(
        cls, pulid: list[LoadedPulid], image: list[Tensor], face: list[str], face_index: list[int],
        photos: list[Photos], id_mix: list[bool], no_face: list[str], mask: list[Tensor] | None = None,
        weights: list[str] | None = None, resolution: list[str] | None = None,
    ) -> io.NodeOutput:  # fmt: skip
        taken = photographs(rows(image), rows(mask) or None)
        loaded, text = only(pulid, "pulid"), only(weights or [""], "weights")
        settings = EncodeSettings(
            FaceChoice(
                only(face, "face"),
                only(face_index, "face_index"),
                full=RESOLUTIONS[only(resolution or [AS_THE_AUTHORS], "resolution")],
            ),
            only(photos, "photos"),
            only(id_mix, "id_mix"),
            skip=only(no_face, "no_face") == "skip photo",
            weights=read_weights(text, len(taken), "photographs", least=0) if text.strip() else (),
        )
        sources = loaded.weights.encoder.source, loaded.networks.source
        key = (*sources, settings, *(photograph.key for photograph in taken))
        if (shown := CACHE.get(key)) is None:
            encoded = encode(taken, loaded.weights, loaded.networks, settings, CACHE, step_of(len(taken)))
            shown = Shown.of(encoded, taken, settings)
            CACHE.put(key, shown, shown.tensors)
        return io.NodeOutput(shown.identity, shown.faces, shown.detections, ui=shown.ui)


def size_note(pixels: Tensor, found: Selection) -> str:
    """How large the face was as it was encoded, and whether the photograph has more of it."""
    photo = read_size(pixels)
    cut_from = found.cut_from or photo
    x0, y0, x1, y1 = found.faces[found.index].box
    face = [round(side * cut_from[0] / photo[0]) for side in (x1 - x0, y1 - y0)]
    text = f" The face was {face[0]} x {face[1]} px as it was encoded."
    if words := cut_off(pixels):
        text += f" It is a photograph {words}."
    if words := shrunk(pixels, cut_from):
        text += f" The photograph was {words}."
        if min(face) < SMALL_FACE:
            text += ' There is more of the face in it: set resolution to "full photograph".'
    return text


def step_of(count: int) -> Step:
    """Moves the node's progress bar over so many photographs, and stops when the user interrupts."""
    bar = ProgressBar(count)

    def step(done: int) -> None:
        throw_exception_if_processing_interrupted()
        bar.update_absolute(done)

    return step


@dataclass(frozen=True, eq=False)
class Shown:
    """The node's outputs; ui is what it shows."""

    identity: IdEmbedding
    faces: Tensor
    detections: Tensor
    ui: dict

    @classmethod
    def of(cls, encoded: Encoded, taken: Sequence[Photograph], settings: EncodeSettings) -> "Shown":
        drawn, notes = [], []
        for number, (photograph, seen) in enumerate(zip(taken, encoded.seen, strict=True), start=1):
            found = None if isinstance(seen, NoFace) else seen.selection
            drawn.append(draw_selection(read_photo(photograph.pixels), found))
            note = f"skipped. {seen.reason}" if isinstance(seen, NoFace) else ""
            if found:
                note = f"face {found.index} of {len(found.faces)}, {settings.choice.order}; {found.how}."
                note += size_note(photograph.pixels, found)
            notes.append(f"Photograph {number} of {len(taken)}: {note}")
        identity = encoded.identity
        notes.append(
            f"{len(encoded.faces)} of {len(taken)} photographs used, PuLID {identity.version}, "
            f"{identity.tokens} ID tokens."
        )
        faces = torch.stack([seen.grey for seen in encoded.faces])
        detections = on_one_size(drawn).float().div_(255)
        pictures = [picture for batch in (faces, detections) for picture in ui.PreviewImage(batch).as_dict()["images"]]
        return cls(identity, faces, detections, {"images": pictures, "text": notes})

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        identity = self.identity
        kept = () if identity.arcface is None else (identity.arcface,)
        return identity.cond, identity.uncond, *kept, self.faces, self.detections
