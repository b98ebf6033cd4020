"""The nodes of the hosted twin: the same picture from fal-ai/pulid, for machines without a GPU.

Every input, output and call of https://fal.ai/models/fal-ai/pulid/api; the key never comes near a node.
"""

import asyncio
import itertools
import json
import os
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker
from comfy_execution.utils import get_executing_context
from torch import Tensor

from ..hosted import api, job, journal, references
from ..hosted.pictures import Outcome
from ..hosted.queue import SubmitOptions
from ..hosted.service import Limits, Report, Service, Watch, open_service, read_numbers
from ..pulid.errors import InputError
from . import host
from .background import run_in_background
from .lists import each
from .texts import described

CATEGORY = "PuLID"
CUSTOM = "custom"
# From a node to the API, under the same name.
PASSED_ON = ("prompt", "negative_prompt", "num_images", "guidance_scale", "num_inference_steps", "id_scale", "mode")
DAY = 24 * 3600  # seconds
LIFETIMES = {"1h": 3600, "1d": DAY, "7d": 7 * DAY, "30d": 30 * DAY}
ACCOUNTS = "as the account has it"
ACCESS = {ACCOUNTS: "", "anyone with the link": "allow", "my account only": "forbid"}
NO_FILE = "none"
NO_RUN = uuid.uuid4().hex  # stands for a run where there is none, as in scripts

T = TypeVar("T")


def _choice(name: str, options: Sequence[str], optional: bool = True) -> io.Input:
    """A choice whose first option is the default."""
    return io.Combo.Input(name, optional=optional, options=list(options), default=options[0])


def _request_inputs() -> list[io.Input]:
    """The API's own, in its order; image_size with the two numbers that "custom" sends."""
    return [
        io.String.Input("prompt", multiline=True, default=""),
        io.String.Input("negative_prompt", multiline=True, default=api.NEGATIVE_PROMPT),
        io.Int.Input("num_images", default=1, min=1, max=8),
        io.Float.Input("guidance_scale", default=1.2, min=1, max=1.5, step=0.05),
        io.Int.Input("num_inference_steps", default=4, min=1, max=12),
        io.Int.Input("seed", default=0, min=-1, max=api.LARGEST_SEED, control_after_generate=True),
        _choice("image_size", [CUSTOM, *api.PRESETS], optional=False),
        io.Int.Input("width", default=768, min=1, max=api.LARGEST_SIDE),
        io.Int.Input("height", default=1024, min=1, max=api.LARGEST_SIDE),
        io.Float.Input("id_scale", default=0.8, min=0, max=5, step=0.05),
        _choice("mode", api.MODES, optional=False),
        io.Boolean.Input("id_mix", default=False),
    ]


def _reference_inputs() -> list[io.Input]:
    return [
        io.Image.Input("reference_images", optional=True),
        io.String.Input("reference_urls", optional=True, multiline=True, default=""),
        _choice("transport", references.TRANSPORTS),
        SIZE,
    ]


SIZE = _choice("reference_size", ["1024", "as is"])
REQUEST_ID = io.String.Input("request_id")
LIMITS = {"queue_limit": 300, "run_limit": 600, "total_limit": 900}  # seconds, by default


def _limit_inputs(*names: str) -> list[io.Input]:
    return [io.Int.Input(name, optional=True, default=LIMITS[name], min=2, max=DAY) for name in names]


def _money_inputs() -> list[io.Input]:
    return [
        io.Boolean.Input("confirm_paid", optional=True, default=False),
        io.String.Input("force_resubmit", optional=True, default=""),  # was a switch once
    ]


def _storage_inputs() -> list[io.Input]:
    return [
        _choice("keep_pictures", [ACCOUNTS, *LIFETIMES]),
        io.Boolean.Input("service_copy", optional=True, default=True),
    ]


def _result_outputs(many: bool) -> list[io.Output]:
    """`many` where a node may make several requests, and so gives a list of each."""
    return [
        io.Image.Output("pictures", display_name="images", is_output_list=True),
        io.String.Output("used_seed", display_name="seed", is_output_list=many),
        io.String.Output("id_of_request", display_name="request_id", is_output_list=many),
        io.String.Output("facts", display_name="info", is_output_list=many),
    ]


