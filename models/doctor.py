"""What there is to know when something does not work, as a text to read and to paste into a bug report.

Collected without ComfyUI, from given folders; nothing is changed. The text holds no home folder and no key.
"""

import os
import platform
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path
from urllib.parse import urlsplit

from ..pulid.errors import MissingPackage, PulidError
from ..pulid.packages import PIP_NAMES, describe, import_package, pip_command
from .catalogue import WeightFile
from .inventory import inventory, lacking
from .locate import ModelFolders, shown
from .onnx_providers import available_providers, provider_in_use

PACK = Path(__file__).absolute().parents[1]
RUN = PACK / "run.py"
FLOOR = (0, 3, 64)  # the oldest ComfyUI that serves
# What the pack imports.
HOSTS_PACKAGES = ("torch", "torchvision", "numpy", "safetensors", "PIL", "huggingface_hub")
PACKAGES = (*HOSTS_PACKAGES, "cv2", "onnxruntime", "insightface", "facexlib")
SUBMODULES = {"insightface": "insightface.model_zoo", "facexlib": "facexlib.detection.retinaface"}  # what is used
ONNXRUNTIMES = re.compile(r"(onnxruntime|ort)(-\w+)*", re.IGNORECASE)
NO_RUNTIMES = {"onnxruntime-extensions", "onnxruntime-tools", "onnxruntime-genai"}
OPENCVS = re.compile(r"opencv(-contrib)?-python(-headless)?", re.IGNORECASE)
VARIABLES = ("HF_ENDPOINT", "HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY")

# Nodes that older shared workflows name: ours step back where another pack has one.
LEGACY_IDS = {"PulidModelLoader", "PulidInsightFaceLoader", "PulidEvaClipLoader", "ApplyPulid", "ApplyPulidAdvanced"}
NODE_IDS = re.compile(rf"""["']({"|".join(LEGACY_IDS)}|ApplyPulidFlux|PuLID_\w+)["']""".encode())


@dataclass(frozen=True)
class Finding:
    """One line of the report, and what to do about it, if anything."""

    topic: str
    text: str
    remedy: str = ""


def examine(
    folders: ModelFolders | None,
    comfyui: Path | None,
    custom_nodes: Path | None,
    ask: Callable[[str], list[Finding]] | None = None,
    environment: Mapping[str, str] = os.environ,
    progress: Callable[[WeightFile, int], None] | None = None,
) -> list[Finding]:
    """All there is to find; `text_of` makes the report of it.

    ask       tries a package and says what it found; by default in this process, which a broken library can end
    progress  hears the bytes read while hashes are compared; without it sizes are
    """
    findings = [*system(), *comfyui_version(comfyui), *network(environment), *builds()]
    if version_of("torch"):
        for package in PACKAGES:
            findings += (ask or try_package)(package)
    else:
        portable = f'python_embeded\\python.exe -s "{RUN}" doctor'
        remedy = f"Run this with the Python that starts ComfyUI; in the portable build: {portable}"
        findings.append(Finding("packages", "no torch here, so this is not ComfyUI's Python", remedy))
    findings += (
        files(folders, progress)
        if folders
        else [Finding("files", "no models folder is known", "Name one: --models DIR")]
    )
    return [*findings, *(neighbours(custom_nodes) if custom_nodes else [])]


def advice(folders: ModelFolders, of_files: bool = True) -> str:
    """The part of the report that matters when loading fails, and how to get the rest."""
    try:
        findings = [finding for finding in (*builds(), *(files(folders) if of_files else ())) if finding.remedy]
    except (OSError, PulidError) as error:  # it is added to a message that must arrive
        findings = [Finding("files", describe(error))]
    versions = ", ".join(f"{name} {found}" for name in PACKAGES if (found := version_of(name)))
    lines = [f"Python {platform.python_version()}, {versions}."]
    lines += [f"{finding.topic}: {finding.text}. {finding.remedy}" for finding in findings]
    lines.append(f"All about this installation: {command('doctor')}")
    return anonymous("\n".join(lines))


def command(*words: str) -> str:
    """What to type for a command of run.py, with the Python that runs here; paths in it may name the home folder."""
    return f'"{sys.executable}" "{RUN}" {" ".join(words)}'


