"""For developers: bench, conformance, demo, and what the tests stand on. Run one with `python tools NAME ...`."""

from pathlib import Path

TOOLS = Path(__file__).resolve().parent
ROOT = TOOLS.parent
