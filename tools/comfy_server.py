"""Talks to a ComfyUI server, one prompt at a time; and runs one as a process of its own, on 127.0.0.1 only."""

import asyncio
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

import aiohttp

from .develop import frontend_root, pinned_frontend
from .processes import ENDS_WITH_US

ADDRESS = "127.0.0.1"
START_SECONDS = 300
STOP_SECONDS = 20
FOLDERS = ("custom_nodes", "input", "models", "output", "temp", "user")

Report = Callable[[str], None]


class ServerError(Exception):
    """The server, or what it was asked to run, failed; the message is in words."""


class ServerGone(ServerError):
    """The server cannot be reached, or ended before it answered."""


def link(source: Path, target: Path) -> None:
    """Make `source`, a file or a folder, appear as `target`; copied where the system allows no links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        target.symlink_to(source.resolve(), target_is_directory=source.is_dir())
    except OSError:
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns(".*", "output"))
        else:
            shutil.copyfile(source, target)


def front_end(comfyui: Path) -> Path | None:
    """The front end to serve: of the version in COMFYUI_FRONTEND, else of the one that this ComfyUI pins; None where
    `run.py test` has not fetched it."""
    version = os.environ.get("COMFYUI_FRONTEND") or pinned_frontend(comfyui)
    root = version and frontend_root(version)
    return root if root and root.is_dir() else None


def nothing_to_serve(base: Path) -> Path:
    """An empty folder in the place of a front end: ComfyUI wants one that is there, and clears its own `temp` away."""
    root = base / "no_front_end"
    root.mkdir(parents=True, exist_ok=True)
    return root


class ComfyClient:
    """Talks to the ComfyUI at `url`."""

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        self.client_id = uuid.uuid4().hex
        self.prompt_id: str | None = None  # of the prompt that was sent last

    def read(self, path: str) -> bytes:
        with urllib.request.urlopen(f"{self.url}{path}", timeout=60) as answer:
            return answer.read()

    def get(self, path: str) -> dict:
        return json.loads(self.read(path))

    def object_info(self) -> dict:
        return self.get("/object_info")

    def picture(self, entry: dict) -> bytes:
        """The bytes of a picture, given its entry in a node's output."""
        return self.read(f"/view?{urllib.parse.urlencode(entry)}")

    def run(self, prompt: dict, report: Report = lambda line: None) -> dict[str, dict]:
        """Run a prompt to its end; node id -> what that node put out ("images": [...]).

        Raises ServerError with the host's or the node's own message, ServerGone if there was no answer.
        """
        try:
            return asyncio.run(self._run(prompt, report))
        except (aiohttp.ClientError, OSError) as error:
            raise ServerGone(f"ComfyUI at {self.url} does not answer: {error}") from error

    async def _run(self, prompt: dict, report: Report) -> dict[str, dict]:
        async with (
            aiohttp.ClientSession(self.url) as session,
            # 0: previews come as long messages
            session.ws_connect(f"/ws?clientId={self.client_id}", max_msg_size=0) as socket,
        ):
            async with session.post("/prompt", json={"prompt": prompt, "client_id": self.client_id}) as answer:
                queued = await answer.json()
            # ComfyUI takes a prompt that is partly wrong too, and runs the rest of it.
            if answer.status != 200 or queued["node_errors"]:
                raise ServerError(refusal(queued, prompt))
            self.prompt_id = queued["prompt_id"]
            return await follow(socket, self.prompt_id, prompt, report)

    def upload(self, name: str, content: bytes, kind: str, subfolder: str) -> str:
        """Put a file below ComfyUI's `kind` folder (input or output); returns the name it got there.

        An equal file of that name serves as it is; one of other content gets another name.
        """
        try:
            return asyncio.run(self._upload(name, content, kind, subfolder))
        except aiohttp.ClientResponseError as error:
            raise ServerError(f"ComfyUI at {self.url} refused {name}: {error.status} {error.message}") from error
        except (aiohttp.ClientError, OSError) as error:
            raise ServerGone(f"ComfyUI at {self.url} does not answer: {error}") from error

    async def _upload(self, name: str, content: bytes, kind: str, subfolder: str) -> str:
        form = aiohttp.FormData({"type": kind, "subfolder": subfolder})
        form.add_field("image", content, filename=name, content_type="application/octet-stream")
        async with (
            aiohttp.ClientSession(self.url, raise_for_status=True) as session,
            session.post("/upload/image", data=form) as answer,
        ):
            return (await answer.json())["name"]

    def cancel(self) -> None:
        """Take the prompt that was sent last out of the queue, or interrupt it; other people's prompts go on."""
        if self.prompt_id:
            self._post("/queue", {"delete": [self.prompt_id]})
            if self.prompt_id in [entry[1] for entry in self.get("/queue")["queue_running"]]:
                self._post("/interrupt", {"prompt_id": self.prompt_id})

    def _post(self, path: str, body: dict) -> None:
        data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
        urllib.request.urlopen(urllib.request.Request(f"{self.url}{path}", data, headers), timeout=10).close()


