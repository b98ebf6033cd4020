"""Who a row of the network's batch belongs to: the positive prompt or not, which picture, and which part of it.

Decided here alone, once for each arrangement in a sampling run. ComfyUI's own batch has a chunk for each prompt, named
by uuids, with all pictures in it; an area of a prompt is a part. What other packs make of that batch is traced. Where
they make a new one, the prompt in each row tells. What cannot be known is an error as soon as it matters.
"""

import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol
from uuid import UUID

import numpy as np
import torch
from comfy.patcher_extension import WrapperExecutor, WrappersMP
from torch import Tensor

from ..pulid.errors import MismatchError
from ..pulid.schedule import Schedule
from . import host
from .trace import UNKNOWN, Origin, Traced, origins_of, plain

log = logging.getLogger(__name__)

KEY = "pulid_sdxl"  # of our wrappers; in transformer_options, of the Call under way
COMPILE_KEY = "torch.compile"  # of ComfyUI's wrapper that puts the compiled network in place
ENTERED = {stage: f"{KEY} {stage}" for stage in (WrappersMP.APPLY_MODEL, WrappersMP.DIFFUSION_MODEL)}


class Mask(Protocol):
    def prepare(self, like: Tensor, placement: "Placement") -> None: ...


Area = Sequence[int]  # height, width, y, x in latent pixels
Window = tuple[int, tuple[int, ...]]  # a dimension of the latents, and which of its pictures, lines or columns
DIMENSIONS = LINES, COLUMNS = 2, 3


@dataclass(frozen=True, eq=False)
class Part:
    """Which lines and columns of the whole latent a row shows, in its order."""

    ys: np.ndarray
    xs: np.ndarray


@dataclass(frozen=True, eq=False)
class Row:
    """One row of a batch.

    positive  whether its prompt says what the picture is to show
    picture   its number in the latent batch; None where nothing tells
    part      None where nothing tells
    """

    positive: bool
    picture: int | None
    part: Part | None

    def cut(self, origin: Origin) -> "Row":
        part = self.part
        return replace(self, part=Part(part.ys[origin.ys], part.xs[origin.xs])) if part else self


@dataclass(eq=False)
class Placement:
    """Whose the rows of one batch are, in order.

    size     height and width of the whole latent
    derived  placements of batches that were made of this one, by what tells them apart
    tokens   masks that were cut for these rows
    """

    rows: Sequence[Row]
    size: tuple[int, int]
    derived: dict[Hashable, "Placement"] = field(default_factory=dict)
    tokens: dict[tuple, Tensor] = field(default_factory=dict)
    _identities: dict[int, tuple[int, ...]] = field(default_factory=dict)

    def identities(self, count: int) -> tuple[int, ...]:
        """For each row, the row of keys and values: 0 .. count - 1, or `count` for what is not positive.

        Picture j gets identity j, the last one repeats.
        """
        if (found := self._identities.get(count)) is None:
            found = tuple(_number(row, count) if row.positive else count for row in self.rows)
            if not torch.compiler.is_compiling():  # which would compile all again where something is found
                self._identities[count] = found
        return found

    def masks(self, count: int) -> list[int]:
        """For each row the number of its mask: picture j gets mask j, the last one repeats."""
        return [_number(row, count) for row in self.rows]

    def parts(self) -> list[Part] | None:
        """What each row shows; None where each shows the whole picture. Raises MismatchError."""
        if any(row.part is None for row in self.rows):
            raise MismatchError(
                "PuLID's mask lies on the whole picture, but the model is given pictures of another size, and nothing "
                "says which parts of it they are: by a node behind Apply PuLID, or by a sampler that works at several "
                "sizes (euler_dy, euler_smea_dy). Take the mask away, that node out, or choose another sampler."
            )
        parts = [row.part for row in self.rows if row.part is not None]
        whole = _all_of(self.size)
        if all(np.array_equal(part.ys, whole.ys) and np.array_equal(part.xs, whole.xs) for part in parts):
            return None
        return parts


def _number(row: Row, count: int) -> int:
    if count == 1:
        return 0
    if row.picture is None:
        raise MismatchError(
            "PuLID has an identity or a mask for each picture of the batch, but something between Apply PuLID and the "
            "sampler hands pictures in without saying which they are. Use one identity and one mask for all pictures, "
            "or take that node out."
        )
    return min(row.picture, count - 1)


