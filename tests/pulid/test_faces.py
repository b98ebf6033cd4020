"""pulid/faces.py, against arithmetic by hand, with analyzers that are not networks."""

import sys

import numpy as np
import pytest
import torch
from pulid_sdxl.pulid import faces
from pulid_sdxl.pulid.encode import FaceChoice, Photograph
from pulid_sdxl.pulid.errors import InputError, MissingPackage, NoFaceError
from pulid_sdxl.tools.conformance import FOLDER
from safetensors.torch import load_file


def face_at(x, y, width=40, height=50, score=0.9):
    """A face of this size whose box is centered on (x, y); its landmarks lie as in an upright face."""
    box = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
    landmarks = (faces.CROP_LANDMARKS / faces.CROP_SIZE - 0.5) * width + (x, y)
    return faces.Face(box, landmarks, score)


class FakeAnalyzer:
    """Reports what it is told, and embeds a face as its box, so that a test can see whose embedding it holds."""

    def __init__(self, detected=(), for_alignment=()):
        self.detected, self.for_alignment = list(detected), list(for_alignment)
        self.recognised_crops = []

    def detect(self, photo, side):
        return self.detected

    def detect_for_alignment(self, photo):
        return self.for_alignment

    def recognise(self, photo, face):
        return torch.tensor(face.box)

    def recognise_crop(self, crop):
        self.recognised_crops.append(crop)
        return torch.full((512,), 7.0)


@pytest.fixture
def photo():
    return np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)


# ---- Choosing ----

SIZE = (400, 300)
LEFT, MIDDLE, RIGHT = face_at(60, 200, 30, 40), face_at(190, 60, 60, 70), face_at(330, 120, 50, 60)


ORDERED = {
    "largest": [MIDDLE, RIGHT, LEFT], "center": [MIDDLE, RIGHT, LEFT], "left to right": [LEFT, MIDDLE, RIGHT],
    "right to left": [RIGHT, MIDDLE, LEFT], "top to bottom": [MIDDLE, RIGHT, LEFT],
    "bottom to top": [LEFT, RIGHT, MIDDLE], "small to large": [LEFT, RIGHT, MIDDLE],
}  # fmt: skip


@pytest.mark.parametrize("order", faces.ORDERS)
@pytest.mark.parametrize("seen", [[LEFT, MIDDLE, RIGHT], [RIGHT, LEFT, MIDDLE]])
def test_every_order_and_index_picks_the_face_it_names(photo, order, seen):
    assert faces.in_order(seen, order, SIZE) == ORDERED[order]
    picked = [faces.find_face(photo, FakeAnalyzer(seen), order, index)[1].box for index in range(3)]
    assert picked == [face.box for face in ORDERED[order]]


def test_of_two_hundred_faces_those_that_tie_keep_the_detectors_order():
    crowd = [face_at(x, y, 6, 8) for x in range(10, 210, 10) for y in range(10, 110, 10)]
    assert faces.in_order(crowd, "right to left", SIZE) == sorted(crowd, key=lambda face: -face.center[0])


@pytest.mark.parametrize("index", [3, 200, -1])
def test_an_index_beyond_the_faces_says_how_many_there_are(index):
    with pytest.raises(InputError, match=f"index {index}.*3 faces.*0 to 2"):
        faces.pick([LEFT, MIDDLE, RIGHT], index)


def test_an_order_that_does_not_exist_names_those_that_do():
    with pytest.raises(InputError, match=r"'biggest'.*largest, center"):
        faces.in_order([LEFT], "biggest", SIZE)


# ---- A mask ----


def mask_over(*places, shape=(30, 40)):
    """A mask a tenth of the photograph's size, white in these (y0, y1, x0, x1)."""
    mask = torch.zeros(shape)
    for y0, y1, x0, x1 in places:
        mask[y0:y1, x0:x1] = 1
    return mask


@pytest.mark.parametrize("face", [LEFT, MIDDLE, RIGHT])
@pytest.mark.parametrize("order", faces.ORDERS)
def test_a_mask_over_one_face_takes_it_whatever_the_order(photo, face, order):
    x0, y0, x1, y1 = (int(edge / 10) for edge in face.box)
    mask = mask_over((y0, y1 + 1, x0, x1 + 1))
    assert faces.find_face(photo, FakeAnalyzer([LEFT, MIDDLE, RIGHT]), order, 0, mask)[1].box == face.box


