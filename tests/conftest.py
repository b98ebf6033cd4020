"""Mounts the pack the way ComfyUI does: by path, under an alias, its root not importable from."""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).resolve().parents[1] / "run.py"))["mount_pack"]()
