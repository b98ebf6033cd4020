"""The nodes about people, on a real ComfyUI: which photographs, is it them, who is where, each into their place."""

import math
import os
from functools import partial

import pytest

if not os.environ.get("COMFYUI"):
    pytest.skip("COMFYUI names no ComfyUI folder", allow_module_level=True)

from pulid_sdxl.tools import comfy_host

comfy_host.enter(os.environ["COMFYUI"])

import comfy.model_management
import folder_paths
import numpy as np
import torch
from comfy_execution.graph import ExecutionBlocker
from pulid_sdxl.hosted import references
from pulid_sdxl.nodes import host, people
from pulid_sdxl.nodes.apply import PulidApply
from pulid_sdxl.nodes.closeup import PulidFaceCrop, PulidFacePaste
from pulid_sdxl.nodes.lists import each
from pulid_sdxl.nodes.people import PulidApplyPeople, PulidBestPhotos, PulidLikenessGate, PulidPlacePeople
from pulid_sdxl.pulid.cache import ResultCache
from pulid_sdxl.pulid.closeup import Place
from pulid_sdxl.pulid.errors import InputError, NoFaceError
from pulid_sdxl.pulid.faces import Face
from pulid_sdxl.pulid.identity import IdEmbedding
from pulid_sdxl.pulid.tokens import PEOPLE, combine
from pulid_sdxl.tools.fakes import networks as fakes

from . import sampling


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch, inference):
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path))
    monkeypatch.setattr(people, "CACHE", ResultCache(2**20))


class BrightPixelsAreFaces:
    """Sees a face of 40 px at each pixel with red above 200; its green is the angle of the embedding."""

    source = "bright pixels"

    def __init__(self):
        self.looks, self.recognised = 0, 0

    def detect(self, photo, side):
        self.looks += 1
        spots = np.argwhere(photo[..., 0] > 200)
        return [Face((x - 20.0, y - 20.0, x + 20.0, y + 20.0), fakes.LANDMARKS - 50 + (x, y), 0.9) for y, x in spots]

    def detect_for_alignment(self, photo):
        return []

    def recognise(self, photo, face):
        self.recognised += 1
        x, y = int(face.box[0] + 20), int(face.box[1] + 20)
        return 20 * direction(float(photo[y, x, 1]))


def direction(degrees):
    return torch.tensor([math.cos(math.radians(degrees)), math.sin(math.radians(degrees)), *[0.0] * 510])


def cosine(degrees):
    return pytest.approx(math.cos(math.radians(degrees)), abs=1e-5)


def picture(*faces, height=200, width=300):
    """A grey picture (1, H, W, 3) with faces (x, y, angle)."""
    image = torch.full((1, height, width, 3), 0.5)
    for x, y, angle in faces:
        image[0, y, x] = torch.tensor([1.0, angle / 255, 0.0])
    return image


def loaded(analyzer=None):
    return fakes.loaded(networks=fakes.photo_networks(analyzer or BrightPixelsAreFaces()))


def identity(*angles, tokens=10):
    generator = torch.Generator().manual_seed(3)
    cond = torch.randn(len(angles), tokens, 2048, generator=generator)
    arcface = torch.stack([direction(angle) for angle in angles])
    return IdEmbedding(cond, torch.randn(1, tokens, 2048, generator=generator), "v1", "print", None, arcface)


# ---- Best photos ----


def best_photos(*images, count=4, drop=True, analyzer=None):
    return PulidBestPhotos.execute([loaded(analyzer)], list(images), [count], ["largest"], [0], [drop])


def test_the_best_photographs_come_as_a_list_each_in_its_own_size():
    images = [picture((100, 100, angle), width=300 + angle) for angle in (0, 5, 120, 10)]
    images.append(picture())
    photos, scores, sheet = (out := best_photos(*images, count=2)).args
    assert len(photos) == len(scores) == 2 and scores == sorted(scores, reverse=True)
    assert all(any(torch.equal(photo, image) for image in images) for photo in photos)
    assert sheet.ndim == 4 and sheet.shape[-1] == 3 and sheet.std() > 0.05
    assert out.ui["text"][0] == "2 of 5 photographs taken, 2 asked for."
    assert next(line for line in out.ui["text"] if "someone else" in line).startswith(
        "Photo 3: someone else? likeness "
    )
    assert "Photo 5: no face." in out.ui["text"] and len(out.ui["images"]) == 1


