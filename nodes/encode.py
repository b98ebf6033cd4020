"""The node that makes an identity from photographs."""

from dataclasses import dataclass, replace

import torch
from comfy.model_management import throw_exception_if_processing_interrupted
from comfy.utils import ProgressBar
from comfy_api.latest import io, ui
from torch import Tensor

from ..pulid.cache import Kept
from ..pulid.embed import Photos, reads_together
from ..pulid.encode import Choice, Look, Photograph, look, photographs
from ..pulid.errors import InputError, NoFaceError
from ..pulid.faces import ORDERS, read_photo
from ..pulid.identity import PREVIEWS, IdEmbedding
from ..pulid.preview import draw_faces
from .types import IdentitySocket, Pulid, PulidSocket

KEPT = Kept(128 * 2**20)  # a look is 1.5 MB, 13 MB where PuLID v1.1 reads photographs together


class PulidEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PuLID_Encode",
            display_name="PuLID Encode Identity",
            category="PuLID",
            description="Finds a face in each photograph and makes an identity. A batch is photographs of one person.",
            inputs=[
                PulidSocket.Input("pulid", tooltip="From Load PuLID."),
                io.Image.Input("image", tooltip="Photographs. The first is the main one."),
                io.Combo.Input(
                    "face",
                    options=list(ORDERS),
                    default="largest",
                    tooltip="How the faces in a photograph are ordered; face_index counts in this order.",
                ),
                io.Int.Input(
                    "face_index", default=0, min=0, max=255, tooltip="Which face of each photograph, 0 is the first."
                ),
                io.Combo.Input(
                    "photos",
                    options=["one person", "average", "one identity per photo"],
                    default="one person",
                    tooltip="What several photographs are: one person as the authors do it, their mean, or an identity "
                    "each (the first for the first picture of a batch, and so on).",
                ),
                io.Boolean.Input(
                    "id_mix",
                    default=False,
                    tooltip="Mix different people into one (PuLID v1). Leave it off for photographs of one person.",
                ),
                io.Combo.Input(
                    "no_face",
                    options=["stop", "skip photo"],
                    default="stop",
                    tooltip="What to do when a photograph shows no face: stop, or go on with the others.",
                ),
                io.Mask.Input(
                    "mask", optional=True, tooltip="Marks the face to take: the one that it covers best comes first."
                ),
            ],
            outputs=[
                IdentitySocket.Output("encoded", display_name="identity"),
                io.Image.Output(
                    "seen", display_name="faces", tooltip="What the vision tower sees, one per photograph."
                ),
                io.Image.Output(
                    "found",
                    display_name="detections",
                    tooltip="The photographs with all faces found; the chosen one is marked.",
                ),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def execute(cls, pulid, image, face, face_index, photos, id_mix, no_face, mask=None):
        if len(image) == 0:
            raise InputError("The image batch is empty: connect at least one photograph.")
        choice = Choice(face, face_index, reads_together(pulid.version, photos))
        taken = photographs(image, mask, pulid.source, choice)
        key = (*(photograph.key for photograph in taken), photos, id_mix, no_face)
        if (encoded := KEPT.get(key)) is None:
            encoded = encode(pulid, taken, choice, photos, id_mix, no_face == "skip photo")
            KEPT.put(key, encoded, encoded.tensors)
        return io.NodeOutput(encoded.identity, encoded.seen, encoded.found, ui=encoded.ui)


@dataclass(frozen=True, eq=False)
class Encoded:
    """What the node gives; ui is what it shows."""

    identity: IdEmbedding
    seen: Tensor
    found: Tensor
    ui: dict

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.identity.cond, self.identity.uncond, self.seen, self.found


def encode(pulid: Pulid, taken: list[Photograph], choice: Choice, photos: Photos, id_mix: bool, skip: bool) -> Encoded:
    """Looks at each photograph and makes the identity of what was seen."""
    progress, used, drawn, notes, faceless = ProgressBar(len(taken)), [], [], [], []
    looks = look(pulid, taken, choice, KEPT, throw_exception_if_processing_interrupted)
    for number, (photograph, seen) in enumerate(zip(taken, looks, strict=True), start=1):
        name = f"Photograph {number} of {len(taken)}"
        sight = None
        if isinstance(seen, Look):
            used.append(seen)
            sight = seen.sight
            notes.append(f"{name}: face {sight.index} of {len(sight.faces)}, {choice.order}; {sight.how}.")
        else:
            notes.append(f"{name}: skipped. {seen}")
            faceless.append(f"{name}: {seen}")
        drawn.append(draw_faces(read_photo(photograph.pixels), sight))
        progress.update(1)
    if faceless and not skip:
        raise NoFaceError("\n".join(faceless))
    if not used:
        raise NoFaceError("\n".join(("No photograph was left.", *notes)))
    readings = [one.reading for one in used]
    identity = pulid.identify(readings, photos, id_mix, throw_exception_if_processing_interrupted)
    identity = replace(identity, preview=torch.stack([one.small for one in used[:PREVIEWS]]))
    notes.append(
        f"{len(used)} of {len(taken)} photographs used, PuLID {identity.version}, {identity.tokens} ID tokens."
    )
    seen, found = torch.stack([one.seen for one in used]), torch.stack(drawn).float().div_(255)
    shown = [picture for shown in (seen, found) for picture in ui.PreviewImage(shown).as_dict()["images"]]
    return Encoded(identity, seen, found, {"images": shown, "text": notes})
