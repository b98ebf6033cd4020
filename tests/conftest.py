"""Mounts the pack the way ComfyUI does: by path, under an alias, with its root left off sys.path."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

from mount import mount

mount()