def test_more_than_there_are_gives_all_that_serve_and_a_batch_is_a_list():
    out = best_photos(torch.cat([picture((100, 100, 0)), picture((90, 100, 3)), picture()]), count=64)
    assert len(out.args[0]) == 2 and out.ui["text"][0] == "2 of 3 photographs taken, 64 asked for."


def test_where_nobody_is_there_it_stops_in_words():
    with pytest.raises(NoFaceError, match="None of the 2 photographs shows a face"):
        best_photos(picture(), picture())


def test_another_count_looks_at_nothing_again():
    analyzer = BrightPixelsAreFaces()
    images = [picture((100, 100, 0)), picture((80, 100, 2))]
    best_photos(*images, count=1, analyzer=analyzer)
    looks = analyzer.looks
    best_photos(*images, count=2, analyzer=analyzer)
    assert analyzer.looks == looks


# ---- The gate ----


def gate(*images, keep="at least", threshold=0.5, count=5, none="stop", analyzer=None, **more):
    given = {"identity": [identity(0)], **{name: value for name, value in more.items()}}
    return PulidLikenessGate.execute(
        [loaded(analyzer)], list(images), [keep], [threshold], [count], [none],
        **{name: value for name, value in given.items() if value is not None},
    )  # fmt: skip


ANGLES = (80, 10, 50, 30)
FOUR = [picture((100, 100, angle)) for angle in ANGLES]


def test_pictures_pass_best_first_and_the_others_come_out_beside():
    passed, rejected, scores, table, chart = (out := gate(*FOUR, picture())).args
    assert torch.equal(passed[0], torch.cat([FOUR[1], FOUR[3], FOUR[2]])) and len(passed) == 1
    assert torch.equal(rejected[0], torch.cat([FOUR[0], picture()]))
    assert scores[:4] == [cosine(angle) for angle in ANGLES] and scores[4] == -1
    assert table.splitlines()[0] == "picture,score,rank,faces,person 1" and len(table.splitlines()) == 6
    assert chart.ndim == 4 and out.ui["text"][0] == "3 of 5 pass, score at least 0.5."
    assert "A face is missing in picture 5." in out.ui["text"] and "flatters" in out.ui["text"][-1]


def test_the_best_of_fifty():
    angles = [(37 * step) % 97 for step in range(50)]
    passed = gate(torch.cat([picture((100, 100, angle)) for angle in angles]), keep="best", count=5).args[0]
    assert [round(image[100, 100, 1].item() * 255) for image in passed[0]] == sorted(angles)[:5]


def test_pictures_of_several_sizes_come_as_a_batch_for_each():
    passed, rejected, *_ = gate(picture((50, 50, 0)), picture((50, 50, 9), width=200), picture((50, 50, 5))).args
    assert [tuple(batch.shape) for batch in passed] == [(2, 200, 300, 3), (1, 200, 200, 3)]
    assert isinstance(rejected, ExecutionBlocker) and rejected.message is None


def test_when_none_passes_it_stops_or_gives_the_best():
    with pytest.raises(InputError, match=r"No picture reaches the threshold 0\.99; the best, picture 2"):
        gate(*FOUR, threshold=0.99)
    out = gate(*FOUR, threshold=0.99, none="best one")
    assert torch.equal(out.args[0][0], FOUR[1]) and "None reaches 0.99" in out.ui["text"][1]
    with pytest.raises(NoFaceError):
        gate(picture(), picture(), none="best one")


def test_strangers_set_the_floor_and_a_threshold_below_it_is_told():
    strangers = [torch.cat([picture((50, 50, 100), (200, 50, 60)), picture()])]
    said = gate(*FOUR, threshold=0.4, strangers=strangers).ui["text"]
    assert "Strangers reach 0.500: a threshold below that lets them pass. Yours, 0.4, does." in said
    assert "Yours" not in "".join(gate(*FOUR, threshold=0.6, strangers=strangers).ui["text"])
    with pytest.raises(NoFaceError, match="strangers show no face"):
        gate(*FOUR, strangers=[picture()])


