"""What goes on a MODEL: one AttentionPatch per cross-attention site, over whatever was there before."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from types import CellType
from typing import Any
from uuid import uuid4

import numpy as np
import torch
import torch.nn.functional as F
from comfy.ldm.modules import attention as host_attention
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP, WrappersMP, add_wrapper_with_key
from comfy.samplers import CFGGuider
from torch import Tensor

from ..pulid.attention import Fusion, HeadKV, Sampling, SiteKV, mask_to_tokens
from ..pulid.kernels import Fuse, fuse_for
from ..pulid.schedule import Schedule
from ..pulid.sites import SITES
from . import host
from .host import cross_attention
from .rows import KEY, RUN, Call, Placement, SamplingRun, arrive_by_the_way, without_a_run

# The branches of a guider that hold what the picture is to show: CFG and most others, DualCFG's second prompt.
POSITIVE_BRANCHES = ("positive", "middle")
OVERRIDE = "optimized_attention_override"  # in transformer_options: another pack's, for ComfyUI's own attention
INSTALLED = f"{KEY} installed"  # in transformer_options: the Installed of every Apply node, in order
MISFIT = 0.02  # between the shapes of mask and picture, which are multiples of some pixels each
PIXELS = 8  # of a picture for each pixel of its latent, in both directions

Replacement = Callable[[Tensor, Tensor, Tensor, dict], Tensor]


NUMBERS = count()


class TokenMask:
    """A mask (M, H, W) 0..1 on the CPU, which lies on the whole picture, and its token grids.

    A grid is made once for each placement, which keeps it: `prepare`, before the network runs, makes the usual ones.
    """

    def __init__(self, mask: Tensor, sampling: Sampling = "area"):
        self.mask, self.sampling, self.number = mask, sampling, next(NUMBERS)

    def __deepcopy__(self, memo: dict) -> "TokenMask":
        return self

    def prepare(self, like: Tensor, placement: Placement) -> None:
        """like  (B, C, H, W) what the network is given, in the dtype of its activations"""
        lines, columns = like.shape[-2:]
        for _ in range(2):
            lines, columns = (lines + 1) // 2, (columns + 1) // 2
            self.tokens(like, (lines, columns), placement)

    def tokens(self, like: Tensor, grid: tuple[int, int], placement: Placement) -> Tensor:
        """(1 or B, N) for activations of B rows, whose grids have these rows and columns of tokens."""
        key = self.number, *grid, like.device.index
        if key not in placement.tokens:
            placement.tokens[key] = self._made(grid, placement).to(like)
        return placement.tokens[key]

    def _made(self, grid: tuple[int, int], placement: Placement) -> Tensor:
        masks = placement.masks(len(self.mask))
        parts = placement.parts()
        if parts is None:
            tokens = mask_to_tokens(self.mask, grid, self.sampling)
            return tokens[masks] if len(tokens) > 1 else tokens
        size = tuple(PIXELS * side for side in placement.size)
        pictures = F.interpolate(self.mask.unsqueeze(1), size=size, mode="area").squeeze(1)
        cut = [
            pictures[number][_pixels(part.ys)][:, _pixels(part.xs)] for number, part in zip(masks, parts, strict=True)
        ]
        return mask_to_tokens(torch.stack(cut), grid, self.sampling)


def _pixels(places: np.ndarray) -> Tensor:
    """The lines (or columns) of a picture that these of its latent stand for."""
    return (torch.from_numpy(places)[:, None] * PIXELS + torch.arange(PIXELS)).flatten()


@dataclass(frozen=True)
class Installed:
    """What one Apply node put on a model.

    node_id    of that node, to say things on; None where it runs outside of a workflow
    sites      the keys of the sites that carry a patch
    schedule   Schedule.percents; None where it always acts
    mask       where in the picture it acts
    """

    node_id: str | None
    sites: tuple[tuple, ...]
    schedule: tuple[float, float, str] | None
    mask: TokenMask | None
    token: str = field(default_factory=lambda: uuid4().hex)  # tells two nodes with equal settings apart


@dataclass(eq=False)
class AttentionPatch:
    """The replacement of one site, on the host's contract: (q, k, v, extra_options) -> output before to_out.

    It owns small tensors only and is never changed once a model carries it, except through `add`, which belongs to
    other packs; `copy` keeps that from reaching another model.
    """

    kv: HeadKV
    fusion: Fusion
    installed: Installed
    schedule: Schedule | None = None
    mask: TokenMask | None = None
    base: Replacement | None = None
    added: list[tuple[Callable, dict]] = field(default_factory=list)
    _ways: dict[tuple, Fuse] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._ways = {(self.kv.keys.device, self.kv.keys.dtype): fuse_for(self.kv, self.fusion)}

    def _way(self, q: Tensor) -> Fuse:
        """With keys and values like q, converted once where a model computes in another dtype than it said."""
        where = q.device, q.dtype
        if where not in self._ways:
            self._ways[where] = fuse_for(self.kv.to(q), self.fusion)
        return self._ways[where]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra_options: dict) -> Tensor:
        call, schedule = extra_options.get(KEY), self.schedule
        if call is None:
            placement = without_a_run(tuple(extra_options["cond_or_uncond"]), len(q))
        else:
            placement = call.at_site(q, extra_options)
            schedule = call.run.schedules.get(self.installed.schedule, schedule)
        if k.ndim == q.ndim and len(k) > len(q):  # behind the prompts' rows, NAG puts those that it guides away from
            k, v = k[: len(q)], v[: len(q)]
            if call is not None:
                call.run.say(SURPLUS_KEYS, self.installed.node_id)
        base, is_ours = self._without_us(q, k, v, extra_options, call)
        strength = None
        if schedule is not None:
            strengths = {} if call is None else call.strengths
            if (schedule, q.dtype) not in strengths:  # the same at all sites
                strengths[schedule, q.dtype] = schedule.strength(extra_options["sigmas"].flatten()[0]).to(q.dtype)
            strength = strengths[schedule, q.dtype]
        mask = None
        if self.mask is not None:
            grid = tuple(extra_options["activations_shape"][-2:])  # here and now, whatever shrank the latent on its way
            mask = self.mask.tokens(q, grid, placement)
        rows = placement.identities(self.kv.rows - 1)
        out = self._way(q)(q, base, rows, strength, mask, overwrite=is_ours)
        return self._with_added(out, q, k, v, extra_options) if self.added else out

    def _without_us(
        self, q: Tensor, k: Tensor, v: Tensor, extra_options: dict, call: Call | None
    ) -> tuple[Tensor, bool]:
        """What the site gives without this patch, and whether we may change it: what others give, they may keep."""
        below = self.base
        if below is None and call is not None:
            below = call.replacements.get(extra_options["block"])  # put on the whole block behind Apply
        if below is not None:
            return below(q, k, v, extra_options), isinstance(below, AttentionPatch)
        base = host_attention.optimized_attention(
            q, k, v, extra_options["n_heads"],
            attn_precision=extra_options.get("attn_precision"), transformer_options=extra_options,
        )  # fmt: skip
        return base, OVERRIDE not in extra_options

    def _with_added(self, out: Tensor, q: Tensor, k: Tensor, v: Tensor, extra_options: dict) -> Tensor:
        sigma = extra_options["sigmas"].flatten()[0].item()  # their contract compares numbers
        for callback, kwargs in self.added:
            if kwargs.get("sigma_end", 0.0) <= sigma <= kwargs.get("sigma_start", float("inf")):
                residual = callback(out, q, k, v, extra_options, **kwargs)  # a tensor, or 0 where it does nothing
                out = out + (residual.to(out) if isinstance(residual, Tensor) else residual)
        return out

    def add(self, callback: Callable, **kwargs: Any) -> None:
        """What IPAdapter, InstantID and others call on whatever is on the key: their residual goes on top of ours."""
        self.added.append((callback, kwargs))

    def copy(self) -> "AttentionPatch":
        """A patch of its own for another model, down to the last below it; tensors are shared: nobody changes them."""
        return replace(self, added=list(self.added), base=_own_copy(self.base))

    def __deepcopy__(self, memo: dict) -> "AttentionPatch":
        return self.copy()

    def to(self, target: torch.device | torch.dtype) -> "AttentionPatch":
        """The host calls this with the device, then with the dtype of the weights, which may be a storage dtype."""
        kv = self.kv if isinstance(target, torch.dtype) else self.kv.to(target)
        move = getattr(self.base, "to", None)  # what lies on a key alone is asked
        return replace(self, kv=kv, base=move(target) if move else self.base)


SURPLUS_KEYS = (
    "NAG is inactive while PuLID is applied: it works inside the cross-attention that PuLID replaces. PuLID and the "
    "prompts act as without NAG."
)


def _own_copy(replacement: Replacement | None) -> Replacement | None:
    """Of what can be changed by `add`, a copy that only its owner can reach; anything else as it is."""
    if isinstance(replacement, AttentionPatch):
        return replacement.copy()
    if not hasattr(replacement, "add"):
        return replacement
    own = copy.copy(replacement)
    for name, value in vars(own).items():
        if isinstance(value, list | dict):
            setattr(own, name, value.copy())
    return own


def _start(
    executor: Callable[..., Tensor], guider: CFGGuider, sigmas: Tensor, extra_args: dict, callback: Any, noise: Tensor,
    *args: Any, **kwargs: Any,
) -> Tensor:  # fmt: skip
    """Once per sampling run, before the first step: collects what the sites ask of it, and looks at who lies on them.

    The index that a pass carries does not say whose it is: PerpNeg and DualCFG put other conds at 0, SAG sends the
    negative alone. A cond that no guider knows (the old PerpNeg node's empty prompt) is therefore not a positive.
    """
    options = extra_args["model_options"]["transformer_options"]
    installed: tuple[Installed, ...] = options.get(INSTALLED, ())
    run = _run_of(guider, noise, installed)
    run.follow(extra_args["model_options"])
    if not run.positives:
        branches = [*guider.conds]
        run.say(
            f"PuLID is not applied: of this guider's branches, {branches}, none is known as the positive one.", None
        )
    for one in installed:
        for text in (*_displaced(one, options), *_misfit(one, run.size)):
            run.say(text, one.node_id)
    token = RUN.set(run)
    try:
        return executor(guider, sigmas, extra_args, callback, noise, *args, **kwargs)
    finally:
        RUN.reset(token)


def _run_of(guider: CFGGuider, noise: Tensor, installed: Sequence[Installed]) -> SamplingRun:
    seen, positives, areas = set(), set(), {}
    shown: list[Tensor] = []
    others: list[Tensor] = []
    for branch, conds in guider.conds.items():
        for cond in conds or ():
            if cond["uuid"] in seen:  # the host completes areas with a copy of the other branch's cond, uuid and all
                cond["uuid"] = uuid4()
            seen.add(cond["uuid"])
            if branch in POSITIVE_BRANCHES:
                positives.add(cond["uuid"])
            if (area := cond.get("area")) is not None:
                areas[cond["uuid"]] = area
            if (prompt := cond.get("model_conds", {}).get("c_crossattn")) is not None:
                (shown if branch in POSITIVE_BRANCHES else others).append(prompt.cond)
    percent_to_sigma = guider.model_patcher.get_model_object("model_sampling").percent_to_sigma
    schedules = {
        percents: Schedule.make(percent_to_sigma, *percents, device=noise.device)
        for percents in {one.schedule for one in installed if one.schedule is not None}
    }
    return SamplingRun(
        frozenset(positives),
        areas,
        shown,
        others,
        len(noise),
        (noise.shape[-2], noise.shape[-1]),
        schedules,
        [one.mask for one in installed if one.mask is not None],
    )


def _displaced(installed: Installed, options: dict) -> list[str]:
    """Which packs put something of their own in the place of a node's patches, and what to do."""
    replacements = options["patches_replace"]["attn2"]
    lost = [site for site in installed.sites if not _holds(replacements.get(site), installed)]
    if not lost:
        return []
    packs = sorted({host.origin_of(replacements[site]) for site in lost if site in replacements})
    return [
        f"{' and '.join(packs) or 'Another node'} took {len(lost)} of {len(installed.sites)} places in the model from "
        "PuLID, which acts there no more. Put that node before Apply PuLID."
    ]


# Where a function, a method or a partial keeps what it was made with.
HOLDING = ("__self__", "__wrapped__", "__defaults__", "__kwdefaults__", "func", "args", "keywords")


def _holds(replacement: object, installed: Installed, depth: int = 6) -> bool:
    """Whether a patch of that node is what lies there, or can be reached from it: other packs wrap what they find."""
    if isinstance(replacement, AttentionPatch):
        return replacement.installed == installed or _holds(replacement.base, installed, depth)
    if depth == 0 or isinstance(replacement, Tensor | torch.nn.Module | ModelPatcher | str | type | None):
        return False
    if isinstance(replacement, dict):
        inside = [*replacement.values()]
    elif isinstance(replacement, list | tuple):
        inside = [*replacement]
    else:
        cells = getattr(replacement, "__closure__", None) or ()
        inside = [cell.cell_contents for cell in cells if cell != CellType()]
        inside += [getattr(replacement, name, None) for name in HOLDING]
        inside += [*getattr(replacement, "__dict__", {}).values()]
    return any(_holds(one, installed, depth - 1) for one in inside)


def _misfit(installed: Installed, size: tuple[int, int]) -> list[str]:
    """What to say of a mask that is larger than the picture or of another shape, which may be a tile of one."""
    if installed.mask is None:
        return []
    (height, width), (rows, columns) = installed.mask.mask.shape[1:], (PIXELS * size[0], PIXELS * size[1])
    if height <= rows and width <= columns and abs(height * columns / (width * rows) - 1) < MISFIT:
        return []
    return [
        f"PuLID's mask of {width} x {height} px is fitted to the {columns} x {rows} px that are sampled. If these are "
        "a tile of a larger picture, the mask should be that tile's: nothing tells PuLID where the tile lies."
    ]


def _own_patches(_: ModelPatcher, clone: ModelPatcher) -> None:
    """Runs at each clone(): hosts since 0.14 share patch objects, and what others `add` must not reach upstream."""
    replacements = clone.model_options["transformer_options"].get("patches_replace", {}).get("attn2", {})
    for key, patch in replacements.items():
        if isinstance(patch, AttentionPatch):
            replacements[key] = patch.copy()


def patch_model(
    model: ModelPatcher,
    site_kvs: Sequence[SiteKV],
    fusion: Fusion,
    zero_tokens: int,
    site_weights: Sequence[float],
    schedule: Schedule | None = None,
    mask: TokenMask | None = None,
) -> ModelPatcher:
    """A clone of `model` with all sites patched over what is on them; the model given is left as it was.

    site_kvs      keys and values per site in checkpoint order, the negative branch in the last row
    site_weights  per site; a site of weight 0 is not patched
    """
    clone = model.clone()
    options = clone.model_options["transformer_options"]
    existing = dict(options.get("patches_replace", {}).get("attn2", {}))
    installed = Installed(
        host.executing_node(),
        tuple(site.key for site, weight in zip(SITES, site_weights, strict=True) if weight),
        None if schedule is None else schedule.percents,
        mask,
    )
    options[INSTALLED] = *options.get(INSTALLED, ()), installed
    for site, kv, weight in zip(SITES, site_kvs, site_weights, strict=True):
        if weight == 0:
            continue
        base = _own_copy(existing.get(site.key, existing.get(site.key[:2])))
        attention = cross_attention(model, site)
        assert attention is not None, "check_layout has looked at every site"
        prepared = kv.prepare(attention.heads, zero_tokens, weight, host.sampling_dtype(model))
        patch = AttentionPatch(prepared, fusion, installed, schedule, mask, base)
        clone.set_model_attn2_replace(patch, site.part, site.number, site.block)
    if not clone.get_wrappers(WrappersMP.SAMPLER_SAMPLE, KEY):
        clone.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, _start)
        add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, arrive_by_the_way, clone.model_options, True)
        clone.add_callback_with_key(CallbacksMP.ON_CLONE, KEY, _own_patches)
    return clone
