"""How photographs, and then people, combine into the ID tokens of one identity.

Sources: the authors' `get_id_embedding`, and the demos that call it for further photographs and for `id_mix`
(github.com/ToTheBeginning/PuLID). Calculating with tokens, token by token, is this pack's own.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from .encoders import FACE_TOKENS, FACE_WIDTH, HIDDEN_WIDTH, POSITIONS, STAGES
from .errors import InputError, MismatchError
from .identity import PREVIEWS, IdEmbedding, Version, VisionFeatures
from .people import mean_direction

Photos = Literal["one person", "average", "one identity per photo"]


def face_vectors(arcface: Tensor, features: VisionFeatures) -> Tensor:
    """arcface (B, 512) as the recogniser gives it, with the pooled vectors -> (B, 1280)."""
    return torch.cat((arcface.to(features.pooled), features.pooled), dim=-1)


def sound(answer: Tensor) -> Tensor:
    """The same. InputError for NaN and infinity, which would make every picture black without a word."""
    if not answer.isfinite().all():
        raise InputError(
            "PuLID's networks answered with NaN or infinite values. Get the files chosen as pulid_file and eva_clip "
            "again; if they are whole, start ComfyUI with --cpu to see whether the graphics card is at fault."
        )
    return answer


def uncond_tokens(
    encoder: nn.Module,
    positions: int = POSITIONS,
    device: torch.device | None = None,
    noise: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """The encoder's answer to all zeros, (1, T, D): the negative branch of every identity with these weights.

    positions  length of one photograph's hidden states; v1.1 attends over them even where they are zero
    noise      instead of zeros, uniform noise 0..noise, drawn on the CPU from `seed`
    """
    generator = torch.Generator().manual_seed(seed)
    shapes = [(1, FACE_WIDTH), *[(1, positions, HIDDEN_WIDTH)] * STAGES]
    x, *hidden = ((torch.rand(shape, generator=generator) * noise).to(device) for shape in shapes)
    return sound(encoder(x, hidden))


def join_tokens(tokens: Sequence[Tensor], id_mix: bool) -> Tensor:
    """v1's rule: all tokens of the first photograph, of each further one the first five (all when mixing people).

    (R, T, D) each -> (R, sum of tokens, D)
    """
    first, *further = tokens
    return torch.cat((first, *(t if id_mix else t[:, :FACE_TOKENS] for t in further)), dim=1)


def reads_together(version: Version, photos: Photos) -> bool:
    """Whether the encoder looks at all photographs at once, so that no photograph has tokens of its own."""
    return version == "v1.1" and photos == "one person"


def identity_of(
    tokens: Tensor,
    uncond: Tensor,
    version: Version,
    fingerprint: str,
    photos: Photos = "one person",
    id_mix: bool = False,
    weights: Tensor | None = None,
) -> IdEmbedding:
    """One IdEmbedding of several photographs' tokens.

    tokens    (P, T, D), P >= 1, each photograph's own; (1, T, D) where the encoder read them together
    uncond    (1, T, D), from `uncond_tokens` of the same encoder
    photos    "one person": the authors' rule. v1 joins tokens, v1.1 reads all photographs at once (always 32 tokens).
              "average": the mean of each photograph's own tokens, or as `weights` (P,) say.
              "one identity per photo": R = P rows.
    id_mix    v1 only: every photograph gives all its tokens, to mix people. v1.1 always reads all of each.
    """
    if photos == "average":
        tokens = tokens.mean(dim=0, keepdim=True) if weights is None else _weighted(tokens, weights)
    elif photos == "one person":
        uncond = join_tokens([uncond] * len(tokens), id_mix)
        tokens = join_tokens(tokens.split(1), id_mix)
    return IdEmbedding(tokens, uncond, version, fingerprint)


def _weighted(tokens: Tensor, weights: Tensor) -> Tensor:
    """(P, T, D) and (P,) -> (1, T, D)"""
    return torch.tensordot((weights / weights.sum()).to(tokens), tokens, dims=1).unsqueeze(0)


def read_weights(text: str, count: int, what: str, least: float, most: float = math.inf) -> tuple[float, ...]:
    """`count` weights in a text, separated by commas, spaces or line ends; one serves for all of them.

    Raises InputError for another number of them, with `what` was counted, and for one that is none or out of range,
    with its number.
    """
    words = text.replace(",", " ").split()
    if len(words) not in (1, count):
        raise InputError(
            f"Expected one weight, or one for each of {count} {what}, separated by commas; found {text!r}."
        )
    weights = []
    for number, word in enumerate(words, start=1):
        try:
            weights.append(float(word))
        except ValueError:
            weights.append(math.nan)
        if not (least <= weights[-1] <= most and math.isfinite(weights[-1])):
            reach = f"from {least:g} " + (f"to {most:g}" if math.isfinite(most) else "on")
            raise InputError(f"Weight {number} of {len(words)} must be a number {reach}, found {word!r}.")
    return tuple(weights * count if len(weights) == 1 else weights)


def with_noise(identity: IdEmbedding, zeros: Tensor, noise: Tensor) -> IdEmbedding:
    """The identity with the encoder's answer to noise, instead of zeros, in its negative branch.

    zeros, noise  (1, T, D), the encoder's answers to each. v1 joins the tokens of several photographs, so each token of
                  `uncond` is looked up among those of `zeros`, and the one of `noise` in that place is taken.
    """
    which = torch.cdist(identity.uncond[0], zeros[0]).argmin(dim=1)  # (T of the identity,)
    return replace(identity, uncond=noise[:, which])


# --- People ---

# Identities of one layout have the same negative branch, up to the rounding of different machines; where a token plays
# another part, its negative differs by about its own size.
SAME_PART = 0.01  # of the largest value

# mode -> both conds (R, T, D), the negative branch (1, T, D) and the weight -> cond. The negative branch stands for
# nobody: what a person adds to it is what is added or taken away, so a person less themselves is nobody.
CALCULATED: dict[str, Callable[[Tensor, Tensor, Tensor, float], Tensor]] = {
    "average": lambda first, second, nobody, weight: torch.lerp(first, second, weight),
    "add": lambda first, second, nobody, weight: first + weight * (second - nobody),
    "subtract": lambda first, second, nobody, weight: first - weight * (second - nobody),
}
# mode -> whether the second gives all its tokens, or the first five.
JOINED = {"mix": True, "auxiliary": False}

PEOPLE = "people"  # the mode in which each stays a person of their own, for a mask each

MODES = (*JOINED, *CALCULATED, PEOPLE)


def combine(first: IdEmbedding, second: IdEmbedding, mode: str, weight: float = 0.5) -> IdEmbedding:
    """One identity of two. T1, T2 are their numbers of tokens, u the tokens of nobody (`uncond`).

    mode    "mix": all tokens of both, T1 + T2. Of v1 identities of one photograph each, exactly `id_mix`.
            "auxiliary": all of the first and the first five of the second, T1 + 5. With v1, exactly a further
            photograph of the same person. v1.1 has no such rule: its first five are five of 32 equals.
            "average": (1 - weight) first + weight second.
            "add": first + weight (second - u). "subtract": first - weight (second - u).
            "people": R1 rows of the first, then R2 of the second; each stays a person of their own.
    weight  0..1; nothing to "mix", "auxiliary" and "people", which take tokens as they are

    But for "people", R identities combine with R, or with one, row by row. The negative branch always has as many
    tokens as the result.
    Raises MismatchError for different encoders, numbers of identities, or layouts of tokens where these are calculated
    with (v1 joins the tokens of several photographs); InputError for another mode or weight.
    """
    if mode not in MODES:
        raise InputError(f"Identities cannot be combined by {mode!r}; choose one of: {', '.join(MODES)}.")
    if not 0 <= weight <= 1:
        raise InputError(f"The weight must lie between 0 and 1, found {weight}.")
    _check_encoders(first, second)
    preview = _previews(first, second)
    if mode == PEOPLE:
        _check_layouts(first, second, mode)
        arcface = _arcface(first, second, lambda one, other: torch.cat((one, other)))
        return replace(first, cond=torch.cat((first.cond, second.cond)), preview=preview, arcface=arcface)
    conds = _rows(first.cond, second.cond)
    if mode in JOINED:
        cond = join_tokens(conds, JOINED[mode])
        uncond = join_tokens((first.uncond, second.uncond), JOINED[mode])
    else:
        _check_layouts(first, second, mode)
        uncond = first.uncond
        cond = CALCULATED[mode](*conds, uncond, weight)
    share = weight if mode == "average" else 0.5
    arcface = _arcface(first, second, lambda *both: _between(*_rows(*both), share)) if mode in PHOTOGRAPHED else None
    return replace(first, cond=cond, uncond=uncond, preview=preview, arcface=arcface)


# Modes whose result looks like somebody between the two. What is added or taken away leaves nobody whose face the
# recogniser has seen.
PHOTOGRAPHED = ("mix", "auxiliary", "average")


def _arcface(first: IdEmbedding, second: IdEmbedding, join: Callable[[Tensor, Tensor], Tensor]) -> Tensor | None:
    if first.arcface is None or second.arcface is None:
        return None
    return join(first.arcface, second.arcface)


def _between(first: Tensor, second: Tensor, share: float) -> Tensor:
    """Directions (R, 512) of both -> (R, 512), the second counting `share`."""
    weights = torch.tensor((1 - share, share))
    return torch.stack([mean_direction(torch.stack(pair), weights) for pair in zip(first, second, strict=True)])


def _check_encoders(first: IdEmbedding, second: IdEmbedding) -> None:
    if (first.version, first.encoder) != (second.version, second.encoder):
        raise MismatchError(
            "Identities combine only if one encoder made both. "
            f"identity_1 was made with PuLID {first.version} (encoder {first.encoder}), "
            f"identity_2 with PuLID {second.version} (encoder {second.encoder}). Encode one of them again."
        )


def _rows(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Both (R, ...) with the same R; one row serves all of the other."""
    if len(first) != len(second) and 1 not in (len(first), len(second)):
        raise MismatchError(
            f"identity_1 holds {len(first)} identities, identity_2 holds {len(second)}. "
            "They combine row by row, so both need the same number, or one of them a single identity."
        )
    rows = max(len(first), len(second))
    return first.expand(rows, *first.shape[1:]), second.expand(rows, *second.shape[1:])


def _check_layouts(first: IdEmbedding, second: IdEmbedding, mode: str) -> None:
    limit = SAME_PART * first.uncond.abs().max()
    if first.tokens != second.tokens or (first.uncond - second.uncond).abs().max() > limit:
        raise MismatchError(
            f"{mode!r} needs the same tokens in both, but identity_1 has {first.tokens} tokens and identity_2 "
            f"{second.tokens}{', which play other parts' if first.tokens == second.tokens else ''}: PuLID v1 joins "
            "those of several photographs. Encode both from the same number of photographs, or with photos 'average', "
            "or use 'mix'."
        )


def _previews(first: IdEmbedding, second: IdEmbedding) -> Tensor | None:
    """The faces of both; where there are too many, half of the places for each."""
    kept = [preview for preview in (first.preview, second.preview) if preview is not None]
    if not kept:
        return None
    half = PREVIEWS // 2
    shown = [preview[: max(half, PREVIEWS - sum(map(len, kept)) + len(preview))] for preview in kept]
    return torch.cat(shown)