def test_two_people_are_matched_one_to_one_and_the_worse_one_counts():
    together = [
        picture((50, 50, 80), (150, 50, 20), (250, 50, 200)),
        picture((50, 50, 5)),
        picture((50, 50, 0), (150, 50, 40)),
    ]
    scores = gate(*together, keep="best", identity=[identity(0, 90)]).args[2]
    assert scores == [cosine(20), -1, cosine(50)]


def test_reference_photographs_count_in_place_of_the_identity():
    reference = [torch.cat([picture((50, 50, 60)), picture((50, 50, 100), (200, 50, 80))])]  # of equal ones the first
    for given in ({"identity": None}, {}):
        assert gate(*FOUR, keep="best", reference=reference, **given).args[2][0] == cosine(0)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"identity": None}, "Connect an identity, or reference photographs"),
        (
            {"identity": [IdEmbedding(torch.zeros(1, 5, 2048), torch.zeros(1, 5, 2048), "v1", "p")]},
            "earlier version.*reference",
        ),
        ({"reference": [torch.cat([picture((9, 9, 0)), picture()])]}, "Reference 2 shows no face"),
        ({"strangers": [torch.zeros(1, 4, 4, 3)]}, "Stranger 1 of 1: .*too small"),
    ],
)
def test_what_the_gate_cannot_do_is_said(more, words):
    with pytest.raises(InputError, match=words):
        gate(*FOUR, **more)


def test_a_threshold_that_moves_looks_at_nothing_again():
    analyzer = BrightPixelsAreFaces()
    gate(*FOUR, analyzer=analyzer)
    looks = analyzer.looks, analyzer.recognised
    gate(*FOUR, threshold=0.7, keep="best of those at least", analyzer=analyzer)
    assert (analyzer.looks, analyzer.recognised) == looks


def test_it_stops_between_faces_when_the_user_says_so():
    class Stops(BrightPixelsAreFaces):
        def recognise(self, photo, face):
            if self.recognised == 4:
                comfy.model_management.interrupt_current_processing()
            return super().recognise(photo, face)

    crowd = picture(*((20 + 13 * i, 50, 10) for i in range(20)))
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        gate(crowd, analyzer=(stops := Stops()))
    assert stops.recognised == 5


# ---- Who is where ----


def place(image=None, people=2, order="left to right", reach="head", boxes="", size=(96, 64)):
    return PulidPlacePeople.execute(loaded(), people, order, reach, 0.1, *size, boxes, image).args


def test_people_of_a_draft_get_masks_in_order_and_their_boxes_make_the_same_ones():
    draft = picture((220, 100, 0), (60, 90, 0))
    masks, preview, boxes = place(draft)
    assert (masks.shape, preview.shape) == ((2, 64, 96), (1, 64, 96, 3))
    middles = [np.argwhere(mask.numpy() == 1).mean(axis=0)[1] for mask in masks]
    assert middles[0] < 30 and middles[1] > 60
    assert torch.equal(place(draft, order="right to left")[0], masks.flip(0))
    again = place(boxes=boxes)
    assert torch.equal(again[0], masks) and again[2] == boxes


@pytest.mark.parametrize(("given", "words"), [
    ({}, "Connect a draft picture, or write one box a line"),
    ({"image": picture((50, 50, 0))}, "shows 1 face, and 2 people"),
    ({"image": torch.cat([picture()] * 2)}, "A draft is one picture, found 2"),
    ({"boxes": "0 0 1 1"}, "Boxes for 2 needed.*found 1"),
])  # fmt: skip
def test_who_cannot_be_placed_is_said(given, words):
    with pytest.raises(InputError, match=words):
        place(**given)


# ---- Each into their place ----

HEIGHT, WIDTH = 16, 24
sample = partial(sampling.sample, steps=2)


def apply_people(model, pulid, identities, masks, weights="0.8", method="fidelity"):
    return PulidApplyPeople.execute(model, pulid, identities, masks, method, weights, 0.0, 1.0)[0]


