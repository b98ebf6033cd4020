"""From what the vision tower and the recogniser see to ID tokens: how photographs and people combine.

Source: the authors' `get_id_embedding` and the demos that call it (github.com/ToTheBeginning/PuLID).
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from .encoders import FACE_TOKENS, FACE_WIDTH, HIDDEN_WIDTH, STAGES
from .errors import InputError
from .identity import IdEmbedding, Version, VisionFeatures

Photos = Literal["one person", "average", "one identity per photo"]


def face_vectors(arcface: Tensor, features: VisionFeatures) -> Tensor:
    """arcface (B, 512) as the recogniser gives it, with the pooled vectors -> (B, 1280)."""
    return torch.cat((arcface.to(features.pooled), features.pooled), dim=-1)


def uncond_tokens(encoder: nn.Module, positions: int, device=None, noise: float = 0.0, seed: int = 0) -> Tensor:
    """The encoder's answer to all zeros, (1, T, D): the negative branch of every identity with these weights.

    positions  length of one photograph's hidden states; v1.1 attends over them even where they are zero
    noise      instead of zeros, uniform noise 0..noise, drawn on the CPU from `seed`
    """
    generator = torch.Generator().manual_seed(seed)
    shapes = [(1, FACE_WIDTH), *[(1, positions, HIDDEN_WIDTH)] * STAGES]
    x, *hidden = ((torch.rand(shape, generator=generator) * noise).to(device) for shape in shapes)
    return encoder(x, hidden)


def join_tokens(tokens: Sequence[Tensor], id_mix: bool) -> Tensor:
    """v1's rule: all tokens of the first photograph, of each further one the first five (all when mixing people).

    (R, T, D) each -> (R, sum of tokens, D)
    """
    first, *further = tokens
    return torch.cat((first, *(t if id_mix else t[:, :FACE_TOKENS] for t in further)), dim=1)


def reads_together(version: Version, photos: Photos) -> bool:
    """Whether the encoder looks at all photographs at once, so that no photograph has tokens of its own."""
    return version == "v1.1" and photos == "one person"


def embed(
    encoder: nn.Module,
    version: Version,
    fingerprint: str,
    x: Tensor,
    hidden: Sequence[Tensor],
    uncond: Tensor,
    photos: Photos = "one person",
    id_mix: bool = False,
) -> IdEmbedding:
    """ID tokens of P photographs: x (P, 1280) from `face_vectors`, hidden 5 x (P, positions, 1024).

    The rest as in `identity_of`. Raises InputError when there is no photograph.
    """
    if len(x) == 0:
        raise InputError("An identity needs at least one photograph with a face; none was left.")
    if reads_together(version, photos):
        x, hidden = x.unsqueeze(0), [stream.flatten(0, 1).unsqueeze(0) for stream in hidden]
    return identity_of(encoder(x, hidden), uncond, version, fingerprint, photos, id_mix)


def identity_of(
    tokens: Tensor,
    uncond: Tensor,
    version: Version,
    fingerprint: str,
    photos: Photos = "one person",
    id_mix: bool = False,
) -> IdEmbedding:
    """One IdEmbedding of several photographs' tokens.

    tokens    (P, T, D), P >= 1, each photograph's own; (1, T, D) where the encoder read them together
    uncond    (1, T, D), from `uncond_tokens` of the same encoder
    photos    "one person": the authors' rule. v1 joins tokens, v1.1 reads all photographs at once (always 32 tokens).
              "average": the mean of each photograph's own tokens.
              "one identity per photo": R = P rows.
    id_mix    v1 only: every photograph gives all its tokens, to mix people. v1.1 always reads all of each.
    """
    if photos == "average":
        tokens = tokens.mean(dim=0, keepdim=True)
    elif photos == "one person":
        uncond = join_tokens([uncond] * len(tokens), id_mix)
        tokens = join_tokens(tokens.split(1), id_mix)
    return IdEmbedding(tokens, uncond, version, fingerprint)
