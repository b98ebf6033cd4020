"""What run.py's commands for developers do: make their environment, run tools, tests and gates in it.

Standard library only, since it runs before there is an environment.
"""

import ast
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as xml
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..run import CACHE, ROOT, Failure
from . import TOOLS, arguments
from .processes import ENDS_WITH_US

HOST_URL = "https://github.com/comfyanonymous/ComfyUI"
HOST_TAG = "v0.3.64"
CLONE_SECONDS = 300
# Our own list pins torch and torchvision. ComfyUI starts without its templates and docs; its front end, of which each
# host pins another version, gets a folder of its own.
FRONTEND = "comfyui-frontend-package"
NEWEST_FRONTEND, ITS_HOST = "1.58.1", (0, 33)  # and the oldest ComfyUI that people have it with
FRONTENDS = CACHE / "frontends"
HOST_REQUIREMENTS_LEFT_OUT = {"torch", "torchvision", FRONTEND, "comfyui-workflow-templates", "comfyui-embedded-docs"}
# A PYTHONPATH would reach into .venv, a COMFYUI into the tests that are to run without one; and without bytecode pytest
# would rewrite every test, and all of hypothesis, at each start: that is seconds.
NOT_HANDED_ON = {"PYTHONPATH", "COMFYUI", "COMFYUI_FRONTEND", "PYTHONDONTWRITEBYTECODE"}


def clone_host(cache: Path = CACHE) -> list[Path]:
    """The official repository at a pinned tag, in `cache`; nothing, with the reason printed, where it cannot be had."""
    print(f"No ComfyUI found; cloning {HOST_TAG} of {HOST_URL}", flush=True)
    partial = cache / "ComfyUI.partial"
    shutil.rmtree(partial, ignore_errors=True)
    cache.mkdir(exist_ok=True)
    stall = ["-c", "http.lowSpeedLimit=1000", "-c", "http.lowSpeedTime=15"]
    clone = ["git", *stall, "clone", "--quiet", "--depth", "1", "--branch", HOST_TAG, HOST_URL, str(partial)]
    silent = {**os.environ, "GIT_TERMINAL_PROMPT": "0"}
    try:
        subprocess.run(clone, check=True, timeout=CLONE_SECONDS, capture_output=True, text=True, env=silent)
        return [partial.rename(cache / "ComfyUI")]
    except (OSError, subprocess.SubprocessError) as problem:
        shutil.rmtree(partial, ignore_errors=True)
        reason = (getattr(problem, "stderr", None) or str(problem)).strip().splitlines()[-1]
        print(f"  could not clone it: {reason}")
        print("  Going on without. To use one you have: --comfyui FOLDER, or the environment variable COMFYUI_PATH.")
        return []


def host_version(host: Path) -> str:
    text = (host / "comfyui_version.py").read_text(encoding="utf-8")
    [version] = re.findall(r'__version__ = "(.+?)"', text)
    return version


def age_of(host: Path) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", host_version(host)))


# --- The environment -------------------------------------------------------------------------------------------------


EVERYTHING = ("demo", "standalone", "test")


def own_requirements(extras: Sequence[str] = EVERYTHING) -> list[str]:
    """`dependencies` and extras of pyproject.toml. Python 3.10 has no tomllib; the lists read as Python."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    lists = re.findall(rf"^(?:{'|'.join(('dependencies', *extras))}) = (\[.*?^\])", text, re.MULTILINE | re.DOTALL)
    return [line for found in lists for line in ast.literal_eval(found)]


def host_requirements(host: Path) -> list[str]:
    return [line for line in _lines(host) if _package(line) not in HOST_REQUIREMENTS_LEFT_OUT]


def pinned_frontend(host: Path) -> str | None:
    """The version of the front end that this ComfyUI asks for, None where it does not say."""
    if not (host / "requirements.txt").is_file():
        return None
    return next((line.partition("==")[2] for line in _lines(host) if _package(line) == FRONTEND), None)


def frontend_root(version: str) -> Path:
    """Where the front end of this version is, or will be: ComfyUI's --front-end-root."""
    return FRONTENDS / version / FRONTEND.replace("-", "_") / "static"


def _lines(host: Path) -> list[str]:
    lines = (line.split("#")[0].strip() for line in (host / "requirements.txt").read_text("utf-8").splitlines())
    return [line for line in lines if line]


def _package(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement)[0]


