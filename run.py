#!/usr/bin/env python3
"""The pack's commands. These set up what they need, once: a .venv beside this file, and a ComfyUI.

    python3 run.py demo             a picture of the person in a photograph, through ComfyUI's own server
    python3 run.py test             all tests, those that need ComfyUI once on every ComfyUI given
    python3 run.py lint             ruff's and mypy's findings, none in what is submitted
    python3 run.py conformance DIR  this pack's numbers against the authors' reference vectors in DIR
    python3 run.py bench            what the pack costs, as ratios; --quick for a first look

These set up nothing and use what is there; start them with the Python that starts ComfyUI.

    python run.py models            every weight file: where it lies, whether it is whole; --download fetches them
    python run.py doctor            what is installed and what is wrong, as a text to paste into a bug report
    python run.py hosted list       requests to the hosted service that are known here; `hosted forget` deletes them
    python run.py batch             a graph and a table become pictures, over as many GPUs as there are

`run.py COMMAND --help` says what each takes. `models` and `doctor` exit with 1 while something is to be done.

ComfyUI is looked for in --comfyui FOLDER, COMFYUI_PATH (several: separated like PATH), around this folder when it lies
in custom_nodes, and in ~/comfy/ComfyUI; demo, test and bench clone the official repository where there is none. Where
custom_nodes lies beside models and user alone, as in ComfyUI Desktop, those are looked into.
"""

# Standard library only, and of the pack what needs no more; what developers use lies in tools/develop.py. A new command
# is a function that takes (hosts, rest), a line in COMMANDS and one above.

from __future__ import annotations  # so that an older Python gets to its message

import sys

if sys.version_info < (3, 10):  # noqa: UP036
    found = ".".join(map(str, sys.version_info[:2]))
    sys.exit("PuLID for SDXL needs Python 3.10 or newer, this is " + found + ". Start run.py with a newer one.")

import argparse
import importlib.util
import io
import json
import os
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pulid_sdxl.models.catalogue import Need, WeightFile
    from pulid_sdxl.models.locate import ModelFolders

HERE = Path(__file__).absolute().parent  # links are kept: the pack may be linked into custom_nodes
ROOT = HERE.resolve()
CACHE = ROOT / ".cache"

Command = Callable[[list[Path], list[str]], int]  # hosts, further arguments -> exit code


class Failure(Exception):
    """Something the user has to know; the message is all that is printed."""


def is_comfyui(path: Path) -> bool:
    return (path / "main.py").is_file() and (path / "comfy" / "supported_models.py").is_file()


def find_hosts(given: str | None, here: Path = HERE, cache: Path = CACHE) -> list[Path]:
    """The ComfyUI folders to work with; empty when there is none."""
    asked = given or os.environ.get("COMFYUI_PATH")
    if asked:
        hosts = [Path(part).expanduser().resolve() for part in asked.split(os.pathsep) if part]
        for host in hosts:
            if not is_comfyui(host):
                raise Failure(f"{host} is not a ComfyUI folder: it has no main.py with comfy/ beside it.")
        return list(dict.fromkeys(hosts))
    if base_folder(here):
        return []
    for host in (here.parent.parent, Path.home() / "comfy" / "ComfyUI", cache / "ComfyUI"):
        if is_comfyui(host):
            return [host]
    return []


def base_folder(here: Path = HERE) -> Path | None:
    """The folder around this pack that holds custom_nodes, models and user without a ComfyUI: --base-directory."""
    around = here.parent.parent
    is_base = here.parent.name == "custom_nodes" and (around / "models").is_dir() and not is_comfyui(around)
    return around if is_base else None


def folder_of(hosts: list[Path]) -> Path | None:
    """The folder that holds models and user."""
    return hosts[0] if hosts else base_folder()


