#!/usr/bin/env python3
"""The pack's commands. Each sets up what it needs, once: a .venv beside this file, and a ComfyUI.

    python3 run.py demo             a picture of the person in a photograph, through ComfyUI's own server
    python3 run.py test             all tests, those that need ComfyUI once on every ComfyUI given
    python3 run.py conformance DIR  this pack's numbers against the authors' reference vectors in DIR
    python3 run.py bench            what the pack costs, as ratios; --quick within two minutes

Two set up nothing and look at what is there; start them with the Python that starts ComfyUI.

    python run.py models            every weight file: where it lies, whether it is whole; --download fetches them
    python run.py doctor            what is installed and what is wrong, as a text to paste into a bug report

ComfyUI is looked for in --comfyui, COMFYUI_PATH (several: separated like PATH), around this folder when it lies in
custom_nodes, and in ~/comfy/ComfyUI; otherwise the official repository is cloned into .cache/.

Standard library only, and for `models` and `doctor` parts of the pack that need no more. A new command is a function
that takes (hosts, rest) and a line in COMMANDS.
"""

import argparse
import ast
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as xml
from collections import Counter
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).absolute().parent  # links are kept: the pack may be linked into custom_nodes
ROOT = HERE.resolve()
CACHE = ROOT / ".cache"
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
STAMP = VENV / "pulid-sdxl.json"

HOST_URL = "https://github.com/comfyanonymous/ComfyUI"
HOST_TAG = "v0.3.64"
CLONE_SECONDS = 300
# Only ComfyUI's audio nodes want torchaudio; our own list pins the other two. ComfyUI starts without its templates and
# docs, and no version of the templates serves old and new hosts alike.
HOST_REQUIREMENTS_LEFT_OUT = {
    "torchaudio",
    "torch",
    "torchvision",
    "comfyui-workflow-templates",
    "comfyui-embedded-docs",
}


Command = Callable[[list[Path], list[str]], int]  # hosts, further arguments -> exit code


class Failure(Exception):
    """Something the user has to know; the message is all that is printed."""


# --- ComfyUI ---------------------------------------------------------------------------------------------------------


def is_comfyui(path: Path) -> bool:
    return (path / "main.py").is_file() and (path / "comfy" / "supported_models.py").is_file()


def find_hosts(given: str | None, clone: bool = True) -> list[Path]:
    """The ComfyUI folders to work with; empty when there is none and none can be had, or may be cloned."""
    asked = given or os.environ.get("COMFYUI_PATH")
    if asked:
        hosts = [Path(part).expanduser().resolve() for part in asked.split(os.pathsep) if part]
        for host in hosts:
            if not is_comfyui(host):
                raise Failure(f"{host} is not a ComfyUI folder: it has no main.py with comfy/ beside it.")
        return list(dict.fromkeys(hosts))
    for host in (HERE.parent.parent, Path.home() / "comfy" / "ComfyUI", CACHE / "ComfyUI"):
        if is_comfyui(host):
            return [host]
    return clone_host() if clone else []


def clone_host() -> list[Path]:
    print(f"No ComfyUI found; cloning {HOST_TAG} of {HOST_URL}", flush=True)
    partial = CACHE / "ComfyUI.partial"
    shutil.rmtree(partial, ignore_errors=True)
    CACHE.mkdir(exist_ok=True)
    stall = ["-c", "http.lowSpeedLimit=1000", "-c", "http.lowSpeedTime=15"]
    clone = ["git", *stall, "clone", "--quiet", "--depth", "1", "--branch", HOST_TAG, HOST_URL, str(partial)]
    try:
        subprocess.run(
            clone,
            check=True,
            timeout=CLONE_SECONDS,
            capture_output=True,
            text=True,
            env={**os.environ, "GIT_TERMINAL_PROMPT": "0"},
        )
        partial.rename(CACHE / "ComfyUI")
    except (OSError, subprocess.SubprocessError) as problem:
        shutil.rmtree(partial, ignore_errors=True)
        reason = (getattr(problem, "stderr", None) or str(problem)).strip().splitlines()[-1]
        print(f"  could not clone it: {reason}")
        print("  Going on without. To use one you have: --comfyui FOLDER, or the environment variable COMFYUI_PATH.")
        return []
    return [CACHE / "ComfyUI"]


def host_version(host: Path) -> str:
    text = (host / "comfyui_version.py").read_text(encoding="utf-8")
    return re.search(r'__version__ = "(.+?)"', text)[1]


# --- The environment -------------------------------------------------------------------------------------------------


