"""The nodes of the hosted twin: the same picture from fal-ai/pulid, for machines without a GPU.

Every input, output and call of https://fal.ai/models/fal-ai/pulid/api; the key never comes near a node.
"""

import json
import os
from collections.abc import Awaitable, Callable
from typing import TypeVar

import numpy as np
import torch
from comfy_api.latest import io
from comfy_execution.utils import get_executing_context
from PIL import Image
from torch import Tensor

from ..hosted import api, job, storage
from ..hosted.client import Status, SubmitOptions, Ticket
from ..hosted.results import Outcome, as_batches
from ..hosted.service import Service, guard, open_service
from ..pulid.errors import InputError
from . import host
from .background import aside

CATEGORY = "PuLID"
FACES_LEAVE = "Photographs of faces leave this machine, and a request costs money."
CUSTOM = "custom"
PASSED_ON = ("prompt", "negative_prompt", "num_images", "guidance_scale", "num_inference_steps", "seed", "id_scale")
PASSED_ON += ("mode", "id_mix")  # from a node to the API, under the same name
LIFETIMES = {"1h": 3600, "1d": 24 * 3600, "7d": 7 * 24 * 3600, "30d": 30 * 24 * 3600}
DAY = 24 * 3600  # seconds

T = TypeVar("T")


# ---- Inputs that several nodes share ----


def _request_inputs() -> list[io.Input]:
    """The API's own, in its order; image_size with the two numbers that "custom" sends."""
    presets = ", ".join(f"{name} {width}x{height}" for name, (width, height) in api.PRESETS.items())
    return [
        io.String.Input("prompt", multiline=True, default="", tooltip="What the picture shows."),
        io.String.Input(
            "negative_prompt", multiline=True, default=api.NEGATIVE_PROMPT, tooltip="What the picture must not show."
        ),
        io.Int.Input(
            "num_images", default=1, min=1, max=8, tooltip="How many pictures to make. One request makes them all."
        ),
        io.Float.Input(
            "guidance_scale",
            default=1.2,
            min=1,
            max=1.5,
            step=0.05,
            tooltip="How closely the picture follows the prompt; higher is stricter and harsher.",
        ),
        io.Int.Input(
            "num_inference_steps", default=4, min=1, max=12, tooltip="Sampling steps; more give finer detail."
        ),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=api.LARGEST_SEED,
            control_after_generate=True,
            tooltip="Chooses the picture. A picture with this seed and these values is paid for once and then kept.",
        ),
        io.Combo.Input(
            "image_size",
            options=[CUSTOM, *api.PRESETS],
            default=CUSTOM,
            tooltip=f"The size of the picture: custom takes width and height below. In pixels: {presets}.",
        ),
        io.Int.Input(
            "width", default=768, min=1, max=api.LARGEST_SIDE, tooltip="Width in pixels, for image_size custom."
        ),
        io.Int.Input(
            "height", default=1024, min=1, max=api.LARGEST_SIDE, tooltip="Height in pixels, for image_size custom."
        ),
        io.Float.Input(
            "id_scale",
            default=0.8,
            min=0,
            max=5,
            step=0.05,
            tooltip="How strongly the person shows; more is more alike and less free.",
        ),
        io.Combo.Input(
            "mode",
            options=list(api.MODES),
            default="fidelity",
            tooltip="fidelity keeps the person, extreme style gives the prompt more say.",
        ),
        io.Boolean.Input(
            "id_mix",
            default=False,
            tooltip="On to mix two people into one. Leave it off for photographs of one person.",
        ),
    ]


def _reference_inputs() -> list[io.Input]:
    return [
        io.Image.Input(
            "reference_images",
            optional=True,
            tooltip="Photographs of the person, the main one first; four are ideal. They leave this machine.",
        ),
        io.String.Input(
            "reference_urls",
            optional=True,
            multiline=True,
            default="",
            tooltip="Further photographs: one https address or data URI a line, after the connected ones.",
        ),
        io.Combo.Input(
            "transport",
            optional=True,
            options=list(storage.TRANSPORTS),
            default="auto",
            tooltip="How photographs travel: inside the request, or uploaded, where anyone with the link can see them "
            "until they expire. auto uploads only large ones.",
        ),
        _size_input(),
    ]


def _size_input() -> io.Input:
    return io.Combo.Input(
        "reference_size",
        optional=True,
        options=["1024", "as is"],
        default="1024",
        tooltip="The long side of photographs that are sent: at most 1024 pixels, or as they are.",
    )


def _limit_inputs(*names: str) -> list[io.Input]:
    limits = {
        "queue_limit": (300, "Seconds to wait in the queue before giving up."),
        "run_limit": (600, "Seconds to wait for the run before giving up."),
        "total_limit": (900, "Seconds to wait altogether before giving up."),
    }
    return [
        io.Int.Input(name, optional=True, default=limits[name][0], min=2, max=DAY, tooltip=limits[name][1])
        for name in names
    ]


