"""The nodes of the hosted twin: the same picture from fal-ai/pulid, for machines without a GPU.

Every input, output and call of https://fal.ai/models/fal-ai/pulid/api; the key never comes near a node.
"""

import json
import os
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from comfy_api.latest import io
from comfy_execution.utils import get_executing_context
from torch import Tensor

from ..hosted import api, job, references
from ..hosted.pictures import Outcome, as_batches
from ..hosted.queue import SubmitOptions, Ticket
from ..hosted.service import JobProgress, Service, Watch, open_service, read_guard
from ..pulid.errors import InputError
from . import host
from .background import run_in_background
from .texts import described

CATEGORY = "PuLID"
CUSTOM = "custom"
# From a node to the API, under the same name.
PASSED_ON = ("prompt", "negative_prompt", "num_images", "guidance_scale", "num_inference_steps", "seed")
LIFETIMES = {"1h": 3600, "1d": 24 * 3600, "7d": 7 * 24 * 3600, "30d": 30 * 24 * 3600}
DAY = 24 * 3600  # seconds

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
        io.Int.Input("seed", default=0, min=0, max=api.LARGEST_SEED, control_after_generate=True),
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
    return [io.Boolean.Input(name, optional=True, default=False) for name in ("confirm_paid", "force_resubmit")]


def _result_outputs() -> list[io.Output]:
    return [
        io.Image.Output("pictures", display_name="images", is_output_list=True),
        io.String.Output("used_seed", display_name="seed"),
        io.String.Output("id_of_request", display_name="request_id"),
        io.String.Output("facts", display_name="info"),
    ]


def _with_defaults(node: type[io.ComfyNode], values: dict[str, Any]) -> dict[str, Any]:
    """The values that a run gave, and the schema's default for each input that it left out."""
    return {input.id: getattr(input, "default", None) for input in node.SCHEMA.inputs} | values


def _as_job(values: dict[str, Any], options: SubmitOptions) -> job.Job:
    """A node's values, by name, as a job. Encodes the photographs, so it is called in the background."""
    images = () if values["reference_images"] is None else values["reference_images"]
    photos = [references.encode(image, as_is=values["reference_size"] == "as is") for image in images]
    photos += references.read_lines(values["reference_urls"])
    preset = values["image_size"]
    request = api.HostedRequest(
        reference_images=tuple(photo.digest for photo in photos),
        image_size=(values["width"], values["height"]) if preset == CUSTOM else preset,
        **{name: values[name] for name in (*PASSED_ON, "id_scale", "mode", "id_mix")},
    )
    context = get_executing_context()
    return job.Job(
        request=request,
        references=tuple(photos),
        options=options,
        guard=read_guard(os.environ, lifted=values["confirm_paid"]),
        run=context.prompt_id if context else "",
        transport=values["transport"],
        limits=_limits(values),
        force=values["force_resubmit"],
    )


def _limits(values: dict[str, Any]) -> job.Limits:
    return job.Limits(
        **{name: values[f"{name}_limit"] for name in ("queue", "run", "total") if f"{name}_limit" in values}
    )


async def _with_service(work: Callable[[Service], Awaitable[T]], node: type[io.ComfyNode]) -> T:
    """Run `work` in the background, with a service that is open as long as it takes."""

    async def run(stop: Callable[[], bool], report: Callable[[JobProgress], None]) -> T:
        async with open_service(os.environ, host.private_folder(), Watch(stop), report) as service:
            return await work(service)

    return await run_in_background(run, node.hidden.unique_id)


def _as_output(outcome: Outcome) -> io.NodeOutput:
    info = json.dumps(outcome.info, indent=2)
    notes = [f"request {outcome.request_id}, seed {outcome.seed}", *outcome.info["notes"]]
    arrays = [np.stack([np.asarray(image) for image in batch]) for batch in as_batches(outcome.images)]
    batches = [torch.from_numpy(array).float() / 255 for array in arrays]  # (B, H, W, 3)
    return io.NodeOutput(batches, outcome.seed, outcome.request_id, info, ui={"text": notes})


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
            ],
            outputs=_result_outputs(),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    async def execute(cls, **values: Any) -> io.NodeOutput:
        values = _with_defaults(cls, values)

        async def work(service: Service) -> Outcome:
            return await job.generate(_as_job(values, SubmitOptions(start_seconds=values["queue_limit"])), service)

        return _as_output(await _with_service(work, cls))


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
            ],
            outputs=[io.String.Output("id_of_request", display_name="request_id")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    async def execute(cls, **values: Any) -> io.NodeOutput:
        values = _with_defaults(cls, values)
        options = SubmitOptions(
            webhook_url=values["webhook_url"].strip(),
            priority=values["priority"],
            runner_hint=values["runner_hint"].strip(),
            no_retry=values["no_retry"],
            start_seconds=values["queue_limit"],
        )

        async def work(service: Service) -> Ticket:
            return await job.order(_as_job(values, options), service)

        ticket = await _with_service(work, cls)
        return io.NodeOutput(ticket.request_id, ui={"text": [f"request {ticket.request_id}"]})


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
            outputs=_result_outputs(),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    async def execute(cls, request_id: str, **values: Any) -> io.NodeOutput:
        limits = _limits(_with_defaults(cls, values))
        return _as_output(await _with_service(lambda service: job.fetch(request_id, limits, service), cls))


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
            inputs=[io.Image.Input("image"), _choice("expires_in", list(LIFETIMES)), SIZE],
            outputs=[io.String.Output("addresses", display_name="urls")],
            hidden=[io.Hidden.unique_id],
            is_input_list=True,
            is_output_node=True,
        )

    @classmethod
    async def execute(
        cls, image: list[Tensor], expires_in: Sequence[str] = ("1h",), reference_size: Sequence[str] = ("1024",)
    ) -> io.NodeOutput:
        as_is, seconds = reference_size[0] == "as is", LIFETIMES[expires_in[0]]
        if not any(len(batch) for batch in image):
            raise InputError("The image batch is empty: connect at least one photograph.")

        async def work(service: Service) -> list[str]:
            photos = [references.encode(picture, as_is) for batch in image for picture in batch]
            return await job.upload(photos, seconds, service)

        urls = await _with_service(work, cls)
        return io.NodeOutput("\n".join(urls), ui={"text": list(urls)})


NODES = [PulidHosted, PulidHostedSubmit, PulidHostedStatus, PulidHostedResult, PulidHostedCancel, PulidHostedUpload]
