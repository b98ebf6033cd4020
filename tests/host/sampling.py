"""What tests of sampling share: a tiny SDXL, marked prompts, latents that hold their own places, and a watcher.

Import it after `comfy_host.enter`.
"""

from dataclasses import dataclass, field

import comfy.sample
import comfy.samplers
import torch
from comfy.ldm.modules.attention import optimized_attention
from pulid_sdxl.nodes import patch
from pulid_sdxl.nodes.apply import PulidApply
from pulid_sdxl.pulid.attention import IdProjections, fuse
from pulid_sdxl.pulid.identity import IdEmbedding
from pulid_sdxl.pulid.sites import SITES
from torch.nn import functional

MODEL_CHANNELS = 32  # a tenth of SDXL: heads of 64 need at least 64 channels at the first site
WIDTHS = tuple(site.channels * MODEL_CHANNELS // 320 for site in SITES)
POSITIVE, NEGATIVE, EMPTY, SECOND = 1.0, -1.0, -2.0, 2.0  # what the conditionings of these tests are filled with


def projections(widths=WIDTHS):
    torch.manual_seed(5)
    return IdProjections(widths)


def make_identity(seed=1, people=1, tokens=10, version="v1", encoder="print"):
    generator = torch.Generator().manual_seed(seed)
    cond = torch.randn(people, tokens, 2048, generator=generator)
    return IdEmbedding(cond, torch.randn(1, tokens, 2048, generator=generator), version, encoder)


def apply(model, pulid, identity, method="fidelity", weight=0.8, start_at=0.0, end_at=1.0, attn_mask=None):
    return PulidApply.execute(model, pulid, identity, method, weight, start_at, end_at, attn_mask)[0]


def conditioning(marker, **more):
    return [[torch.full((1, 77, 2048), marker), {"pooled_output": torch.full((1, 1280), marker), **more}]]


def latent(batch=1, height=16, width=24):
    return torch.randn(batch, 4, height, width, generator=torch.Generator().manual_seed(7))


def sample(model, steps=1, cfg=3.0, positive=None, negative=None, batch=1, guider=None, noise=None, **size):
    noise = latent(batch, **size) if noise is None else noise
    if guider is not None:
        sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", steps)
        sampler = comfy.samplers.sampler_object("euler")
        return guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, seed=1)
    return comfy.sample.sample(
        model, noise, steps, cfg, "euler", "normal",
        conditioning(POSITIVE) if positive is None else positive,
        conditioning(NEGATIVE) if negative is None else negative,
        torch.zeros_like(noise), disable_pbar=True, seed=1,
    )  # fmt: skip


def sites_of(patched):
    return patched.model_options["transformer_options"]["patches_replace"]["attn2"]


class Attn2Replace:
    """What IPAdapter, InstantID and the older PuLID pack leave on a key, reduced to its contract."""

    def __init__(self, callback, **kwargs):
        self.entries = [(callback, kwargs)]

    def add(self, callback, **kwargs):
        self.entries.append((callback, kwargs))

    def __call__(self, q, k, v, extra_options):
        out = optimized_attention(q, k, v, extra_options["n_heads"])
        for callback, kwargs in self.entries:
            out = out + callback(out, q, k, v, extra_options, **kwargs)
        return out


def add_callback(model, callback, **kwargs):
    """Clones, then puts a residual on every site or adds it to what is there, as those packs do."""
    clone, kwargs = model.clone(), {"sigma_start": 1e9, "sigma_end": 0.0, **kwargs}
    replacements = clone.model_options["transformer_options"].setdefault("patches_replace", {}).setdefault("attn2", {})
    for site in SITES:
        if site.key in replacements:
            replacements[site.key].add(callback, **kwargs)
        else:
            replacements[site.key] = Attn2Replace(callback, **kwargs)
    return clone


def places(batch=1, height=16, width=24):
    """Latents that say where each of their pixels is: in channel 0 its line, in 1 its column, in 2 its picture."""
    latents = torch.zeros(batch, 4, height, width)
    latents[:, 0] = torch.arange(height)[:, None]
    latents[:, 1] = torch.arange(width)
    latents[:, 2] = torch.arange(batch)[:, None, None]
    return latents


def ramp(batch=1, height=16, width=24, pixels=8):
    """Masks that say the same, each pixel its line's share of the height plus a twentieth of the picture's number."""
    lines = (torch.arange(height * pixels) + 0.5) / (height * pixels)
    return lines[None, :, None] / 2 + torch.arange(batch)[:, None, None] / 20 + torch.zeros(batch, 1, width * pixels)


@dataclass
class Call:
    """One call of the network: what it was really given, and what each site made of it."""

    x: torch.Tensor
    prompts: list[float]
    timestep: float
    sites: list[tuple[list[int], torch.Tensor | None, int]] = field(default_factory=list)  # rows, mask, tokens

    def expected_rows(self, people=1):
        pictures = self.x[:, 2].mean(dim=(1, 2)).round().int().tolist()
        return [
            min(picture, people - 1) if prompt > 0 else people
            for prompt, picture in zip(self.prompts, pictures, strict=True)
        ]

    def expected_mask(self, grid, pictures, height):
        lines = functional.adaptive_avg_pool2d(self.x[:, 0], grid)
        number = self.x[:, 2].mean(dim=(1, 2)).round().clamp(max=pictures - 1)
        return (((lines + 0.5) / height) / 2 + number[:, None, None] / 20).flatten(1)


def fuse_by(monkeypatch, watched):
    """Have every patch call this in the place of fuse."""

    def way(patch, q):
        return lambda q, base, rows, *more, **named: watched(q, base, patch.kv, rows, patch.fusion, *more, **named)

    monkeypatch.setattr(patch.AttentionPatch, "_way", way)


@dataclass
class Watcher:
    """Reads what passes at every site of every call, from the places in the latents and the marks in the prompts."""

    calls: list[Call] = field(default_factory=list)

    def network(self, module, args, kwargs):
        context = kwargs.get("context", args[2] if len(args) > 2 else None)
        self.calls.append(Call(args[0].clone(), context[:, 0, 0].tolist(), float(args[1][0])))

    def fuse(self, q, base, kv, rows, fusion, strength, mask, **options):
        self.calls[-1].sites.append((list(rows), mask, q.shape[1]))
        return fuse(q, base, kv, rows, fusion, strength, mask, **options)

    def check(self, people=1, masks=0, height=16):
        """Every row of every site had the identity, and the part of the mask, that it should."""
        assert self.calls and all(len(call.sites) == len(SITES) for call in self.calls)
        for call in (call for call in self.calls if call.timestep == self.calls[0].timestep):  # later, x is a picture
            expected = call.expected_rows(people)
            for rows, mask, tokens in call.sites:
                assert rows == expected, f"prompts {call.prompts}, found {rows}, expected {expected}"
                if masks:
                    _, _, lines, columns = call.x.shape
                    grid = next(
                        (lines // by, columns // by) for by in (2, 4) if (lines // by) * (columns // by) == tokens
                    )
                    wanted = call.expected_mask(grid, masks, height)
                    assert torch.allclose(mask.expand_as(wanted), wanted, atol=1e-4)

    def attach(self, model, monkeypatch):
        fuse_by(monkeypatch, self.fuse)
        return model.model.diffusion_model.register_forward_pre_hook(self.network, with_kwargs=True)