def own_requirements() -> list[str]:
    """`dependencies` and the extra `test` of pyproject.toml. Python 3.10 has no tomllib; the lists read as Python."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    lists = [re.search(rf"^{name} = (\[.*?^\])", text, re.MULTILINE | re.DOTALL) for name in ("dependencies", "test")]
    return [line for found in lists for line in ast.literal_eval(found[1])]


def host_requirements(host: Path) -> list[str]:
    lines = (line.split("#")[0].strip() for line in (host / "requirements.txt").read_text("utf-8").splitlines())
    return [line for line in lines if line and re.match(r"[\w.-]+", line)[0] not in HOST_REQUIREMENTS_LEFT_OUT]


def ensure_environment(hosts: list[Path]) -> None:
    """Make .venv hold our requirements and each host's. What is already there costs one look at the stamp file."""
    layers = [own_requirements()]
    # Old hosts first: each pins the frontend, and a newer frontend serves an older host better than the reverse.
    for host in sorted(hosts, key=lambda host: [int(n) for n in re.findall(r"\d+", host_version(host))]):
        layers.append(own_requirements() + host_requirements(host))  # ours again, so that pip keeps to its pins

    installed = read_stamp()
    if not PYTHON.exists():
        print("Setting up .venv (once; torch alone is some gigabytes)", flush=True)
        create_venv()
        installed = []
    for layer in layers:
        key = hashlib.sha256(json.dumps(layer).encode()).hexdigest()
        if key not in installed:
            pip_install(layer)
            installed.append(key)
            STAMP.write_text(json.dumps(installed))


def read_stamp() -> list[str]:
    try:
        return json.loads(STAMP.read_text())
    except (OSError, ValueError):
        return []


def create_venv() -> None:
    made = subprocess.run([sys.executable, "-m", "venv", "--clear", str(VENV)], capture_output=True, text=True)
    if made.returncode:
        shutil.rmtree(VENV, ignore_errors=True)
        raise Failure(f"Could not make {VENV}.\n{made.stdout}{made.stderr}On Debian: apt install python3-venv")


def pip_install(requirements: list[str]) -> None:
    command = [str(PYTHON), "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off"]
    lines = []
    with subprocess.Popen(
        [*command, *requirements], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as pip:
        for line in pip.stdout:
            lines.append(line)
            if line.startswith(("Collecting", "Downloading", "  Downloading", "Installing collected")):
                print(" ", line.strip()[:110], flush=True)
    if pip.returncode:
        raise Failure(f"Could not install the requirements; pip's last lines:\n{''.join(lines[-12:])}")


# --- Commands --------------------------------------------------------------------------------------------------------


def tool(name: str, arguments: list[str]) -> int:
    if not (ROOT / "tools").is_dir():
        raise Failure("This command comes with the repository of PuLID for SDXL; what is installed here has no tools/.")
    return subprocess.call([str(PYTHON), str(ROOT / "tools"), name, *arguments])


def on_first(name: str) -> Command:
    """The command that runs a tool on the first host, or on none."""
    return lambda hosts, rest: tool(name, [*(["--comfyui", str(hosts[0])] if hosts else []), *rest])


def conformance(hosts: list[Path], rest: list[str]) -> int:
    return tool("conformance", [*(f"--comfyui={host}" for host in hosts), *rest])


def test(hosts: list[Path], rest: list[str]) -> int:
    """pytest without a host, then tests/host once per host. Paths in `rest` narrow that down; options go to both."""
    tests = ROOT / "tests"
    paths = {argument: Path(argument.split("::")[0]).resolve() for argument in rest}
    chosen = [argument for argument in rest if paths[argument].exists() and paths[argument].is_relative_to(tests)]
    options = [argument for argument in rest if argument not in chosen]
    on_host = [argument for argument in chosen if paths[argument].is_relative_to(tests / "host")]
    without_host = [argument for argument in chosen if argument not in on_host]

    runs = []
    if without_host or not chosen:
        everything = [str(tests), f"--ignore={tests / 'host'}"]
        runs.append(pytest("without ComfyUI", [*(without_host or everything), *options]))
    if on_host or not chosen:
        for host in hosts:
            title = f"on ComfyUI {host_version(host)} ({host})"
            runs.append(pytest(title, [*(on_host or [str(tests / "host")]), *options], COMFYUI=str(host)))
        if not hosts:
            print(f"\n{'!' * 100}\nNO COMFYUI: the tests on a host (tests/host) did NOT run.\n{'!' * 100}")

    counts = sum((count for _, count in runs), Counter())
    print(f"\n{counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped", flush=True)
    codes = [code for code, _ in runs if code not in (0, NO_TESTS)]
    return codes[0] if codes else 0 if counts else NO_TESTS


NO_TESTS = 5  # pytest's exit code when its arguments leave none


def pytest(title: str, arguments: list[str], **variables: str) -> tuple[int, Counter]:
    """Run pytest in .venv; returns its exit code and how many tests passed, failed and were skipped."""
    print(f"\n=== {title}", flush=True)
    report = CACHE / "pytest.xml"
    CACHE.mkdir(exist_ok=True)
    report.unlink(missing_ok=True)
    # A PYTHONPATH would reach into .venv, a COMFYUI into the tests that are to run without one.
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "COMFYUI")}
    code = subprocess.call([str(PYTHON), "-m", "pytest", *arguments, f"--junitxml={report}"], env={**kept, **variables})
    if not report.is_file():
        return code, Counter()
    suite = xml.parse(report).getroot().find("testsuite")
    count = Counter({key: int(suite.get(key)) for key in ("tests", "failures", "errors", "skipped")})
    failed = count["failures"] + count["errors"]
    return code, Counter(passed=count["tests"] - failed - count["skipped"], failed=failed, skipped=count["skipped"])


