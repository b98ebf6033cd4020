"""The nodes about people: which photographs, is it them, who is where, and each person into their place."""

from collections.abc import Sequence

import numpy as np
import torch
from comfy.model_management import throw_exception_if_processing_interrupted
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io, ui
from comfy_execution.graph import ExecutionBlocker
from torch import Tensor

from ..pulid.attention import METHODS
from ..pulid.cache import ResultCache
from ..pulid.encode import FaceChoice, Photograph, photographs
from ..pulid.errors import InputError, about
from ..pulid.faces import ORDERS, find_faces
from ..pulid.identity import IdEmbedding
from ..pulid.layouts import REACHES, masks_of, people_of, read_boxes, write_boxes
from ..pulid.people import (
    KEEPS,
    Keep,
    Likeness,
    Recognised,
    Rule,
    floor_of,
    match,
    mean_direction,
    passing,
    recognise_all,
    report,
)
from ..pulid.photo import read_photo
from ..pulid.portraits import Choice, Portrait, choose, look_at_all
from ..pulid.preview import Card, Column, contact_sheet, draw_people, score_chart
from ..pulid.tokens import read_weights
from . import host
from .apply import END, MODEL, PATCHED, PULID, START, WEIGHT, PulidApply
from .checked import checked
from .encode import step_of
from .lists import by_size, only_ones, rows
from .seen import notes_on
from .similarity import FLATTERED
from .texts import described
from .types import IdentitySocket, LoadedPulid

CACHE = ResultCache(16 * 2**20)  # what was seen of a face takes a few kB
FACE = io.Combo.Input("face", options=list(ORDERS), default="largest")
FACE_INDEX = io.Int.Input("face_index", default=0, min=0, max=255)
PREVIEWED = [io.Hidden.prompt, io.Hidden.extra_pnginfo]
MOST_PEOPLE = 8
MISSING = -1.0  # the score of a picture in which somebody has no face: that of the least alike there could be


@described
@checked
class PulidBestPhotos(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PuLID_BestPhotos",
            display_name="PuLID Best Photos",
            category="PuLID",
            inputs=[
                PULID,
                io.Image.Input("images"),
                io.Int.Input("count", default=4, min=1, max=64),
                FACE,
                FACE_INDEX,
                io.Boolean.Input("drop_strangers", default=True),
            ],
            outputs=[
                io.Image.Output("photos", display_name="photos", is_output_list=True),
                io.Float.Output("scores", display_name="scores", is_output_list=True),
                io.Image.Output("sheet", display_name="sheet"),
            ],
            hidden=PREVIEWED,
            is_input_list=True,
        )

    @classmethod
    def execute(
        cls, pulid: list[LoadedPulid], images: list[Tensor], count: list[int], face: list[str], face_index: list[int],
        drop_strangers: list[bool],
    ) -> io.NodeOutput:  # fmt: skip
        taken = photographs(rows(images))
        loaded, best, order, index, drop = only_ones(
            pulid=pulid, count=count, face=face, face_index=face_index, drop_strangers=drop_strangers
        )
        looks = look_at_all(taken, loaded.networks.analyzer, FaceChoice(order, index), CACHE, step_of(len(taken)))
        choice = choose(looks, best, drop)
        sheet = contact_sheet(_cards(taken, looks, choice)).float().div_(255)[None]
        photos = [taken[number].pixels[None] for number in choice.best]
        notes = [f"{len(photos)} of {len(taken)} photographs taken, {best} asked for."]
        notes += [f"Photo {number + 1}: {why}." for number, why in sorted(choice.left_out.items())]
        boxes = [look.face.box if isinstance(look, Portrait) else None for look in looks]
        notes += notes_on("Photo", [one.pixels for one in taken], boxes)
        if choice.further:
            notes.append(f"Not needed: {', '.join(str(number + 1) for number in choice.further)}.")
        shown = {**ui.PreviewImage(sheet, cls=cls).as_dict(), "text": notes}
        return io.NodeOutput(photos, [choice.scores[number] for number in choice.best], sheet, ui=shown)


