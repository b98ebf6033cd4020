"""Is it them? How alike faces look to the recogniser, who is who in a picture, and which pictures pass.

The likeness is the cosine between the recogniser's embeddings. Source: ArcFace, https://arxiv.org/abs/1801.07698, which
is trained so that this angle tells people apart.
"""

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from torch import Tensor
from torch.nn import functional

from .cache import ResultCache
from .errors import InputError, NoFaceError
from .faces import Face, FaceAnalyzer, Heard, find_faces
from .packages import import_package
from .photo import digest, read_photo

Keep = Literal["at least", "best", "best of those at least"]
KEEPS: tuple[Keep, ...] = get_args(Keep)


def mean_direction(embeddings: Tensor, weights: Tensor | None = None) -> Tensor:
    """What several photographs of a person have in common: (F, 512) -> (512,) of unit length.

    The mean of normalised embeddings, so that each photograph counts the same, or as its weight (F,) says. Raises
    InputError for NaN.
    """
    directions = unit(embeddings)
    if weights is not None:
        directions = directions * weights[:, None]
    return functional.normalize(directions.mean(dim=0), dim=0)  # mean over F photographs


def similarities(embeddings: Tensor, direction: Tensor) -> Tensor:
    """Cosines -1..1 of faces (F, 512) with a direction (512,) from `mean_direction` -> (F,). InputError for NaN."""
    return unit(embeddings) @ direction


def unit(embeddings: Tensor) -> Tensor:
    """The directions of embeddings (F, 512), each of length 1. Raises InputError for NaN."""
    if not embeddings.isfinite().all():
        raise InputError(
            "The face recogniser answered with NaN or infinite values. Load PuLID with another provider, such as CPU."
        )
    return functional.normalize(embeddings, dim=-1)


@dataclass(frozen=True, eq=False)
class Recognised:
    """All faces of a picture, their boxes in pixels of `read_photo`, and their embeddings (F, 512)."""

    faces: tuple[Face, ...]
    embeddings: Tensor

    @property
    def largest(self) -> Tensor:
        """The embedding (512,) of the largest face."""
        return self.embeddings[max(range(len(self.faces)), key=lambda index: self.faces[index].area)]


def recognise_all(
    picture: Tensor, analyzer: FaceAnalyzer, cache: ResultCache, step: Callable[[], None] = lambda: None
) -> Recognised:
    """Every face of a picture (H, W, C), recognised; one that the cache has is not looked at again.

    step  is called before each look, and may raise, to stop. Raises InputError for a picture that cannot be used.
    """
    key = analyzer.source, digest(picture)
    if (known := cache.get(key)) is None:
        photo = read_photo(picture)
        heard = cast(FaceAnalyzer, Heard(analyzer, step))
        found = find_faces(photo, heard)
        embeddings = [found.embedding(face, photo, heard) for face in found.faces]
        known = Recognised(tuple(found.faces), torch.stack(embeddings) if embeddings else torch.zeros(0, 512))
        cache.put(key, known, [known.embeddings])
    return known


@dataclass(frozen=True)
class Likeness:
    """What a picture shows of R people.

    cosines  of each person with the face that is theirs; None where no face is left for them
    faces    for each person the index of that face
    count    of all faces in the picture
    """

    cosines: tuple[float | None, ...]
    faces: tuple[int | None, ...]
    count: int

    @property
    def score(self) -> float | None:
        """The worst person's cosine: a picture of two people is as good as its worse face. None if one is missing."""
        found = [cosine for cosine in self.cosines if cosine is not None]
        return min(found) if len(found) == len(self.cosines) else None


def match(embeddings: Tensor, people: Tensor) -> Likeness:
    """Each person gets a face of their own, so that the sum of cosines is the highest there is.

    embeddings  (F, 512) of a picture's faces; where F is less than R, the people least alike go without
    people      (R, 512) directions
    """
    cosines = unit(embeddings) @ people.T  # (F, R)
    rows, columns = import_package("scipy.optimize").linear_sum_assignment(cosines.numpy(), maximize=True)
    face_of = dict(zip(columns.tolist(), rows.tolist(), strict=True))
    faces = tuple(face_of.get(person) for person in range(len(people)))
    found = tuple(None if face is None else cosines[face, person].item() for person, face in enumerate(faces))
    return Likeness(found, faces, len(embeddings))


def floor_of(strangers: Sequence[Tensor], people: Tensor) -> float:
    """The highest cosine that any face of strangers, (F, 512) for each picture, has with any of the people (R, 512).

    Raises NoFaceError if they show no face.
    """
    faces = torch.cat(list(strangers))
    if not len(faces):
        raise NoFaceError("The pictures of strangers show no face. Give some that do, or leave the input empty.")
    return (unit(faces) @ people.T).max().item()


@dataclass(frozen=True)
class Rule:
    """Which pictures pass: those of at least `threshold`, the best `count`, or the best of those."""

    keep: Keep = "at least"
    threshold: float = 0.5
    count: int = 5
    best_if_none: bool = False


def passing(scores: Sequence[float | None], rule: Rule) -> list[int]:
    """The indices of the pictures that pass, best first; of equal ones the earlier first.

    Raises NoFaceError where no picture has a score, InputError where none passes and the best one is not taken then.
    """
    if rule.keep not in KEEPS:
        raise InputError(f"Pictures cannot be kept by {rule.keep!r}; choose one of: {', '.join(KEEPS)}.")
    scored = {index: score for index, score in enumerate(scores) if score is not None}
    if not scored:
        raise NoFaceError(
            f"None of the {len(scores)} pictures shows a face for every person, so there is nothing to compare. Check "
            "that the faces are in view and upright, and how many people the identity holds."
        )
    ranked = sorted(scored, key=lambda index: -scored[index])
    kept = [index for index in ranked if rule.keep == "best" or scored[index] >= rule.threshold]
    if not kept and not rule.best_if_none:
        raise InputError(
            f"No picture reaches the threshold {rule.threshold:g}; the best, picture {ranked[0] + 1}, has "
            f"{scored[ranked[0]]:.3f}. Lower the threshold, make more pictures, or set when_none to 'best one'."
        )
    return (kept or ranked[:1])[: None if rule.keep == "at least" else rule.count]


def report(likenesses: Sequence[Likeness], passed: Sequence[int]) -> str:
    """A table of all pictures in their order, as CSV: a header, then a line for each."""
    people = max((len(likeness.cosines) for likeness in likenesses), default=0)
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["picture", "score", "rank", "faces", *(f"person {number + 1}" for number in range(people))])
    for index, likeness in enumerate(likenesses):
        cosines = ["" if cosine is None else f"{cosine:.4f}" for cosine in (likeness.score, *likeness.cosines)]
        rank = passed.index(index) + 1 if index in passed else ""
        table.writerow([index + 1, cosines[0], rank, likeness.count, *cosines[1:]])
    return text.getvalue()
