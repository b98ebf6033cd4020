"""How alike faces look to the recogniser: the cosine between its embeddings.

Source: ArcFace, https://arxiv.org/abs/1801.07698, which is trained so that this angle tells people apart.
"""

from torch import Tensor
from torch.nn import functional

from .errors import InputError


def mean_direction(embeddings: Tensor) -> Tensor:
    """What several photographs of a person have in common: (F, 512) -> (512,) of unit length.

    The mean of normalised embeddings, so that each photograph counts the same. Raises InputError for NaN.
    """
    return functional.normalize(_directions(embeddings).mean(dim=0), dim=0)  # mean over F photographs


def similarities(embeddings: Tensor, direction: Tensor) -> Tensor:
    """Cosines -1..1 of faces (F, 512) with a direction (512,) from `mean_direction` -> (F,). InputError for NaN."""
    return _directions(embeddings) @ direction


def _directions(embeddings: Tensor) -> Tensor:
    if not embeddings.isfinite().all():
        raise InputError(
            "The face recogniser answered with NaN or infinite values. Load PuLID with another provider, such as CPU."
        )
    return functional.normalize(embeddings, dim=-1)
