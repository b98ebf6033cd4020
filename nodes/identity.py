"""The node that makes an identity from photographs."""

import torch
from comfy.model_management import throw_exception_if_processing_interrupted
from comfy.utils import ProgressBar
from comfy_api.latest import io, ui

from ..pulid.errors import InputError, NoFaceError
from ..pulid.faces import ORDERS, VISION_SIZE, find_face, grey_on_white, read_photo, shrink
from .preview import draw_faces
from .sockets import IdentitySocket, PulidSocket


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
        progress = ProgressBar(len(image) + 1)
        photographs, found, notes = [read_photo(picture) for picture in image], [], []
        for number, photo in enumerate(photographs, start=1):
            throw_exception_if_processing_interrupted()
            where = None if mask is None else mask[min(number, len(mask)) - 1]
            try:
                found.append(find_face(photo, pulid.analyzer, face, face_index, where))
            except InputError as error:
                message = f"Photograph {number} of {len(image)}: {error}"
                if no_face == "stop" or not isinstance(error, NoFaceError):
                    raise type(error)(message) from error
                found.append(None)
                notes.append(message)
            progress.update(1)
        crops = [sight.crop for sight in found if sight is not None]
        if not crops:
            raise NoFaceError("\n".join(("No photograph was left.", *notes)))
        pixels = torch.stack([crop.pixels for crop in crops])
        faces = grey_on_white(pixels, pulid.analyzer.parse(pixels))
        identity = pulid.identify(faces, torch.stack([crop.arcface for crop in crops]), photos, id_mix)
        progress.update(1)
        seen = shrink(faces, VISION_SIZE).clamp(0, 1).movedim(1, -1)  # (P, 3, H, W) -> (P, H, W, 3)
        notes.append(
            f"{len(crops)} of {len(image)} photographs used, PuLID {identity.version}, {identity.tokens} ID tokens."
        )
        return io.NodeOutput(
            identity,
            seen,
            draw_faces(photographs, found),
            ui={**ui.PreviewImage(seen, cls=cls).as_dict(), "text": notes},
        )