def mount_pack() -> None:
    """Make the pack importable as `pulid_sdxl`, its root kept off sys.path, as ComfyUI does."""
    if "pulid_sdxl" in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(
        "pulid_sdxl", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    assert spec and spec.loader
    sys.modules["pulid_sdxl"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["pulid_sdxl"])
    if __name__ == "__main__":
        sys.modules["pulid_sdxl.run"] = sys.modules[__name__]  # this, and not a second one


def places(
    parser: argparse.ArgumentParser, hosts: list[Path], rest: list[str]
) -> tuple[argparse.Namespace, ModelFolders | None]:
    """The further arguments, and the folders to look into: None where no models folder is known."""
    from pulid_sdxl.models.extra_model_paths import model_paths
    from pulid_sdxl.models.locate import ModelFolders, other_programs

    parser.epilog = "--comfyui FOLDER names the ComfyUI; run.py --help says where it is looked for."
    parser.add_argument("--models", type=Path, metavar="DIR", help="a ComfyUI `models` folder; else the ComfyUI's own")
    parser.add_argument("--extra-model-paths", type=Path, action="append", default=[], metavar="FILE.yaml")
    known = parser.parse_args(rest)
    yamls = [host / "extra_model_paths.yaml" for host in hosts[:1]]
    yamls = [*filter(Path.is_file, yamls), *known.extra_model_paths]
    around = folder_of(hosts)
    models = known.models or (around and around / "models")
    if models is None:
        return known, None
    if not models.is_dir():
        raise Failure(f"{models} is not a folder. Expected a ComfyUI `models` folder.")
    return known, ModelFolders(model_paths(models.absolute(), yamls), other_programs(os.environ, Path.home()))


def models(hosts: list[Path], rest: list[str], needs: tuple[Need, ...] | None = None) -> int:
    """The table of files; 1 if the loader lacks any. `needs` stands in for those of the catalogue."""
    from pulid_sdxl.models import catalogue, inventory

    files = tuple(file for need in needs for file in need.files) if needs else catalogue.CATALOGUE
    needs = needs or catalogue.NEEDS
    parser = argparse.ArgumentParser(prog="run.py models", description="Lists every weight file, and fetches them.")
    parser.add_argument("--download", nargs="*", metavar="NAME", help="fetch these; without names, all that is missing")
    parser.add_argument("--accept-licence", action="store_true", help="agree to licences that would be asked about")
    known, folders = places(parser, hosts, rest)
    if folders is None:
        raise Failure("No ComfyUI found. Name its folder with --comfyui, or its models with --models.")
    checked = partial(inventory.inventory, folders, files=files)
    entries = checked(checking)
    show_progress("", 0, None)
    if known.download is not None:
        wanted = [file_named(name, files) for name in known.download] or inventory.lacking(entries, needs)
        whole = {entry.file for entry in entries if entry.whole}
        failed = [file for file in wanted if file not in whole and not download(file, folders, known.accept_licence)]
        if failed:
            return 1
        fetched = {entry.file: entry for entry in checked(checking, files=wanted)}
        entries = [fetched.get(entry.file, entry) for entry in entries]
    print(inventory.table(entries))
    lacking = inventory.lacking(entries, needs)
    if lacking:
        print(f"\nThe loader lacks {', '.join(file.name for file in lacking)}. To fetch: run.py models --download")
    return 1 if lacking or any(entry.fault for entry in entries) else 0


def file_named(name: str, files: tuple[WeightFile, ...]) -> WeightFile:
    for file in files:
        if file.name == name:
            return file
    raise Failure(f"No file {name!r} is known. Known are: {', '.join(file.name for file in files)}.")


def download(file: WeightFile, folders: ModelFolders, accepted: bool) -> bool:
    """Fetch one file into its folder, after its licence was shown; False, with the reason printed, if that failed."""
    from pulid_sdxl.models.catalogue import RESEARCH_ONLY
    from pulid_sdxl.models.download import fetch
    from pulid_sdxl.pulid.errors import PulidError

    def check_file(path: Path) -> None:
        from pulid_sdxl.models import checkpoints

        checkpoints.check_file(file, path)

    print(f"{file.name}: {file.needed_for}. Licence: {file.licence}.", flush=True)
    if file.licence == RESEARCH_ONLY and not accepted and not agrees(file):
        print("  not fetched: this licence has to be accepted (--accept-licence)")
        return False
    if not file.sha256 and importlib.util.find_spec("torch") is None:
        print("  not fetched: no hash is published, and without torch it cannot be recognised. Use ComfyUI's Python.")
        return False
    try:
        fetch(file, folders.destination(file), partial(show_progress, file.name), check_file)
    except PulidError as error:
        print(f"\n  {error}")
        return False
    finally:
        show_progress("", 0, None)
    return True


def checking(file: WeightFile, done: int) -> None:
    show_progress(f"checking {file.name}", done, file.size)


def agrees(file: WeightFile) -> bool:
    if not sys.stdin.isatty():
        return False
    typed = input(f"  {file.name} is for {file.licence}. Is that what you do with it? [y/N] ")
    return typed.strip().lower() in ("y", "yes")


def show_progress(what: str, done: int, total: int | None) -> None:
    """One line that is written over; nothing where nobody watches."""
    if sys.stderr.isatty():
        percent = f" of {total / 1e6:.0f} MB, {100 * done // total} %" if total else ""
        print(f"\r\033[K{what and f'{what}: {done / 1e6:.0f} MB{percent}'}", end="", file=sys.stderr, flush=True)


def doctor(hosts: list[Path], rest: list[str]) -> int:
    """The report; 1 if it says that something is to be done."""
    from pulid_sdxl.models import doctor

    parser = argparse.ArgumentParser(prog="run.py doctor", description="Says what is installed and what is wrong.")
    parser.add_argument("--package", help=argparse.SUPPRESS)  # how it asks itself, see ask
    known, folders = places(parser, hosts, rest)
    if known.package:
        print(MARK + json.dumps([finding.__dict__ for finding in doctor.try_package(known.package)]))
        return 0
    around = HERE.parent if HERE.parent.name == "custom_nodes" else hosts[0] / "custom_nodes" if hosts else None
    host = hosts[0] if hosts else None
    findings = doctor.examine(folders, host, around if around and around.is_dir() else None, ask, progress=checking)
    show_progress("", 0, None)
    print(doctor.text_of(findings))
    return int(any(finding.remedy for finding in findings))


MARK = "FOUND "  # what follows is ours; packages print at import
PACKAGE_SECONDS = 120


def ask(package: str) -> list:
    """Try a package in a process of its own: a broken library can take the whole of Python with it."""
    from pulid_sdxl.models.doctor import Finding, version_of
    from pulid_sdxl.pulid.packages import PIP_NAMES, pip_command

    command = [sys.executable, str(ROOT / "run.py"), "doctor", "--models", str(ROOT), "--package", package]
    try:
        tried = subprocess.run(command, capture_output=True, text=True, timeout=PACKAGE_SECONDS, errors="replace")
        found = tried.stdout.rpartition(MARK)
        if tried.returncode == 0 and found[1]:
            return [Finding(**entry) for entry in json.loads(found[2])]
        fate = f"ends Python (exit code {tried.returncode})"
    except subprocess.TimeoutExpired:
        fate = f"does not come to an end within {PACKAGE_SECONDS} s"
    name = PIP_NAMES.get(package, package)
    anew = pip_command("install", "--upgrade", "--force-reinstall", "--no-deps", name)
    return [Finding(package, f"{version_of(package) or ''} {fate} when imported".strip(), f"Install it anew: {anew}")]


def span(text: str) -> float:
    """30d, 12h -> seconds."""
    number, unit = text[:-1], {"d": 24.0 * 3600, "h": 3600.0}.get(text[-1:])
    if unit is None or not number.isdecimal():
        raise argparse.ArgumentTypeError(f"expected days or hours, such as 30d or 12h, found {text!r}")
    return int(number) * unit


def hosted(hosts: list[Path], rest: list[str]) -> int:
    """Lists or forgets what this machine keeps of hosted requests, those of every user with --multi-user."""
    from pulid_sdxl.hosted import journal

    parser = argparse.ArgumentParser(prog="run.py hosted", description=hosted.__doc__)
    parser.add_argument("action", choices=["list", "forget"])
    parser.add_argument("ids", nargs="*", default=[], metavar="ID", help="requests to forget, as `list` names them")
    parser.add_argument("--all", action="store_true", help="forget all")
    parser.add_argument("--older-than", type=span, metavar="30d", help="forget what is older: days (d) or hours (h)")
    parser.add_argument("--user-directory", type=Path, metavar="DIR", help="a ComfyUI `user` folder; else its own")
    known = parser.parse_args(rest)
    around = folder_of(hosts)
    users = known.user_directory or (around and around / "user")
    if users is None:
        raise Failure("No ComfyUI found. Name its folder with --comfyui, or its user folder with --user-directory.")
    if known.user_directory and not users.is_dir():
        raise Failure(f"{users} is not a folder. Expected a ComfyUI `user` folder.")
    files = sorted(users.glob(f"__pulid/**/{journal.JOURNAL_FILE}"))
    if known.action == "list":
        print(journal.listing(row for file in files for row in journal.Journal(file).rows()))
        return 0
    seconds = 0.0 if known.all else known.older_than
    if seconds is None and not known.ids:
        raise Failure("Say what to forget: ids, --all, or --older-than 30d.")
    rows = [row for file in files for row in journal.Journal(file).rows()]
    unknown = {*known.ids} - {name for row in rows for name in (row.request_id, row.name)}
    if unknown:
        raise Failure(f"Not known here: {', '.join(sorted(unknown))}. Nothing was forgotten; see: run.py hosted list")
    print(f"{sum(journal.Journal(file).forget(known.ids, seconds) for file in files)} forgotten.")
    return 0


def developer(name: str, hosts: list[Path], rest: list[str]) -> int:
    need_tools()
    from pulid_sdxl.tools import develop

    return develop.run(name, hosts, rest)


def batch(hosts: list[Path], rest: list[str]) -> int:
    need_tools()
    from pulid_sdxl.tools.batch import command

    return command.run(hosts, rest)


def need_tools() -> None:
    """For commands that only the repository has: what is installed from the registry has no tools/."""
    if not (ROOT / "tools").is_dir():
        raise Failure("This command comes with the repository of PuLID for SDXL; what is installed here lacks it.")


COMMANDS: dict[str, Command] = {
    **{name: partial(developer, name) for name in ("demo", "test", "lint", "conformance", "bench")},
    "models": models,
    "doctor": doctor,
    "hosted": hosted,
    "batch": batch,
}


def main(arguments: list[str] | None = None) -> int:
    mount_pack()
    from pulid_sdxl.pulid.errors import PulidError

    parser = argparse.ArgumentParser(
        description=__doc__.strip(), formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--comfyui", metavar="FOLDER")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name in COMMANDS:
        # Help after a command is the tool's own.
        command = commands.add_parser(name, add_help=False, allow_abbrev=False)
        command.add_argument("--comfyui", metavar="FOLDER", default=argparse.SUPPRESS)  # here or before
    known, rest = parser.parse_known_args(arguments)
    if known.command is None:
        parser.exit(2, parser.format_help())
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # in order with what the processes started from here print
    asks = known.command == "lint" or {"-h", "--help"} & {*rest}  # these are answered whatever a ComfyUI is like
    try:
        return COMMANDS[known.command]([] if asks else find_hosts(known.comfyui), rest)
    except (Failure, PulidError) as failure:
        print(failure, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
