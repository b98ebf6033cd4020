"""From photographs to an identity: the one way there is, for the nodes, the demo and the bench.

    photograph -> face chosen and aligned -> grey, on white -> vision tower -> ID encoder -> ID tokens

Pixels are handled on the CPU in float32, so that every machine gives the same numbers (bicubic resizing is missing or
different on some devices). Source: https://github.com/ToTheBeginning/PuLID/blob/main/pulid/pipeline_v1_1.py
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from .cache import ResultCache
from .encoders import STAGES, PerceiverAttention
from .errors import InputError, NoFaceError, about
from .eva import Block
from .faces import FaceAnalyzer, Heard, Selection, find_face, find_largest_and_central
from .identity import PREVIEWS, FaceCrop, IdEmbedding
from .networks import PhotoNetworks, PulidWeights
from .onednn import quick_linear
from .people import mean_direction, unit
from .photo import digest, read_photo
from .preview import thumbnails
from .tokens import Photos, face_vectors, identity_of, reads_together, sound

PARTS = (Block, PerceiverAttention, nn.Sequential)  # of the vision tower and the ID encoders
BATCH = 4  # photographs that go through the vision tower together; more would need more memory for the same speed

# BiSeNet's labels that become white: background, ears, earring, neck, necklace, cloth and hat.
BACKGROUND_LABELS = (0, 7, 8, 9, 14, 15, 16, 18)
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
VISION_SIZE = 336  # px
# OpenAI CLIP's normalisation, https://github.com/openai/CLIP/blob/main/clip/clip.py
VISION_MEAN = (0.48145466, 0.4578275, 0.40821073)
VISION_STD = (0.26862954, 0.26130258, 0.27577711)

Step = Callable[[int], None]  # hears how many photographs are looked at; may raise, to stop


@dataclass(frozen=True, eq=False)
class Photograph:
    """pixels (H, W, C) float 0..1, as `read_photo` takes them; mask (H, W) over the face to take, or None."""

    pixels: Tensor
    mask: Tensor | None = None

    @cached_property
    def key(self) -> Hashable:
        """A hash of both."""
        return digest(self.pixels), None if self.mask is None else digest(self.mask)


def photographs(images: Iterable[Tensor], masks: Sequence[Tensor] | Tensor | None = None) -> list[Photograph]:
    """Images (H, W, C), of any sizes, with a mask (H, W) each; the last mask serves for all that follow."""
    last = -1 if masks is None else len(masks) - 1
    return [Photograph(image, None if masks is None else masks[min(row, last)]) for row, image in enumerate(images)]


@dataclass(frozen=True)
class FaceChoice:
    """Which face of a photograph is taken: by index, in one of faces.ORDERS."""

    order: str = "largest"
    index: int = 0
    antialias: bool = False  # when the face is shrunk for the vision tower
    full: bool = False  # cut out of the full photograph, not of one of 1024 px as the authors do

    def find(self, photograph: Photograph, analyzer: FaceAnalyzer) -> tuple[Selection, FaceCrop]:
        """Raises NoFaceError, InputError."""
        larger = partial(read_photo, photograph.pixels) if self.full else None
        photo = read_photo(photograph.pixels)
        return find_face(photo, analyzer, self.order, self.index, photograph.mask, larger)


@dataclass(frozen=True)
class OlderChoice(FaceChoice):
    """How the pack of older shared workflows looks at a photograph: whole, and at two faces where there are several."""

    antialias: bool = True

    def find(self, photograph: Photograph, analyzer: FaceAnalyzer) -> tuple[Selection, FaceCrop]:
        pixels = (photograph.pixels[..., :3] * 255).floor() / 255  # it cuts off where ours rounds, and opacity away
        return find_largest_and_central(read_photo(pixels, max(pixels.shape[:2])), analyzer)


@dataclass(frozen=True)
class EncodeSettings:
    """What a user chooses.

    photos  how several photographs combine, see tokens.identity_of; with id_mix
    skip    leave out photographs without a face, instead of raising NoFaceError
    weights of the photographs in an average, one each, 0 and up; empty where all count the same
    """

    choice: FaceChoice = FaceChoice()
    photos: Photos = "one person"
    id_mix: bool = False
    skip: bool = False
    weights: tuple[float, ...] = ()


@dataclass(frozen=True, eq=False)
class EncoderInput:
    """What the ID encoder takes of one face: x (1280,), and 5 hidden states (577, 1024), 12 MB."""

    x: Tensor
    hidden: tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class SeenFace:
    """What was seen in one photograph, on the CPU.

    grey       (336, 336, 3) 0..1, the face as the vision tower sees it
    thumbnail  (128, 128, 3) uint8, the face for people to look at
    arcface    (512,) the recogniser's embedding, as it comes
    encoded    the face's own tokens (T, D), or what the encoder needs to read it together with others
    """

    selection: Selection
    grey: Tensor
    thumbnail: Tensor
    arcface: Tensor
    encoded: Tensor | EncoderInput

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        encoded = self.encoded
        own = (encoded,) if isinstance(encoded, Tensor) else (encoded.x, *encoded.hidden)
        return self.grey, self.thumbnail, self.arcface, *own


@dataclass(frozen=True)
class NoFace:
    """A photograph that shows no face, and why that is said."""

    reason: str


@dataclass(frozen=True, eq=False)
class Encoded:
    """The identity, and what was seen in each photograph, in order."""

    identity: IdEmbedding
    seen: tuple[SeenFace | NoFace, ...]

    @property
    def faces(self) -> list[SeenFace]:
        return [one for one in self.seen if isinstance(one, SeenFace)]


def encode(
    taken: Sequence[Photograph],
    weights: PulidWeights,
    networks: PhotoNetworks,
    settings: EncodeSettings,
    cache: ResultCache,
    step: Step = lambda done: None,
) -> Encoded:
    """The identity of the person, or people, in these photographs.

    cache  what was seen in a photograph, from earlier calls and for later ones

    Raises InputError, with the photograph's number, for one that cannot be used, and NoFaceError for those without a
    face, unless they are skipped and one is left.
    """
    if not taken:
        raise InputError("The image batch is empty: connect at least one photograph.")
    seen = see(taken, weights, networks, settings, cache, step)
    encoded = [one for one in seen if isinstance(one, SeenFace)]
    faceless = [
        f"Photograph {number} of {len(taken)}: {one.reason}"
        for number, one in enumerate(seen, start=1)
        if isinstance(one, NoFace)
    ]
    if faceless and not (settings.skip and encoded):
        left = ["No photograph was left."] if settings.skip else []
        raise NoFaceError("\n".join(left + faceless))
    counts = _counts(settings, seen)
    with _heard_within(weights.encoder.module, partial(step, len(taken))):
        return Encoded(identify(encoded, weights, settings.photos, settings.id_mix, counts), tuple(seen))


def _counts(settings: EncodeSettings, seen: Sequence[SeenFace | NoFace]) -> Tensor | None:
    """How much each photograph that shows a face counts, (P,), at most 1. InputError where weights make no sense."""
    if not settings.weights:
        return None
    if settings.photos != "average":
        raise InputError(
            f"Weights count in an 'average' only, and photos is {settings.photos!r}. Change it, or empty weights."
        )
    taken = [weight for weight, one in zip(settings.weights, seen, strict=True) if isinstance(one, SeenFace)]
    if min(taken) < 0 or sum(taken) == 0:
        raise InputError(f"Weights must be 0 or more, and of photographs with a face not all be 0; found {taken}.")
    return torch.tensor([weight / max(taken) for weight in taken])  # the sum of what is huge, or tiny, is no float32


def see(
    taken: Sequence[Photograph],
    weights: PulidWeights,
    networks: PhotoNetworks,
    settings: EncodeSettings,
    cache: ResultCache,
    step: Step,
) -> list[SeenFace | NoFace]:
    """What is seen in each photograph, a few at a time; what the cache has is not looked at again."""
    together = reads_together(weights.version, settings.photos)
    circumstances = weights.encoder.source, networks.source, settings.choice, together
    keys = [(*circumstances, photograph.key) for photograph in taken]
    seen: list[SeenFace | NoFace | None] = [cache.get(key) for key in keys]
    for first in range(0, len(taken), BATCH):
        found: dict[int, tuple[Selection, FaceCrop]] = {}  # by number, those that the networks have yet to see
        for number in range(first, min(first + BATCH, len(taken))):
            step(number)
            if seen[number] is not None:
                continue
            heard = cast(FaceAnalyzer, Heard(networks.analyzer, partial(step, number)))
            with about(f"Photograph {number + 1} of {len(taken)}"):
                try:
                    found[number] = settings.choice.find(taken[number], heard)
                except NoFaceError as error:
                    seen[number] = faceless = NoFace(str(error))
                    cache.put(keys[number], faceless)
        if found:
            now = partial(step, max(found))
            with _heard_within(networks.tower.module, now), _heard_within(weights.encoder.module, now):
                seeing = replace(networks, analyzer=cast(FaceAnalyzer, Heard(networks.analyzer, now)))
                faces = _through_networks(list(found.values()), weights, seeing, settings.choice, together)
            for number, face in zip(found, faces, strict=True):
                seen[number] = face
                cache.put(keys[number], face, face.tensors)
    step(len(taken))
    return [one for one in seen if one is not None]


@contextmanager
def _heard_within(network: nn.Module, step: Callable[[], None]) -> Iterator[None]:
    """The user can interrupt before each part of a network, of which one pass takes seconds on a CPU."""
    parts = [part for part in network.modules() if isinstance(part, PARTS)]
    hooks = [part.register_forward_pre_hook(lambda *_: step()) for part in parts]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _through_networks(
    found: Sequence[tuple[Selection, FaceCrop]],
    weights: PulidWeights,
    networks: PhotoNetworks,
    choice: FaceChoice,
    together: bool,
) -> list[SeenFace]:
    """Sends chosen faces through the networks together. Rows are copied, so that one kept keeps no others alive."""
    crops = torch.stack([crop.pixels for _, crop in found])
    arcface = torch.stack([crop.arcface for _, crop in found])
    labels = torch.cat([networks.analyzer.parse(crop) for crop in crops.split(1)])
    grey = shrink(grey_on_white(crops, labels), antialias=choice.antialias)
    device = networks.tower.load()
    with quick_linear(device):
        features = networks.tower.module.features(to_vision_input(grey).to(device))
        sound(features.pooled)
        unit(arcface)  # refuses NaN, too
        x = face_vectors(arcface.to(device), features)
        encoded: list[Tensor | EncoderInput]
        if together:
            rows = zip(x.cpu(), *(stream.cpu() for stream in features.hidden), strict=True)
            encoded = [EncoderInput(own.clone(), tuple(stream.clone() for stream in streams)) for own, *streams in rows]
        else:
            device = weights.encoder.load()
            tokens = weights.encoder.module(x.to(device), [stream.to(device) for stream in features.hidden])
            encoded = [own.clone() for own in sound(tokens).cpu()]
    pictures = grey.clamp(0, 1).movedim(1, -1)  # (P, 3, H, W) -> (P, H, W, 3)
    return [
        SeenFace(selection, picture.clone(), thumbnail.clone(), crop.arcface, own)
        for (selection, crop), picture, thumbnail, own in zip(found, pictures, thumbnails(crops), encoded, strict=True)
    ]


def identify(
    faces: Sequence[SeenFace], weights: PulidWeights, photos: Photos, id_mix: bool, counts: Tensor | None = None
) -> IdEmbedding:
    """One IdEmbedding, on the CPU, of what was seen in each photograph; counts (P,) are weights of an average."""
    inputs = [face.encoded for face in faces if isinstance(face.encoded, EncoderInput)]
    if inputs:
        device = weights.encoder.load()
        x = torch.stack([one.x for one in inputs]).unsqueeze(0)  # (1, P, 1280)
        stages = (torch.cat([one.hidden[stage] for one in inputs]).unsqueeze(0).to(device) for stage in range(STAGES))
        with quick_linear(device):
            tokens = sound(weights.encoder.module(x.to(device), stages)).cpu()
    else:
        tokens = torch.stack([face.encoded for face in faces if isinstance(face.encoded, Tensor)])
    identity = identity_of(tokens, weights.zeros, weights.version, weights.fingerprint, photos, id_mix, counts)
    arcface = torch.stack([face.arcface for face in faces])
    people = arcface.split(1) if photos == "one identity per photo" else [arcface]
    return replace(
        identity,
        preview=torch.stack([face.thumbnail for face in faces[:PREVIEWS]]),
        arcface=torch.stack([mean_direction(own, counts) for own in people]),
    )


def grey_on_white(crops: Tensor, labels: Tensor) -> Tensor:
    """Only the face, in grey, on white: crops (B, 3, H, W) RGB 0..1 and labels (B, H, W) -> (B, 3, H, W)."""
    crops = crops.cpu().float()
    luma = crops.new_tensor(LUMA)[:, None, None]
    grey = (crops * luma).sum(1, keepdim=True)  # (B, 3, H, W) -> (B, 1, H, W)
    background = torch.isin(labels.cpu(), torch.tensor(BACKGROUND_LABELS, dtype=labels.dtype))
    return torch.where(background[:, None], 1.0, grey).expand(-1, 3, -1, -1)


def shrink(faces: Tensor, size: int = VISION_SIZE, antialias: bool = False) -> Tensor:
    """(B, 3, H, W) -> (B, 3, size, size), bicubic.

    antialias  torchvision's default since 0.17; the authors pin 0.15, where it is off
    """
    return functional.interpolate(faces.cpu().float(), (size, size), mode="bicubic", antialias=antialias)


def to_vision_input(faces: Tensor, size: int = VISION_SIZE) -> Tensor:
    """What the vision tower takes: (B, 3, H, W) 0..1 -> (B, 3, size, size), normalised."""
    mean, std = faces.new_tensor((VISION_MEAN, VISION_STD), device="cpu")[..., None, None]
    return (shrink(faces, size) - mean) / std