def test_of_several_faces_under_a_mask_the_best_covered_comes_first():
    half_right, whole_left = (9, 15, 33, 36), (18, 23, 4, 8)
    assert faces.under_mask([RIGHT, MIDDLE, LEFT], mask_over(half_right, whole_left), SIZE) == [LEFT, RIGHT]


def test_a_mask_beside_all_faces_says_so(photo):
    with pytest.raises(InputError, match=r"touches no face.*3 faces"):
        faces.find_face(photo, FakeAnalyzer([LEFT, MIDDLE, RIGHT]), mask=mask_over((0, 3, 0, 3)))


def test_a_face_that_reaches_beyond_the_frame_is_measured_by_what_the_mask_can_cover():
    cut = face_at(5, 5, 60, 60)
    assert faces.under_mask([cut], mask_over((0, 5, 0, 5)), SIZE) == [cut]


# ---- One face for everything ----


def test_embedding_box_and_crop_are_of_the_chosen_face(photo):
    twins = [face_at(336, 126), face_at(331, 121, 52, 62, 0.99), face_at(191, 61, 58, 72), face_at(61, 199, 31, 41)]
    analyzer = FakeAnalyzer([LEFT, MIDDLE, RIGHT], twins)

    selection, found = faces.find_face(photo, analyzer, "right to left", 0)

    assert [face.box for face in selection.faces] == [RIGHT.box, MIDDLE.box, LEFT.box] and selection.index == 0
    assert found.box == RIGHT.box
    assert found.score == RIGHT.score
    assert torch.equal(found.arcface, torch.tensor(RIGHT.box))
    assert np.array_equal(found.landmarks.numpy(), twins[1].landmarks)
    expected = torch.from_numpy(faces.align(photo, twins[1].landmarks)).permute(2, 0, 1) / 255
    assert torch.equal(found.pixels, expected)
    assert found.pixels.shape == (3, 512, 512) and found.pixels.dtype == torch.float32


@pytest.mark.parametrize(
    "others", [[], [LEFT, MIDDLE], [face_at(365, 120, 50, 60)]], ids=["none", "others", "a shoulder"]
)
def test_without_a_twin_the_detectors_own_landmarks_serve(photo, others):
    found = faces.find_face(photo, FakeAnalyzer([LEFT, MIDDLE, RIGHT], others), "right to left")[1]
    assert np.array_equal(found.landmarks.numpy(), RIGHT.landmarks)


def test_a_face_that_only_the_second_detector_sees_is_recognised_from_its_crop(photo):
    analyzer = FakeAnalyzer([], [LEFT, MIDDLE])

    found = faces.find_face(photo, analyzer, "left to right", 1)[1]

    assert found.box == MIDDLE.box
    assert found.arcface.tolist() == [7.0] * 512
    assert np.array_equal(analyzer.recognised_crops[0], faces.align(photo, MIDDLE.landmarks))


@pytest.mark.parametrize("mask", [None, torch.ones(30, 40)])
def test_no_face_at_all_is_an_error_of_its_own(photo, mask):
    with pytest.raises(NoFaceError, match="No face"):
        faces.find_face(photo, FakeAnalyzer(), mask=mask)


def test_landmarks_that_coincide_are_no_face(photo):
    point = faces.Face((10, 10, 50, 60), np.full((5, 2), 30.0), 0.9)
    with pytest.raises(NoFaceError, match="do not span a face"):
        faces.find_face(photo, FakeAnalyzer([point]))


@pytest.mark.parametrize(("x", "share"), [(100, 1), (120, 800 / 2400), (300, 0)])
def test_overlap_is_intersection_over_union(x, share):
    assert faces.overlap(face_at(100, 100, 40, 40), face_at(x, 100, 40, 40)) == pytest.approx(share)


def test_detections_that_are_not_finite_or_have_no_area_are_dropped():
    boxes = np.array([[0, 0, 9, 9], [np.nan, 0, 9, 9], [0, 0, np.inf, 9], [9, 0, 0, 9], [0, 0, 9, 9]])
    landmarks = np.tile(faces.CROP_LANDMARKS, (5, 1, 1))
    landmarks[4, 2] = np.nan

    kept = faces.faces_of(boxes, landmarks, np.full(5, 0.9))

    assert [face.box for face in kept] == [(0, 0, 9, 9)]


# ---- Sizes, margins and turns ----


