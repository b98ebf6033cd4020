"""The node that says how alike the faces of pictures are to a person."""

from collections.abc import Iterator
from typing import cast

import torch
from comfy.model_management import throw_exception_if_processing_interrupted
from comfy.utils import ProgressBar
from comfy_api.latest import io, ui
from torch import Tensor

from ..pulid.errors import NoFaceError, about
from ..pulid.faces import FaceAnalyzer, FoundFaces, Heard, find_faces, in_order
from ..pulid.people import mean_direction, similarities
from ..pulid.photo import Photo, read_photo
from ..pulid.preview import draw_boxes
from .checked import checked
from .seen import notes_on
from .texts import described
from .types import LoadedPulid, PulidSocket

FLATTERED = (
    "The recogniser that measures here also made the identity, so it flatters: compare scores with each other only."
)


@described
@checked
class PulidFaceSimilarity(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PuLID_FaceSimilarity",
            display_name="PuLID Face Similarity",
            category="PuLID",
            inputs=[PulidSocket.Input("pulid"), io.Image.Input("reference"), io.Image.Input("image")],
            outputs=[
                io.Float.Output("similarity", display_name="similarity"),
                io.String.Output("scores", display_name="per image"),
                io.Image.Output("compared", display_name="annotated image"),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, pulid: LoadedPulid, reference: Tensor, image: Tensor) -> io.NodeOutput:
        progress = ProgressBar(len(reference) + len(image))
        analyzer = cast(FaceAnalyzer, Heard(pulid.networks.analyzer, throw_exception_if_processing_interrupted))
        person = _person(analyzer, reference, progress)
        drawn, scored, compared = [], {}, []
        for name, photo, found in _detected(analyzer, image, "Picture", progress):
            boxes = [face.box for face in found.faces]
            looks = [found.embedding(face, photo, analyzer) for face in found.faces]
            scores = similarities(torch.stack(looks), person).tolist() if looks else []
            chosen = scores.index(max(scores)) if scores else None
            drawn.append(draw_boxes(photo, boxes, [f"{score:.2f}" for score in scores], chosen))
            scored[name] = scores
            compared.append(None if chosen is None else boxes[chosen])
        best = [max(scores) for scores in scored.values() if scores]
        if not best:
            raise NoFaceError(
                f"No face was found in any of the {len(image)} pictures, so there is nothing to compare. Check that "
                "they show a face, in view and upright."
            )
        lines = [f"{name}: {_described(scores)}" for name, scores in scored.items()]
        mean = sum(best) / len(best)
        annotated = torch.stack(drawn).float().div_(255)
        text = [
            *lines,
            f"Mean of {len(best)} of {len(image)}: {mean:.3f}",
            *notes_on("Picture", list(image), compared),
            FLATTERED,
        ]
        shown = {**ui.PreviewImage(annotated, cls=cls).as_dict(), "text": text}
        return io.NodeOutput(mean, "\n".join(lines), annotated, ui=shown)


def _person(analyzer: FaceAnalyzer, reference: Tensor, progress: ProgressBar) -> Tensor:
    """The direction (512,) of the largest faces of all references. Raises NoFaceError naming one that shows none."""
    embeddings = []
    for name, photo, found in _detected(analyzer, reference, "Reference", progress):
        if not found.faces:
            raise NoFaceError(f"{name}: No face found. Use photographs where the face is in view.")
        largest = in_order(found.faces, "largest", photo.shape[1::-1])[0]
        embeddings.append(found.embedding(largest, photo, analyzer))
    return mean_direction(torch.stack(embeddings))


def _detected(
    analyzer: FaceAnalyzer, batch: Tensor, kind: str, progress: ProgressBar
) -> Iterator[tuple[str, Photo, FoundFaces]]:
    """For each picture of a batch its name in messages, the photograph and its faces."""
    for number, picture in enumerate(batch, start=1):
        name = f"{kind} {number} of {len(batch)}"
        with about(name):
            photo = read_photo(picture)
        yield name, photo, find_faces(photo, analyzer)
        progress.update(1)


def _described(scores: list[float]) -> str:
    if not scores:
        return "no face, no score"
    return f"{max(scores):.3f}" + (f", the best of {len(scores)} faces" if len(scores) > 1 else "")