def text_of(findings: Sequence[Finding]) -> str:
    width = max(len(finding.topic) for finding in findings)
    lines = ["PuLID for SDXL: what is here"]
    lines += [f"  {finding.topic:<{width}}  {finding.text}{'  (!)' if finding.remedy else ''}" for finding in findings]
    remedies = [finding for finding in findings if finding.remedy]
    lines += ["", "To do" if remedies else "Nothing to do."]
    lines += [f"  {number}. {finding.topic}: {finding.remedy}" for number, finding in enumerate(remedies, start=1)]
    return anonymous("\n".join(lines))


def anonymous(text: str) -> str:
    """The text without the path of the home folder; paths in quotes stay usable in a terminal."""
    home = str(Path.home())
    if len(home) <= 1:  # a root folder tells nobody's name
        return text
    variable = "%USERPROFILE%" if os.name == "nt" else "$HOME"
    return text.replace(f'"{home}', f'"{variable}').replace(home, "~")


def system() -> list[Finding]:
    portable = " (ComfyUI's portable one)" if "python_embed" in sys.executable else ""
    return [
        Finding("system", f"{platform.platform()}, {os.cpu_count()} CPU cores"),
        Finding(
            "python",
            f"{platform.python_version()}{portable}, {sys.executable}",
            "" if sys.version_info >= (3, 10) else "PuLID for SDXL needs Python 3.10 or newer.",
        ),
        Finding("pack", str(PACK)),
    ]


def comfyui_version(comfyui: Path | None) -> list[Finding]:
    if comfyui is None:
        return [Finding("ComfyUI", "none found; name it with --comfyui FOLDER to look into its folders")]
    try:
        text = (comfyui / "comfyui_version.py").read_text(encoding="utf-8")
    except OSError:
        text = ""
    found = re.search(r'__version__ = "([\d.]+)', text)
    if not found:
        return [Finding("ComfyUI", f"of unknown version, {comfyui}")]
    old = tuple(int(part) for part in found[1].strip(".").split(".")) < FLOOR
    remedy = f"Update ComfyUI: {'.'.join(map(str, FLOOR))} or newer is needed." if old else ""
    return [Finding("ComfyUI", f"{found[1]}, {comfyui}", remedy)]


def network(environment: Mapping[str, str]) -> list[Finding]:
    """Which variables direct downloads; of an address the host alone, since it may hold a password."""
    values = {name: environment.get(name) or environment.get(name.lower()) for name in VARIABLES}
    texts = [f"{name} is {urlsplit(value).hostname or 'set'}" for name, value in values.items() if value]
    return [Finding("network", ", ".join(texts))] if texts else []


def builds() -> list[Finding]:
    """Packages of which only one kind may be installed."""
    names = {(found.metadata["Name"] or "").lower().replace("_", "-"): found.version for found in distributions()}
    runtimes = sorted(name for name in names if ONNXRUNTIMES.fullmatch(name) and name not in NO_RUNTIMES)
    opencvs = sorted(name for name in names if OPENCVS.fullmatch(name))
    findings = []
    if len(runtimes) > 1:
        keep = next((name for name in runtimes if name != "onnxruntime"), runtimes[0])
        remedy = (
            f"They share one folder and spoil each other. Remove all and install one:\n"
            f"     {pip_command('uninstall', '-y', *runtimes)}\n     {pip_command('install', keep)}"
        )
        findings.append(Finding("onnxruntime builds", ", ".join(f"{name} {names[name]}" for name in runtimes), remedy))
    if len(opencvs) > 1:
        findings.append(Finding("opencv builds", ", ".join(f"{name} {names[name]}" for name in opencvs)))
    return findings


def try_package(package: str) -> list[Finding]:
    """Import a package, and look at what it offers."""
    try:
        import_package(package)
        import_package(SUBMODULES.get(package, package))
        more = MORE.get(package, lambda: [])()
    except MissingPackage as error:
        message = str(error)
        states = {"is not installed": "not installed", "but hollow": f"{version_of(package) or ''} hollow"}
        cannot = f"{version_of(package) or ''} cannot be imported"
        state = next((state for words, state in states.items() if words in message), cannot)
        return [Finding(package, state.strip(), " ".join(message.split()))]
    return [Finding(package, version_of(package) or "of unknown version"), *more]


