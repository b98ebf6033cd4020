"""Runs a tool with the pack importable as `pulid_sdxl`: `python tools NAME ...`; or code so: `python tools -c CODE`."""

import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

if __name__ == "__main__":
    sys.path.pop(0)  # this folder: everything in it is reached through the package
    runpy.run_path(str(ROOT / "run.py"))["mount_pack"]()
    name, *sys.argv[1:] = sys.argv[1:]
    if name == "-c":
        code, *sys.argv[1:] = sys.argv[1:]
        exec(code, {"__name__": "__main__"})
    else:
        runpy.run_module(f"pulid_sdxl.tools.{name}", run_name="__main__", alter_sys=True)
