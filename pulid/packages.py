"""How this pack imports a package that may be missing: inside the function that needs it, with a remedy in words."""

import importlib
import sys
from importlib.metadata import distributions, version
from types import ModuleType

from .errors import MissingPackage

# Where the name that pip knows is not the name that Python imports.
PIP_NAMES = {"cv2": "opencv-python", "skimage": "scikit-image", "PIL": "Pillow", "google": "protobuf"}

# What each module must have, since a package that was half removed, or mixed with another build, can still be imported.
NEEDED = {
    "cv2": "resize",
    "onnxruntime": "InferenceSession",
    "insightface.model_zoo": "get_model",
    "insightface.app.common": "Face",
    "facexlib.detection.retinaface": "RetinaFace",
    "facexlib.parsing.bisenet": "BiSeNet",
    "torchvision": "transforms",
}
# Builds of one package that share a folder, so that removing one leaves the other hollow.
BUILDS = {
    "cv2": ("opencv-python", "opencv-python-headless", "opencv-contrib-python", "opencv-contrib-python-headless"),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino"),
}
# What a package imports itself: a fault there would else be told as one of its own.
BUILT_ON = {"insightface": ("cv2", "onnxruntime"), "facexlib": ("cv2", "torchvision")}


def import_package(module: str) -> ModuleType:
    """Import `module` (dotted names allowed), or raise MissingPackage with the package at fault and the pip line."""
    top = module.partition(".")[0]
    for other in BUILT_ON.get(top, ()):
        import_package(other)
    try:
        imported = importlib.import_module(module)
    except ModuleNotFoundError as error:
        package, _, below = (error.name or module).partition(".")
        if below:
            raise MissingPackage(_hollow(f"{package}.{below}")) from error
        left = installed(package)
        believed = ", though pip believes that it is" if left else ""
        name = (left or [PIP_NAMES.get(package, package)])[-1]
        first = pip_command("uninstall", "-y", *left) + "\n    " if left else ""
        raise MissingPackage(
            f"The Python package {package!r} is not installed{believed}. Install it into the Python that runs here:\n"
            f"    {first}{pip_command('install', '--upgrade', name)}\nthen restart."
        ) from error
    except Exception as error:  # a library that does not load, or whatever a package made for other versions does
        how = " Several builds of it are installed, and spoil each other." if len(installed(top)) > 1 else ""
        raise MissingPackage(
            f"The Python package {top!r} is installed, but cannot be imported ({describe(error)}).{how} Install it "
            f"anew into the Python that runs here, other packages left as they are:\n{_anew(top)}then restart."
        ) from error
    if (needed := NEEDED.get(module)) and not hasattr(imported, needed):
        raise MissingPackage(_hollow(f"{module}.{needed}"))
    return imported


def installed(package: str) -> list[str]:
    """The names under which pip has a package: more than one where several of its builds are installed."""
    return [name for name in BUILDS.get(package, (PIP_NAMES.get(package, package),)) if [*distributions(name=name)]]


def _hollow(lacking: str) -> str:
    package = lacking.partition(".")[0]
    if package in BUILDS:
        how = f"Several builds of it ({', '.join(BUILDS[package])}) were mixed, or one of them was removed."
    else:
        how = "It was removed in part, or a folder of the same name stands in its place."
    return (
        f"The Python package {package!r} is installed, but hollow: {lacking} is not there. {how} Put it right "
        f"in the Python that runs here:\n{_anew(package, package in BUILDS)}then restart."
    )


def _anew(package: str, from_scratch: bool = False) -> str:
    """Commands that put a package right and leave all others as they are, torch's build among them."""
    builds = installed(package)
    name = (builds or [PIP_NAMES.get(package, package)])[-1]  # of several, the one that was chosen over the plain one
    if from_scratch or len(builds) > 1:
        return f"    {pip_command('uninstall', '-y', *BUILDS[package])}\n    {pip_command('install', name)}\n"
    again = ["install", "--upgrade", "--force-reinstall", "--no-deps", name]
    if package == "torchvision" and builds:  # which belongs to one version of torch
        number, _, kind = version(name).partition("+")
        again[-1] += f"=={number}"
        again += ["--index-url", f"https://download.pytorch.org/whl/{kind}"] if kind else []
    return f"    {pip_command(*again)}\n"


def describe(error: BaseException) -> str:
    """The kind of the error and the first line of its message."""
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def pip_command(*arguments: str) -> str:
    """A line for a terminal that runs pip for the Python that runs here, portable ones included."""
    alone = "-s " if sys.flags.no_user_site else ""  # how ComfyUI's portable Python is started
    return f'"{sys.executable}" {alone}-m pip {" ".join(arguments)}'
