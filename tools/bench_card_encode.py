"""From photograph to identity on a card, for bench_card.py: networks of the real sizes with random weights."""

import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from ..models.face_networks import InsightFaceAnalyzer
from ..models.onnx_providers import available_providers
from ..pulid.attention import IdProjections
from ..pulid.cache import ResultCache
from ..pulid.encode import EncodeSettings, Photograph, encode, to_vision_input
from ..pulid.encoders import STAGES, IdFormer
from ..pulid.eva import EvaVisionTower
from ..pulid.networks import PhotoNetworks, PulidWeights, on_cpu
from .bench_encoding import rolled
from .card import Bench, Card, Figure

REAL_LIMIT = 0.15  # s, a further photograph on a card
PHOTOGRAPHS = 6
CACHED = 256 << 20  # bytes


def on_card(card: Card, make: Callable[..., torch.nn.Module]) -> torch.nn.Module:
    """A network with random weights of the card's dtype, resting on the CPU."""
    network = make(device=card.device, dtype=card.dtype).requires_grad_(False)
    card.fill(network)
    return network.to("cpu")


def make_networks(card: Card, folder: Path) -> tuple[PulidWeights, PhotoNetworks]:
    import onnx

    from ..nodes import host
    from .fakes import standin_faces

    standin_faces.make_face_models(folder)
    antelope, facexlib = folder / "insightface/models/antelopev2", folder / "facexlib"
    onnx.save(standin_faces.make_iresnet100(), antelope / "glintr100.onnx")  # as large as the real one
    files = antelope, facexlib / "detection_Resnet50_Final.pth", facexlib / "parsing_bisenet.pth"
    analyzer = InsightFaceAnalyzer(*files, providers=available_providers(), manage=host.manage)
    tower = on_card(card, lambda **where: EvaVisionTower(operations=host.OPERATIONS, **where))
    encoder = on_card(card, lambda **where: IdFormer(operations=host.OPERATIONS, **where))
    managed = host.managed(tower, "bench"), host.managed(encoder, "bench")
    weights = PulidWeights("v1.1", "bench", managed[1], on_cpu(IdProjections([], device="meta")))
    return weights, PhotoNetworks(managed[0], analyzer)


def seconds(card: Card, call: Callable[[], object]) -> float:
    card.wait()
    start = time.perf_counter()
    call()
    card.wait()
    return time.perf_counter() - start


def figures(bench: Bench) -> Iterator[Figure]:
    warnings.filterwarnings("ignore", module="torchvision|insightface|facexlib|skimage")
    card, photos = bench.card, rolled(PHOTOGRAPHS)
    with tempfile.TemporaryDirectory() as folder:
        weights, networks = make_networks(card, Path(folder))
        cache, settings = ResultCache(CACHED), EncodeSettings()

        def one(photo) -> None:
            taken = Photograph(torch.from_numpy(photo).float() / 255)
            encode([taken], weights, networks, settings, cache)

        times = [seconds(card, lambda photo=photo: one(photo)) for photo in photos]
        limit = REAL_LIMIT if card.kind != "cpu" else None
        yield Figure("encode", "first photograph, files opened and networks brought there", times[0], "s")
        yield Figure("encode", "a further photograph", statistics.median(times[1:]), "s", limit)
        yield Figure("encode", "the same again", seconds(card, lambda: one(photos[-1])), "s")
        yield from parts(card, weights, networks, photos[0])


def parts(card: Card, weights: PulidWeights, networks: PhotoNetworks, photo) -> Iterator[Figure]:
    analyzer = networks.analyzer
    [face, *_] = analyzer.detect(photo, 640)
    crop = torch.rand(1, 3, 512, 512)
    pixels = to_vision_input(crop).to(networks.tower.load())
    hidden = networks.tower.module.features(pixels).hidden
    x = torch.rand(1, 1280, device=weights.encoder.load())
    calls = {
        f"InsightFace finds faces ({analyzer._providers[0]})": lambda: analyzer.detect(photo, 640),
        "facexlib finds faces": lambda: analyzer.detect_for_alignment(photo),
        "ArcFace recognises": lambda: analyzer.recognise(photo, face),
        "BiSeNet parses": lambda: analyzer.parse(crop),
        "the vision tower": lambda: networks.tower.module.features(pixels),
        "the ID encoder": lambda: weights.encoder.module(x, hidden[:STAGES]),
    }
    for name, call in calls.items():
        call()
        taken = statistics.median(seconds(card, call) for _ in range(3))
        yield Figure("encode", f"  {name}", taken * 1e3, "ms")
