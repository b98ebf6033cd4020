"""One worker: a ComfyUI without a face, its own process or a server that runs already, and the files that went to it.

In Ray it is an actor. It travels as bytes to machines that do not have this pack's tools, so it needs Python, aiohttp
and what lies in comfy_server.py. What it gives back is made of plain values.
"""

import contextlib
import os
import socket
import sys
import tempfile
import time
import urllib.error
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..comfy_server import ComfyClient, ComfyServer, ServerError, ServerGone
from ..workflow import Prompt

Outcome = dict[str, Any]  # {"pictures": [(name, bytes)], "seconds"}, {"error": words}, or {"gone": words}


@dataclass(frozen=True)
class Place:
    """Where a worker's ComfyUI is.

    url        of a server that runs; otherwise one is started
    comfyui    ComfyUI's folder, on the machine of the worker
    base       with its models and custom_nodes
    arguments  of its main.py
    threads    share of the processor's cores that a ComfyUI without GPU gets: one of this many; 0 with a GPU
    leash      text of leash.py
    """

    url: str | None = None
    comfyui: Path | None = None
    base: Path | None = None
    arguments: tuple[str, ...] = ()
    threads: int = 0
    leash: str = ""


class Worker:
    """fetch  gives the bytes for what stands for a file in `run`: ray.get"""

    def __init__(self, number: int, place: Place, fetch: Callable[[Any], bytes]):
        self.name, self.place, self.fetch = f"{number}@{socket.gethostname()}", place, fetch
        self.client = ComfyClient(place.url or "")
        self.server: ComfyServer | None = None  # of our own: the client too, once it is started
        self.uploaded: dict[str, str] = {}  # name by content -> name at the server

    def ready(self, node_types: list[str]) -> dict[str, Any]:
        """Start the server if it does not run; {"known": what it knows of these nodes} or {"error": words}."""
        try:
            if not self.place.url and (self.server is None or self.server.process.poll() is not None):
                self.uploaded = {}
                self.client = self.server = self._started()
            known = self.client.object_info()
        except ServerError as error:
            return {"error": str(error)}
        except (OSError, ValueError) as error:
            return {"error": f"ComfyUI at {self.place.url or self.place.comfyui} does not answer: {error}"}
        return {"known": {name: known[name] for name in node_types if name in known}}

    def _started(self) -> ComfyServer:
        assert self.place.comfyui and self.place.base, "a place has these or a url"
        self.scratch = Path(tempfile.mkdtemp(prefix="pulid_batch_"))
        self.log = self.scratch.with_suffix(".log")  # stays, for whoever asks why it ended, until a clean end
        folders = {name: self.scratch / name for name in ("input", "output", "temp")}
        arguments = [f"--{name}-directory={folder}" for name, folder in folders.items()]
        for folder in folders.values():
            folder.mkdir()
        # Ray sets one thread for its own sake.
        threads = str(max(1, (os.cpu_count() or 1) // self.place.threads)) if self.place.threads else None
        server = ComfyServer(
            self.place.comfyui,
            self.place.base,
            (*arguments, *self.place.arguments),
            {"OMP_NUM_THREADS": threads},
            self.log,
            (sys.executable, "-c", self.place.leash, str(self.scratch)),
        )
        return server.__enter__()

    def run(self, graph: Prompt, files: dict[tuple[str, str], tuple[str, str, str, Any]]) -> Outcome:
        """Run the graph and bring what it saved.

        files  node and input -> name by content, kind and subfolder at the server, and what stands for the bytes
        """
        started = time.monotonic()
        try:
            for (node_id, name), file in files.items():
                graph[node_id]["inputs"][name] = self._at_server(*file)
            outputs = self.client.run(graph)
            entries = [entry for output in outputs.values() for entry in saved(output)]
            pictures = [(entry["filename"], self._taken(entry)) for entry in entries]
        except ServerGone as error:
            return {"gone": str(error), "worker": self.name}
        except (ServerError, urllib.error.HTTPError) as error:
            return {"error": str(error), "worker": self.name}
        except OSError as error:
            return {"gone": f"ComfyUI at {self.client.url} does not answer: {error}", "worker": self.name}
        if not pictures:
            return {"error": "The graph ran and saved no picture. Add Save Image to it.", "worker": self.name}
        return {"pictures": pictures, "seconds": round(time.monotonic() - started, 3), "worker": self.name}

    def _at_server(self, name: str, kind: str, subfolder: str, content: Any) -> str:
        if name not in self.uploaded:
            self.uploaded[name] = self.client.upload(name, self.fetch(content), kind, subfolder)
        found = self.uploaded[name]
        below = f"{subfolder}/{found}" if kind == "input" else f"{subfolder.partition('/')[2]}/{found}"
        return below.lstrip("/")

    def _taken(self, entry: dict[str, str]) -> bytes:
        """The bytes of a file, which is removed in a ComfyUI of our own: a night's pictures need not lie twice."""
        content = self.client.picture(entry)
        if self.server:
            (self.scratch / "output" / entry["subfolder"] / entry["filename"]).unlink(missing_ok=True)
        return content

    def close(self) -> None:
        """End the server, or take back what another one was asked for."""
        if self.server:
            self.server.stop()
            self.log.unlink(missing_ok=True)
        elif self.place.url:
            with contextlib.suppress(OSError):  # it does not answer: nothing can be taken back
                self.client.cancel()


def saved(output: dict[str, Any]) -> list[dict[str, str]]:
    """The files below the output folder that a node names: pictures, and whatever else it saves."""
    lists = [value for value in output.values() if isinstance(value, list)]
    entries = [entry for value in lists for entry in value if isinstance(entry, dict)]
    return [entry for entry in entries if "filename" in entry and entry.get("type") == "output"]
