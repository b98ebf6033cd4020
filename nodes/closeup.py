"""The nodes that take a face out of a picture, large, and put it back once it was changed."""

import torch
from comfy_api.latest import io
from torch import Tensor

from ..pulid.closeup import Place, cut, mask_of, paste, place_of
from ..pulid.errors import InputError, about
from ..pulid.faces import find_faces, in_order, pick
from ..pulid.photo import read_photo
from .apply import PULID
from .checked import checked
from .encode import step_of
from .people import FACE, FACE_INDEX
from .texts import described
from .types import LoadedPulid, PlaceSocket


@described
@checked
class PulidFaceCrop(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PuLID_FaceCrop",
            display_name="PuLID Face Crop",
            category="PuLID",
            inputs=[
                PULID,
                io.Image.Input("image"),
                FACE,
                FACE_INDEX,
                io.Int.Input("size", default=1024, min=64, max=2048, step=8),
                io.Float.Input("context", default=2.0, min=1.0, max=6.0, step=0.1),
            ],
            outputs=[
                io.Image.Output("crop", display_name="crop"),
                io.Mask.Output("mask", display_name="mask"),
                PlaceSocket.Output("place", display_name="place"),
            ],
        )

    @classmethod
    def execute(
        cls, pulid: LoadedPulid, image: Tensor, face: str, face_index: int, size: int, context: float
    ) -> io.NodeOutput:
        crops, masks, places = [], [], []
        step = step_of(len(image))
        for number, picture in enumerate(image):
            step(number)
            full = picture.shape[1], picture.shape[0]
            with about(f"Picture {number + 1} of {len(image)}"):
                photo = read_photo(picture)
                seen = photo.shape[1], photo.shape[0]
                chosen = pick(in_order(find_faces(photo, pulid.networks.analyzer).faces, face, seen), face_index)
            x0, y0, x1, y1 = (value * full[i % 2] / seen[i % 2] for i, value in enumerate(chosen.box))
            places.append(place_of((x0, y0, x1, y1), full, context))
            crops.append(cut(picture, places[-1], size))
            masks.append(mask_of((x0, y0, x1, y1), places[-1], size))
        step(len(image))
        return io.NodeOutput(torch.stack(crops), torch.stack(masks), places)


@described
@checked
class PulidFacePaste(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PuLID_FacePaste",
            display_name="PuLID Face Paste",
            category="PuLID",
            inputs=[
                io.Image.Input("image"),
                io.Image.Input("crop"),
                PlaceSocket.Input("place"),
                io.Float.Input("feather", default=0.15, min=0.0, max=0.5, step=0.01),
            ],
            outputs=[io.Image.Output("pasted", display_name="image")],
        )

    @classmethod
    def execute(cls, image: Tensor, crop: Tensor, place: list[Place], feather: float) -> io.NodeOutput:
        counts = len(image), len(crop), len(place)
        most = max(counts)
        if any(count not in (1, most) for count in counts):
            raise InputError(
                f"Pictures, crops and places go together one by one: found {counts[0]} pictures, {counts[1]} crops and "
                f"{counts[2]} places. Connect all that came out of one PuLID Face Crop."
            )
        pasted = []
        for i in range(most):
            with about(f"Picture {i + 1} of {most}"):
                pasted.append(paste(image[i % counts[0]], crop[i % counts[1]], place[i % counts[2]], feather))
        return io.NodeOutput(torch.stack(pasted))