@pytest.mark.parametrize(("weights", "each"), [("0.8", (0.8, 0.8, 0.8)), ("1.2, 0.5, 0", (1.2, 0.5, 0.0))])
@pytest.mark.parametrize("method", ["fidelity", "neutral"])
def test_people_in_one_node_are_apply_nodes_in_a_chain(model, pulid, weights, each, method):
    rows = [identity(0), identity(40), identity(80)]
    rows = [
        row if index == 0 else IdEmbedding(torch.randn_like(row.cond), row.uncond, "v1", "print")
        for index, row in enumerate(rows)
    ]
    joined = combine(combine(rows[0], rows[1], PEOPLE), rows[2], PEOPLE)
    boxes = "0.1 0.2 0.2 0.4\n0.4 0.2 0.5 0.4\n0.7 0.2 0.8 0.4"
    masks = place(people=3, reach="body", boxes=boxes, size=(WIDTH * 8, HEIGHT * 8))[0]

    together = sample(apply_people(model, pulid, joined, masks, weights, method))

    chained = model
    for row, mask, weight in zip(rows, masks, each, strict=True):
        chained = PulidApply.execute(chained, pulid, row, method, weight, 0.0, 1.0, mask)[0]
    expected, without = sample(chained), sample(model)
    effect = (expected - without).std()
    assert effect > 1e-3
    assert (together - expected).abs().max() <= 2e-5 * effect


def test_exchanged_people_exchange_places(model, pulid):
    first, second = identity(0), IdEmbedding(torch.randn(1, 10, 2048), identity(0).uncond, "v1", "print")
    masks = place(people=2, reach="body", boxes="0.1 0.2 0.2 0.4\n0.6 0.2 0.7 0.4", size=(192, 128))[0]

    def made(*pair, masks):  # "neutral" only adds, so that it does not matter who comes first
        return sample(apply_people(model, pulid, combine(*pair, PEOPLE), masks, method="neutral"))

    there = made(first, second, masks=masks)
    effect = (there - sample(model)).std()
    assert (there - made(second, first, masks=masks.flip(0))).abs().max() < 1e-4 * effect
    assert (there - made(second, first, masks=masks)).abs().max() > 0.1 * effect


@pytest.mark.parametrize(("masks", "weights", "words"), [
    (torch.ones(3, 8, 8), "0.8", "2 identities and 3 masks"),
    (torch.ones(2, 8, 8), "0.8, 1, 2", "one for each of 2 people"),
    (torch.ones(2, 8, 8), "0.8, 9", "Weight 2 of 2 must be a number from -1 to 5, found '9'"),
])  # fmt: skip
def test_people_who_do_not_fit_are_refused(model, pulid, masks, weights, words):
    with pytest.raises(InputError, match=words):
        apply_people(model, pulid, identity(0, 40), masks, weights)


def test_who_has_an_empty_mask_is_said_and_the_others_are_put_in(model, pulid, monkeypatch):
    said, three = [], identity(0, 40, 80)
    monkeypatch.setattr(host, "say", said.append)
    masks = torch.tensor([1.0, 0.0, 0.0])[:, None, None].expand(3, HEIGHT, WIDTH)
    made = sample(apply_people(model, pulid, three, masks))
    assert torch.equal(made, sample(apply_people(model, pulid, three.people[0], masks[:1])))
    assert len(said) == 1 and "no effect for person 2, 3 of 3: their mask is empty" in said[0]


def test_a_slider_projects_nobody_again(model, pulid, monkeypatch):
    both, masks, calls = identity(0, 40), torch.ones(2, 8, 8), []
    apply_people(model, pulid, both, masks)
    network = pulid.weights.projections.module
    monkeypatch.setattr(type(network), "project", lambda *_: calls.append(1))
    apply_people(model, pulid, both, masks, "0.5")
    assert calls == []


# ---- The face close up ----