def mount_pack() -> None:
    """Make the pack importable as `pulid_sdxl`, its root kept off sys.path, as ComfyUI does."""
    if "pulid_sdxl" in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(
        "pulid_sdxl", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    sys.modules["pulid_sdxl"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["pulid_sdxl"])


def places(parser: argparse.ArgumentParser, hosts: list[Path], rest: list[str]):
    """The further arguments, and the folders to look into: None where no models folder is known."""
    from pulid_sdxl.models.files import ModelFolders, other_programs
    from pulid_sdxl.models.paths import model_paths

    parser.add_argument("--models", type=Path, metavar="DIR", help="a ComfyUI `models` folder; else the ComfyUI's own")
    parser.add_argument("--extra-model-paths", type=Path, action="append", default=[], metavar="FILE.yaml")
    known = parser.parse_args(rest)
    yamls = [host / "extra_model_paths.yaml" for host in hosts[:1]]
    yamls = [*filter(Path.is_file, yamls), *known.extra_model_paths]
    models = known.models or (hosts[0] / "models" if hosts else None)
    if models is None:
        return known, None
    if not models.is_dir():
        raise Failure(f"{models} is not a folder. Expected a ComfyUI `models` folder.")
    return known, ModelFolders(model_paths(models.absolute(), yamls), other_programs(os.environ, Path.home()))


def models(hosts: list[Path], rest: list[str]) -> int:
    """The table of files; 1 if the loader lacks any."""
    mount_pack()
    from pulid_sdxl.models import inventory

    parser = argparse.ArgumentParser(prog="run.py models", description="Lists every weight file, and fetches them.")
    parser.add_argument("--download", nargs="*", metavar="NAME", help="fetch these; without names, all that is missing")
    parser.add_argument("--accept-licence", action="store_true", help="agree to licences that would be asked about")
    known, folders = places(parser, hosts, rest)
    if folders is None:
        raise Failure("No ComfyUI found. Name its folder with --comfyui, or its models with --models.")
    entries = inventory.inventory(folders, lambda file, done: show_progress(f"checking {file.name}", done, file.size))
    show_progress("", 0, None)
    if known.download is not None:
        wanted = [file_named(name) for name in known.download] or inventory.lacking(entries)
        whole = {entry.file for entry in entries if entry.whole}
        failed = [file for file in wanted if file not in whole and not download(file, folders, known.accept_licence)]
        if failed:
            return 1
        entries = inventory.inventory(folders)
    print(inventory.table(entries))
    lacking = inventory.lacking(entries)
    if lacking:
        print(f"\nThe loader lacks {', '.join(file.name for file in lacking)}. To fetch: run.py models --download")
    return 1 if lacking or any(entry.fault for entry in entries) else 0


def file_named(name: str):
    from pulid_sdxl.models.catalogue import BY_NAME

    if name not in BY_NAME:
        raise Failure(f"No file {name!r} is known. Known are: {', '.join(BY_NAME)}.")
    return BY_NAME[name]


def download(file, folders, accepted: bool) -> bool:
    """Fetch one file into its folder, after its licence was shown; False, with the reason printed, if that failed."""
    from pulid_sdxl.models.download import fetch
    from pulid_sdxl.models.inventory import asks_consent
    from pulid_sdxl.pulid.errors import PulidError

    def check_file(path: Path) -> None:
        from pulid_sdxl.models import checkpoints

        checkpoints.check_file(file, path)

    print(f"{file.name}: {file.needed_for}. Licence: {file.licence}.", flush=True)
    if asks_consent(file) and not accepted and not agrees(file):
        print("  not fetched: this licence has to be accepted (--accept-licence)")
        return False
    if not file.sha256 and importlib.util.find_spec("torch") is None:
        print(
            "  not fetched: nobody published its hash, and without torch it cannot be recognised. Use ComfyUI's Python."
        )
        return False
    try:
        fetch(file, folders.destination(file), lambda done, total: show_progress(file.name, done, total), check_file)
    except PulidError as error:
        show_progress("", 0, None)
        print(f"  {error}")
        return False
    show_progress("", 0, None)
    return True


def agrees(file) -> bool:
    if not sys.stdin.isatty():
        return False
    return input(f"  {file.name} is for {file.licence}. Is that what you do with it? [y/N] ").strip().lower() in (
        "y",
        "yes",
    )


def show_progress(what: str, done: int, total: int | None) -> None:
    """One line that is written over; nothing where nobody watches."""
    if sys.stderr.isatty():
        percent = f" of {total / 1e6:.0f} MB, {100 * done // total} %" if total else ""
        print(f"\r\033[K{what and f'{what}: {done / 1e6:.0f} MB{percent}'}", end="", file=sys.stderr, flush=True)


def doctor(hosts: list[Path], rest: list[str]) -> int:
    mount_pack()
    from pulid_sdxl.models import doctor
    from pulid_sdxl.pulid.errors import PulidError

    parser = argparse.ArgumentParser(prog="run.py doctor", description="Says what is installed and what is wrong.")
    parser.add_argument("--package", help=argparse.SUPPRESS)  # how it asks itself, see ask
    try:
        known, folders = places(parser, hosts, rest)
    except PulidError as error:
        raise Failure(str(error)) from error
    if known.package:
        print(MARK + doctor.to_json(doctor.try_package(known.package)))
        return 0
    around = HERE.parent if HERE.parent.name == "custom_nodes" else hosts[0] / "custom_nodes" if hosts else None
    host = hosts[0] if hosts else None
    print(doctor.report(folders, host, around if around and around.is_dir() else None, ask))
    return 0


MARK = "FOUND "  # what follows is ours; packages print at import
PACKAGE_SECONDS = 120


def ask(package: str) -> list:
    """Try a package in a process of its own: a broken library can take the whole of Python with it."""
    from pulid_sdxl.models.doctor import Finding, from_json, version_of
    from pulid_sdxl.pulid.packages import PIP_NAMES, pip_command

    command = [sys.executable, str(ROOT / "run.py"), "doctor", "--models", str(ROOT), "--package", package]
    try:
        tried = subprocess.run(command, capture_output=True, text=True, timeout=PACKAGE_SECONDS, errors="replace")
        found = tried.stdout.rpartition(MARK)
        if tried.returncode == 0 and found[1]:
            return from_json(found[2])
        fate = f"ends Python (exit code {tried.returncode})"
    except subprocess.TimeoutExpired:
        fate = f"does not come to an end within {PACKAGE_SECONDS} s"
    name = PIP_NAMES.get(package, package)
    anew = pip_command("install", "--upgrade", "--force-reinstall", "--no-deps", name)
    return [Finding(package, f"{version_of(package) or ''} {fate} when imported".strip(), f"Install it anew: {anew}")]


SETS_UP_NOTHING = {"models", "doctor"}
COMMANDS = {
    "demo": (on_first("demo"), "make a picture of the person in a photograph"),
    "test": (test, "run all tests; further arguments go to pytest"),
    "conformance": (conformance, "compare with the reference vectors in a folder"),
    "bench": (on_first("bench"), "measure what the pack costs"),
    "models": (models, "list the weight files, and fetch what is missing"),
    "doctor": (doctor, "say what is installed and what is wrong"),
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.strip(), formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, line) in COMMANDS.items():
        # Help after a command is the tool's own.
        command = commands.add_parser(name, help=line, add_help=False, allow_abbrev=False)
        command.add_argument("--comfyui", metavar="FOLDER")
    known, rest = parser.parse_known_args(arguments)
    try:
        sets_up = known.command not in SETS_UP_NOTHING
        hosts = find_hosts(known.comfyui, clone=sets_up and known.command != "conformance")
        if sets_up:
            ensure_environment(hosts)
        return COMMANDS[known.command][0](hosts, rest)
    except Failure as failure:
        print(failure, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