def _all_of(size: tuple[int, int]) -> Part:
    return Part(np.arange(size[0]), np.arange(size[1]))


def without_a_run(chunks: tuple[int, ...], rows: int) -> Placement:
    """Where the network is called without a sampler: a chunk for each index, and 0 is the positive."""
    images, rest = divmod(rows, len(chunks))
    if rest:
        raise MismatchError(f"PuLID cannot tell whose {rows} rows are, with {len(chunks)} prompts and no sampler.")
    size = (1, 1)  # nobody says how large the latent is: all rows show the whole of it
    return Placement([Row(chunk == 0, j, _all_of(size)) for chunk in chunks for j in range(images)], size)


@dataclass(eq=False)
class SamplingRun:
    """What is known from the sampler's start to its end.

    positives, areas  of the guider's conds, by the uuid that names them in every pass
    shown, others     (1, S, D) the prompts of the positive conds, and of all others
    pictures, size    of the latent: its rows, and (height, width)
    schedules         of the model that samples, by Schedule.percents
    masks             that are cut for every batch before the network runs
    """

    positives: frozenset[UUID]
    areas: Mapping[UUID, Area]
    shown: Sequence[Tensor]
    others: Sequence[Tensor]
    pictures: int
    size: tuple[int, int]
    schedules: Mapping[tuple, Schedule | None]
    masks: Sequence[Mask]
    said: set[str] = field(default_factory=set)
    known: dict[Hashable, Placement] = field(default_factory=dict)

    def __deepcopy__(self, memo: dict) -> "SamplingRun":
        return self  # as Pre CFG and Automatic CFG copy the options of a model in every step

    def say(self, text: str, node_id: str | None) -> None:
        """Say it once, on the node and in the log."""
        if text not in self.said:
            self.said.add(text)
            log.warning("%s", text)
            if node_id is not None:
                host.say(text, node_id)

    def follow(self, model_options: dict) -> None:
        """Stand before and behind all that can rearrange a batch on its way to the network."""
        wrappers = model_options["transformer_options"].setdefault("wrappers", {})
        for stage, arrive in ((WrappersMP.APPLY_MODEL, self.arrive), (WrappersMP.DIFFUSION_MODEL, self._arrive_within)):
            theirs = dict(wrappers.get(stage, {}))
            theirs.pop(KEY, None)
            compiling = {COMPILE_KEY: theirs.pop(COMPILE_KEY)} if COMPILE_KEY in theirs else {}
            first = {f"{KEY} first": [partial(_enter, stage)]} if theirs else {}
            if theirs or stage == WrappersMP.APPLY_MODEL:
                wrappers[stage] = {**first, **theirs, KEY: [arrive], **compiling}
        if function := model_options.get("model_function_wrapper"):
            model_options["model_function_wrapper"] = partial(_enter_function, function)

    def arrive(
        self, executor: WrapperExecutor, x: Tensor, t: Tensor, c_concat: Tensor | None, c_crossattn: Tensor,
        control: Any, transformer_options: dict, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        """Behind all wrappers of the model: leaves a Call for the sites."""
        options = transformer_options
        entered = options.get(ENTERED[WrappersMP.APPLY_MODEL])
        shape = entered or tuple(x.shape)
        key = shape, tuple(options.get("uuids", ())), window_of(options, self.pictures, self.size)
        if key not in self.known:
            self.known[key] = self._own(*key)
        placement = self._derived(self.known[key], shape, x, c_crossattn, followed=entered is not None)
        patches = options.get("patches", {})
        theirs = [one for one in patches.get("attn2_patch", ()) if one not in (_mark_queries, _read_queries)]
        if theirs:
            options["patches"] = {**patches, "attn2_patch": [_mark_queries, *theirs, _read_queries]}
        options[KEY] = Call(self, placement, options.get("patches_replace", {}).get("attn2", {}))
        model: Any = executor.class_obj
        like = plain(x).to(model.manual_cast_dtype or model.get_dtype())
        for mask in self.masks:
            mask.prepare(like, placement)
        return executor(plain(x), t, c_concat, c_crossattn, control, options, **kwargs)

    def _arrive_within(
        self, executor: Callable, x: Tensor, timesteps: Tensor, context: Tensor, y: Tensor, control: Any,
        transformer_options: dict, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        """The same behind all wrappers of the network itself."""
        options = transformer_options
        entered, call = options.get(ENTERED[WrappersMP.DIFFUSION_MODEL]), options[KEY]
        placement = self._derived(call.placement, entered or tuple(x.shape), x, context, followed=entered is not None)
        options[KEY] = replace(call, placement=placement)
        return executor(plain(x), timesteps, context, y, control, options, **kwargs)

    def _own(self, shape: tuple[int, ...], uuids: tuple[UUID, ...], window: Window | None) -> Placement:
        """Of ComfyUI's own batch; without rows where nobody named its chunks."""
        images, rest = divmod(shape[0], max(len(uuids), 1))
        if not uuids or rest:
            return Placement([], self.size)
        dim, places = window or (0, None)
        pictures: Sequence[int | None] = [None] * images
        if dim == 0 and places is not None and len(places) == images:
            pictures = places
        elif images == self.pictures:
            pictures = range(images)
        parts = {uuid: self._part(self.areas.get(uuid), shape[-2:], window) for uuid in uuids}
        rows = [Row(uuid in self.positives, picture, parts[uuid]) for uuid in uuids for picture in pictures]
        return Placement(rows, self.size)

    def _part(self, area: Area | None, size: tuple[int, ...], window: Window | None) -> Part | None:
        """What a row of this size shows: ComfyUI cuts windows out of the latent, and areas out of windows."""
        part = _all_of(self.size)
        if window is not None and window[0] in DIMENSIONS:
            dim, places = window[0], np.array(window[1])
            part = Part(places, part.xs) if dim == LINES else Part(part.ys, places)
        if area is not None:
            height, width, y, x = area
            part = Part(part.ys[y : y + height], part.xs[x : x + width])
        return part if (len(part.ys), len(part.xs)) == tuple(size) else None

    def _derived(
        self, base: Placement, entered: tuple[int, ...], batch: Tensor, context: Tensor, followed: bool
    ) -> Placement:
        """Of what was made of a batch of shape `entered`, whose placement is `base`.

        followed  whether that batch was traced
        """
        origins = origins_of(batch) if isinstance(batch, Traced) else None
        key = tuple(batch.shape), followed, None if origins is None else tuple(origin.key for origin in origins)
        if key not in base.derived:
            if base.rows and origins is not None:
                base.derived[key] = Placement([base.rows[one.row].cut(one) for one in origins], self.size)
            elif base.rows and not followed and tuple(batch.shape) == entered:
                base.derived[key] = base
            else:
                base.derived[key] = self._read(base, batch, context)
        return base.derived[key]

    def _read(self, base: Placement, batch: Tensor, context: Tensor) -> Placement:
        """Of a batch that somebody made anew: by the prompt in each row. Waits for the device."""
        positives = [self._is_positive(row) for row in context[: len(batch)]]
        part = _all_of(self.size) if tuple(batch.shape[-2:]) == self.size else None
        if part and positives == [row.positive for row in base.rows]:
            return base
        picture = 0 if self.pictures == 1 else None
        return Placement([Row(positive, picture, part) for positive in positives], self.size)

    def _is_positive(self, row: Tensor) -> bool:
        shown, other = (any(same_prompt(row, one) for one in prompts) for prompts in (self.shown, self.others))
        if shown and other:
            raise MismatchError(
                "Positive and negative prompt are equal, and something between Apply PuLID and the sampler puts the "
                "batch together anew, so that PuLID cannot tell which rows are the positive ones. Change one of the "
                "prompts, or take that node out."
            )
        return shown


@dataclass(frozen=True, eq=False)
class Call:
    """One call of the network.

    replacements  of cross-attentions, in this call; those of a whole block lie below ours
    sites      placements of queries that other packs' patches (attn2_patch) changed, by block
    strengths  of schedules at this call's noise level, by schedule and dtype
    """

    run: SamplingRun
    placement: Placement
    replacements: Mapping[Hashable, Callable] = field(default_factory=dict)
    sites: dict[Hashable, Placement] = field(default_factory=dict)
    strengths: dict[tuple[Schedule, torch.dtype], Tensor] = field(default_factory=dict)

    def __deepcopy__(self, memo: dict) -> "Call":
        return self

    def at_site(self, q: Tensor, extra_options: Mapping) -> Placement:
        """Of the queries (B, N, C) of a site, to which other packs may have added rows."""
        placement = self.sites.get(_site(extra_options), self.placement)
        if len(q) != len(placement.rows):
            raise MismatchError(
                f"The network was given {len(self.placement.rows)} rows, but {len(q)} come to the cross-attention of "
                f"{extra_options['block']}, and nothing tells PuLID whose they are. Take out the node that adds them."
            )
        return placement


def _site(extra_options: Mapping) -> Hashable:
    return *extra_options["block"], extra_options["block_index"]


def _mark_queries(n: Tensor, k: Tensor, v: Tensor, extra_options: Mapping) -> tuple[Tensor, Tensor, Tensor]:
    """Before all attn2 patches: hands them rows that remember which they are."""
    return n if torch.compiler.is_compiling() else Traced.rows_of(n), k, v


def _read_queries(n: Tensor, k: Tensor, v: Tensor, extra_options: Mapping) -> tuple[Tensor, Tensor, Tensor]:
    """Behind all attn2 patches: which rows are there now."""
    if isinstance(n, Traced):
        call = extra_options[KEY]
        rows = tuple(n.origins.flatten().tolist())
        if UNKNOWN not in rows:
            own = call.placement
            if rows != tuple(range(len(own.rows))):
                own = own.derived.setdefault(rows, Placement([own.rows[row] for row in rows], own.size))
            call.sites[_site(extra_options)] = own
    return plain(n), k, v


RUN: ContextVar[SamplingRun | None] = ContextVar("RUN", default=None)  # the one under way


def arrive_by_the_way(executor: WrapperExecutor, *args: Any, **kwargs: Any) -> Tensor:
    """For a pack that calls the model, while sampling, with options that it kept since before (Automatic CFG)."""
    run = RUN.get()
    return executor(*args, **kwargs) if run is None else run.arrive(executor, *args, **kwargs)


def _enter(
    stage: str, executor: Callable, x: Tensor, t: Tensor, c_concat: Tensor | None, c_crossattn: Tensor, control: Any,
    transformer_options: dict, **kwargs: Any,
) -> Tensor:  # fmt: skip
    """Before all wrappers of a stage: hands them a batch that remembers where it comes from."""
    rest = t, c_concat, c_crossattn, control, transformer_options
    if ENTERED[stage] in transformer_options or torch.compiler.is_compiling():
        return executor(x, *rest, **kwargs)
    transformer_options[ENTERED[stage]] = tuple(x.shape)
    try:
        return plain(executor(Traced.of(x), *rest, **kwargs))
    finally:
        del transformer_options[ENTERED[stage]]


def _enter_function(function: Callable, apply_model: Callable, arguments: dict) -> Tensor:
    """The same before another pack's model_function_wrapper, which comes before the wrappers of the model."""
    options, x = arguments["c"]["transformer_options"], arguments["input"]
    options[ENTERED[WrappersMP.APPLY_MODEL]] = tuple(x.shape)
    return plain(function(apply_model, {**arguments, "input": Traced.of(x)}))


def same_prompt(row: Tensor, prompt: Tensor) -> bool:
    """Whether a row (S, D) is of this prompt (B, T, D), which ComfyUI repeats to the length of the longest in a batch.

    Where each picture has a prompt of its own, B is more than one.
    """
    length, width = prompt.shape[1:]
    return len(row) % length == 0 and row.shape[1] == width and bool((row[:length] == prompt.to(row)).all((1, 2)).any())


def window_of(options: Mapping, pictures: int, size: tuple[int, int]) -> Window | None:
    """The context window under way, of ComfyUI's or of AnimateDiff-Evolved's, in a latent of so many pictures."""
    window = options.get("context_window")
    dim = getattr(window, "dim", 0)
    if window is not None and dim in (0, *DIMENSIONS):
        whole = torch.arange(size[dim - LINES] if dim else pictures).view(*[1] * dim, -1)
        return dim, tuple(window.get_tensor(whole).flatten().tolist())  # with what it puts before them
    indices = (options.get("ad_params") or {}).get("sub_idxs")
    return None if indices is None else (0, tuple(indices))
