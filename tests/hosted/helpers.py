"""A small request and a client that was just started, against the fake service."""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import torch
from pulid_sdxl.hosted import job as jobs
from pulid_sdxl.hosted.api import read_request
from pulid_sdxl.hosted.job import Job
from pulid_sdxl.hosted.journal import Guard
from pulid_sdxl.hosted.queue import SubmitOptions
from pulid_sdxl.hosted.references import encode
from pulid_sdxl.hosted.service import Watch, open_service

FACE = torch.rand(8, 8, 3, generator=torch.Generator().manual_seed(0))


def a_job(seed=7, references=None, num_images=1, guard=None, **others):
    references = tuple(references or [encode(FACE)])
    digests = tuple(reference.digest for reference in references)
    values = {"prompt": "portrait", "num_images": num_images, "seed": seed, "image_size": (32, 48)}
    request = read_request(reference_images=digests, **values)
    return Job(request, references, SubmitOptions(), guard or Guard(), run="run", **others)


def perform(fal, folder, act=None, watch=None, told=None, change=lambda service: service, **environ):
    """What `act(service)` gives, a request's pictures unless said otherwise, on a client that was just started."""
    act = act or (lambda service: jobs.generate(a_job(), service))

    async def run():
        def report(step, words):
            (told if told is not None else []).append(words)

        service = open_service(fal.environment | environ, folder, watch or Watch(), report)
        return await act(change(replace(service, poll_seconds=(0.02,))))

    return asyncio.run(run())


def generate(fal, folder, job=None, **others):
    return perform(fal, folder, lambda service: jobs.generate(job or a_job(), service), **others)


def beside(target, *arguments, **others):
    """Run in a thread; returns a function that gives the result or raises the error."""
    future = ThreadPoolExecutor(1).submit(target, *arguments, **others)
    return partial(future.result, timeout=30)  # a silent call is given up after 60 s


def wait_until(condition, seconds=30):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)
