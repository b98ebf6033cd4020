"""Gives tasks to workers through Ray, one at a time each; who is lost comes back or is done without.

Ray starts the workers where there is a GPU for each, brings files to them, and starts a worker anew that died. A task
that was under way then goes back to the front of the queue, as often as it may be tried.
"""

import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from ..workflow import Prompt
from . import BatchError
from .plan import FILE_INPUTS, Place
from .worker import Outcome, Worker
from .worker import Place as WorkerPlace

TRIES = 3  # of a task whose worker was lost, and of a worker that does not start
STORE = 512 << 20  # bytes of Ray's object store on this machine; what does not fit goes to the disk
CLOSE_SECONDS = 25


@dataclass(frozen=True)
class Task:
    """One run of a graph. `graph` makes it, when it is due; `files` has the names of files by content."""

    id: str
    graph: Callable[[], Prompt]
    files: Mapping[Place, str]


def start_ray(address: str | None, cpus: int | None) -> str:
    """Join the cluster at `address`, or start one on this machine; the address of Ray's dashboard, or ""."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # says nothing to Ray's makers
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    local: dict[str, Any] = {"num_cpus": cpus, "object_store_memory": STORE, "include_dashboard": True}
    local["_node_ip_address"] = "127.0.0.1"  # nobody else's
    try:
        context = ray.init(address, **quiet) if address else ray.init("local", **local, **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise BatchError(f"Ray could not be {'joined at ' + address if address else 'started'}: {error}") from error
    return context.dashboard_url or ""


Finish = Callable[[Task, Outcome], None]


class Crew:
    """The workers.

    places  one for each worker
    gpu     each has a GPU of its own
    types   nodes whose definitions are asked for; `known` has them as soon as one worker is ready
    """

    def __init__(self, places: list[WorkerPlace], gpu: bool, types: list[str]):
        ray.cloudpickle.register_pickle_by_value(__import__(__name__.partition(".")[0]))
        actor = ray.remote(Worker).options(
            num_gpus=int(gpu),
            num_cpus=0 if places[0].url else 1,
            max_restarts=-1,
            max_task_retries=0,
            max_concurrency=2,  # so that close is heard while run runs
            scheduling_strategy="SPREAD",
        )
        self.workers = [actor.remote(number, place, ray.get) for number, place in enumerate(places, 1)]
        self.types = types
        self.known: dict[str, Any] = {}
        self.idle: list[Any] = []
        self.busy: dict[Any, tuple[Any, Task | None]] = {}  # future -> worker, and its task; None while it starts
        self.strikes: Counter[Any] = Counter()
        self.reasons: list[str] = []
        for worker in self.workers:
            self._start(worker)

    def _start(self, worker: Any) -> None:
        self.busy[worker.ready.remote(self.types)] = worker, None

    def give(self, task: Task, contents: "Contents") -> None:
        worker = self.idle.pop()
        self.busy[worker.run.remote(task.graph(), contents.references(task.files))] = worker, task

    def running(self) -> int:
        return sum(task is not None for _, task in self.busy.values())

    def wait(self, seconds: float) -> list[tuple[Task, Outcome]]:
        """What became of tasks, within so many seconds. Raises BatchError when no worker is left."""
        if not self.busy and not self.idle:
            raise BatchError("No worker is left. " + " ".join(dict.fromkeys(self.reasons)))
        done, _ = ray.wait([*self.busy], timeout=seconds)
        found = []
        for future in done:
            worker, task = self.busy.pop(future)
            try:
                outcome = ray.get(future)
            except RayError as error:
                outcome = {"gone": f"the worker was lost ({type(error).__name__})"}
            if task is None:
                self._started(worker, outcome)
                continue
            if "gone" in outcome:
                self._start(worker)
            else:
                self.idle.append(worker)
            found.append((task, outcome))
        return found

    def _started(self, worker: Any, outcome: Outcome) -> None:
        if "known" in outcome:
            self.known = self.known or outcome["known"]
            self.idle.append(worker)
            return
        self.strikes[worker] += 1
        self.reasons.append(outcome.get("error") or outcome["gone"])
        if self.strikes[worker] < TRIES:
            self._start(worker)

    def close(self) -> None:
        """End every ComfyUI that was started, and what others were asked for."""
        ray.wait(
            [worker.close.remote() for worker in self.workers], num_returns=len(self.workers), timeout=CLOSE_SECONDS
        )
        for worker in self.workers:
            ray.kill(worker)


@dataclass
class Contents:
    """Files by content, put into Ray's store when first needed, once, and taken out when no task needs them more."""

    path_of: Callable[[str], Path]
    uses: Counter[str] = field(default_factory=Counter)
    stored: dict[str, Any] = field(default_factory=dict)

    def references(self, files: Mapping[Place, str]) -> dict[Place, tuple[str, str, str, Any]]:
        """As `Worker.run` takes them."""
        for name in files.values():
            if name not in self.stored:
                self.stored[name] = ray.put(self.path_of(name).read_bytes())
        return {place: (name, *FILE_INPUTS[place[1]], self.stored[name]) for place, name in files.items()}

    def need(self, tasks: Iterable[Task]) -> None:
        self.uses.update(name for task in tasks for name in task.files.values())

    def release(self, task: Task) -> None:
        self.uses.subtract(task.files.values())
        for name in task.files.values():
            if self.uses[name] <= 0:
                self.stored.pop(name, None)