@dataclass(frozen=True)
class Environment:
    """A virtual environment, and in its stamp file what was installed into it."""

    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

    @property
    def stamp(self) -> Path:
        return self.folder / "pulid-sdxl.json"

    def prepare(self, hosts: list[Path], extras: Sequence[str] = EVERYTHING) -> None:
        """Make it hold our requirements and each host's. What is already there costs one look at the stamp file."""
        own = own_requirements(extras)
        # Old hosts first, so that the newest has the last word; ours with each, so that pip keeps to its pins.
        layers = [own, *(own + host_requirements(host) for host in sorted(hosts, key=age_of))]

        installed = self.installed()
        if not self.python.exists() or not (installed or self.has_pip()):  # an earlier set-up may have been cut off
            print("Setting up .venv (once; torch alone is some gigabytes)", flush=True)
            self.create()
            installed = []
        for layer in layers:
            key = hashlib.sha256(json.dumps(layer).encode()).hexdigest()
            if key not in installed:
                self.install(layer)
                installed.append(key)
                self.stamp.write_text(json.dumps(installed))

    def add_frontends(self, versions: Iterable[str | None]) -> None:
        """Fetch each of these versions of ComfyUI's front end that is not there yet, into a folder of its own."""
        for version in filter(None, versions):
            folder = FRONTENDS / version
            if not folder.is_dir():
                partial = folder.with_suffix(".partial")
                shutil.rmtree(partial, ignore_errors=True)
                self.install(["--no-deps", "--target", str(partial), f"{FRONTEND}=={version}"])
                partial.rename(folder)

    def installed(self) -> list[str]:
        try:
            return list(json.loads(self.stamp.read_text()))
        except (OSError, ValueError):
            return []

    def create(self) -> None:
        command = [sys.executable, "-m", "venv", "--clear", str(self.folder)]
        made = subprocess.run(command, capture_output=True, text=True)
        if made.returncode:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise Failure(
                f"Could not make {self.folder}.\n{made.stdout}{made.stderr}On Debian: apt install python3-venv"
            )

    def has_pip(self) -> bool:
        return subprocess.run([str(self.python), "-m", "pip", "--version"], capture_output=True).returncode == 0

    def install(self, requirements: list[str]) -> None:
        pip = [str(self.python), "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off"]
        lines = []
        command = [*pip, *requirements]
        how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, **ENDS_WITH_US}
        with subprocess.Popen(command, **how) as process:
            for line in process.stdout or ():
                lines.append(line)
                if line.startswith(("Collecting", "Downloading", "  Downloading", "Installing collected")):
                    print(" ", line.strip()[:110], flush=True)
        if process.returncode:
            errors = [line for line in lines if line.startswith("ERROR")] or lines[-3:]
            raise Failure(
                f"pip could not install what is needed: {''.join(errors).strip()}\n"
                "Check the network, the proxy and the free disk, then run the same command again: it goes on from here."
            )

    def call(self, *arguments: str, **variables: str) -> int:
        """Run its Python in this folder, its lines in order with ours; returns the exit code."""
        kept = {name: value for name, value in os.environ.items() if name not in NOT_HANDED_ON}
        environment = {**kept, "PYTHONUNBUFFERED": "1", **variables}
        return subprocess.call([str(self.python), *arguments], env=environment, **ENDS_WITH_US)


# --- Commands --------------------------------------------------------------------------------------------------------


def on_first(name: str) -> "Command":
    """The command that runs a tool on the first host, or on none."""

    def command(environment: Environment, hosts: list[Path], rest: list[str]) -> int:
        host = ["--comfyui", str(hosts[0])] if hosts else []
        return environment.call(str(TOOLS), name, *host, *rest)

    return command


def conformance(environment: Environment, hosts: list[Path], rest: list[str]) -> int:
    return environment.call(str(TOOLS), "conformance", *(f"--comfyui={host}" for host in hosts), *rest)


@dataclass(frozen=True)
class Run:
    """One run of pytest: where, its exit code, how many tests passed, failed and were skipped, how long it took."""

    host: str
    editor: str
    code: int
    counts: "Counter[str]"
    seconds: float


def test(environment: Environment, hosts: list[Path], rest: list[str]) -> int:
    """pytest without a host, then tests/host once per host. Paths in `rest` narrow that down; options go to both."""
    tests = ROOT / "tests"
    rest = [argument for argument in rest if argument != "--"]
    paths = {argument: Path(argument.split("::")[0]).resolve() for argument in rest}
    chosen = [argument for argument in rest if paths[argument].exists() and paths[argument].is_relative_to(tests)]
    options = [argument for argument in rest if argument not in chosen]
    on_host = [argument for argument in chosen if paths[argument].is_relative_to(tests / "host")]
    without_host = [argument for argument in chosen if argument not in on_host]

    runs = []
    if without_host or not chosen:
        everything = [str(tests), f"--ignore={tests / 'host'}"]
        runs.append(pytest(environment, "no ComfyUI", "", [*(without_host or everything), *options]))
    if on_host or not chosen:
        runs += test_on_hosts(environment, hosts, on_host or [str(tests / "host")], options)
    print(f"\n{table(runs)}", flush=True)
    codes = [run.code for run in runs if run.code not in (0, NO_TESTS)]
    return codes[0] if codes else 0 if any(run.counts.total() for run in runs) else NO_TESTS


