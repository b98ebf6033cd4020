#!/usr/bin/env python3
"""The pack's commands. Each sets up what it needs, once: a .venv beside this file, and a ComfyUI.

    python3 run.py demo             a picture of the person in a photograph, through ComfyUI's own server
    python3 run.py test             all tests, those that need ComfyUI once on every ComfyUI given
    python3 run.py conformance DIR  this pack's numbers against the authors' reference vectors in DIR
    python3 run.py bench            what the pack costs, as ratios; --quick within two minutes

ComfyUI is looked for in --comfyui, COMFYUI_PATH (several: separated like PATH), around this folder when it lies in
custom_nodes, and in ~/comfy/ComfyUI; otherwise the official repository is cloned into .cache/.

Standard library only. A new command is a function that takes (hosts, rest) and a line in COMMANDS.
"""

import argparse
import ast
import hashlib
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
    return subprocess.call([str(PYTHON), str(ROOT / "tools" / name), *arguments])


def on_first(name: str) -> Command:
    """The command that runs a tool on the first host, or on none."""
    return lambda hosts, rest: tool(name, [*(["--comfyui", str(hosts[0])] if hosts else []), *rest])


def conformance(hosts: list[Path], rest: list[str]) -> int:
    return tool("conformance.py", [*(f"--comfyui={host}" for host in hosts), *rest])


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


COMMANDS = {
    "demo": (on_first("demo.py"), "make a picture of the person in a photograph"),
    "test": (test, "run all tests; further arguments go to pytest"),
    "conformance": (conformance, "compare with the reference vectors in a folder"),
    "bench": (on_first("bench.py"), "measure what the pack costs"),
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
        hosts = find_hosts(known.comfyui, clone=known.command != "conformance")
        ensure_environment(hosts)
        return COMMANDS[known.command][0](hosts, rest)
    except Failure as failure:
        print(failure, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
