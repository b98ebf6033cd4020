"""Damaged and hostile files for every reader, in a process of its own with limits of memory and time: tools/fuzz.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from pulid_sdxl.tools import TOOLS, fuzz

SEED = 20240425
CASES = {"checkpoints": 300, "zip": 500, "yaml": 400, "catalogue": 2000, "recogniser": 300}

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(),
    reason="MEMORY IS NOT WATCHED HERE: peak memory is read from Linux's /proc",
)


def test_every_reader_is_fuzzed():
    assert set(CASES) == set(fuzz.READERS)


@pytest.mark.parametrize("reader", CASES)
def test_no_file_makes_a_reader_crash_hang_run_code_or_fill_the_memory(reader, capsys):
    command = [sys.executable, TOOLS, "fuzz", reader, str(CASES[reader]), str(SEED)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")

    last = (done.stdout.splitlines() or ["nothing at all"])[-1]
    assert done.returncode == 0, f"after {last!r}: {done.stderr[-2000:]}"
    result = json.loads(last)
    with capsys.disabled():
        print(f"\n  fuzzed {result}", flush=True)
    assert result["cases"] >= CASES[reader]
    assert result["most memory beyond the file, MB"] <= fuzz.ROOM / 1e6
    assert max(result["outcomes"].values()) < result["cases"] or reader == "zip"  # the cases are of several kinds


def test_the_watch_sees_memory_that_is_taken(tmp_path):
    watched = fuzz.Watched(lambda path: bytes(bytearray(b"x")) * 300_000_000)
    watched(tmp_path)
    assert watched.peak > fuzz.ROOM


def test_a_hostile_pickle_is_not_harmless(tmp_path):
    """What the fuzzing feeds would run if something trusted it."""
    import torch

    trace, path = tmp_path / "it ran", tmp_path / "case"
    path.write_bytes(fuzz.hostile_checkpoints(trace)["code, zip"])
    torch.load(path, weights_only=False)
    assert trace.exists()


def test_the_damages_are_many():
    import random

    chance, content = random.Random(0), bytes(range(256)) * 40
    assert len({fuzz.mutate(content, chance) for _ in range(300)}) > 290
