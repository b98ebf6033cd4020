"""Mounts the pack the way ComfyUI does: by path, under an alias, its root not importable from."""

import os
import runpy
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported: its kernels run on the CPU
runpy.run_path(str(Path(__file__).resolve().parents[1] / "run.py"))["mount_pack"]()