def table(runs: Sequence[Run]) -> str:
    """A line for each run, and one for all of them."""
    counts = sum((run.counts for run in runs), Counter[str]())
    lines = [f"{'host':<20}{'editor':<10}{'passed':>8}{'failed':>8}{'skipped':>9}{'seconds':>9}"]
    for run in (*runs, Run("all", "", 0, counts, sum(run.seconds for run in runs))):
        passed, failed, skipped = (run.counts[kind] for kind in ("passed", "failed", "skipped"))
        lines.append(f"{run.host:<20}{run.editor:<10}{passed:>8}{failed:>8}{skipped:>9}{run.seconds:>9.0f}")
    return "\n".join(lines)


def test_on_hosts(environment: Environment, hosts: list[Path], paths: list[str], options: list[str]) -> list[Run]:
    """Run these tests on each host with the front end that it pins. The newest host then gets those in the editor once
    more, with the newest front end, unless it is older than what people have that with."""
    if not hosts:
        print(f"\n{'!' * 100}\nNO COMFYUI: the tests on a host (tests/host) did NOT run.\n{'!' * 100}", flush=True)
        return []
    in_editor = [f"{path}/test_browser.py" if Path(path).is_dir() else path for path in paths]
    in_editor = [path for path in in_editor if "test_browser.py" in path]
    newest = max(hosts, key=age_of)
    again = in_editor and age_of(newest) >= ITS_HOST and pinned_frontend(newest) != NEWEST_FRONTEND
    environment.add_frontends([*map(pinned_frontend, hosts), *([NEWEST_FRONTEND] if again else [])])
    runs = []
    for host in hosts:
        title, editor = f"ComfyUI {host_version(host)}", pinned_frontend(host) or ""
        runs.append(pytest(environment, title, editor, [*paths, *options], COMFYUI=str(host)))
    if again:
        title, variables = f"ComfyUI {host_version(newest)}", {"COMFYUI": str(newest)}
        arguments = [*in_editor, *options]
        runs.append(
            pytest(environment, title, NEWEST_FRONTEND, arguments, **variables, COMFYUI_FRONTEND=NEWEST_FRONTEND)
        )
    return runs


NO_TESTS = 5  # pytest's exit code when its arguments leave none


def pytest(environment: Environment, host: str, editor: str, arguments: list[str], **variables: str) -> Run:
    print(f"\n=== {host}{editor and f', editor {editor}'} {variables.get('COMFYUI', '')}".rstrip(), flush=True)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        code = environment.call("-m", "pytest", *arguments, f"--junitxml={report}", **variables)
        suite = xml.parse(report).find("testsuite") if report.is_file() else None
    counts = Counter[str]()
    if suite is not None:
        count = {key: int(suite.attrib[key]) for key in ("tests", "failures", "errors", "skipped")}
        failed = count["failures"] + count["errors"]
        counts.update(passed=count["tests"] - failed - count["skipped"], failed=failed, skipped=count["skipped"])
    return Run(host, editor, code, counts, time.monotonic() - start)


def lint(environment: Environment, _: list[Path], rest: list[str]) -> int:
    """ruff and mypy with the settings of pyproject.toml. All of them run; 1 if any finds something."""
    link_for_mypy(CACHE)
    checks = (
        ["ruff", "check", str(ROOT)],
        ["ruff", "format", "--check", str(ROOT)],
        ["mypy", f"--config-file={ROOT / 'pyproject.toml'}"],
    )
    return int(any([environment.call("-m", *check) for check in checks]))


def link_for_mypy(cache: Path) -> None:
    """Link this folder under the package's name to where pyproject.toml lets mypy look for it."""
    link = cache / "mypy" / "pulid_sdxl"
    if not link.is_dir():
        try:
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(os.path.relpath(ROOT, link.parent), target_is_directory=True)
        except OSError as error:
            raise Failure(f"Could not make the link {link}: {error}. Windows needs Developer Mode for it.") from error


Command = Callable[[Environment, list[Path], list[str]], int]  # its hosts and further arguments -> exit code
COMMANDS: dict[str, Command] = {
    "demo": on_first("demo"),
    "test": test,
    "lint": lint,
    "conformance": conformance,
    "bench": on_first("bench"),
}


def run(name: str, hosts: list[Path], rest: list[str], environment: Environment = Environment(ROOT / ".venv")) -> int:
    """A command for developers, in an environment that is made if need be; without a host, one is cloned."""
    arguments.check(name, rest)
    if not os.access(ROOT, os.W_OK):
        raise Failure(
            f"{ROOT} cannot be written to, and run.py keeps there what it sets up (.venv, .cache). "
            "Copy the folder to a place of yours, and run it there."
        )
    if not hosts and name not in ("conformance", "lint"):
        hosts = clone_host()
    extras = ("demo", *(() if hosts else ("standalone",))) if name == "demo" else EVERYTHING
    environment.prepare(hosts, extras)
    return COMMANDS[name](environment, hosts, rest)