def _money_inputs() -> list[io.Input]:
    return [
        io.Boolean.Input(
            "confirm_paid",
            optional=True,
            default=False,
            tooltip="On to send it although the number of pictures of this run or of this day is reached.",
        ),
        io.Boolean.Input(
            "force_resubmit",
            optional=True,
            default=False,
            tooltip="On to pay for a new picture although an equal one is finished, under way or of unknown outcome.",
        ),
    ]


def _result_outputs() -> list[io.Output]:
    return [
        io.Image.Output(
            "pictures",
            display_name="images",
            is_output_list=True,
            tooltip="The pictures as one batch; several batches where the service sent different sizes.",
        ),
        io.String.Output("used_seed", display_name="seed", tooltip="The seed as text: it can be very large."),
        io.String.Output("id_of_request", display_name="request_id", tooltip="Names the request at the service."),
        io.String.Output("facts", display_name="info", tooltip="JSON: seed, addresses, timings, request, notes."),
    ]


# ---- From a node's values to the client's, and back ----


def _with_defaults(node: type[io.ComfyNode], values: dict) -> dict:
    """The values that a run gave, and the schema's default for each input that it left out."""
    return {input.id: getattr(input, "default", None) for input in node.SCHEMA.inputs} | values


def _as_job(values: dict, options: SubmitOptions) -> job.Job:
    """A node's values, by name, as a job."""
    images = () if values["reference_images"] is None else values["reference_images"]
    references = [storage.encode(image, as_is=values["reference_size"] == "as is") for image in images]
    references += storage.read_lines(values["reference_urls"])
    preset = values["image_size"]
    request = api.HostedRequest(
        reference_images=tuple(reference.digest for reference in references),
        image_size=api.Size(values["width"], values["height"]) if preset == CUSTOM else preset,
        **{name: values[name] for name in PASSED_ON},
    )
    context = get_executing_context()
    return job.Job(
        request=request,
        references=tuple(references),
        options=options,
        guard=guard(os.environ, lifted=values["confirm_paid"]),
        run=context.prompt_id if context else "",
        transport=values["transport"],
        limits=_limits(values),
        force=values["force_resubmit"],
    )


def _limits(values: dict) -> job.Limits:
    return job.Limits(
        **{name: values[f"{name}_limit"] for name in ("queue", "run", "total") if f"{name}_limit" in values}
    )


async def _aside(work: Callable[[Service], Awaitable[T]], node: type[io.ComfyNode]) -> T:
    """Run `work` beside the host, with a service that is open as long as it takes."""

    async def run(stop, report):
        async with open_service(os.environ, host.private_folder(), stop, report) as service:
            return await work(service)

    return await aside(run, node.hidden.unique_id)


def _as_output(outcome: Outcome) -> io.NodeOutput:
    info = json.dumps(outcome.info, indent=2)
    notes = [f"request {outcome.request_id}, seed {outcome.seed}", *outcome.info["notes"]]
    batches = [_as_tensor(batch) for batch in as_batches(outcome.images)]
    return io.NodeOutput(batches, outcome.seed, outcome.request_id, info, ui={"text": notes})


def _as_tensor(batch: list[Image.Image]) -> Tensor:
    return torch.from_numpy(np.stack([np.asarray(image) for image in batch])).float() / 255  # (B, H, W, 3)


# ---- The nodes ----


