"""Which way of computing `pulid.attention.fuse` is the quickest on a device."""

import logging
import os
from collections.abc import Callable
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from .attention import Fusion, HeadKV, SiteKV, fuse

log = logging.getLogger(__name__)

Fuse = Callable[..., Tensor]  # (q, base, rows, strength, mask, overwrite), as `fuse` has them


def fuse_for(kv: HeadKV, fusion: Fusion) -> Fuse:
    """The quickest way to fuse with these keys and values; PULID_ATTENTION=eager in the environment keeps to `fuse`."""
    fused = _kernels(kv.keys.device, kv.keys.dtype)
    if fused is not None and fused.fits(kv):
        return fused.Fused(kv, fusion)
    return eager(kv, fusion)


def eager(kv: HeadKV, fusion: Fusion) -> Fuse:
    """`fuse` itself, by PyTorch's operators."""
    return lambda q, base, rows, *more, **named: fuse(q, base, kv, rows, fusion, *more, **named)


@cache
def _kernels(device: torch.device, dtype: torch.dtype) -> ModuleType | None:
    """The fused kernels, tried on this device first: they need Triton, its compiler and a card that it knows."""
    wanted = os.environ.get("PULID_ATTENTION")
    is_usual = torch.version.cuda is not None and dtype is not torch.float32  # which has no tensor cores to gain from
    if device.type != "cuda" or wanted == "eager" or not (is_usual or wanted == "triton"):
        return None
    try:
        from . import fused

        drawn = torch.Generator(device).manual_seed(0)
        q, base = torch.randn(2, 2, 150, 128, generator=drawn, device=device).to(dtype)
        keys, values = torch.randn(2, 2, 8, 128, generator=drawn, device=device).to(dtype)
        kv, fusion = SiteKV(keys, values).prepare(2, 3), Fusion.ORTHOGONAL_V2
        site = fused.Fused(kv, fusion)
        site(q, base, [1, 0])  # is compiled; from the second time on, only launched
        error = (site(q, base, [1, 0]) - fuse(q, base, kv, [1, 0], fusion)).abs().max().item()
        if not error < 0.1:
            raise RuntimeError(f"its result is off by {error:.2g}")
    except Exception as error:  # Triton, its compiler and the driver raise whatever they like
        log.warning(
            "PuLID does without its fused kernels on %s: %s. Pictures are the same, steps slower.", device, error
        )
        return None
    return fused