def torch_devices() -> list[Finding]:
    torch = import_package("torch")
    kinds = {"CUDA": torch.version.cuda, "ROCm": getattr(torch.version, "hip", None)}
    built = ", ".join(f"{kind} {number}" for kind, number in kinds.items() if number) or "the CPU alone"
    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    names += ["Apple GPU (MPS)"] if torch.backends.mps.is_available() else []
    names += ["Intel GPU (XPU)"] if hasattr(torch, "xpu") and torch.xpu.is_available() else []
    return [Finding("devices", f"{', '.join(names) or 'CPU'}; torch is built for {built}")]


def onnx_providers() -> list[Finding]:
    """Every provider that is offered, and whether it loads beside torch, which brings CUDA's libraries in ComfyUI."""
    with suppress(MissingPackage):  # which is a finding of its own
        import_package("torch")
    findings = []
    for asked in available_providers():
        name, reason = provider_in_use(list(dict.fromkeys((asked, "CPUExecutionProvider"))))
        remedy = "Install what it names, or choose the provider CPU." if reason else ""
        findings.append(Finding("provider", f"{asked} does not load: {reason}" if reason else f"{name} loads", remedy))
    return findings


MORE: dict[str, Callable[[], list[Finding]]] = {"torch": torch_devices, "onnxruntime": onnx_providers}


def files(folders: ModelFolders, progress: Callable[[WeightFile, int], None] | None = None) -> list[Finding]:
    """Where the files lie and whether they are whole: by their hashes with `progress`, else by their sizes."""
    entries = inventory(folders, progress)
    findings = [
        Finding(
            "file",
            f"{entry.verdict}, {shown(entry.path)}",
            f"Delete it and get it again from {entry.file.url}." if entry.fault else "",
        )
        for entry in entries
        if entry.path
    ]
    if names := [file.place for file in lacking(entries)]:
        remedy = (
            f"Choose missing_files: download on Load PuLID (SDXL), or run {command('models --download')}; without "
            "--download it lists the addresses."
        )
        findings.append(Finding("files", f"not here, or not whole: {', '.join(names)}", remedy))
    return findings


def neighbours(custom_nodes: Path) -> list[Finding]:
    """Other PuLID packs, by the nodes that their sources name; nothing of them is imported."""
    findings = []
    for pack in sorted(path for path in custom_nodes.iterdir() if path.is_dir()):
        if pack.name.startswith((".", "__")) or pack.name.endswith(".disabled") or pack.resolve() == PACK.resolve():
            continue
        ids = sorted(_node_ids(pack))
        copies = [node_id for node_id in ids if node_id.startswith("PuLID_")]
        if ids:
            remedy = f"It has nodes of this pack ({', '.join(copies[:3])}): keep one of the two." if copies else ""
            theirs = "; older workflows run on its nodes, not on ours" if LEGACY_IDS & {*ids} else ""
            findings.append(Finding("other pack", f"{pack.name} has {', '.join(ids)}{theirs}", remedy))
    return findings


def version_of(package: str) -> str | None:
    """The installed version by what pip knows, without importing anything; for OpenCV and ONNX Runtime of any build."""
    try:
        return version(PIP_NAMES.get(package, package))
    except PackageNotFoundError:
        pattern = {"cv2": OPENCVS, "onnxruntime": ONNXRUNTIMES}.get(package)
        if pattern is None:
            return None
        found = ((dist.metadata["Name"] or "", dist.version) for dist in distributions())
        return next((f"{number} ({name})" for name, number in found if pattern.fullmatch(name)), None)


def _node_ids(pack: Path) -> set[str]:
    """Those that its Python files name, as far down as packs keep their nodes."""
    found: set[str] = set()
    for path in (path for pattern in ("*.py", "*/*.py", "*/*/*.py") for path in pack.glob(pattern)):
        with suppress(OSError):
            found |= {name.decode() for name in NODE_IDS.findall(path.read_bytes())}
    return found