class PulidHosted(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PuLID_Hosted",
            display_name="PuLID Hosted (fal.ai)",
            category=CATEGORY,
            description=f"Makes pictures of a person with the hosted fal-ai/pulid. {FACES_LEAVE}",
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
    async def execute(cls, **values):
        values = _with_defaults(cls, values)

        async def work(service: Service) -> Outcome:
            return await job.generate(_as_job(values, SubmitOptions(start_seconds=values["queue_limit"])), service)

        return _as_output(await _aside(work, cls))


class PulidHostedSubmit(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PuLID_HostedSubmit",
            display_name="PuLID Hosted Submit",
            category=CATEGORY,
            description=f"Puts a request into the queue of fal-ai/pulid and does not wait for it. {FACES_LEAVE}",
            inputs=[
                *_request_inputs(),
                *_reference_inputs(),
                io.String.Input(
                    "webhook_url",
                    optional=True,
                    default="",
                    tooltip="A public address of yours that the service calls with the result.",
                ),
                io.Combo.Input(
                    "priority",
                    optional=True,
                    options=["normal", "low"],
                    default="normal",
                    tooltip="low lets other requests of your account go first.",
                ),
                io.String.Input(
                    "runner_hint",
                    optional=True,
                    default="",
                    tooltip="Requests with the same hint go to the same machine where possible.",
                ),
                io.Boolean.Input(
                    "no_retry",
                    optional=True,
                    default=False,
                    tooltip="On to keep the service from trying again by itself when one of its machines fails.",
                ),
                *_limit_inputs("queue_limit"),
                *_money_inputs(),
            ],
            outputs=[io.String.Output("id_of_request", display_name="request_id", tooltip="For the other nodes.")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    async def execute(cls, **values):
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

        ticket = await _aside(work, cls)
        return io.NodeOutput(ticket.request_id, ui={"text": [f"request {ticket.request_id}"]})


class PulidHostedStatus(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PuLID_HostedStatus",
            display_name="PuLID Hosted Status",
            category=CATEGORY,
            description="Asks the hosted service where a request stands. Costs nothing.",
            inputs=[
                io.String.Input("request_id", tooltip="From PuLID Hosted Submit, or from fal.ai/dashboard/requests."),
                io.Boolean.Input("logs", default=True, tooltip="On to get what the model has written so far, too."),
            ],
            outputs=[
                io.String.Output("state", display_name="status", tooltip="IN_QUEUE, IN_PROGRESS or COMPLETED."),
                io.String.Output(
                    "facts", display_name="info", tooltip="JSON: place in the queue, logs, timings, error."
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **_):
        return float("nan")  # equal to nothing: a status is asked for anew each time

    @classmethod
    async def execute(cls, request_id, logs):
        status = await _aside(lambda service: job.status(request_id, logs, service), cls)
        text = [status.state, *([] if status.position is None else [f"{status.position} before it"]), *status.logs[-1:]]
        return io.NodeOutput(status.state, json.dumps(_status_facts(status), indent=2), ui={"text": text})


def _status_facts(status: Status) -> dict:
    return {
        "status": status.state,
        "queue_position": status.position,
        "logs": list(status.logs),
        "metrics": dict(status.metrics),
        "error": status.error,
        "error_type": status.error_type,
    }


class PulidHostedResult(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PuLID_HostedResult",
            display_name="PuLID Hosted Result",
            category=CATEGORY,
            description="Fetches the pictures of a request by its id, once it is done. Costs nothing.",
            inputs=[
                io.String.Input("request_id", tooltip="From PuLID Hosted Submit, or from fal.ai/dashboard/requests."),
                *_limit_inputs("queue_limit", "run_limit", "total_limit"),
            ],
            outputs=_result_outputs(),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    async def execute(cls, request_id, **values):
        limits = _limits(_with_defaults(cls, values))
        return _as_output(await _aside(lambda service: job.fetch(request_id, limits, service), cls))


class PulidHostedCancel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PuLID_HostedCancel",
            display_name="PuLID Hosted Cancel",
            category=CATEGORY,
            description="Asks the hosted service to stop a request. One that runs already may still be charged.",
            inputs=[
                io.String.Input("request_id", tooltip="From PuLID Hosted Submit, or from fal.ai/dashboard/requests.")
            ],
            outputs=[],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **_):
        return float("nan")

    @classmethod
    async def execute(cls, request_id):
        cancelled = await _aside(lambda service: job.cancel(request_id, service), cls)
        return io.NodeOutput(ui={"text": [cancelled.words]})


class PulidHostedUpload(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PuLID_HostedUpload",
            display_name="PuLID Hosted Upload",
            category=CATEGORY,
            description="Uploads photographs to the hosted service's storage, where anyone with the link can see them "
            "until they expire.",
            inputs=[
                io.Image.Input("image", tooltip="A batch, or a list of batches of different sizes."),
                io.Combo.Input(
                    "expires_in",
                    optional=True,
                    options=list(LIFETIMES),
                    default="1h",
                    tooltip="After which time the service deletes the photographs.",
                ),
                _size_input(),
            ],
            outputs=[io.String.Output("addresses", display_name="urls", tooltip="One a line, for reference_urls.")],
            hidden=[io.Hidden.unique_id],
            is_input_list=True,
            is_output_node=True,
        )

    @classmethod
    async def execute(cls, image, expires_in=("1h",), reference_size=("1024",)):
        as_is, seconds = reference_size[0] == "as is", LIFETIMES[expires_in[0]]
        references = [storage.encode(picture, as_is) for batch in image for picture in batch]
        if not references:
            raise InputError("The image batch is empty: connect at least one photograph.")
        urls = await _aside(lambda service: job.upload(references, seconds, service), cls)
        return io.NodeOutput("\n".join(urls), ui={"text": list(urls)})


NODES = [
    PulidHosted,
    PulidHostedSubmit,
    PulidHostedStatus,
    PulidHostedResult,
    PulidHostedCancel,
    PulidHostedUpload,
]