def _cards(taken: Sequence[Photograph], looks: Sequence[Portrait | str], choice: Choice) -> list[Card]:
    """The photographs that are taken, in order, those that come after them, and those that are left out."""
    cards = []
    ranked = [*choice.best, *choice.further]
    for number in (*ranked, *sorted(choice.left_out)):
        look, bars, box = looks[number], {}, None
        if isinstance(look, Portrait):
            marks, box = look.marks, look.face.box
            beside = {
                "size": f"{marks.side:.0f} px",
                "sharp": f"{marks.bars['sharp']:.2f}",
                "frontal": f"{marks.yaw:+.0f}, {marks.pitch:+.0f} deg",
                "exposure": f"{marks.bars['exposure']:.2f}",
                "detector": f"{marks.detector:.2f}",
            }
            bars = {name: (value, beside[name]) for name, value in marks.bars.items()}
            bars["alike"] = (max(choice.likeness[number], 0.0), f"{choice.likeness[number]:.2f}")
        place = ranked.index(number) + 1 if number in ranked else None
        photo, why = read_photo(taken[number].pixels), choice.left_out.get(number, "")
        score, is_taken = choice.scores.get(number), number in choice.best
        cards.append(Card(photo, number + 1, box, place, is_taken, why, score, bars))
    return cards


@described
@checked
class PulidLikenessGate(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PuLID_LikenessGate",
            display_name="PuLID Likeness Gate",
            category="PuLID",
            inputs=[
                PULID,
                io.Image.Input("images"),
                io.Combo.Input("keep", options=list(KEEPS), default="at least"),
                io.Float.Input("threshold", default=0.5, min=-1.0, max=1.0, step=0.01),
                io.Int.Input("count", default=5, min=1, max=1024),
                io.Combo.Input("when_none", options=["stop", "best one"], default="stop"),
                IdentitySocket.Input("identity", optional=True),
                io.Image.Input("reference", optional=True),
                io.Image.Input("strangers", optional=True),
            ],
            outputs=[
                io.Image.Output("passed", display_name="passed", is_output_list=True),
                io.Image.Output("rejected", display_name="rejected", is_output_list=True),
                io.Float.Output("scores", display_name="scores", is_output_list=True),
                io.String.Output("report", display_name="report"),
                io.Image.Output("chart", display_name="chart"),
            ],
            hidden=PREVIEWED,
            is_input_list=True,
        )

    @classmethod
    def execute(
        cls, pulid: list[LoadedPulid], images: list[Tensor], keep: list[Keep], threshold: list[float],
        count: list[int], when_none: list[str], identity: list[IdEmbedding | None] | None = None,
        reference: list[Tensor] | None = None, strangers: list[Tensor] | None = None,
    ) -> io.NodeOutput:  # fmt: skip
        loaded, kept, least, most, none, person = only_ones(
            pulid=pulid, keep=keep, threshold=threshold, count=count, when_none=when_none, identity=identity or [None]
        )
        rule = Rule(kept, least, most, best_if_none=none == "best one")
        pictures = rows(images)
        looked_at = _Looking(loaded, pictures, rows(reference), rows(strangers))
        people = looked_at.people(person)
        seen = looked_at.pictures("Picture", pictures)
        floor = looked_at.floor(people)

        likenesses = [match(one.embeddings, people) for one in seen]
        scores = [likeness.score for likeness in likenesses]
        numbers = [MISSING if score is None else score for score in scores]
        passed = passing(scores, rule)
        rejected = sorted({*range(len(pictures))} - {*passed}, key=lambda index: (-numbers[index], index))

        title = f"{len(passed)} of {len(pictures)} pass"
        boxes = [_shown_face(*pair) for pair in zip(seen, likenesses, strict=True)]
        columns = [
            Column(read_photo(pictures[i]), i + 1, scores[i], i in passed, boxes[i]) for i in (*passed, *rejected)
        ]
        line = None if rule.keep == "best" else rule.threshold
        chart = score_chart(columns, line, floor, title).float().div_(255)[None]
        notes = [*looked_at.notes, *notes_on("Picture", pictures, boxes)]
        text = [*_said(title, likenesses, rule, floor), *notes, FLATTERED]
        shown = {**ui.PreviewImage(chart, cls=cls).as_dict(), "text": text}
        return io.NodeOutput(
            _batches(pictures, passed), _batches(pictures, rejected), numbers, report(likenesses, passed), chart,
            ui=shown,
        )  # fmt: skip


