"""How a run tells how it goes, and how many workers it asks for."""

import io

import pytest
from pulid_sdxl.tools.batch import BatchError, command

pytest.importorskip("ray", reason="RAY IS NOT INSTALLED: run.py batch is not tested")

from pulid_sdxl.tools.batch.drive import Progress
from pulid_sdxl.tools.batch.session import Session


class Watched(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stream", [io.StringIO(), Watched()])
def test_progress_says_what_is_done_and_how_long_it_takes(stream):
    now = 0.0
    progress = Progress("Pictures", 100, stream, clock=lambda: now)
    progress.show(running=2)
    now = 60.0
    for _ in range(9):
        progress.count({"pictures": [("a.png", b""), ("b.png", b"")]})
    progress.count({"error": "no face"})
    progress.show(running=2)

    first, last = (line for line in stream.getvalue().replace("\r\033[K", "\n").split("\n") if line)
    assert first == "Pictures: 0 done, 2 running, 0 failed, 98 left, - pictures/min, - to go"
    assert last == "Pictures: 9 done, 2 running, 1 failed, 88 left, 18.0 pictures/min, 9 min 00 s to go"
    assert ("\n" in stream.getvalue()) != stream.isatty()  # one line that moves, where somebody watches


def session(*given, comfyui="/somewhere/ComfyUI"):
    known = command.options(["--workflow", "g.json", "--table", "t.csv", "--out", "o", *given])
    return Session(known, comfyui and command.Path(comfyui))


def test_there_is_a_worker_for_each_gpu_or_server_or_as_many_as_were_asked_for():
    places, gpu = session("--comfyui-argument=--lowvram").places(gpus=4)
    assert (len(places), gpu) == (4, True) and places[0].arguments == ("--lowvram",)
    places, gpu = session("--workers", "2").places(gpus=4)
    assert (len(places), gpu) == (2, True)
    places, gpu = session("--workers", "2").places(gpus=0)
    assert (len(places), gpu, places[0].threads) == (2, False, 2) and places[0].arguments == ("--cpu",)
    places, gpu = session("--server", "http://a:1", "--server", "http://b:2").places(gpus=4)
    assert ([place.url for place in places], gpu) == (["http://a:1", "http://b:2"], False)


@pytest.mark.parametrize(("given", "gpus", "words"), [
    ((), 0, "Ray sees no GPU. To use the processor.*--workers 1"),
    (("--workers", "3"), 2, "--workers 3, but Ray sees 2 GPUs"),
])  # fmt: skip
def test_workers_that_cannot_be_had_are_refused(given, gpus, words):
    with pytest.raises(BatchError, match=words):
        session(*given).places(gpus)
