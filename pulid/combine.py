"""How two identities become one: their tokens joined, as the authors do it, or calculated with, token by token.

Source: the authors' rule for further photographs and for `id_mix` (github.com/ToTheBeginning/PuLID, app.py), which
embed.py states. Calculating with tokens is this pack's own.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from .embed import join_tokens
from .errors import InputError, MismatchError
from .identity import PREVIEWS, IdEmbedding

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

MODES = (*JOINED, *CALCULATED)


def combine(first: IdEmbedding, second: IdEmbedding, mode: str, weight: float = 0.5) -> IdEmbedding:
    """One identity of two. T1, T2 are their numbers of tokens, u the tokens of nobody (`uncond`).

    mode    "mix": all tokens of both, T1 + T2. Of v1 identities of one photograph each, exactly `id_mix`.
            "auxiliary": all of the first and the first five of the second, T1 + 5. With v1, exactly a further
            photograph of the same person. v1.1 has no such rule: its first five are five of 32 equals.
            "average": (1 - weight) first + weight second.
            "add": first + weight (second - u). "subtract": first - weight (second - u).
    weight  0..1; nothing to "mix" and "auxiliary", which take tokens as they are

    R identities combine with R, or with one, row by row. The negative branch always has as many tokens as the result.
    Raises MismatchError for different encoders, numbers of identities, or layouts of tokens where these are calculated
    with (v1 joins the tokens of several photographs); InputError for another mode or weight.
    """
    if mode not in MODES:
        raise InputError(f"Identities cannot be combined by {mode!r}; choose one of: {', '.join(MODES)}.")
    if not 0 <= weight <= 1:
        raise InputError(f"The weight must lie between 0 and 1, found {weight}.")
    _check_encoders(first, second)
    conds = _rows(first.cond, second.cond)
    if mode in JOINED:
        cond = join_tokens(conds, JOINED[mode])
        uncond = join_tokens((first.uncond, second.uncond), JOINED[mode])
    else:
        _check_layouts(first, second, mode)
        uncond = first.uncond
        cond = CALCULATED[mode](*conds, uncond, weight)
    return replace(first, cond=cond, uncond=uncond, preview=_previews(first, second))


def _check_encoders(first: IdEmbedding, second: IdEmbedding) -> None:
    if (first.version, first.encoder) != (second.version, second.encoder):
        raise MismatchError(
            "Identities combine only if one encoder made both. "
            f"identity_1 was made with PuLID {first.version} (encoder {first.encoder}), "
            f"identity_2 with PuLID {second.version} (encoder {second.encoder}). Encode one of them again."
        )


def _rows(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Both (R, T, D) with the same R; one row serves all of the other."""
    if len(first) != len(second) and 1 not in (len(first), len(second)):
        raise MismatchError(
            f"identity_1 holds {len(first)} identities, identity_2 holds {len(second)}. "
            "They combine row by row, so both need the same number, or one of them a single identity."
        )
    rows = max(len(first), len(second))
    return first.expand(rows, -1, -1), second.expand(rows, -1, -1)


def _check_layouts(first: IdEmbedding, second: IdEmbedding, mode: str) -> None:
    limit = SAME_PART * first.uncond.abs().max()
    if first.tokens != second.tokens or (first.uncond - second.uncond).abs().max() > limit:
        raise MismatchError(
            f"{mode!r} goes token by token, but identity_1 has {first.tokens} tokens and identity_2 {second.tokens}"
            f"{', which play other parts' if first.tokens == second.tokens else ''}: PuLID v1 joins those of several "
            "photographs. Encode both from the same number of photographs, or with photos 'average', or use 'mix'."
        )


def _previews(first: IdEmbedding, second: IdEmbedding) -> Tensor | None:
    """The faces of both; where there are too many, half of the places for each."""
    kept = [preview for preview in (first.preview, second.preview) if preview is not None]
    if not kept:
        return None
    half = PREVIEWS // 2
    shown = [preview[: max(half, PREVIEWS - sum(map(len, kept)) + len(preview))] for preview in kept]
    return torch.cat(shown)
