"""Mounts the pack the way ComfyUI does: by path, under an alias, with its root left off sys.path."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
sys.path.insert(1, str(Path(__file__).resolve().parent / "hosted"))

from mount import mount

mount()
