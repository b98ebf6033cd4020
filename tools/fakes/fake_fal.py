"""A fake of fal's queue, storage and proxies on loopback ports, which counts money and watches where the key goes.

    with FakeFal() as fal:
        fal.plan("submit", 1, accept_then_drop)
        ...                       # a client, pointed at fal.queue_url, .rest_url or .proxy_url
        assert fal.bill <= 1      # accepted submits

Leaving it raises KeyLeak when any part of the key reached an origin, or a place in a request, that must not see it.
Wire format: <https://fal.ai/docs/api-reference/inference-api/openapi/queue.json>, the code of fal-client 1.0.3,
@fal-ai/client 1.10.1 and @fal-ai/server-proxy 1.2.1.
"""

import asyncio
import base64
import hashlib
import json
import secrets
import socket
import threading
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field, replace
from typing import Any

import aiohttp
import numpy as np
from aiohttp import web

from .fake_faults import BEFORE_BODY, Call, Fault
from .fake_model import RANDOM_SEED, BadReference, pictures, png, problems, read_references

ADDRESS = "127.0.0.1"
MODEL = "fal-ai/pulid"
EVERY = 0  # as `nth` of a plan
FILE_DAYS = 7  # that files are kept unless a lifecycle says otherwise
MOST_BODY = 256 << 20  # bytes
RECEIVED = 64 << 10  # bytes that lie ready at most before they are read: what is not read has not left its sender

# Which origins are there, and which of them may see the key, in the Authorization header only.
ORIGINS = ("queue", "rest", "cdn", "foreign", "proxy")
TRUSTED = {"queue", "rest"}
PUBLIC_CDN = "https://v3.fal.media"

# origin, method, path, route: the name that plans and records use, and the method of FakeFal that answers
REQUEST = f"/{MODEL}/requests/{{id}}"
ROUTES = (
    ("queue", "POST", f"/{MODEL}", "submit"),
    ("queue", "GET", REQUEST + "/status{slash:/?}", "status"),
    ("queue", "GET", REQUEST, "result"),
    ("queue", "PUT", REQUEST + "/cancel", "cancel"),
    ("rest", "POST", "/storage/upload/initiate", "initiate"),
    ("rest", "GET", "/v1/models/pricing", "pricing"),
    ("cdn", "PUT", "/files/{name:.+}", "put"),
    ("cdn", "GET", "/files/{name:.+}", "download"),
    ("foreign", "GET", "/{path:.*}", "foreign"),
    ("proxy", "*", "/formula", "formula"),
    ("proxy", "*", "/server-proxy", "server_proxy"),
)
LOGS = ("Warming up", "Denoising", "Denoising", "Encoding")  # two lines are alike on purpose


Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class KeyLeak(AssertionError):
    """The key, or a part of it, reached somewhere that must not see it."""


@dataclass(frozen=True)
class Seen:
    """One request as it came in."""

    origin: str
    route: str
    method: str
    path: str  # with the query
    query: dict[str, str]
    headers: dict[str, str]  # names in lower case
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def authorization(self) -> str | None:
        return self.headers.get("authorization")


@dataclass
class Job:
    """An accepted submit, which is what costs money."""

    id: str
    input: dict[str, Any]
    polls: int = 0
    cancelled: bool = False
    done: bool = False
    outcome: tuple[int, Any, dict[str, str]] = field(default=(0, None, {}))  # status, body, headers, once it is done


@dataclass
class File:
    content: bytes
    content_type: str
    expires: float  # on the fake clock


