"""What `run.py batch` costs, on ComfyUIs whose nodes only wait: two workers over one, a job over posting it by hand.

    python tools bench_batch

A Ray of this machine does the work; nothing of it is left behind.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import ray

from .batch.drive import Contents, Crew, Task, carry_out
from .batch.session import LEASH
from .batch.worker import Place
from .comfy_server import ComfyServer
from .fakes.fake_comfy import make_comfyui
from .workflow import Prompt

JOBS, SECONDS = 24, 0.5


def graph(number: int, seconds: float) -> Prompt:
    return {
        "1": {"class_type": "Text", "inputs": {"text": "x", "seed": number}},
        "2": {"class_type": "Sleep", "inputs": {"image": ["1", 0], "seconds": seconds}},
        "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "x"}},
    }


def by_ray(comfyui: Path, folder: Path, workers: int, seconds: float) -> float:
    """Seconds for all jobs, the workers being there."""
    place = Place(None, comfyui, folder, (), workers, LEASH.read_text("utf-8"))
    crew = Crew([place] * workers, gpu=False, types=[])
    while len(crew.idle) < workers:
        crew.wait(seconds=1)
    tasks = [Task(str(number), lambda number=number: graph(number, seconds), {}) for number in range(JOBS)]
    failed: list[str] = []
    started = time.monotonic()
    carry_out(
        tasks,
        crew,
        Contents(Path),
        lambda task, outcome: failed.extend(filter(None, [outcome.get("error")])),
        lambda running, left: None,
    )
    took = time.monotonic() - started
    crew.close()
    assert not failed, failed
    return took


def by_hand(comfyui: Path, folder: Path, seconds: float) -> float:
    options = tuple(f"--{kind}-directory={folder / kind}" for kind in ("input", "output", "temp"))
    with ComfyServer(comfyui, folder, options) as server:
        started = time.monotonic()
        for number in range(JOBS):
            [entry] = server.run(graph(number, seconds))["3"]["images"]
            server.picture(entry)
        return time.monotonic() - started


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        comfyui = make_comfyui(Path(name, "comfy"))
        small = {"num_cpus": 2, "include_dashboard": False, "object_store_memory": 200 << 20}
        ray.init("local", **small, log_to_driver=False, _node_ip_address="127.0.0.1")
        try:
            one, two = (by_ray(comfyui, Path(name), workers, SECONDS) for workers in (1, 2))
            pairs = [(by_ray(comfyui, Path(name), 1, 0), by_hand(comfyui, Path(name), 0)) for _ in range(3)]
        finally:
            ray.shutdown()
    over = statistics.median((ours - hand) / JOBS * 1000 for ours, hand in pairs)
    print(f"{JOBS} jobs of {SECONDS} s: one worker {one:.2f} s, two {two:.2f} s, ratio {two / one:.2f}")
    print(f"each job over posting it by hand: {over:.1f} ms (median of {len(pairs)})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
