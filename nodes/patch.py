"""What goes on a MODEL: one AttentionPatch per cross-attention site, over whatever was there before."""

import logging
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import comfy.patcher_extension
import torch
from comfy.ldm.modules import attention as host_attention
from comfy.model_patcher import ModelPatcher
from comfy.samplers import CFGGuider
from torch import Tensor

from ..pulid.attention import Fuse, Fusion, HeadKV, Sampling, SiteKV, fuse_for, mask_to_tokens
from ..pulid.schedule import Schedule
from ..pulid.sites import SITES
from .host import cross_attention

log = logging.getLogger(__name__)

# The branches of a guider that hold what the picture is to show: CFG and most others, DualCFG's second prompt.
POSITIVE_BRANCHES = ("positive", "middle")
KEY = "pulid_sdxl"  # of our wrapper and callback on a model, and of what we leave in transformer_options

Replacement = Callable[[Tensor, Tensor, Tensor, dict], Tensor]


class TokenMask:
    """A mask (M, H, W) 0..1 on the CPU, and its token grids, each made once."""

    def __init__(self, mask: Tensor, sampling: Sampling = "area"):
        self.mask, self.sampling = mask, sampling
        self._grids: dict[tuple, Tensor] = {}

    def tokens(self, like: Tensor, grid: tuple[int, int], chunks: int) -> Tensor:
        """(1 or B, N) for activations like (B, N, C): mask m applies to latent m of a chunk, the last one repeats.

        grid  rows and columns of the N image tokens
        """
        images = len(like) // chunks
        key = (images, chunks, grid, like.dtype, like.device)
        if key not in self._grids:
            tokens = mask_to_tokens(self.mask, grid, self.sampling).to(like)
            if len(tokens) > 1:
                tokens = tokens[[min(i, len(tokens) - 1) for i in range(images)] * chunks]
            self._grids[key] = tokens
        return self._grids[key]


@dataclass(eq=False)
class AttentionPatch:
    """The replacement of one site, on the host's contract: (q, k, v, extra_options) -> output before to_out.

    It owns small tensors only and is never changed once a model carries it, except through `add`, which belongs to
    other packs; `copy` keeps that from reaching another model.
    """

    kv: HeadKV
    fusion: Fusion
    schedule: Schedule | None = None
    mask: TokenMask | None = None
    base: Replacement | None = None
    added: list[tuple[Callable, dict]] = field(default_factory=list)
    _ways: dict[tuple, tuple[HeadKV, Fuse]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._ways = {(self.kv.keys.device, self.kv.keys.dtype): (self.kv, fuse_for(self.kv))}

    def _way(self, q: Tensor) -> tuple[HeadKV, Fuse]:
        """Keys and values like q, converted once where a model computes in another dtype than it said or elsewhere."""
        where = q.device, q.dtype
        if where not in self._ways:
            kv = self.kv.to(q)
            self._ways[where] = kv, fuse_for(kv)
        return self._ways[where]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra_options: dict) -> Tensor:
        if self.base is not None:
            base = self.base(q, k, v, extra_options)
        else:
            base = host_attention.optimized_attention(
                q, k, v, extra_options["n_heads"],
                attn_precision=extra_options.get("attn_precision"), transformer_options=extra_options,
            )  # fmt: skip
        kv, fuse = self._way(q)
        strength = None
        if self.schedule is not None:
            strength = self.schedule.strength(extra_options["sigmas"].flatten()[0]).to(q.dtype)
        mask = None
        if self.mask is not None:
            grid = tuple(extra_options["activations_shape"][-2:])  # here and now, whatever shrank the latent on its way
            mask = self.mask.tokens(q, grid, len(extra_options["cond_or_uncond"]))
        rows = identity_rows(kv.rows - 1, len(q), extra_options)
        out = fuse(q, base, kv, rows, self.fusion, strength, mask, overwrite=self.base is None)
        return self._with_added(out, q, k, v, extra_options) if self.added else out

    def _with_added(self, out: Tensor, q: Tensor, k: Tensor, v: Tensor, extra_options: dict) -> Tensor:
        sigma = extra_options["sigmas"].flatten()[0].item()  # their contract compares numbers
        for callback, kwargs in self.added:
            if kwargs.get("sigma_end", 0.0) <= sigma <= kwargs.get("sigma_start", float("inf")):
                out = out + callback(out, q, k, v, extra_options, **kwargs).to(out)
        return out

    def add(self, callback: Callable, **kwargs: Any) -> None:
        """What IPAdapter, InstantID and others call on whatever is on the key: their residual goes on top of ours."""
        self.added.append((callback, kwargs))

    def copy(self) -> "AttentionPatch":
        """A patch of its own for another model; tensors are shared, since nobody changes them."""
        return replace(self, added=list(self.added))

    def __deepcopy__(self, memo: dict) -> "AttentionPatch":
        return self.copy()

    def to(self, target: torch.device | torch.dtype) -> "AttentionPatch":
        """The host calls this with the device, then with the dtype of the weights, which may be a storage dtype."""
        if isinstance(target, torch.dtype):
            return self
        return replace(self, kv=self.kv.to(target))