def _with_defaults(node: type[io.ComfyNode], values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that a run gave, and the schema's default for each input that it left out."""
    return {input.id: getattr(input, "default", None) for input in node.SCHEMA.inputs} | {**values}


def _requests(node: type[io.ComfyNode], lists: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
    """The values of each request: lists go side by side, a shorter one with its last value again, as ComfyUI does it;
    all photographs go into each, whatever their sizes."""
    lists = {name: values for name, values in lists.items() if values}
    photographs = lists.pop("reference_images", None)
    count = max(map(len, lists.values()), default=1)
    chosen = ({name: values[min(index, len(values) - 1)] for name, values in lists.items()} for index in range(count))
    return [_with_defaults(node, {**values, "reference_images": photographs}) for values in chosen]


async def _all(requests: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """What all of them give; one that fails is told only when the others, which are paid for, have come to an end."""
    results = await asyncio.gather(*requests, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return [result for result in results if not isinstance(result, BaseException)]


def _is_new_each_time(seed: Any) -> float | bool:
    """For a fingerprint: with a seed of the service's choice, no run equals the one before."""
    return float("nan") if -1 in (seed if isinstance(seed, list) else [seed]) else False


def _given_up(text: Any) -> str:
    """The id in force_resubmit. Raises InputError for the switch that it was in graphs of older versions."""
    text = str(text).strip()
    if text.lower() == "true":
        raise InputError(
            "force_resubmit was a switch and is a text now, so that a saved graph cannot pay twice. Nothing was sent. "
            "Leave it empty; to give up a request for a new one, put that request's id into it: it is shown on the "
            "node, in the error message, and by PuLID Hosted Requests."
        )
    return "" if text.lower() in ("false", "none") else text


def _options(values: Mapping[str, Any]) -> SubmitOptions:
    return SubmitOptions(
        webhook_url=values.get("webhook_url", "").strip(),
        priority=values.get("priority", "normal"),
        runner_hint=values.get("runner_hint", "").strip(),
        no_retry=values.get("no_retry", False),
        start_seconds=values["queue_limit"],
        lifetime=LIFETIMES.get(values["keep_pictures"], 0),
        access=ACCESS[values.get("picture_access", ACCOUNTS)],
        store=values["service_copy"],
    )


def _as_job(values: Mapping[str, Any]) -> job.Job:
    """A node's values, by name, as a job. Encodes the photographs, so it is called in the background."""
    as_is = values["reference_size"] == "as is"
    photos = each(values["reference_images"], lambda image: references.encode(image, as_is))
    photos += references.read_lines(values["reference_urls"], as_is)
    preset = values["image_size"]
    request = api.read_request(
        reference_images=tuple(photo.digest for photo in photos),
        image_size=(values["width"], values["height"]) if preset == CUSTOM else preset,
        seed=None if values["seed"] == -1 else values["seed"],
        id_mix=bool(values["id_mix"]),
        **{name: values[name] for name in PASSED_ON},
    )
    context = get_executing_context()
    return job.Job(
        request=request,
        references=tuple(photos),
        options=_options(values),
        guard=read_numbers(journal.Guard, os.environ, lifted=bool(values["confirm_paid"])),
        run=context.prompt_id if context else NO_RUN,
        transport=values["transport"],
        limits=_limits(values),
        give_up=_given_up(values["force_resubmit"]),
    )


def _limits(values: Mapping[str, Any]) -> Limits:
    return Limits(**{name: values[f"{name}_limit"] for name in ("queue", "run", "total") if f"{name}_limit" in values})


async def _with_service(work: Callable[[Service], Awaitable[T]], node: type[io.ComfyNode]) -> T:
    """Run `work` in the background, with the service as the environment has it."""

    async def run(stop: Callable[[], bool], report: Report) -> T:
        return await work(open_service(os.environ, host.private_folder(), Watch(stop), report))

    return await run_in_background(run, node.hidden.unique_id)


def _as_batches(outcome: Outcome) -> list[Tensor]:
    """(B, H, W, 3) each: neighbours of one size together, so that none is lost or stretched where sizes differ."""
    groups = itertools.groupby(outcome.images, key=lambda image: image.size)
    arrays = [np.stack([np.asarray(image) for image in group]) for _, group in groups]
    return [torch.from_numpy(array).float() / 255 for array in arrays]


def _notes(outcome: Outcome) -> list[str]:
    return [f"request {outcome.request_id}, seed {outcome.seed}", *outcome.info["notes"]]


@described
class PulidHosted(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PuLID_Hosted",
            display_name="PuLID Hosted (fal.ai)",
            category=CATEGORY,
            inputs=[
                *_request_inputs(),
                *_reference_inputs(),
                *_limit_inputs("queue_limit", "run_limit", "total_limit"),
                *_money_inputs(),
                *_storage_inputs(),
            ],
            outputs=_result_outputs(many=True),
            hidden=[io.Hidden.unique_id],
            is_input_list=True,
        )

    @classmethod
    def fingerprint_inputs(cls, seed: Any = None, **_: Any) -> float | bool:
        return _is_new_each_time(seed)

    @classmethod
    async def execute(cls, **values: Any) -> io.NodeOutput:
        async def make(values: dict[str, Any]) -> Outcome:
            return await _with_service(lambda service: job.generate(_as_job(values), service), cls)

        outcomes = await _all([make(each) for each in _requests(cls, values)])
        return io.NodeOutput(
            [batch for outcome in outcomes for batch in _as_batches(outcome)],
            [outcome.seed for outcome in outcomes],
            [outcome.request_id for outcome in outcomes],
            [json.dumps(outcome.info, indent=2) for outcome in outcomes],
            ui={"text": [note for outcome in outcomes for note in _notes(outcome)]},
        )


@described
class PulidHostedSubmit(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PuLID_HostedSubmit",
            display_name="PuLID Hosted Submit",
            category=CATEGORY,
            inputs=[
                *_request_inputs(),
                *_reference_inputs(),
                io.String.Input("webhook_url", optional=True, default=""),
                _choice("priority", ["normal", "low"]),
                io.String.Input("runner_hint", optional=True, default=""),
                io.Boolean.Input("no_retry", optional=True, default=False),
                *_limit_inputs("queue_limit"),
                *_money_inputs(),
                *_storage_inputs(),
                _choice("picture_access", list(ACCESS)),
            ],
            outputs=[io.String.Output("id_of_request", display_name="request_id", is_output_list=True)],
            hidden=[io.Hidden.unique_id],
            is_input_list=True,
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, seed: Any = None, **_: Any) -> float | bool:
        return _is_new_each_time(seed)

    @classmethod
    async def execute(cls, **values: Any) -> io.NodeOutput:
        async def send(values: dict[str, Any]) -> tuple[str, list[str]]:
            return await _with_service(lambda service: job.order(_as_job(values), service), cls)

        sent = await _all([send(each) for each in _requests(cls, values)])
        text = [line for request_id, notes in sent for line in (f"request {request_id}", *notes)]
        return io.NodeOutput([request_id for request_id, _ in sent], ui={"text": text})


@described
class PulidHostedStatus(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PuLID_HostedStatus",
            display_name="PuLID Hosted Status",
            category=CATEGORY,
            inputs=[REQUEST_ID, io.Boolean.Input("logs", default=True)],
            outputs=[io.String.Output("state", display_name="status"), io.String.Output("facts", display_name="info")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> float:
        return float("nan")  # equal to nothing: a status is asked for anew each time

    @classmethod
    async def execute(cls, request_id: str, logs: bool) -> io.NodeOutput:
        status = await _with_service(lambda service: job.status(request_id, logs, service), cls)
        facts = json.dumps(status.model_dump(mode="json", by_alias=True), indent=2)
        text = [status.state, *([] if status.position is None else [f"{status.position} before it"]), *status.logs[-1:]]
        return io.NodeOutput(status.state, facts, ui={"text": text})


@described
class PulidHostedResult(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PuLID_HostedResult",
            display_name="PuLID Hosted Result",
            category=CATEGORY,
            inputs=[REQUEST_ID, *_limit_inputs("queue_limit", "run_limit", "total_limit")],
            outputs=_result_outputs(many=False),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    async def execute(cls, request_id: str, **values: Any) -> io.NodeOutput:
        limits = _limits(_with_defaults(cls, values))
        outcome = await _with_service(lambda service: job.fetch(request_id, limits, service), cls)
        info = json.dumps(outcome.info, indent=2)
        ui = {"text": _notes(outcome)}
        return io.NodeOutput(_as_batches(outcome), outcome.seed, outcome.request_id, info, ui=ui)


@described
class PulidHostedCancel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PuLID_HostedCancel",
            display_name="PuLID Hosted Cancel",
            category=CATEGORY,
            inputs=[REQUEST_ID],
            outputs=[],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> float:
        return float("nan")

    @classmethod
    async def execute(cls, request_id: str) -> io.NodeOutput:
        cancelled = await _with_service(lambda service: job.cancel(request_id, service), cls)
        return io.NodeOutput(ui={"text": [cancelled.value]})


@described
class PulidHostedUpload(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PuLID_HostedUpload",
            display_name="PuLID Hosted Upload",
            category=CATEGORY,
            inputs=[
                io.Image.Input("image", optional=True),
                _choice("expires_in", list(LIFETIMES)),
                SIZE,
                _choice("file", [NO_FILE, *host.input_files()]),
            ],
            outputs=[io.String.Output("addresses", display_name="urls")],
            hidden=[io.Hidden.unique_id],
            is_input_list=True,
            is_output_node=True,
        )

    @classmethod
    async def execute(
        cls,
        image: Sequence[Tensor] = (),
        expires_in: Sequence[str] = ("1h",),
        reference_size: Sequence[str] = ("1024",),
        file: Sequence[str] = (NO_FILE,),
    ) -> io.NodeOutput:
        as_is, seconds = reference_size[0] == "as is", LIFETIMES[expires_in[0]]
        names = [name for name in file if name != NO_FILE]
        if not names and not any(len(batch) for batch in image):
            raise InputError("There is nothing to upload: connect at least one photograph, or choose a file.")

        async def work(service: Service) -> list[str]:
            photos = each(image, lambda picture: references.encode(picture, as_is))
            photos += [references.read_file(host.input_folder(), name) for name in names]
            return await job.upload(photos, seconds, service)

        urls = await _with_service(work, cls)
        return io.NodeOutput("\n".join(urls), ui={"text": list(urls)})


@described
class PulidHostedRequests(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PuLID_HostedRequests",
            display_name="PuLID Hosted Requests",
            category=CATEGORY,
            inputs=[
                _choice("show", list(journal.CHOICES), optional=False),
                io.String.Input("request_id", default=""),
                _choice("action", ["list", "fetch", "cancel", "forget"], optional=False),
            ],
            outputs=[
                io.String.Output("report", display_name="report"),
                io.Image.Output("pictures", display_name="images", is_output_list=True),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> float:
        return float("nan")

    @classmethod
    async def execute(cls, show: str, request_id: str, action: str) -> io.NodeOutput:
        folder, request_id, pictures, said = host.private_folder(), request_id.strip(), None, ""
        known = journal.Journal(folder / journal.JOURNAL_FILE)
        if action != "list" and not request_id:
            raise InputError(f"To {action} a request, put its id into request_id. The list shows all ids.")
        if action == "fetch":
            outcome = await _with_service(lambda service: job.fetch(request_id, Limits(), service), cls)
            pictures, said = _as_batches(outcome), "\n".join(_notes(outcome))
        elif action == "cancel":
            said = (await _with_service(lambda service: job.cancel(request_id, service), cls)).value
        elif action == "forget":
            said = f"{await asyncio.to_thread(known.forget, [request_id])} forgotten."
        report = "\n".join(filter(None, (said, journal.listing(await asyncio.to_thread(known.rows), show))))
        return io.NodeOutput(report, pictures or ExecutionBlocker(None), ui={"text": report.splitlines()})


NODES = [
    PulidHosted,
    PulidHostedSubmit,
    PulidHostedStatus,
    PulidHostedResult,
    PulidHostedCancel,
    PulidHostedUpload,
    PulidHostedRequests,
]
