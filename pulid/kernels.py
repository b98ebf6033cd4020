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

Fuse = Callable[..., Tensor]  # `fuse`, or what stands in for it


def fuse_for(kv: HeadKV) -> Fuse:
    """The quickest way to fuse with these keys and values; PULID_ATTENTION=eager in the environment keeps to `fuse`."""
    kernels = _kernels(kv.keys.device, kv.keys.dtype)
    return kernels.fuse if kernels is not None and kernels.fits(kv) else fuse


@cache
def _kernels(device: torch.device, dtype: torch.dtype) -> ModuleType | None:
    """The fused kernels, tried on this device first: they need Triton, its compiler and a card that it knows."""
    wanted = os.environ.get("PULID_ATTENTION")
    if device.type != "cuda" or wanted == "eager" or (wanted is None and torch.version.cuda is None):
        return None
    try:
        from . import attention_triton

        drawn = torch.Generator(device).manual_seed(0)
        q, base = torch.randn(2, 2, 150, 128, generator=drawn, device=device).to(dtype)
        keys, values = torch.randn(2, 2, 8, 128, generator=drawn, device=device).to(dtype)
        tried = q, base, SiteKV(keys, values).prepare(2, 3), [1, 0], Fusion.ORTHOGONAL_V2
        attention_triton.fuse(*tried)  # is compiled; from the second time on, only launched
        error = (attention_triton.fuse(*tried) - fuse(*tried)).abs().max().item()
        if not error < 0.1:
            raise RuntimeError(f"its result is off by {error:.2g}")
    except Exception as error:  # Triton, its compiler and the driver raise whatever they like
        log.warning(
            "PuLID does without its fused kernels on %s: %s. Pictures are the same, steps slower.", device, error
        )
        return None
    return attention_triton