class _Looking:
    """Looks at every picture that the gate is given; one progress bar for all."""

    def __init__(self, loaded: LoadedPulid, pictures: list[Tensor], reference: list[Tensor], strangers: list[Tensor]):
        if not pictures:
            raise InputError("There is no picture to look at. Connect at least one.")
        self.analyzer, self.reference, self.strangers = loaded.networks.analyzer, reference, strangers
        self.notes: list[str] = []
        self._step, self._done = step_of(len(pictures) + len(reference) + len(strangers)), 0

    def pictures(self, kind: str, pictures: Sequence[Tensor]) -> list[Recognised]:
        """The faces of each picture. Raises InputError with the kind and number of one that cannot be used."""
        seen = []
        for number, picture in enumerate(pictures, start=1):
            with about(f"{kind} {number} of {len(pictures)}"):
                seen.append(recognise_all(picture, self.analyzer, CACHE, throw_exception_if_processing_interrupted))
            self._done += 1
            self._step(self._done)
        return seen

    def floor(self, people: Tensor) -> float | None:
        """The highest cosine that strangers reach, where there are any."""
        seen = self.pictures("Stranger", self.strangers)
        return floor_of([found.embeddings for found in seen], people) if seen else None

    def people(self, identity: IdEmbedding | None) -> Tensor:
        """The directions (R, 512) of the people to look for: of the reference photographs, else of the identity."""
        if self.reference:
            seen = self.pictures("Reference", self.reference)
            faceless = [str(number) for number, found in enumerate(seen, start=1) if not found.faces]
            if faceless:
                raise InputError(f"Reference {', '.join(faceless)} shows no face. Use photographs where it is in view.")
            boxes = [max(found.faces, key=lambda face: face.area).box for found in seen]
            self.notes += notes_on("Reference", self.reference, boxes)
            return mean_direction(torch.stack([found.largest for found in seen]))[None]
        if identity is None:
            raise InputError("Connect an identity, or reference photographs of the person, to compare with.")
        if identity.arcface is None:
            raise InputError(
                "This identity does not say what the recogniser saw: it was saved by an earlier version, or is the sum "
                "or difference of others. Connect photographs of the person to reference instead."
            )
        return identity.arcface


def _shown_face(seen: Recognised, likeness: Likeness) -> tuple[float, ...] | None:
    """The box of the face that a picture's score is about; None where there is none."""
    if likeness.score is None:
        return None
    worst = likeness.faces[likeness.cosines.index(likeness.score)]
    return None if worst is None else seen.faces[worst].box


def _said(title: str, likenesses: Sequence[Likeness], rule: Rule, floor: float | None) -> list[str]:
    missing = [str(number) for number, likeness in enumerate(likenesses, start=1) if likeness.score is None]
    best = max(likeness.score for likeness in likenesses if likeness.score is not None)
    if rule.keep != "best" and best < rule.threshold:
        said = [f"{title}.", f"None reaches {rule.threshold:g}, so the best one was taken, with {best:.3f}."]
    else:
        said = [f"{title}, score at least {rule.threshold:g}." if rule.keep == "at least" else f"{title}, best first."]
    if missing:
        said.append(f"A face is missing in picture {', '.join(missing)}.")
    if floor is not None:
        said.append(f"Strangers reach {floor:.3f}: a threshold below that lets them pass.")
        if rule.keep != "best" and rule.threshold < floor:
            said[-1] += f" Yours, {rule.threshold:g}, does."
    return said


