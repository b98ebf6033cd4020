"""Lists: what a node gets that takes them, pictures of any size and everything else too; and a node that makes one."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from comfy_api.latest import io
from torch import Tensor

from ..pulid.errors import InputError, about
from .checked import checked
from .texts import described

Value = TypeVar("Value")


def rows(batches: Iterable[Tensor] | Tensor | None) -> list[Tensor]:
    """The pictures (H, W, C) of a list of batches, or its masks (H, W); of one batch, as a program may give it."""
    if isinstance(batches, Tensor):
        batches = [batches]
    return [row for batch in batches or () for row in batch]


def each(batches: Iterable[Tensor] | None, make: Callable[[Tensor], Value]) -> list[Value]:
    """What is made of each picture of a list of batches. An InputError says which photograph it is about."""
    photographs, made = rows(batches), []
    for number, photograph in enumerate(photographs, start=1):
        with about(f"Photograph {number} of {len(photographs)}"):
            made.append(make(photograph))
    return made


def only(values: Sequence[Value], name: str) -> Value:
    """The value of an input that takes one. Raises InputError for a list of several."""
    if len(values) != 1:
        raise InputError(f"{name} takes one value, found a list of {len(values)}. Connect one of them.")
    return values[0]


def only_ones(**inputs: Sequence[Any]) -> list[Any]:
    """`only` of each, in their order."""
    return [only(values, name) for name, values in inputs.items()]


def by_size(pictures: Iterable[Tensor]) -> list[list[Tensor]]:
    """Pictures that fit into one batch together, the sizes in the order in which they come up."""
    groups: dict[tuple[int, ...], list[Tensor]] = {}
    for picture in pictures:
        groups.setdefault(tuple(picture.shape), []).append(picture)
    return list(groups.values())


@described
@checked
class PulidPhotoList(io.ComfyNode):
    """In place of ComfyUI's Batch Images, which cuts every picture to the size of the first."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PuLID_PhotoList",
            display_name="PuLID Photo List",
            category="PuLID",
            inputs=[
                io.Image.Input("photo_1"),
                io.Image.Input("photo_2", optional=True),
                io.Image.Input("photo_3", optional=True),
                io.Image.Input("photo_4", optional=True),
                io.Image.Input("photo_5", optional=True),
                io.Image.Input("photo_6", optional=True),
            ],
            outputs=[io.Image.Output("photos", display_name="photos", is_output_list=True)],
        )

    @classmethod
    def execute(
        cls, photo_1: Tensor, photo_2: Tensor | None = None, photo_3: Tensor | None = None,
        photo_4: Tensor | None = None, photo_5: Tensor | None = None, photo_6: Tensor | None = None,
    ) -> io.NodeOutput:  # fmt: skip
        photos = photo_1, photo_2, photo_3, photo_4, photo_5, photo_6
        return io.NodeOutput([photo for photo in photos if photo is not None])