class Particular(FakeAnalyzer):
    """Sees a face only in a photograph held one way, at one size: a white patch that lies as `patch` says."""

    def __init__(self, side=None, shape=None, patch=None, upright=()):
        super().__init__(for_alignment=upright)
        self.side, self.shape, self.patch, self.asked = side, shape, patch, []

    def detect(self, photo, side):
        self.asked.append((photo.shape[:2], side))
        if side != self.side or photo.shape[:2] != self.shape:
            return []
        y, x = (int(values.mean()) for values in np.nonzero((photo == 255).all(axis=2)))
        return [face_at(x, y)] if self.patch in (None, (x, y)) else []


DOWN = (640, 576, 512, 448, 384, 320, 256)
UP = (768, 896, 1024, 1152, 1280)
SPOT = (100, 60)  # x, y in a photograph 400 px wide and 300 high


@pytest.fixture
def spotted():
    photo = np.full((300, 400, 3), 40, np.uint8)
    photo[SPOT[1], SPOT[0]] = 255
    return photo


@pytest.mark.parametrize(
    ("side", "sides"), [(640, DOWN[:1]), (320, DOWN[:6]), (256, DOWN), (768, (*DOWN, 768)), (1280, DOWN + UP)]
)
def test_sizes_are_tried_in_turn_up_to_the_first_that_shows_a_face(spotted, side, sides):
    analyzer = Particular(side, (300, 400))

    assert faces.find_face(spotted, analyzer)[0].how == f"InsightFace at {side} px"
    assert analyzer.asked == [((300, 400), asked) for asked in sides]


@pytest.mark.parametrize(("side", "shape", "patch", "how"), [
    (640, (600, 800), (300, 210), "InsightFace at 640 px, photograph with a margin of half its size"),
    (640, (400, 300), (239, 100), "InsightFace at 640 px, photograph turned 90 degrees"),
    (1280, (400, 300), (60, 299), "InsightFace at 1280 px, photograph turned 270 degrees"),
])  # fmt: skip
def test_margins_and_turns_find_the_face_in_the_photographs_own_pixels(spotted, side, shape, patch, how):
    selection, crop = faces.find_face(spotted, Particular(side, shape, patch))

    assert selection.how == how
    assert selection.faces[0].center == pytest.approx(SPOT)
    assert crop.box == selection.faces[0].box


@pytest.mark.parametrize("view", faces.VIEWS, ids=lambda view: view.words)
def test_every_pixel_goes_back_to_where_it_came_from(view):
    rng = np.random.default_rng(2)
    photo = rng.integers(0, 255, (30, 44, 3), dtype=np.uint8)
    for x, y in ((0, 0), (43, 0), (7, 29), (20, 11)):
        marked = photo.copy()
        marked[y, x] = 255
        held = view.of(marked)
        v, u = (int(values[0]) for values in np.nonzero((held == 255).all(axis=2)))
        found = faces.Face((u - 2, v - 1, u + 2, v + 1), np.tile([float(u), v], (5, 1)), 0.5)

        back = view.back(found, photo)

        assert back.landmarks.tolist() == [[x, y]] * 5
        assert back.center == (x, y)
        assert back.box[2] > back.box[0] and back.box[3] > back.box[1]


def test_what_surrounds_a_photograph_is_what_surrounds_a_crop(spotted):
    held = faces.VIEWS[1].of(spotted)
    assert held.shape == (600, 800, 3)
    assert held[0, 0].tolist() == held[-1, -1].tolist() == list(faces.CROP_BORDER)


def test_nothing_is_turned_where_the_second_detector_sees_a_face_upright(spotted):
    analyzer = Particular(640, (400, 300), upright=[face_at(*SPOT)])

    selection, crop = faces.find_face(spotted, analyzer)

    assert selection.how == "RetinaFace alone"
    assert crop.arcface.tolist() == [7.0] * 512
    assert {shape for shape, _ in analyzer.asked} == {(300, 400), (600, 800)}


def test_a_photograph_without_a_face_is_looked_at_every_way_once(spotted):
    analyzer = Particular()
    with pytest.raises(NoFaceError):
        faces.find_face(spotted, analyzer)
    assert len(analyzer.asked) == sum(len(view.sides) for view in faces.VIEWS) == len(DOWN + UP) + 4 + 9


# ---- As the pack of older shared workflows ----


def test_apart_the_largest_is_recognised_and_the_most_central_aligned(photo):
    small, large = face_at(190, 150, 40, 50), face_at(60, 60, 60, 70)
    off, central = face_at(62, 60, 90, 90), face_at(195, 150, 30, 30)
    analyzer = FakeAnalyzer([small, large], [off, central])
    tried = []
    analyzer.detect = lambda photo, side: tried.append(side) or (analyzer.detected if side == 448 else [])

    selection, crop = faces.find_largest_and_central(photo, analyzer)

    assert torch.equal(crop.arcface, torch.tensor(large.box))
    assert crop.box == large.box
    aligned = torch.from_numpy(faces.align(photo, central.landmarks)).permute(2, 0, 1) / 255
    assert torch.equal(crop.pixels, aligned)
    assert (selection.faces, selection.index, selection.how) == ([large, small], 0, "InsightFace at 448 px")
    assert tried == [640, 576, 512, 448]


