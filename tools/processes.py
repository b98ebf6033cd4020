"""Processes that end when the one that started them does, however that ends. Standard library only."""

import ctypes
import os
import signal
import sys
from typing import Any

PR_SET_PDEATHSIG = 1  # of Linux's prctl.h


def as_child() -> None:
    """In a new process: it ends when its parent does; and Ctrl-C counts, even where a shell started all of this in the
    background and ignores it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


# For subprocess.Popen and its like. Elsewhere than on Linux, what is killed leaves its processes behind.
ENDS_WITH_US: dict[str, Any] = {} if os.name == "nt" else {"preexec_fn": as_child}
