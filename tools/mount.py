"""Makes the pack importable as `pulid_sdxl` without putting its root on sys.path.

ComfyUI loads a pack by path, and its own `nodes` and `models` are bare names; so do our tests and tools.
"""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ALIAS = "pulid_sdxl"


def mount() -> None:
    """Import the pack's root as `pulid_sdxl`; its rooms are then `pulid_sdxl.pulid`, `.models` and `.nodes`."""
    if ALIAS in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(ALIAS, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    module = importlib.util.module_from_spec(spec)
    sys.modules[ALIAS] = module
    spec.loader.exec_module(module)
