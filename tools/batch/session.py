"""A run from its start to its end: Ray, workers and the folder of output, all closed whatever happens."""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import ray

from . import BatchError
from .drive import Contents, Crew, Finish, Progress, Task, carry_out, start_ray
from .output import Output
from .plan import Job, Plan, seed_of
from .worker import Outcome, Place

LEASH = Path(__file__).with_name("leash.py")


class Session:
    """A context manager around one run of the command `known`."""

    def __init__(self, known: argparse.Namespace, comfyui: Path | None):
        self.known, self.comfyui = known, comfyui
        self.crew: Crew | None = None

    def __enter__(self) -> "Session":
        self.output = Output(self.known.out, paid=self.known.allow_hosted).__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if self.crew:
                self.crew.close()
        finally:
            if ray.is_initialized():
                ray.shutdown()
            self.output.__exit__()

    def start(self, types: list[str]) -> dict[str, Any]:
        """Start Ray and the workers; what the first one that is ready knows of these nodes."""
        dashboard = start_ray(self.known.ray, self.known.workers)
        gpus = int(ray.cluster_resources().get("GPU", 0))
        places, gpu = self.places(gpus)
        print(f"{len(places)} workers. Ray's dashboard: {dashboard or 'none'}", file=sys.stderr, flush=True)
        self.crew = Crew(places, gpu, types)
        while not self.crew.idle:
            self.crew.wait(seconds=1)
        return self.crew.known

    def places(self, gpus: int) -> tuple[list[Place], bool]:
        """Where the workers are, and whether each gets a GPU."""
        if self.known.server:
            return [Place(url=url) for url in self.known.server], False
        count = self.known.workers or gpus
        if not count:
            raise BatchError("Ray sees no GPU. To use the processor, say how many ComfyUIs it bears: --workers 1.")
        if gpus and count > gpus:
            raise BatchError(f"--workers {count}, but Ray sees {gpus} GPUs. Ask for {gpus} at most.")
        assert self.comfyui, "the command asks for a ComfyUI or a server"
        base = (self.known.base or self.comfyui).resolve()
        arguments = (*(() if gpus else ("--cpu",)), *self.known.comfyui_argument)
        place = Place(None, self.comfyui, base, arguments, 0 if gpus else count, LEASH.read_text("utf-8"))
        return [place] * count, bool(gpus)

    def carry_out(self, made: Plan) -> list[dict[str, Any]]:
        """Both phases; the manifest's lines of all jobs."""
        due = [job for job in made.jobs if not self.output.is_done(job)]
        if len(due) < len(made.jobs):
            print(f"{len(made.jobs) - len(due)} jobs were finished before.", file=sys.stderr)
        contents = Contents(lambda name: made.paths.get(name) or self.output.folder / "people" / name)
        failed = self.encode_people(made, due, contents)
        for job in due:
            if faults := [failed[encoding] for encoding in job.people.values() if encoding in failed]:
                self.output.keep(job, seed_of(made, job), {"error": f"A person could not be encoded: {faults[0]}"})
        self.make_pictures(made, [job for job in due if not self.output.is_done(job)], contents)
        self.output.write_sheets(made.jobs)
        return [self.output.entries[job.id] for job in made.jobs]

    def encode_people(self, made: Plan, jobs: list[Job], contents: Contents) -> dict[str, str]:
        """Make the cards that these jobs need and that are not there yet; what went wrong, by encoding."""
        needed = dict.fromkeys(encoding for job in jobs for encoding in job.people.values())
        lacking = [encoding for encoding in needed if not self.output.card(encoding).is_file()]
        failed: dict[str, str] = {}
        tasks = [Task(each, partial(made.encoding_graph, each), made.encoding_files(each)) for each in lacking]
        progress = Progress("People", len(tasks), sys.stderr)

        def finish(task: Task, outcome: Outcome) -> None:
            progress.count(outcome)
            if "error" in outcome:
                failed[task.id] = outcome["error"]
            else:
                cards = [content for name, content in outcome["pictures"] if name.startswith(task.id)]
                self.output.keep_card(task.id, cards[0])

        self.work_on(tasks, contents, finish, progress, lambda task: None)
        return failed

    def make_pictures(self, made: Plan, jobs: list[Job], contents: Contents) -> None:
        by_id = {job.id: job for job in jobs}
        tasks = [Task(job.id, partial(made.graph_of, job), made.files_of(job)) for job in jobs]
        progress = Progress("Pictures", len(tasks), sys.stderr)

        def finish(task: Task, outcome: Outcome) -> None:
            progress.count(outcome)
            job = by_id[task.id]
            self.output.keep(job, seed_of(made, job), outcome)
            if "error" in outcome:
                print(f"\nrow {job.row} failed: {outcome['error']}", file=sys.stderr, flush=True)

        self.work_on(tasks, contents, finish, progress, lambda task: self.output.sending(by_id[task.id]))

    def work_on(
        self, tasks: list[Task], contents: Contents, finish: Finish, progress: Progress, sending: Callable[[Task], None]
    ) -> None:
        """Carry them out; where they may cost money, `sending` notes each before, and none is sent twice."""
        assert self.crew, "started"
        if tasks:
            once = sending if self.known.allow_hosted else None
            carry_out(tasks, self.crew, contents, finish, progress.show, once)
            progress.end()