class FakeFal:
    """A context manager, for sync and async tests alike: the server lives in a thread of its own.

    key        what an Authorization header has to carry
    script     what a job's first, second ... status request says: a queue position, or a status; the last one stays.
               Read at each request, so changing it moves the jobs that are there.
    obeys      whether a running job ends when it is cancelled
    clock      seconds, moved by hand: files expire by it
    internet   URL -> content: what is public on the web, for references
    prices     the price list, as the platform API gives it

    The addresses end with _url: foreign is nobody's, and answers every GET with a picture; proxy is one as
    @fal-ai/server-proxy 1.2.1 is, formula_proxy as <https://docs.fal.ai/model-apis/model-endpoints/server-side> says.
    """

    def __init__(self) -> None:
        self.key = f"{uuid.uuid4()}:{secrets.token_hex(16)}"
        self.clock = 0.0
        self.leaks: list[str] = []
        self.internet: dict[str, bytes] = {}
        self.files: dict[str, File] = {}
        self._loop = asyncio.new_event_loop()
        self._held = asyncio.Event()
        self.reset()

    def reset(self) -> None:
        """Forget jobs, requests and plans, drop what a fault holds; files stay, and so does what is known of leaks."""
        self._loop.call_soon_threadsafe(self._held.set)
        self._held = asyncio.Event()
        self.script: tuple[int | str, ...] = ("IN_PROGRESS", "COMPLETED")
        self.obeys = True
        self.prices: list[dict[str, Any]] = []
        self.requests: list[Seen] = []
        self.jobs: dict[str, Job] = {}
        self.most_open = 0  # the most jobs that were accepted and not yet done at one time
        self._plans: dict[tuple[str, int], Fault] = {}
        self._calls: Counter[str] = Counter()

    # --- for tests ---

    @property
    def bill(self) -> int:
        """Accepted submits: each costs money."""
        return len(self.jobs)

    def plan(self, route: str, nth: int, fault: Fault) -> None:
        """Let `fault` answer the nth request (from 1, counted from now on) of this route, or EVERY one."""
        if route not in {name for *_, name in ROUTES}:
            raise ValueError(f"no route {route!r}")
        self._plans[route, nth and self._calls[route] + nth] = fault

    def here(self, url: str) -> str:
        """Where a file of fal's public storage lies in this test."""
        return url.replace(PUBLIC_CDN, self.cdn_url)

    def seen(self, route: str) -> list[Seen]:
        return [request for request in self.requests if request.route == route]

    def go_away(self) -> None:
        """Close every door: from now on nobody answers."""
        self._wait_for(self._close())

    @property
    def environment(self) -> dict[str, str]:
        """The variables that point the pack's client here."""
        return {"FAL_KEY": self.key, "PULID_FAL_QUEUE_URL": self.queue_url, "PULID_FAL_REST_URL": self.rest_url}

    # --- life ---

    def __enter__(self) -> "FakeFal":
        self._thread = threading.Thread(target=self._loop.run_forever, name="fake fal", daemon=True)
        self._thread.start()
        self._wait_for(self._start())
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._wait_for(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        if self.leaks and kind is None:
            raise KeyLeak("the key reached\n  " + "\n  ".join(self.leaks))

    def _wait_for(self, coroutine: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(30)

    async def _start(self) -> None:
        self._session = aiohttp.ClientSession(auto_decompress=False)
        self._urls: dict[str, str] = {}
        self._runners: list[web.AppRunner] = []
        for origin in ORIGINS:
            app = web.Application(client_max_size=MOST_BODY)
            for _, method, path, route in (entry for entry in ROUTES if entry[0] == origin):
                app.router.add_route(method, path, self._door(origin, route))
            app.router.add_route("*", "/{rest:.*}", self._door(origin, "unknown"))
            runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
            await runner.setup()
            listening = socket.create_server((ADDRESS, 0))
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVED)  # for each connection
            await web.SockSite(runner, listening).start()
            self._urls[origin] = f"http://{ADDRESS}:{runner.addresses[0][1]}"
            self._runners.append(runner)
        self.queue_url, self.rest_url, self.cdn_url, self.foreign_url, proxy = self._urls.values()
        self.proxy_url, self.formula_proxy_url = f"{proxy}/server-proxy", f"{proxy}/formula"

    async def _stop(self) -> None:
        self._held.set()
        await self._session.close()
        await self._close()

    async def _close(self) -> None:
        await asyncio.gather(*(runner.cleanup() for runner in self._runners))

    # --- the door: record, watch the key, then a fault or the route ---

    def _door(self, origin: str, route: str) -> Handler:
        async def enter(request: web.Request) -> web.StreamResponse:
            self._calls[route] += 1
            fault = self._plans.pop((route, self._calls[route]), None) or self._plans.get((route, EVERY))
            before_body = fault in BEFORE_BODY
            body = b"" if before_body else await request.read()
            headers = {name.lower(): value for name, value in request.headers.items()}
            path, query = request.path_qs, dict(request.query)
            seen = Seen(origin, route, request.method, path, query, headers, body)
            self.requests.append(seen)
            self._watch(seen)

            async def handle() -> web.Response:
                if origin in TRUSTED and (refusal := self._refusal(seen)) is not None:  # an empty answer is false
                    return refusal
                known = replace(seen, body=await request.read()) if before_body else seen
                return await getattr(self, f"_{route}")(request, known)

            return await (fault(Call(request, handle, self._held)) if fault else handle())

        return enter

    def _watch(self, seen: Seen) -> None:
        """Note any part of the key that is where it must not be."""
        headers = dict(seen.headers)
        if seen.origin in TRUSTED:
            headers.pop("authorization", None)
        text = f"{seen.path}\n{headers}\n".encode() + seen.body
        identity, secret = self.key.split(":")
        parts = (identity, secret, base64.b64encode(self.key.encode()).decode().rstrip("="))
        if any(part.encode() in text for part in parts):
            self.leaks.append(f"{seen.origin}: {seen.method} {seen.path.partition('?')[0]}")

    def _refusal(self, seen: Seen) -> web.Response | None:
        if seen.authorization == f"Key {self.key}":
            return None
        return failure(401, "No user found for Key ID and Secret")

    async def _unknown(self, request: web.Request, seen: Seen) -> web.Response:
        return failure(404, "Not Found")

    # --- queue ---

    async def _submit(self, request: web.Request, seen: Seen) -> web.Response:
        """From here on it costs money. Any JSON object will do: a queue knows no model's schema."""
        job = Job(str(uuid.uuid4()), seen.json)
        self.jobs[job.id] = job
        self.most_open = max(self.most_open, sum(not job.done for job in self.jobs.values()))
        return web.json_response({"status": "IN_QUEUE", **self._handle(job), "queue_position": 0})

    def _handle(self, job: Job) -> dict[str, str]:
        base = f"{self.queue_url}/{MODEL}/requests/{job.id}"
        urls = {"response_url": base, "status_url": f"{base}/status", "cancel_url": f"{base}/cancel"}
        return {"request_id": job.id, **urls}

    def _job(self, request: web.Request) -> Job | None:
        return self.jobs.get(request.match_info["id"])

    async def _status(self, request: web.Request, seen: Seen) -> web.Response:
        job = self._job(request)
        if job is None:
            return failure(404, "Request not found")
        stage = self.script[min(job.polls, len(self.script) - 1)]
        job.polls += 1
        if job.done or job.cancelled or stage == "COMPLETED":
            self._settle(job)
            stage = "COMPLETED"
        if isinstance(stage, int):
            return web.json_response({"status": "IN_QUEUE", "queue_position": stage, **self._handle(job)}, status=202)
        lines = LOGS[: job.polls] if seen.query.get("logs") in ("1", "true") else None
        entry = {"level": "INFO", "source": "USER", "timestamp": "2026-01-01T00:00:00.000000Z"}
        logs = lines and [{"message": line, **entry} for line in lines]
        if stage != "COMPLETED":
            return web.json_response({"status": stage, "logs": logs, **self._handle(job)}, status=202)
        status, body, _ = job.outcome
        error = {} if status == 200 else {"error": json.dumps(body["detail"]), "error_type": body.get("error_type")}
        data = {"status": stage, "logs": logs, "metrics": {"inference_time": 1.25}, "error": None, "error_type": None}
        return web.json_response({**data, **error, **self._handle(job)})

    async def _result(self, request: web.Request, seen: Seen) -> web.Response:
        job = self._job(request)
        if job is None:
            return failure(404, "Request not found")
        if not job.done:
            return failure(400, "Request is still in progress")
        status, body, headers = job.outcome
        return web.json_response(body, status=status, headers=headers)

    async def _cancel(self, request: web.Request, seen: Seen) -> web.Response:
        job = self._job(request)
        if job is None:
            return web.json_response({"status": "NOT_FOUND"}, status=404)
        if job.done:
            return web.json_response({"status": "ALREADY_COMPLETED"}, status=400)
        queued = isinstance(self.script[min(job.polls, len(self.script) - 1)], int)
        job.cancelled = queued or self.obeys
        status, text = (200, "OK") if queued else (202, "CANCELLATION_REQUESTED")
        return web.json_response({"status": text}, status=status)

    # --- the model ---

    def _settle(self, job: Job) -> None:
        """Run the job, once."""
        if job.done:
            return
        job.done, headers = True, {"x-fal-request-id": job.id}
        if job.cancelled:
            body = {"detail": "Request was cancelled by the client", "error_type": "client_cancelled"}
            job.outcome = (499, body, {**headers, "X-Fal-Error-Type": "client_cancelled"})
            return
        wrong = problems(job.input)
        faces: list[np.ndarray] = []
        if not wrong:
            faces, wrong = read_references(job.input, self._fetch)
        if wrong:
            job.outcome = (422, {"detail": wrong}, {**headers, "x-fal-billable-units": "0", "X-Fal-Retryable": "false"})
            return
        seed = job.input.get("seed", RANDOM_SEED)
        made = pictures(job.input, seed, faces)
        entries = [self._publish(png(picture), picture.size) for picture in made]
        headers["x-fal-billable-units"] = str(len(made))
        job.outcome = (200, {"images": entries, "seed": seed}, headers)

    def _publish(self, content: bytes, size: tuple[int, int]) -> dict[str, Any]:
        name = f"{hashlib.sha256(content).hexdigest()[:12]}.png"
        url = self._store(content, "image/png", name, FILE_DAYS * 86400)
        shape = {"width": size[0], "height": size[1]}
        return {"url": url, "content_type": "image/png", "file_name": name, "file_size": len(content), **shape}

    def _fetch(self, url: str) -> bytes:
        """A reference, from this server's own storage or from `internet`; private hosts are not on it."""
        own = f"{self.cdn_url}/files/"
        if self.here(url).startswith(own):
            file = self.files.get(self.here(url).removeprefix(own))
            if file and self.clock < file.expires:
                return file.content
        elif url in self.internet:
            return self.internet[url]
        raise BadReference("file_download_error")

    async def _pricing(self, request: web.Request, seen: Seen) -> web.Response:
        return web.json_response({"prices": self.prices, "next_cursor": None, "has_more": False})

    # --- storage ---

    def _store(self, content: bytes, content_type: str, name: str, lifetime: float) -> str:
        place = f"{secrets.token_hex(8)}/{name}"
        self.files[place] = File(content, content_type, self.clock + lifetime)
        return f"{self.cdn_url}/files/{place}"

    async def _initiate(self, request: web.Request, seen: Seen) -> web.Response:
        lifetime = json.loads(seen.headers["x-fal-object-lifecycle"])["expiration_duration_seconds"]
        url = self._store(b"", seen.json["content_type"], seen.json["file_name"], lifetime)
        upload_url = f"{url}?signature={secrets.token_hex(8)}"
        return web.json_response({"upload_url": upload_url, "file_url": url.replace(self.cdn_url, PUBLIC_CDN)})

    async def _put(self, request: web.Request, seen: Seen) -> web.Response:
        file = self.files.get(request.match_info["name"])
        if file is None or "signature" not in seen.query:
            return failure(403, "Signature does not match")
        file.content, file.content_type = seen.body, seen.headers["content-type"]
        return web.Response()

    async def _download(self, request: web.Request, seen: Seen) -> web.Response:
        file = self.files.get(request.match_info["name"])
        if file is None or self.clock >= file.expires:
            return failure(404, "File not found")
        return web.Response(body=file.content, content_type=file.content_type)

    async def _foreign(self, request: web.Request, seen: Seen) -> web.Response:
        made = pictures({"prompt": "foreign", "image_size": {"width": 64, "height": 64}}, 0, [])
        return web.Response(body=png(made[0]), content_type="image/png")

    # --- proxies ---

    async def _formula(self, request: web.Request, seen: Seen) -> web.Response:
        if seen.method not in ("GET", "POST"):
            return failure(405, "Method not allowed")
        return await self._server_proxy(request, seen)

    async def _server_proxy(self, request: web.Request, seen: Seen) -> web.Response:
        target = seen.headers["x-fal-target-url"]
        assert any(target.startswith(f"{self._urls[origin]}/") for origin in TRUSTED)
        headers = {name: value for name, value in seen.headers.items() if name.startswith("x-fal-")}
        headers |= {"content-type": "application/json", "authorization": f"Key {self.key}"}
        async with self._session.request(seen.method, target, headers=headers, data=seen.body or None) as response:
            content = await response.read()
            kept = {name: value for name, value in response.headers.items() if name.lower().startswith("x-fal-")}
            return web.Response(status=response.status, body=content, headers=kept, content_type=response.content_type)


def failure(status: int, detail: Any, headers: dict[str, str] | None = None) -> web.Response:
    return web.json_response({"detail": detail}, status=status, headers=headers)