def identity_rows(identities: int, batch: int, extra_options: Mapping) -> list[int]:
    """For each batch row the row of the keys and values: 0 .. identities - 1, or `identities` for the negative branch.

    A chunk of the batch is negative when the guider calls it so. Where no guider told us, index 0 is the positive.
    Latent j of a batch gets identity j, the last one repeats.
    """
    chunks = extra_options["cond_or_uncond"]
    images = batch // len(chunks)
    positive_uuids = extra_options.get(KEY)
    if positive_uuids is None:
        positive = [chunk == 0 for chunk in chunks]
    else:
        positive = [cond in positive_uuids for cond in extra_options["uuids"]]
    return [min(j, identities - 1) if is_positive else identities for is_positive in positive for j in range(images)]


def _tell_positives(
    executor: Callable[..., Tensor], guider: CFGGuider, sigmas: Tensor, extra_args: dict, *args: Any, **kwargs: Any
) -> Tensor:
    """Once per sampling run, before the first step: leave the uuids of the guider's positive conds in the options.

    The index that a pass carries does not say: PerpNeg and DualCFG put other conds at 0, SAG sends the negative alone.
    A cond that no guider knows (the old PerpNeg node's empty prompt) is therefore not a positive.
    """
    positives, seen = set(), set()
    for name, conds in guider.conds.items():
        for cond in conds or ():
            if cond["uuid"] in seen:  # the host completes areas with a copy of the other branch's cond, uuid and all
                cond["uuid"] = uuid.uuid4()
            seen.add(cond["uuid"])
            if name in POSITIVE_BRANCHES:
                positives.add(cond["uuid"])
    if not positives:
        log.warning(
            "PuLID is not applied: of this guider's branches, %s, none is known as the positive one.", [*guider.conds]
        )
    extra_args["model_options"]["transformer_options"][KEY] = frozenset(positives)
    return executor(guider, sigmas, extra_args, *args, **kwargs)


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
    existing = dict(clone.model_options["transformer_options"].get("patches_replace", {}).get("attn2", {}))
    for site, kv, weight in zip(SITES, site_kvs, site_weights, strict=True):
        if weight == 0:
            continue
        base = existing.get(site.key, existing.get(site.key[:2]))
        attention = cross_attention(model, site)
        assert attention is not None, "check_layout has looked at every site"
        prepared = kv.prepare(attention.heads, zero_tokens, weight)
        clone.set_model_attn2_replace(
            AttentionPatch(prepared, fusion, schedule, mask, base), site.part, site.number, site.block
        )
    wrapper, callback = comfy.patcher_extension.WrappersMP.SAMPLER_SAMPLE, comfy.patcher_extension.CallbacksMP.ON_CLONE
    if not clone.get_wrappers(wrapper, KEY):
        clone.add_wrapper_with_key(wrapper, KEY, _tell_positives)
        clone.add_callback_with_key(callback, KEY, _own_patches)
    return clone