def test_a_batch_is_cropped_and_put_back():
    batch = torch.cat([picture((100, 100, 0)), picture((5, 190, 0))])
    noise = torch.rand(batch.shape, generator=torch.Generator().manual_seed(1)) * 0.5
    batch = torch.where(batch == 0.5, noise, batch)
    crop, mask, places = PulidFaceCrop.execute(loaded(), batch, "largest", 0, 256, 2.0).args
    assert (crop.shape, mask.shape, len(places)) == ((2, 256, 256, 3), (2, 256, 256), 2)
    assert (PulidFacePaste.execute(batch, crop, places, 0.15)[0] - batch).abs().max() < 1 / 255

    changed = PulidFacePaste.execute(batch, torch.zeros_like(crop), places, 0.15)[0]
    for before, after, where in zip(batch, changed, places, strict=True):
        x0, y0, x1, y1 = where.square
        outside = torch.ones(before.shape[:2], dtype=torch.bool)
        outside[y0:y1, x0:x1] = False
        assert torch.equal(before[outside], after[outside])
        assert after[(y0 + y1) // 2, (x0 + x1) // 2].max() < 0.01


def test_a_large_picture_is_cropped_at_its_own_pixels():
    large = torch.full((1, 1600, 2400, 3), 0.5)
    large[0, 700:710, 1500:1510] = torch.tensor([1.0, 0.0, 0.0])
    [where] = PulidFaceCrop.execute(loaded(), large, "largest", 0, 512, 2.0)[2]
    x0, y0, x1, y1 = where.square
    assert where.size == (2400, 1600) and abs((x0 + x1) / 2 - 1503) < 8 and abs((y0 + y1) / 2 - 703) < 8
    assert x1 - x0 == pytest.approx(40 * 2 * 2400 / 1024, abs=1)


def test_one_picture_takes_several_crops_each_in_a_copy():
    image = picture((100, 100, 0))
    crop, _, places = PulidFaceCrop.execute(loaded(), image, "largest", 0, 64, 2.0).args
    variants = torch.cat([crop, torch.zeros_like(crop), torch.ones_like(crop)])
    pasted = PulidFacePaste.execute(image, variants, places, 0.1)[0]
    assert len(pasted) == 3 and torch.allclose(pasted[0], image[0]) and pasted[2, 100, 100].min() > 0.99
    with pytest.raises(InputError, match="2 pictures, 3 crops and 1 places"):
        PulidFacePaste.execute(torch.cat([image] * 2), variants, places, 0.1)


BATCH = torch.cat([picture((100, 100, 0)), picture()])
BROKEN = [BATCH, picture() * float("nan"), picture()]
HERE, ELSEWHERE = Place((0, 0, 64, 64), (300, 200)), Place((0, 0, 64, 64), (64, 64))


@pytest.mark.parametrize(("call", "words"), [
    (lambda: PulidFaceCrop.execute(loaded(), BATCH, "largest", 0, 64, 2.0), "Picture 2 of 2: No face"),
    (lambda: PulidFaceCrop.execute(loaded(), BATCH, "largest", 1, 64, 2.0), "Picture 1 of 2: There is no face"),
    (lambda: PulidFacePaste.execute(BATCH, BATCH[:, :64, :64], [HERE, ELSEWHERE], 0.1), "Picture 2 of 2: The crop"),
    (lambda: place(boxes="0 0 1 1\n0 1 0 1"), "Line 2 of boxes"),
    (lambda: best_photos(*BROKEN), "images must be .* That is number 2 of the 3 in the list"),
    (lambda: best_photos(*BROKEN[::2], torch.cat(BROKEN)), "in number 3 of 4.* number 3 of the 3 in the list"),
    (lambda: gate(*FOUR, strangers=BROKEN), "strangers must be .* number 2 of the 3"),
    (lambda: best_photos(picture(), torch.zeros(1, 4, 4, 3)), "Photograph 2 of 2: A photograph of 4 x 4"),
    (lambda: each(BROKEN, references.encode), "Photograph 3 of 4: A reference picture holds NaN"),
])  # fmt: skip
def test_one_of_several_that_cannot_be_used_is_named(call, words):
    with pytest.raises(InputError, match=words):
        call()


# ---- What was looked at ----


def odd_pictures():
    large = picture((1000, 1000, 0), height=2048, width=2048)
    large[0, 998:1003, 998:1003] = large[0, 1000, 1000].clone()
    bright = picture((100, 100, 0))
    bright[0, 0, 0] = 1.5
    return [large, bright, torch.ones(1, 64, 64, 3) * 0.5]


def test_what_was_looked_at_is_said():
    for text in (
        gate(*odd_pictures(), reference=odd_pictures()[:2]).ui["text"],
        best_photos(*odd_pictures()).ui["text"],
    ):
        said = "\n".join(text)
        assert " 1: shrunk from 2048 x 2048 to 1024 x 1024 px (2.0 times)." in said
        assert " 2: with pixels from 0.00 to 1.50: what lies beyond" in said
        assert " 3: one colour all over (level 128 of 255)." in said
        assert "Faces as they were looked at: 40 x 40 px" in said
