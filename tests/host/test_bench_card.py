"""The script for a card, tried on the CPU: every row is filled, or says why it cannot be had here."""

import os
import re
import subprocess
import sys

from pulid_sdxl.tools import TOOLS

SECTIONS = ("correct", "precision", "launches", "limit", "steps", "graphs", "memory")
NOT_HERE = ("alone can tell", "launches none", "CUDA only", "does not tell", "none at")


def test_every_row_is_filled_or_named_as_not_to_be_had_here(tmp_path):
    report = tmp_path / "card.json"
    command = [sys.executable, str(TOOLS), "bench", "--device", "cpu", "--comfyui", os.environ["COMFYUI"]]
    command += ["--repeats", "1", "--json", str(report), "--only", *SECTIONS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [
        line for line in done.stdout.splitlines() if re.match(r"(correct|precis|launch|limit|step|cuda|memory)", line)
    ]
    assert len(rows) > 60
    assert [row for row in rows if re.search(r" -( |$)", row) and not any(why in row for why in NOT_HERE)] == []
    assert report.is_file()