def carry_out(
    tasks: list[Task],
    crew: Crew,
    contents: Contents,
    finish: Finish,
    progress: Callable[[int, int], None],
    sending: Callable[[Task], None] | None = None,
) -> None:
    """Carry out all tasks. `finish` gets each with what became of it, `progress` how many run and how many wait.

    sending  is called before a task is sent, which then is sent once and never again
    """
    contents.need(tasks)
    waiting, tries = deque(tasks), Counter[str]()
    while waiting or crew.running():
        while crew.idle and waiting:
            task = waiting.popleft()
            tries[task.id] += 1
            if sending:
                sending(task)
            crew.give(task, contents)
        progress(crew.running(), len(waiting))
        for task, outcome in crew.wait(seconds=0.5):
            if "gone" in outcome and not sending and tries[task.id] < TRIES:
                waiting.appendleft(task)
                continue
            if "gone" in outcome:
                once = " It may have been paid for, and is not sent again." if sending else f" Tried {TRIES} times."
                outcome = {**outcome, "error": outcome["gone"] + once}
            contents.release(task)
            finish(task, outcome)


class Progress:
    """One line that moves, or, where nobody watches, a line every half minute."""

    def __init__(self, what: str, total: int, stream: Any, clock: Callable[[], float] = time.monotonic):
        self.what, self.total, self.stream, self.clock = what, total, stream, clock
        self.done = self.failed = 0
        self.pictures, self.started, self.shown = 0, clock(), -float("inf")

    def count(self, outcome: Outcome) -> None:
        self.failed += "error" in outcome
        self.done += "error" not in outcome
        self.pictures += len(outcome.get("pictures", ()))

    def line(self, running: int) -> str:
        minutes = (self.clock() - self.started) / 60
        finished = self.done + self.failed
        left = self.total - finished - running
        pace = f"{self.pictures / minutes:.1f} pictures/min" if self.pictures and minutes else "- pictures/min"
        to_go = duration(minutes * 60 / finished * (self.total - finished)) if finished else "-"
        counts = f"{self.done} done, {running} running, {self.failed} failed, {left} left"
        return f"{self.what}: {counts}, {pace}, {to_go} to go"

    def show(self, running: int, _: int = 0) -> None:
        moving = self.stream.isatty()
        if self.clock() - self.shown >= (0.2 if moving else 30):
            self.shown = self.clock()
            print(
                f"\r\033[K{self.line(running)}" if moving else self.line(running),
                end="" if moving else "\n",
                file=self.stream,
                flush=True,
            )

    def end(self) -> None:
        print(f"{self.stream.isatty() * chr(13)}{self.line(0)}", file=self.stream, flush=True)


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"
