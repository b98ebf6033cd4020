"""The arguments of the tools that run.py starts; it checks them, and answers --help, before it sets anything up.

Standard library only.
"""

import argparse
import re
from collections.abc import Callable
from pathlib import Path

QUICK_STEPS = 6  # without a GPU and with a stand-in checkpoint there is nothing to see in more
# How files of the usual kinds of pictures begin.
PICTURES = re.compile(rb"\x89PNG|\xff\xd8\xff|GIF8|BM|RIFF....WEBP|II\*\0|MM\0\*|....ftyp(avif|heic|mif1)", re.DOTALL)


def demo() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="run.py demo", description="The shipped workflow on a photograph, through ComfyUI.", allow_abbrev=False
    )
    parser.add_argument("--comfyui", type=Path, help="ComfyUI's folder (run.py finds it)")
    parser.add_argument("--photo", type=picture, help="a photograph of a person; default: an astronaut")
    parser.add_argument("--checkpoint", type=existing_file, help="an SDXL checkpoint; default: a small stand-in")
    parser.add_argument("--seed", type=int, default=0)
    few = f"default: the workflow's, or {QUICK_STEPS} with a stand-in checkpoint"
    parser.add_argument("--steps", type=int, help=few)
    parser.add_argument("--size", type=size, help="WIDTHxHEIGHT; default: the workflow's, or a quarter of its area")
    return parser


def conformance() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="run.py conformance", description="Compares the pack with reference vectors, one line each."
    )
    parser.add_argument("folder", type=existing_folder, help="the folder of the vectors")
    parser.add_argument("--comfyui", type=Path, action="append", default=[], help="compare on its UNet too; repeatable")
    return parser


def lint() -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog="run.py lint", description="Runs ruff and mypy.")


PARSERS: dict[str, Callable[[], argparse.ArgumentParser]] = {"demo": demo, "conformance": conformance, "lint": lint}


def check(name: str, rest: list[str]) -> None:
    """Ends the process as argparse does when the tool of this name would not take these arguments."""
    if name in PARSERS:
        PARSERS[name]().parse_args(rest)


def existing_file(text: str) -> Path:
    path = Path(text).expanduser().resolve()
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"{path} is not a file")
    return path


def existing_folder(text: str) -> Path:
    path = Path(text).expanduser().resolve()
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is not a folder")
    return path


def picture(text: str) -> Path:
    path = existing_file(text)
    with path.open("rb") as opened:
        if not PICTURES.match(opened.read(16)):
            raise argparse.ArgumentTypeError(f"{path} is no picture: use a PNG, JPEG or WebP file")
    return path


def size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"expected something like 896x1152, found {text!r}")
    return int(match[1]), int(match[2])
