"""How this pack imports a package that may be missing: inside the function that needs it, with a remedy in words."""

import importlib
import sys
from types import ModuleType

from .errors import MissingPackage

# Where the name that pip knows is not the name that Python imports.
PIP_NAMES = {"cv2": "opencv-python", "skimage": "scikit-image", "PIL": "Pillow", "google": "protobuf"}


def import_package(module: str) -> ModuleType:
    """Import `module` (dotted names allowed), or raise MissingPackage with the pip line for the Python that runs.

    The package named is the one that could not be found, which may be a dependency of `module`'s; for a package that is
    there and fails in any other way, it is `module`'s own.
    """
    try:
        return importlib.import_module(module)
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


def describe(error: BaseException) -> str:
    """The kind of the error and the first line of its message."""
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def pip_command(*arguments: str) -> str:
    """A line for a terminal that runs pip for the Python that runs here, portable ones included."""
    alone = "-s " if sys.flags.no_user_site else ""  # how ComfyUI's portable Python is started
    return f'"{sys.executable}" {alone}-m pip {" ".join(arguments)}'