def test_without_opencv_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(MissingPackage, match="-m pip install --upgrade opencv-python"):
        faces.align(np.zeros((64, 64, 3), np.uint8), faces.CROP_LANDMARKS)


@pytest.mark.skipif(not FOLDER.is_dir(), reason=f"THE AUTHORS' NUMBERS ARE NOT CHECKED: no {FOLDER}")
def test_alignment_is_the_authors_to_the_last_bit():
    reference = load_file(FOLDER / "alignment.safetensors")
    landmarks = reference["landmarks"].numpy()
    photo = np.ascontiguousarray(reference["image_bgr_u8"].numpy()[..., ::-1])

    assert np.array_equal(faces.alignment(landmarks), reference["affine"].numpy())
    assert np.array_equal(faces.align(photo, landmarks)[..., ::-1], reference["crop_bgr_u8"].numpy())


class LargePhotograph(FakeAnalyzer):
    """A photograph of 4096 px that shows a face of 256 px, wherever it is asked to find it."""

    face = face_at(2000, 2000, 256, 256)
    full = np.zeros((4096, 4096, 3), np.uint8)

    def detect(self, photo, side):
        return [self.face.on(photo, self.full)]

    def recognise(self, photo, face):
        self.asked = photo.shape[0], face.landmarks
        return torch.zeros(512)


def test_a_small_face_in_a_large_photograph_can_be_cut_out_of_the_full_one():
    marked = torch.rand(4096, 4096, 1, generator=torch.Generator().manual_seed(0)) * 0.2
    for x, y in LargePhotograph.face.landmarks.round().astype(int):
        marked[y - 2 : y + 3, x - 2 : x + 3] = 1
    crops, asked = {}, {}
    for full in (False, True):
        analyzer = LargePhotograph()
        selection, crop = FaceChoice(full=full).find(Photograph(marked), analyzer)
        crops[full], asked[full] = crop.pixels[0], analyzer.asked
        assert selection.cut_from == (analyzer.asked[0],) * 2
        for x, y in faces.CROP_LANDMARKS.round().astype(int):  # the marks lie where an aligned face has its landmarks
            assert crops[full][y, x] > crops[full].median() + 0.2
    assert asked[False][0] == 1024 and asked[True][0] == 4096  # the crop could use 8192 px, and there are 4096
    assert np.allclose((asked[False][1] + 0.5) * 4 - 0.5, asked[True][1])
    assert crops[True].std() > 1.3 * crops[False].std()  # the grain is still there


def test_a_face_that_fills_the_crop_already_is_cut_out_of_what_the_authors_look_at():
    large = face_at(512, 512, 600, 600)
    photo = torch.zeros(3000, 3000, 3)
    photo[0] = 1
    for full in (False, True):
        analyzer = FakeAnalyzer([large])
        selection, _ = FaceChoice(full=full).find(Photograph(photo), analyzer)
        assert selection.cut_from == (1024, 1024)


@pytest.mark.parametrize(("shade", "words"), [(1.0, "level 255.*16-bit"), (0.0, r"level 0[^6]*$")])
def test_a_photograph_of_one_colour_is_told_as_that(shade, words):
    with pytest.raises(NoFaceError, match=rf"one colour all over .{words}"):
        FaceChoice().find(Photograph(torch.full((64, 64, 3), shade)), FakeAnalyzer())


def test_an_empty_mask_is_told_as_that():
    with pytest.raises(InputError, match="mask is empty"):
        faces.under_mask([face_at(20, 20)], torch.zeros(64, 64), (64, 64))


def test_a_mask_that_lies_around_the_face_rather_than_on_it_is_said(photo):
    x0, y0, x1, y1 = (round(value / 10) for value in MIDDLE.box)
    around = 1 - mask_over((y0 + 1, y1, x0 + 1, x1))
    found = faces.find_face(photo, FakeAnalyzer([MIDDLE]), mask=around)[0]
    assert "of the rest: is it inverted?" in found.how
    assert "inverted" not in faces.find_face(photo, FakeAnalyzer([MIDDLE]), mask=torch.ones(30, 40))[0].how
