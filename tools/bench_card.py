"""What PuLID costs on a card, from one run: `python3 run.py bench --device cuda [--json FILE]`; also mps, xpu, cpu.

Where nothing can be installed, with the packages of ComfyUI and of this pack at hand:
`python3 tools bench_card --device cuda --comfyui FOLDER`. Weights are random and made on the device. On a CPU the UNet
has a fifth of its width, to try the script out. docs/performance.md says what the rows mean.
"""

import json
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict

import torch

from . import arguments as command_line
from . import comfy_host
from .bench_card_memory import memory
from .bench_card_sites import correctness, launches, limit, precision
from .bench_card_steps import compiled_time, compiling, graphs, steps
from .card import Bench, Card, Figure


def encoding(bench: Bench) -> Iterator[Figure]:
    """From photograph to identity, v1.1, with networks of the real sizes and random weights."""
    from . import bench_card_encode  # needs more packages than the others

    yield from bench_card_encode.figures(bench)


SECTIONS: dict[str, Callable[[Bench], Iterator[Figure]]] = {
    "correct": correctness,
    "precision": precision,
    "launches": launches,
    "limit": limit,
    "steps": steps,
    "graphs": graphs,
    "encode": encoding,
    "compile": compiling,
    "memory": memory,
}
EXTRA = {"compiled": compiled_time}


def main() -> int:
    arguments = command_line.bench()
    if not (arguments.device and arguments.comfyui):
        sys.exit("This measures a device in a ComfyUI: name both, with --device and --comfyui.")
    card = Card(arguments.device)
    attention = ["--use-pytorch-cross-attention"] if arguments.device == "cpu" else []  # as on cards
    comfy_host.enter(arguments.comfyui, *attention, device=arguments.device)
    from comfyui_version import __version__ as host_version

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    about = {
        "device": card.name,
        "torch": torch.__version__,
        "ComfyUI": host_version,
        "python": platform.python_version(),
    }
    print(about, flush=True)
    start, figures = time.perf_counter(), []
    for figure in run(Bench(card, arguments.comfyui, arguments.repeats or 10), arguments.only or list(SECTIONS)):
        print(figure, flush=True)
        figures.append(figure)
    seconds = time.perf_counter() - start
    print(f"{seconds:.0f} s; missed: {sum(not figure.holds for figure in figures)}")
    if arguments.json:
        written = {**about, "seconds": round(seconds), "figures": [asdict(figure) for figure in figures]}
        arguments.json.write_text(json.dumps(written, indent=1) + "\n")
    return int(any(figure.note.startswith("FAILED") for figure in figures))


def run(bench: Bench, sections: Sequence[str]) -> Iterator[Figure]:
    """Every section; one that fails says so in its place, and the others go on."""
    for name in sections:
        try:
            with torch.inference_mode():
                yield from {**SECTIONS, **EXTRA}[name](bench)
        except Exception as problem:
            traceback.print_exc()
            yield Figure(name, "this section", None, note=f"FAILED: {type(problem).__name__}: {str(problem)[:160]}")


if __name__ == "__main__":
    sys.exit(main())
