"""How this pack imports a package that may be missing: inside the function that needs it, with a remedy in words."""

import importlib
import sys
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


def import_package(module: str) -> ModuleType:
    """Import `module` (dotted names allowed), or raise MissingPackage with the pip line for the Python that runs.

    The package named is the one that could not be found, which may be a dependency of `module`'s; for a package that is
    there and fails in any other way, it is `module`'s own.
    """
    try:
        imported = importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = (error.name or module).partition(".")[0]
        raise MissingPackage(
            f"The Python package {package!r} is not installed. Install it into the Python that runs here:\n"
            f"    {pip_command('install', '--upgrade', PIP_NAMES.get(package, package))}\n"
            "then restart."
        ) from error
    except Exception as error:  # a library that does not load, or whatever a package made for other versions does
        package = module.partition(".")[0]
        anew = pip_command("install", "--upgrade", "--force-reinstall", "--no-deps", PIP_NAMES.get(package, package))
        raise MissingPackage(
            f"The Python package {package!r} is installed, but cannot be imported ({describe(error)}). Install it anew "
            f"into the Python that runs here, other packages left as they are:\n    {anew}\nthen restart."
        ) from error
    if (needed := NEEDED.get(module)) and not hasattr(imported, needed):
        raise MissingPackage(_hollow(module, needed))
    return imported


def _hollow(module: str, needed: str) -> str:
    package = module.partition(".")[0]
    name = PIP_NAMES.get(package, package)
    if package in BUILDS:
        how = f"Several builds of it ({', '.join(BUILDS[package])}) were mixed, or one of them was removed."
        commands = [pip_command("uninstall", "-y", *BUILDS[package]), pip_command("install", name)]
    else:
        how = "It was removed in part, or a folder of the same name stands in its place."
        commands = [pip_command("install", "--upgrade", "--force-reinstall", "--no-deps", name)]
    lines = "".join(f"    {command}\n" for command in commands)
    return (
        f"The Python package {package!r} is installed, but hollow: {module}.{needed} is not there. {how} Put it right "
        f"in the Python that runs here:\n{lines}then restart."
    )


def describe(error: BaseException) -> str:
    """The kind of the error and the first line of its message."""
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def pip_command(*arguments: str) -> str:
    """A line for a terminal that runs pip for the Python that runs here, portable ones included."""
    alone = "-s " if sys.flags.no_user_site else ""  # how ComfyUI's portable Python is started
    return f'"{sys.executable}" {alone}-m pip {" ".join(arguments)}'
