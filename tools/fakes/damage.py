"""Damages to the content of a file, most of them near its ends, where headers and tables lie."""

import random
from collections.abc import Iterator


def damages(content: bytes, count: int, seed: int = 0) -> Iterator[bytes]:
    """So many damaged contents, the same for the same seed: bytes changed, left out, said twice or moved, ends cut."""
    rng = random.Random(seed)
    near = min(len(content), 4096)
    for _ in range(count):
        damaged = bytearray(content)
        for _ in range(rng.randint(1, 5)):
            start = rng.choice((rng.randrange(near), len(content) - 1 - rng.randrange(near)))
            end = start + rng.choice((1, 2, 4, 8, 64, 1024))
            bad = rng.choice((rng.randbytes(1), b"\0", b"\xff", b"\x7f")) * (end - start)
            moved = content[(other := rng.randrange(len(content))) : other + end - start]
            damaged[start:end] = rng.choice((bad, bad, moved, b"", content[start:end] * rng.choice((2, 50))))
            if rng.randrange(6) == 0:
                del damaged[start:]
        if damaged != content:
            yield bytes(damaged)
