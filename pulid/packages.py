"""How this pack imports a package that may be missing: inside the function that needs it, with a remedy in words."""

import importlib
import sys
from types import ModuleType

from .errors import MissingPackage

# Where the name that pip knows is not the name that Python imports.
PIP_NAMES = {"cv2": "opencv-python", "skimage": "scikit-image", "PIL": "Pillow", "google": "protobuf"}


def import_package(module: str) -> ModuleType:
    """Import `module` (dotted names allowed), or raise MissingPackage with the pip line for the Python that runs.

    The package named is the one that could not be found, which may be a dependency of `module`'s.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        missing = (error.name or module).partition(".")[0]
        raise MissingPackage(
            f"The Python package {missing!r} cannot be imported ({error}). Install it into the Python that runs here:\n"
            f'    "{sys.executable}" -m pip install --upgrade {PIP_NAMES.get(missing, missing)}\n'
            "then restart."
        ) from error
