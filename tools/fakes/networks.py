"""Networks for tests that look at what is done with networks: they note what they are given and answer at once."""

from collections.abc import Hashable

import numpy as np
import torch
from torch import Tensor, nn

from ...pulid.attention import IdProjections
from ...pulid.eva import EvaVisionTower
from ...pulid.faces import Face
from ...pulid.identity import Version, VisionFeatures
from ...pulid.networks import Managed, PhotoNetworks, PulidWeights, on_cpu

LANDMARKS = np.array([[35.0, 40], [65, 40], [50, 58], [38, 75], [62, 75]])
TOKENS = {"v1": 10, "v1.1": 32}


class SpotAnalyzer:
    """Sees a face of 40 px at each white pixel; embedding begins with its box. `looks` counts calls."""

    def __init__(self, source: Hashable = "spots"):
        self.source, self.looks = source, 0
        self.lefts: list[float] = []  # left edges of the boxes that were recognised

    def detect(self, photo, side):
        self.looks += 1
        spots = np.argwhere((photo == 255).all(axis=2))[:, ::-1]
        return [
            Face((x - 20, y - 20, x + 20.0 + index, y + 20), LANDMARKS - 50 + (x, y), 0.9)
            for index, (x, y) in enumerate(spots)
        ]

    def detect_for_alignment(self, photo):
        return []

    def recognise(self, photo, face):
        self.lefts.append(face.box[0])
        return torch.tensor([*face.box, *[0.0] * 508])

    def recognise_crop(self, crop):
        raise AssertionError("a face that was detected is recognised in the photograph")

    def parse(self, crops):
        return torch.ones(len(crops), 512, 512, dtype=torch.uint8)


class NotingTower(nn.Module):
    """A vision tower that sees nothing; `batches` are the numbers of faces it was given at once."""

    def __init__(self):
        super().__init__()
        self.batches: list[int] = []

    def features(self, pixels: Tensor) -> VisionFeatures:
        self.batches.append(len(pixels))
        zeros = torch.zeros(len(pixels), 768), tuple(torch.zeros(len(pixels), 2, 1024) for _ in range(5))
        return VisionFeatures(*zeros)


class NotingEncoder(nn.Module):
    """An ID encoder whose tokens are all the first number of x; `read` are these numbers, call by call."""

    def __init__(self, version: Version = "v1"):
        super().__init__()
        self.version, self.read = version, []

    def forward(self, x: Tensor, hidden) -> Tensor:
        list(hidden)
        first = x[..., :1].flatten(1)  # (B, 1), or (B, P) of photographs that are read together
        self.read.append(first.flatten().tolist())
        return first[:, :1, None].expand(-1, TOKENS[self.version], 2048).clone()


def weights(
    projections: IdProjections | None = None,
    encoder: nn.Module | None = None,
    version: Version = "v1",
    source: Hashable | None = None,
) -> PulidWeights:
    """Of a PuLID file with the fingerprint "print"; what is not given was never loaded."""
    projections = IdProjections([], device="meta") if projections is None else projections
    encoder = NotingEncoder(version) if encoder is None else encoder
    managed = on_cpu(encoder)
    if source is not None:
        managed = Managed(encoder, managed.load, source)
    return PulidWeights(version, "print", managed, on_cpu(projections))


def photo_networks(analyzer=None, tower: nn.Module | None = None, source: Hashable = "tower") -> PhotoNetworks:
    tower = NotingTower() if tower is None else tower
    return PhotoNetworks(Managed(tower, on_cpu(tower).load, source), analyzer or SpotAnalyzer())


def loaded(of: PulidWeights | None = None, networks: PhotoNetworks | None = None):
    """What the loader node gives; needs a ComfyUI."""
    from ...nodes.types import LoadedPulid

    return LoadedPulid(of or weights(), networks or photo_networks())


def small_tower(**sizes) -> EvaVisionTower:
    """A vision tower of 2 x 2 patches with random weights."""
    from ...pulid.eva import EvaConfig

    torch.manual_seed(0)
    made = EvaVisionTower(EvaConfig(**{"patch_size": 168, "mlp_width": 8, "depth": 22, **sizes}))
    for parameter in made.parameters():  # norms start at one, tokens and biases at zero
        torch.nn.init.normal_(parameter, std=0.1)
    return made.eval().requires_grad_(False)
