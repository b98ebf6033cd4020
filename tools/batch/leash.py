"""Runs a command, and ends it when whoever started this is gone, however that went: when its standard input closes.

    python leash.py FOLDER COMMAND...

FOLDER is removed when the command has ended. This file travels as text to machines that do not have it.
"""

import shutil
import subprocess
import sys
import threading

GRACE = 15  # s


def end_with_input(process: subprocess.Popen) -> None:
    sys.stdin.buffer.read()
    process.terminate()
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        process.kill()


def main() -> int:
    folder, *command = sys.argv[1:]
    try:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        threading.Thread(target=end_with_input, args=(process,), daemon=True).start()
        return process.wait()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


sys.exit(main())