class ComfyServer(ComfyClient):
    """A context manager; leaving it ends the process, whatever happened.

    comfyui    the ComfyUI folder
    base       folder with custom_nodes/, models/, input/ and so on; missing ones are made. The log goes there too.
    arguments  further arguments of ComfyUI's main.py, such as --cpu
    variables  of the process's environment, beside those that are there; None takes one out
    log_file   where the log goes instead
    leash      a command that runs another one, given behind it, until its standard input closes
    """

    def __init__(
        self,
        comfyui: Path,
        base: Path,
        arguments: tuple[str, ...] = (),
        variables: Mapping[str, str | None] | None = None,
        log_file: Path | None = None,
        leash: tuple[str, ...] = (),
    ):
        self.comfyui, self.base, self.arguments = Path(comfyui), Path(base), arguments
        changed = {**os.environ, **(variables or {})}
        self.environment = {name: value for name, value in changed.items() if value is not None}
        self.log_file, self.leash = log_file or self.base / "server.log", leash

    def __enter__(self) -> "ComfyServer":
        for folder in FOLDERS:
            (self.base / folder).mkdir(parents=True, exist_ok=True)
        with socket.socket() as probe:
            probe.bind((ADDRESS, 0))
            self.port = probe.getsockname()[1]
        super().__init__(f"http://{ADDRESS}:{self.port}")
        root = front_end(self.comfyui) or nothing_to_serve(self.base)
        command = [sys.executable, str(self.comfyui / "main.py"), "--listen", ADDRESS, "--port", str(self.port)]
        command += ["--base-directory", str(self.base), "--database-url", "sqlite:///:memory:"]
        command += ["--front-end-root", str(root), "--disable-auto-launch", "--disable-api-nodes", *self.arguments]
        with self.log_file.open("wb") as log:
            self.process = subprocess.Popen(
                [*self.leash, *command],
                stdin=subprocess.PIPE if self.leash else None,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.base,
                env=self.environment,
                **ENDS_WITH_US,
            )
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        if self.process.stdin:
            self.process.stdin.close()
        else:
            self.process.terminate()
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise ServerError(f"ComfyUI ended at start. Its log, {self.log_file}, closes with:\n{self.log_tail()}")
            try:
                self.get("/system_stats")
                return
            except OSError:
                time.sleep(0.2)
        raise ServerError(f"ComfyUI did not answer within {START_SECONDS} s. Its log: {self.log_file}")

    @property
    def log(self) -> str:
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    def log_tail(self, lines: int = 15) -> str:
        return "\n".join(self.log.splitlines()[-lines:])

    def failed_packs(self) -> list[str]:
        """Folder names of the packs in custom_nodes that ComfyUI could not import."""
        return [Path(path).name for path in re.findall(r"\(IMPORT FAILED\): (.+)", self.log)]

    def import_seconds(self) -> dict[str, float]:
        """Folder name of each pack in custom_nodes -> how long ComfyUI says its import took."""
        return {Path(path).name: float(time) for time, path in re.findall(r"([\d.]+) seconds.*?: (.+)", self.log)}


async def follow(
    socket: aiohttp.ClientWebSocketResponse, prompt_id: str, prompt: dict, report: Report
) -> dict[str, dict]:
    """Report each node and each sampling step until the prompt is done; returns what its nodes put out."""
    outputs = {}
    async for message in socket:
        if message.type is not aiohttp.WSMsgType.TEXT:
            continue
        event = json.loads(message.data)
        data = event["data"]
        if data.get("prompt_id") != prompt_id:  # a new connection is told the last node of the prompt before
            continue
        if event["type"] == "executing" and data["node"]:
            report(title(prompt, data["node"]))
        elif event["type"] == "progress":
            report(f"{title(prompt, data['node'])}: {data['value']} of {data['max']}")
        elif event["type"] == "execution_error":
            raise ServerError(f"{title(prompt, data['node_id'])} failed: {data['exception_message'].strip()}")
        elif event["type"] == "execution_interrupted":
            raise ServerError(f"{title(prompt, data['node_id'])} was interrupted.")
        elif event["type"] == "executed" and data["output"]:
            outputs[data["node"]] = data["output"]
        elif event["type"] == "execution_success":
            return outputs
    raise ServerGone("ComfyUI closed the connection before the picture was done.")


def title(prompt: dict, node_id: str) -> str:
    node = prompt.get(str(node_id), {})
    return node.get("_meta", {}).get("title") or node.get("class_type", str(node_id))


def refusal(answer: dict, prompt: dict) -> str:
    """ComfyUI's reasons for not running a prompt, one a line."""
    lines = [answer["error"]["message"]] if "error" in answer else []
    for node_id, found in answer.get("node_errors", {}).items():
        for error in found["errors"]:
            lines.append(f"{title(prompt, node_id)}: {error['message']}: {error['details']}")
    return "ComfyUI refused the workflow.\n  " + "\n  ".join(lines)
