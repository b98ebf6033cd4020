"""The 70 cross-attention sites of SDXL's UNet, in the order in which every PuLID checkpoint numbers them.

Source: the order of diffusers' attention processors, down blocks, up blocks, then the middle block.
"""

from dataclasses import dataclass
from typing import Literal

Part = Literal["input", "output", "middle"]


@dataclass(frozen=True)
class Site:
    """One cross-attention: the key under which ComfyUI looks its replacement up, and its channels in SDXL."""

    part: Part
    number: int
    block: int
    channels: int

    @property
    def key(self) -> tuple[str, int, int]:
        return self.part, self.number, self.block

    def __str__(self) -> str:
        return f"{self.part} block {self.number}, transformer block {self.block}"


# part, numbers, transformer blocks in each, channels
_LAYOUT: tuple[tuple[Part, tuple[int, ...], int, int], ...] = (
    ("input", (4, 5), 2, 640),
    ("input", (7, 8), 10, 1280),
    ("output", (0, 1, 2), 10, 1280),
    ("output", (3, 4, 5), 2, 640),
    ("middle", (0,), 10, 1280),
)

SITES: tuple[Site, ...] = tuple(
    Site(part, number, block, channels)
    for part, numbers, blocks, channels in _LAYOUT
    for number in numbers
    for block in range(blocks)
)


def file_index(site: int) -> int:
    """The index of the i-th site in a checkpoint: self-attentions hold the even numbers."""
    return 2 * site + 1
