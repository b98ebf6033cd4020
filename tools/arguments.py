"""The arguments of the tools that run.py starts; it checks them, and answers --help, before it sets anything up.

Standard library only.
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from . import ROOT

QUICK_BENCH = "about two minutes on two CPU cores"
QUICK_STEPS = 6  # without a GPU and with a stand-in checkpoint there is nothing to see in more
# How files of the usual kinds of pictures begin.
PICTURES = re.compile(rb"\x89PNG|\xff\xd8\xff|GIF8|BM|RIFF....WEBP|II\*\0|MM\0\*|....ftyp(avif|heic|mif1)", re.DOTALL)


def demo(rest: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="run.py demo", description="The shipped workflow on a photograph, through ComfyUI.", allow_abbrev=False
    )
    parser.add_argument("--comfyui", type=Path, help="ComfyUI's folder (run.py finds it)")
    parser.add_argument("--photo", type=picture, help="a photograph of a person; default: an astronaut")
    parser.add_argument("--checkpoint", type=existing_file, help="an SDXL checkpoint; default: a small stand-in")
    parser.add_argument("--seed", type=int, default=0)
    few = f"default: the workflow's, or {QUICK_STEPS} with a stand-in checkpoint"
    parser.add_argument("--steps", type=positive, help=few)
    parser.add_argument("--size", type=size, help="WIDTHxHEIGHT; default: the workflow's, or a quarter of its area")
    return parser.parse_args(rest)


def conformance(rest: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="run.py conformance", description="Compares the pack with reference vectors, one line each."
    )
    parser.add_argument("folder", type=existing_folder, help="the folder of the vectors")
    parser.add_argument("--comfyui", type=Path, action="append", default=[], help="compare on its UNet too; repeatable")
    return parser.parse_args(rest)


def lint(rest: Sequence[str] | None = None) -> argparse.Namespace:
    return argparse.ArgumentParser(prog="run.py lint", description="Runs ruff and mypy.").parse_args(rest)


def test(rest: Sequence[str]) -> argparse.Namespace:
    """Those of pytest's options that are used often; what stands behind `--` is pytest's to check."""
    parser = argparse.ArgumentParser(
        prog="run.py test",
        description="Runs all tests: once without a ComfyUI, then those on a host once for each ComfyUI.",
        epilog="The options are pytest's. Any other one goes behind --, as in: run.py test tests/pulid -- --setup-show",
        allow_abbrev=False,
    )
    parser.add_argument("paths", nargs="*", type=test_path, metavar="PATH", help="only these: tests/pulid, FILE::NAME")
    parser.add_argument("-k", metavar="WORDS", help="only tests whose names have these")
    parser.add_argument("-v", "-q", action="count")
    for name in ("-x", "-s", "--lf", "--ff", "--pdb", "--collect-only"):
        parser.add_argument(name, action="store_true")
    for name in ("--durations", "--maxfail", "--timeout"):
        parser.add_argument(name, type=int, metavar="N")
    for name in ("--tb", "-o", "-p"):
        parser.add_argument(name, metavar="VALUE")
    return parser.parse_intermixed_args(rest[: rest.index("--")] if "--" in rest else rest)


# What `bench --device` measures, by functions of tools/bench_card.py; the last one takes minutes.
SECTIONS = ("correct", "precision", "launches", "limit", "steps", "graphs", "encode", "compile", "memory", "compiled")


def bench(rest: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="run.py bench",
        description="Measures what PuLID costs, as ratios of one run; with --device, on a card, in absolute figures.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--comfyui", help="needed for the times of steps, of encoding and of a slider (run.py finds it)"
    )
    parser.add_argument("--quick", action="store_true", help=f"fewer sizes and repeats: {QUICK_BENCH}")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--device", choices=("cuda", "mps", "xpu", "cpu"), help="measure on this: docs/performance.md")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, metavar="SECTION", help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--repeats", type=positive, metavar="N", help="of each measurement on a device; default: 10")
    known = parser.parse_args(rest)
    if known.device and known.quick:
        parser.error("--quick is for the bench without --device; with it, --only names what to measure")
    if not known.device and (known.only or known.repeats):
        parser.error("--only and --repeats need --device")
    if known.json and not known.json.absolute().parent.is_dir():
        parser.error(f"{known.json.absolute().parent}, where --json is to write, is not a folder")
    return known


def check(name: str, rest: Sequence[str]) -> None:
    """Ends the process as argparse does when the command of this name would not take these arguments."""
    {"demo": demo, "test": test, "conformance": conformance, "lint": lint, "bench": bench}[name](rest)


def test_path(text: str) -> str:
    path = Path(text.split("::")[0])
    if not path.resolve().exists():
        raise argparse.ArgumentTypeError(f"{path} is not there. Tests lie in {ROOT / 'tests'}.")
    return text


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
    if not match or any(int(side) < 64 or int(side) % 8 for side in match.groups()):
        raise argparse.ArgumentTypeError(f"expected something like 896x1152, multiples of 8 from 64 on, found {text!r}")
    return int(match[1]), int(match[2])


def positive(text: str) -> int:
    if not re.fullmatch(r"0*[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, found {text!r}")
    return int(text)