def _batches(pictures: Sequence[Tensor], chosen: Sequence[int]) -> list[Tensor] | ExecutionBlocker:
    """A batch for each size; where there is none, what comes after does not run."""
    batches = [torch.stack(group) for group in by_size(pictures[index] for index in chosen)]
    return batches or ExecutionBlocker(None)


@described
@checked
class PulidPlacePeople(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PuLID_PlacePeople",
            display_name="PuLID Place People",
            category="PuLID",
            inputs=[
                PULID,
                io.Int.Input("people", default=2, min=1, max=MOST_PEOPLE),
                io.Combo.Input("order", options=list(ORDERS), default="left to right"),
                io.Combo.Input("reach", options=list(REACHES), default="head and shoulders"),
                io.Float.Input("feather", default=0.1, min=0.0, max=1.0, step=0.01),
                io.Int.Input("width", default=1024, min=8, max=8192, step=8),
                io.Int.Input("height", default=1024, min=8, max=8192, step=8),
                io.String.Input("boxes", default="", multiline=True),
                io.Image.Input("image", optional=True),
            ],
            outputs=[
                io.Mask.Output("masks", display_name="masks"),
                io.Image.Output("preview", display_name="preview"),
                io.String.Output("placed", display_name="boxes"),
            ],
            hidden=PREVIEWED,
        )

    @classmethod
    def execute(
        cls, pulid: LoadedPulid, people: int, order: str, reach: str, feather: float, width: int, height: int,
        boxes: str, image: Tensor | None = None,
    ) -> io.NodeOutput:  # fmt: skip
        if image is not None and len(image) != 1:
            raise InputError(
                f"A draft is one picture, found {len(image)}. Choose one, with ImageFromBatch for example."
            )
        photo = np.full((height, width, 3), 100, np.uint8) if image is None else read_photo(image[0])
        if boxes.strip():
            placed = read_boxes(boxes, people)
        elif image is None:
            raise InputError("Connect a draft picture, or write one box a line: x0 y0 x1 y1 of a face, 0 to 1.")
        else:
            placed = people_of(find_faces(photo, pulid.networks.analyzer), people, order, photo.shape[1::-1])
        masks = masks_of(placed, reach, feather, (width, height))
        preview = draw_people(photo, masks, placed).float().div_(255)[None]
        return io.NodeOutput(masks, preview, write_boxes(placed), ui=ui.PreviewImage(preview, cls=cls))


@described
@checked
class PulidApplyPeople(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PuLID_ApplyPeople",
            display_name="Apply PuLID to People (SDXL)",
            category="PuLID",
            inputs=[
                MODEL,
                PULID,
                IdentitySocket.Input("identities"),
                io.Mask.Input("masks"),
                io.Combo.Input("method", options=list(METHODS), default="fidelity"),
                io.String.Input("weights", default="0.8"),
                START,
                END,
            ],
            outputs=[PATCHED],
        )

    @classmethod
    def execute(
        cls, model: ModelPatcher, pulid: LoadedPulid, identities: IdEmbedding, masks: Tensor, method: str,
        weights: str, start_at: float, end_at: float,
    ) -> io.NodeOutput:  # fmt: skip
        people = len(identities.cond)
        if len(masks) != people:
            raise InputError(
                f"There are {people} identities and {len(masks)} masks. Join identities with PuLID Combine Identities, "
                "mode 'people', and give a mask for each, from PuLID Place People."
            )
        each = read_weights(weights, people, "people", WEIGHT.min, WEIGHT.max)
        if empty := [str(number) for number, mask in enumerate(masks, start=1) if not mask.any()]:
            host.say(
                f"PuLID has no effect for person {', '.join(empty)} of {people}: their mask is empty. Let PuLID Place "
                "People make the masks, or paint one for everybody."
            )
        for person, weight, mask in zip(identities.people, each, masks, strict=True):
            if not mask.any():
                continue
            [model] = PulidApply.execute(model, pulid, person, method, weight, start_at, end_at, mask[None]).args
        return io.NodeOutput(model)
