"""A server that speaks as ComfyUI's does, and whose nodes cost nothing: for tests of what drives many of them.

    make_comfyui(folder)   a folder that passes for ComfyUI's: its main.py is this file

Nodes: LoadImage (reads its file), PuLID_Encode, PuLID_LoadIdentity and PuLID_SaveIdentity (a card is the text that was
encoded), Sleep (seconds), Fail, SaveImage (a picture made of all that its graph says). Each prompt that begins or ends,
and each upload, adds a line to events.log in that folder.
"""

import argparse
import asyncio
import hashlib
import io
import json
import os
import uuid
from pathlib import Path
from typing import Any

from aiohttp import WSMsgType, web
from PIL import Image

WIDGETS: dict[str, dict[str, Any]] = {
    "LoadImage": {"image": [["a.png"], {"image_upload": True}]},
    "Sleep": {"image": ["IMAGE"], "seconds": ["FLOAT", {}]},
    "Text": {"text": ["STRING", {}], "seed": ["INT", {}]},
    "SaveImage": {"images": ["IMAGE"], "filename_prefix": ["STRING", {}]},
}


EVENTS = "events.log"


def make_comfyui(folder: Path) -> Path:
    (folder / "comfy").mkdir(parents=True)
    (folder / "comfy" / "supported_models.py").touch()
    (folder / EVENTS).touch()
    start = f"runpy.run_path({str(Path(__file__))!r})['main'](Path({str(folder / EVENTS)!r}))"
    (folder / "main.py").write_text(f"import runpy\nfrom pathlib import Path\n\n{start}\n")
    return folder


class FakeComfy:
    """folders  kind ("input", "output", "temp") -> where those files lie"""

    def __init__(self, folders: dict[str, Path], log: Path):
        self.folders, self.log = folders, log
        self.sockets: dict[str, web.WebSocketResponse] = {}
        self.queue: asyncio.Queue[tuple[str, dict, str]] = asyncio.Queue()
        self.running: tuple[str, asyncio.Task] | None = None

    def app(self) -> web.Application:
        app = web.Application(client_max_size=1 << 30)
        app.add_routes([
            web.get("/system_stats", self.answer({})),
            web.get("/object_info", self.answer({name: self.definition(name) for name in WIDGETS})),
            web.get("/queue", self.get_queue),
            web.post("/queue", self.answer({})),
            web.get("/ws", self.ws),
            web.post("/prompt", self.prompt),
            web.post("/interrupt", self.interrupt),
            web.post("/upload/image", self.upload),
            web.get("/view", self.view),
        ])  # fmt: skip
        app.cleanup_ctx.append(self.work)
        return app

    @staticmethod
    def definition(name: str) -> dict[str, Any]:
        return {"input": {"required": WIDGETS[name]}, "output": [], "output_name": [], "display_name": name}

    @staticmethod
    def answer(value: Any) -> Any:
        async def handle(request: web.Request) -> web.Response:
            return web.json_response(value)

        return handle

    async def get_queue(self, request: web.Request) -> web.Response:
        running = [[0, self.running[0], {}]] if self.running else []
        return web.json_response({"queue_running": running, "queue_pending": []})

    async def ws(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        self.sockets[request.query["clientId"]] = socket
        async for message in socket:
            if message.type is WSMsgType.ERROR:
                break
        return socket

    async def prompt(self, request: web.Request) -> web.Response:
        body = await request.json()
        prompt_id = uuid.uuid4().hex
        self.queue.put_nowait((prompt_id, body["prompt"], body["client_id"]))
        return web.json_response({"prompt_id": prompt_id, "node_errors": {}})

    async def interrupt(self, request: web.Request) -> web.Response:
        if self.running:
            self.running[1].cancel()
        return web.Response()

    async def upload(self, request: web.Request) -> web.Response:
        post = await request.post()
        path = self.folders[post["type"]] / post["subfolder"] / post["image"].filename
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(post["image"].file.read())
        self.note("upload", path.name)
        return web.json_response({"name": path.name, "subfolder": post["subfolder"], "type": post["type"]})

    async def view(self, request: web.Request) -> web.FileResponse:
        return web.FileResponse(
            self.folders[request.query["type"]] / request.query["subfolder"] / request.query["filename"]
        )

    async def work(self, app: web.Application) -> Any:
        working = asyncio.create_task(self.carry_out())
        yield
        working.cancel()

    async def carry_out(self) -> None:
        while True:
            prompt_id, graph, client = await self.queue.get()
            send = self.sockets[client].send_json
            task = asyncio.create_task(self.execute(prompt_id, graph, send))
            self.running = prompt_id, task
            try:
                await task
                ended: dict[str, Any] = {"type": "execution_success", "data": {}}
            except asyncio.CancelledError:
                ended = {"type": "execution_interrupted", "data": {"node_id": "?"}}
            except Exception as error:
                ended = {"type": "execution_error", "data": {"node_id": "?", "exception_message": str(error)}}
            self.running = None
            ended["data"]["prompt_id"] = prompt_id
            await send(ended)

    async def execute(self, prompt_id: str, graph: dict[str, Any], send: Any) -> None:
        text = json.dumps([[node["class_type"], node["inputs"]] for _, node in sorted(graph.items())], sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()
        self.note("begin", digest)
        for node_id, node in graph.items():
            inputs, output = node["inputs"], None
            match node["class_type"]:
                case "Sleep":
                    await asyncio.sleep(inputs["seconds"])
                case "Fail":
                    if inputs["when"] == inputs["text"]:
                        raise ValueError(f"no face in {inputs['text']}")
                case "LoadImage":
                    (self.folders["input"] / inputs["image"]).read_bytes()
                case "PuLID_LoadIdentity":
                    (self.folders["input"] / inputs["image"]).read_bytes()
                case "PuLID_SaveIdentity":
                    output = self.save(f"pulid_identities/{inputs['filename_prefix']}", text.encode())
                case "SaveImage":
                    output = self.save(inputs["filename_prefix"], picture(digest))
            if output:
                data = {"node": node_id, "output": {"images": [output]}, "prompt_id": prompt_id}
                await send({"type": "executed", "data": data})
        self.note("end", digest)

    def save(self, prefix: str, content: bytes) -> dict[str, str]:
        path = self.folders["output"] / f"{prefix}_00001_.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return {"filename": path.name, "subfolder": str(Path(prefix).parent).strip("."), "type": "output"}

    def note(self, what: str, name: str) -> None:
        with self.log.open("a") as file:
            file.write(f"{what} {name} {os.getpid()}\n")


def picture(digest: str) -> bytes:
    file = io.BytesIO()
    Image.frombytes("RGB", (2, 5), digest[:30].encode()).resize((64, 64)).save(file, "PNG")
    return file.getvalue()


def main(log: Path) -> None:
    parser = argparse.ArgumentParser()
    for name in ("--listen", "--port", "--input-directory", "--output-directory", "--temp-directory"):
        parser.add_argument(name)
    known, _ = parser.parse_known_args()
    folders = {kind: Path(vars(known)[f"{kind}_directory"]) for kind in ("input", "output", "temp")}
    web.run_app(FakeComfy(folders, log).app(), host=known.listen, port=int(known.port), print=None)
